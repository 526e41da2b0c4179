"""The backends that must keep the tracking contract."""

from pathlib import Path

import pytest

from mlops_dagster.resources.tracking.mlflow_tracking import MlflowTracking
from tests.contracts.tracking.mlflow_server import shared_server


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture(params=["sqlite", "server"])
def tracking(request: pytest.FixtureRequest) -> MlflowTracking:
    if request.param == "sqlite":
        return MlflowTracking(tracking_uri=f"sqlite:///{request.getfixturevalue('database')}")
    return MlflowTracking(tracking_uri=shared_server())
