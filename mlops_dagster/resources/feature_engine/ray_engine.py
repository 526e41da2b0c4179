"""Features by Ray: one task per statement, each running DuckDB where Ray puts it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import MlopsError, ServingError
from mlops_dagster.resources.feature_engine import Case
from mlops_dagster.resources.feature_engine.answers import checked_parameters, checked_tables
from mlops_dagster.resources.feature_engine.duckdb_engine import DuckDBEngine

if TYPE_CHECKING:
    import pyarrow as pa


class RayEngine(ConfigurableResource):
    """FeatureEngine on Ray; tables go through its object store once. Raises ServingError when the cluster does not answer."""

    address: str | None = Field(default=None, description="Address of a Ray cluster, or none for one in this process.")
    processors: int = Field(default=2, ge=1, description="Processors of the cluster in this process; a statement takes one.")
    memory_limit: str = Field(default="2GB", description="Memory that a statement may use before it works on disk, such as 4GB.")

    def run(self, sql: str, tables: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> "pa.Table":
        return self.run_all({"": sql}, tables, parameters)[""]

    def run_all(
        self, statements: Mapping[str, str], tables: Mapping[str, Any], parameters: Mapping[str, Any] | None = None
    ) -> "dict[str, pa.Table]":
        return self.run_each(statements, [(tables, parameters or {})])[0]

    def run_each(self, statements: Mapping[str, str], cases: Sequence[Case]) -> "list[dict[str, pa.Table]]":
        """All statements of all cases are handed to Ray at once, so that every processor has work until the last is done."""
        checked = [(checked_tables(tables), checked_parameters(parameters)) for tables, parameters in cases]
        ray = self._ray()
        task = ray.remote(num_cpus=1)(_answer)
        started = []
        for tables, values in checked:
            stored = [table if isinstance(table, list) else ray.put(table) for table in tables.values()]
            started.append(
                {name: task.remote(self.memory_limit, sql, [*tables], values, *stored) for name, sql in statements.items()}
            )
        with self._answering(ray):
            return [dict(zip(tasks, ray.get([*tasks.values()]), strict=True)) for tasks in started]

    @contextmanager
    def _answering(self, ray: Any) -> Iterator[None]:
        try:
            yield
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MlopsError):
                raise error.cause from None
            raise ServingError(f"Ray: a task failed ({error.cause}). Run it again; its log has more.") from error
        except ray.exceptions.RayError as error:
            raise ServingError(
                f"Ray at {self.address or 'this machine'}: {error}. Check the cluster, then run it again."
            ) from error

    def _ray(self) -> Any:
        import ray

        if not ray.is_initialized():
            settings: dict[str, Any] = {"address": self.address} if self.address else {"num_cpus": self.processors}
            try:
                ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, **settings)
            except Exception as error:  # ConnectionError, RuntimeError, ValueError, by what is wrong
                raise ServingError(f"Ray at {self.address or 'this machine'}: does not start or answer ({error}).") from error
        return ray


def _answer(memory_limit: str, sql: str, names: list[str], values: dict[str, Any], *tables: Any) -> "pa.Table":
    return DuckDBEngine(threads=1, memory_limit=memory_limit).run(sql, dict(zip(names, tables, strict=True)), values)
