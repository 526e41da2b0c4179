"""Live metrics of the embedded profile: what the serving host sampled from Envoy, once a second."""

from datetime import datetime
from typing import TYPE_CHECKING

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import ServingError
from mlops_dagster.core.measurements import Counters
from mlops_dagster.resources.live_metrics import Reading
from mlops_dagster.resources.live_metrics.samples import Samples, difference
from mlops_dagster.resources.serving.state import Folder

if TYPE_CHECKING:
    import pyarrow as pa


class GatewayMetrics(ConfigurableResource):
    """`LiveMetrics` from the samples in the serving host's folder."""

    root: str = Field(description="The folder of the serving host's state, usually <MLOPS_HOME>/serving.")

    def totals(self, model: str) -> Reading:
        latest = self._latest(model)
        return Reading(max(at for at, _ in latest.values()), {arm: counts for arm, (_, counts) in latest.items()})

    def measure(self, model: str, since: datetime) -> Reading:
        latest, first = self._latest(model), self._samples().first_since(model, since)
        if not first:
            raise ServingError(
                f"there are no metrics of {model} since {since.isoformat()}: the serving host has not sampled any."
            )
        start = min(at for at, _ in first.values())
        return Reading(max(at for at, _ in latest.values()), difference(latest, first), start)

    def assigned(self, model: str, after: datetime, until: datetime) -> "pa.Table":
        """See LiveMetrics.assigned: from Envoy's unit log, which goes back for 64 to 128 MiB."""
        from mlops_dagster.resources.live_metrics.units import read_units

        return read_units(Folder(self.root).unit_log, model, after, until)

    def _latest(self, model: str) -> dict[str, tuple[datetime, Counters]]:
        latest = self._samples().latest(model)
        if not latest:
            raise ServingError(f"there are no metrics of {model}: it is not served, or the serving host has not sampled any yet.")
        return latest

    def _samples(self) -> Samples:
        return Samples(Folder(self.root).samples)
