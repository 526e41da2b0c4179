"""Drift reports by Evidently: an HTML file a day and a snapshot in the workspace that `evidently ui` shows."""

import html
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import DataError, StorageError
from mlops_dagster.resources.drift_reports import ReportRef

if TYPE_CHECKING:
    import pandas
    import pyarrow

_NAMESPACE = uuid.UUID("7d1f3f0e-6f0c-5d0a-9f5b-6a1f6d0b9c11")
_OTHER = "(other)"


class EvidentlyReports(ConfigurableResource):
    """DriftReports (see the Protocol) as files; one Evidently project a model, one snapshot a day."""

    folder: str = Field(description="Where the HTML files go, as <model>/<day>.html.")
    workspace: str = Field(description="Evidently's workspace, for `evidently ui --workspace`.")
    sample_rows: int = Field(default=2000, ge=10, description="Rows of each table in a report; more are thinned evenly.")
    plotted_columns: int = Field(
        default=15, ge=1, description="Columns plotted, those of the largest PSI; all are in the table above."
    )
    most_categories: int = Field(default=30, ge=2, description="Categories of a column told apart; the rarer ones are one.")
    max_psi: float = Field(default=0.3, gt=0, description="PSI from which the report calls a column drifted.")

    def write(
        self, model: str, day: date, reference: "pyarrow.Table", current: "pyarrow.Table", psi: Mapping[str, float]
    ) -> ReportRef:
        """See DriftReports.write."""
        _check(model, day, reference, current)
        columns = sorted(plottable(reference, current), key=lambda name: (-psi.get(name, 0.0), name))[: self.plotted_columns]
        if not columns:
            raise DataError(f"{model} {day}: no column has values on both sides; check that the reference is of this model")
        snapshot, rows = self._snapshot(day, reference.select(columns), current.select(columns), psi)
        project, report = uuid.uuid5(_NAMESPACE, model), uuid.uuid5(_NAMESPACE, f"{model}/{day}")
        path = Path(self.folder, model, f"{day}.html")
        with _storage(self.folder):
            _write_snapshot(Path(self.workspace), project, report, model, snapshot)
            page = snapshot.get_html_str(as_iframe=False)
            _replace(path, _with_exact(page, model, day, psi, self.max_psi, current.num_rows, rows))
        return ReportRef(path, f"/projects/{project}/reports/{report}", rows)

    def _snapshot(
        self, day: date, reference: "pyarrow.Table", current: "pyarrow.Table", psi: Mapping[str, float]
    ) -> tuple[Any, int]:
        # Evidently reports home unless told not to; both variables are read when it is imported or used.
        os.environ.setdefault("DO_NOT_TRACK", "1")
        from evidently import DataDefinition, Dataset, Report
        from evidently.metrics import DriftedColumnsCount, ValueDrift
        from evidently.presets import DatasetStats

        before, now = self._frame(reference), self._frame(current)
        _fold_categories(before, now, self.most_categories)
        numbers = [name for name in before.columns if before[name].dtype.kind in "fiu"]
        texts = [name for name in before.columns if name not in numbers]
        definition = DataDefinition(numerical_columns=numbers, categorical_columns=texts)
        # Not DataDriftPreset: it computes every column three times and draws it twice.
        metrics = [DriftedColumnsCount(method="psi", threshold=self.max_psi)]
        metrics += [ValueDrift(column=name, method="psi", threshold=self.max_psi) for name in before.columns]
        exact: dict[str, Any] = {f"psi.{name}": round(value, 6) for name, value in psi.items()}
        report = Report([*metrics, DatasetStats()], metadata=exact)
        snapshot = report.run(
            Dataset.from_pandas(now, data_definition=definition),
            Dataset.from_pandas(before, data_definition=definition),
            timestamp=datetime.combine(day, time(), UTC),
            name=str(day),
        )
        return snapshot, len(now)

    def _frame(self, table: "pyarrow.Table") -> "pandas.DataFrame":
        import pyarrow

        sample = table.take(thinned(table.num_rows, self.sample_rows))
        frame = sample.to_pandas()
        for field in sample.schema:
            if pyarrow.types.is_integer(field.type) or pyarrow.types.is_decimal(field.type):
                frame[field.name] = frame[field.name].astype("float64")
            elif not pyarrow.types.is_floating(field.type):
                frame[field.name] = frame[field.name].astype(object).map(str, na_action="ignore")
        return frame


def thinned(rows: int, most: int) -> list[int]:
    """Row numbers of an even sample of at most `most` of `rows` rows; the same for the same numbers.

    >>> thinned(10, 4)
    [0, 2, 5, 7]
    """
    kept = min(rows, most)
    return [index * rows // kept for index in range(kept)]


def plottable(reference: "pyarrow.Table", current: "pyarrow.Table") -> list[str]:
    """Columns of numbers, text or flags with at least one value on both sides."""
    import pyarrow

    kinds = pyarrow.types
    found = []
    for name in reference.column_names:
        kind = reference.schema.field(name).type
        kind = kind.value_type if kinds.is_dictionary(kind) else kind
        number = kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_decimal(kind)
        text = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind) or kinds.is_boolean(kind)
        sides = (reference.column(name), current.column(name))
        if (number or text) and all(side.null_count < len(side) for side in sides):
            found.append(name)
    return found


def _check(model: str, day: date, reference: "pyarrow.Table", current: "pyarrow.Table") -> None:
    for name, table in (("reference", reference), ("current", current)):
        if table.num_rows == 0:
            raise DataError(f"{model} {day}: the {name} table has no rows; there is nothing to report on")
    if missing := [name for name in reference.column_names if name not in current.column_names]:
        raise DataError(f"{model} {day}: the current table lacks {', '.join(missing)}, which the reference has")


def _fold_categories(before: "pandas.DataFrame", now: "pandas.DataFrame", most: int) -> None:
    """Keep the reference's most frequent categories of each text column apart, in both frames."""
    for name in before.columns:
        if before[name].dtype.kind in "fiu":
            continue
        counts = before[name].value_counts()
        if len(counts) > most or now[name].nunique() > most:
            kept = sorted(counts.index, key=lambda value: (-counts[value], value))[: most - 1]
            for frame in (before, now):
                frame[name] = frame[name].where(frame[name].isin(kept) | frame[name].isna(), _OTHER)


def _write_snapshot(workspace: Path, project: uuid.UUID, report: uuid.UUID, model: str, snapshot: Any) -> None:
    """Write with Evidently's own writer to the side, then move in place: a reader never sees half a file."""
    from evidently.sdk.models import ProjectModel
    from evidently.ui.storage.local.base import LocalState

    workspace.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace, prefix=".writing-") as scratch:
        aside = LocalState(scratch)
        if not (workspace / str(project) / "metadata.json").exists():
            aside.write_project(ProjectModel(id=project, name=model))
            _move(Path(scratch, str(project), "metadata.json"), workspace / str(project) / "metadata.json")
        aside.write_snapshot(project, report, snapshot.to_snapshot_model())
        name = f"{report}.json"
        _move(Path(scratch, str(project), "snapshots", name), workspace / str(project) / "snapshots" / name)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _with_exact(page: str, model: str, day: date, psi: Mapping[str, float], limit: float, rows: int, shown: int) -> str:
    """Put the exact values above Evidently's page, the largest first."""
    ordered = sorted(psi.items(), key=lambda item: (-item[1], item[0]))
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.4f}</td><td>{'drifted' if value > limit else ''}</td></tr>"
        for name, value in ordered
    )
    above = (
        f'<section style="font-family:sans-serif;margin:2em"><h1>{html.escape(model)}, {day}</h1>'
        f"<p>Population stability index of all {rows} rows; more than {limit:g} is drift. "
        f"The plots below show {shown} of these rows.</p>"
        f'<table cellpadding="4"><tr><th>column</th><th>PSI</th><th></th></tr>{lines}</table></section>'
    )
    start = page.find(">", page.find("<body")) + 1
    return f"{page[:start]}{above}{page[start:]}"


@contextmanager
def _storage(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder}: {error}; check that its disk is mounted, writable and not full") from error
