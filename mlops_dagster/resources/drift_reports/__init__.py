"""Where a person looks at how a day's inputs and predictions differ from those of the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class ReportRef:
    """A written report: the HTML file, and the page to append to the address of the reports' UI; `rows` of the day are in it."""

    path: Path
    url_path: str
    rows: int


@runtime_checkable
class DriftReports(Protocol):
    """Keeps one readable report a model and day."""

    def write(
        self, model: str, day: date, reference: pyarrow.Table, current: pyarrow.Table, psi: Mapping[str, float]
    ) -> ReportRef:
        """Write the day's report, replacing the one there is.

        Both tables hold the same columns (features and prediction); `psi` are the exact values of all rows by column, shown above the
        plots, which use a bounded sample. Raises DataError when a table is empty or lacks a column, StorageError when writing fails.
        """
        ...
