"""The backends that must keep the tuning contract."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlops_dagster.resources.training.ray_session import LOCAL, ray_session
from mlops_dagster.resources.tuning import Tuner
from mlops_dagster.resources.tuning.optuna_tuner import OptunaTuner
from mlops_dagster.resources.tuning.ray_tuner import RayTuner


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    pytest.importorskip("ray")
    with ray_session(LOCAL, cpus=2, object_store_mebibytes=80):
        yield


@pytest.fixture(params=["optuna", "ray"])
def tuner(request: pytest.FixtureRequest, tmp_path: Path) -> Tuner:
    folder = str(tmp_path / "tuning")
    if request.param == "optuna":
        return OptunaTuner(folder=folder)
    request.getfixturevalue("cluster")
    return RayTuner(folder=folder)
