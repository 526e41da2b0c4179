"""The embedded backend: the contract with real predictors and Envoy, shared by one host; every test has a model of its own."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlops_dagster.resources.serving.embedded import EmbeddedServing
from tests.contracts.serving.serving_contract import ServingContract

NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServing]:
    serving = EmbeddedServing(root=str(tmp_path_factory.mktemp("serving")))
    yield serving
    serving.stop()


class TestEmbeddedServing(ServingContract):
    @pytest.fixture
    def serving(self, host: EmbeddedServing, model: str) -> Iterator[EmbeddedServing]:
        yield host
        host.remove(model)

    @pytest.fixture
    def model(self, tmp_path: Path) -> str:
        return f"model_{next(NUMBERS)}"
