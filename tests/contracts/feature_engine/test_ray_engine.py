from collections.abc import Iterator

import pytest

from mlops_dagster.core.errors import ServingError
from mlops_dagster.resources.feature_engine.ray_engine import RayEngine
from tests.contracts.feature_engine.engine_contract import EngineContract, tables


class TestRay(EngineContract):
    @pytest.fixture(scope="class")
    def engine(self) -> Iterator[RayEngine]:
        import ray

        began = not ray.is_initialized()
        yield RayEngine()
        if began:
            ray.shutdown()


def test_a_cluster_that_does_not_answer_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.util.client import worker

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    # Of its three attempts, so that the test does not wait for half a minute.
    monkeypatch.setattr(worker, "INITIAL_TIMEOUT_SEC", 1)
    monkeypatch.setattr(worker, "MAX_TIMEOUT_SEC", 1)
    with pytest.raises(ServingError, match=r"Ray at .*127\.0\.0\.1:1"):
        RayEngine(address="ray://127.0.0.1:1").run("SELECT 1 AS a", tables())
