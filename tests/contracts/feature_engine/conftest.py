import pyarrow as pa
import pytest

from mlops_dagster.resources.feature_engine.duckdb_engine import DuckDBEngine
from tests.contracts.feature_engine.engine_contract import PARAMETERS, STATEMENTS, tables


@pytest.fixture(scope="session")
def reference() -> dict[str, pa.Table]:
    """DuckDB's answers, which its own tests check against Polars."""
    return DuckDBEngine().run_all(STATEMENTS, tables(), PARAMETERS)
