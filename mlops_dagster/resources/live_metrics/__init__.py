"""Live metrics: what callers of each arm experienced, counted by what stands in front of the servers."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from mlops_dagster.core.measurements import Counters

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["LiveMetrics", "Reading"]


@dataclass(frozen=True)
class Reading:
    """Counts of each arm (by arm key) from `since` (None: since the arm first ran) until `at`."""

    at: datetime
    arms: Mapping[str, Counters]
    since: datetime | None = None


class LiveMetrics(Protocol):
    """Counters per arm that only grow, whatever restarts; mirrored requests count for the arm that they were copied to."""

    def totals(self, model: str) -> Reading:
        """The counters as they last stood, for `Measurements.observe`.

        Raises ServingError when there are none (no metrics is an error, not a zero); `Reading.at` says how old they are.
        """
        ...

    def measure(self, model: str, since: datetime) -> Reading:
        """What was counted from the first sample at or after `since` until the last one; raises as `totals` does."""
        ...

    def assigned(self, model: str, after: datetime, until: datetime) -> "pa.Table":
        """The requests whose sticky key chose their arm, in order, that began after `after` and not after `until`.

        Columns: `at` (seconds since 1970), `request_id`, `key`, `arm` (as routed, whoever answered), `status` (0: the caller
        left). A request is there from two seconds after its answer on. Raises StorageError when the log cannot be read.
        """
        ...
