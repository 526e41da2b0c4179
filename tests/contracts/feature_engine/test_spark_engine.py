import pytest

from mlops_dagster.core.errors import ServingError
from mlops_dagster.resources.feature_engine.spark_engine import SparkEngine
from tests.contracts.feature_engine.engine_contract import EngineContract, tables


class TestSpark(EngineContract):
    @pytest.fixture(scope="class")
    def engine(self) -> SparkEngine:
        return SparkEngine(master="local[2]", settings={"spark.driver.memory": "1g"})


def test_without_java_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ServingError, match="there is no Java here"):
        SparkEngine().run("SELECT 1 AS a", tables())
