"""Live metrics: what callers of each arm experienced, counted by what stands in front of the servers."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from mlops_dagster.core.measurements import Counters

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
