"""Where a training run's parameters, numbers and files are kept for people to compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class RunRef:
    """Points at one tracked run; `url_path` is appended to the address of the tracking UI."""

    run_id: str
    url_path: str


@dataclass(frozen=True)
class TrackedRun:
    """One run as it reads back: parameters and tags as text, the last value of each metric."""

    ref: RunRef
    finished: bool
    parameters: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Tracking(Protocol):
    """Keeps training runs; every write may be repeated."""

    def log_run(
        self,
        experiment: str,
        run_key: str,
        parameters: Mapping[str, object],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: Mapping[str, Path | bytes],
    ) -> RunRef:
        """Write one whole run and return where it is.

        `run_key` identifies the run within the experiment: a repeated call gives the same run, with metrics, tags and artifacts as
        last given. Parameters are part of what a run is; another value for one raises DataError. `artifacts` maps a relative
        path in the run to a file, a folder or bytes. Raises TransientError when the store is away or busy.
        """
        ...

    def read_run(self, experiment: str, run_key: str) -> TrackedRun | None:
        """The run of this key as stored, or None when there is none."""
        ...
