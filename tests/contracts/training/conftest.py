"""The backends that must keep the training contract."""

from collections.abc import Iterator

import pytest

from mlops_dagster.resources.training import Trainer
from mlops_dagster.resources.training.local import LocalTrainer
from mlops_dagster.resources.training.ray_session import LOCAL, ray_session
from mlops_dagster.resources.training.ray_trainer import RayTrainer


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    pytest.importorskip("ray")
    with ray_session(LOCAL, cpus=2, object_store_mebibytes=80):
        yield


@pytest.fixture(params=["local", "ray"])
def trainer(request: pytest.FixtureRequest) -> Trainer:
    if request.param == "local":
        return LocalTrainer()
    request.getfixturevalue("cluster")
    return RayTrainer()
