"""Reports that a person can open, and that Evidently's own tools can read."""

import re
from datetime import date
from pathlib import Path

import numpy
import pyarrow
import pytest

from mlops_dagster.core.errors import DataError, StorageError
from mlops_dagster.resources.drift_reports import DriftReports
from mlops_dagster.resources.drift_reports.evidently_reports import EvidentlyReports, plottable, thinned

DAY = date(2013, 3, 1)
PSI = {"delay": 0.41, "carrier": 0.02, "prediction": 0.1234, "<hour>": 0.0}


def table(rows: int, shift: float = 0.0) -> pyarrow.Table:
    random = numpy.random.default_rng(rows)
    delay = random.normal(10 + shift, 20, rows)
    delay[::9] = numpy.nan
    return pyarrow.table(
        {
            "delay": pyarrow.array(delay, from_pandas=True),
            "<hour>": random.integers(0, 24, rows),
            "carrier": random.choice(["UA", "AA", None, "B6"], rows),
            "plane": [f"N{number}" for number in random.integers(0, 900, rows)],
            "rain": random.random(rows) < 0.1,
            "prediction": random.random(rows),
            "empty": pyarrow.nulls(rows, pyarrow.float64()),
            "at": pyarrow.array([0] * rows, pyarrow.timestamp("us", "UTC")),
        }
    )


def values(reports: EvidentlyReports, model: str, day: date) -> dict[str, float]:
    """Evidently's own drift values of a day, read back by Evidently."""
    from evidently.ui.workspace import Workspace

    workspace = Workspace(reports.workspace)
    project = workspace.search_project(model)[0]
    runs = [workspace.get_run(project.id, run) for run in workspace.list_runs(project.id)]
    results = [result for run in runs if run and run.timestamp.date() == day for result in run.metric_results.values()]
    return {result.display_name: result.value for result in results if result.display_name.startswith("Value drift")}


@pytest.fixture
def reports(tmp_path: Path) -> EvidentlyReports:
    return EvidentlyReports(folder=str(tmp_path / "html"), workspace=str(tmp_path / "workspace"), sample_rows=300)


def test_satisfies_the_protocol(reports: EvidentlyReports) -> None:
    assert isinstance(reports, DriftReports)


def test_the_page_holds_the_exact_values_and_needs_no_network(reports: EvidentlyReports) -> None:
    ref = reports.write("flight", DAY, table(1000), table(700, shift=40), PSI)
    page = ref.path.read_text()
    assert ref.path.name == "2013-03-01.html"
    assert ref.rows == 300
    assert "<tr><td>delay</td><td>0.4100</td><td>drifted</td></tr>" in page
    assert "<tr><td>&lt;hour&gt;</td><td>0.0000</td><td></td></tr>" in page
    assert "of all 700 rows" in page
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']?(https?:)?//", page)
    assert "plotly" in page


def test_evidentlys_workspace_reads_it(reports: EvidentlyReports) -> None:
    from evidently.ui.workspace import Workspace

    first = reports.write("flight", DAY, table(1000), table(700), PSI)
    again = reports.write("flight", DAY, table(1000), table(700, shift=40), PSI)
    reports.write("flight", date(2013, 3, 2), table(1000), table(700), PSI)
    reports.write("arrival", DAY, table(1000), table(700), PSI)
    assert first.url_path == again.url_path
    workspace = Workspace(reports.workspace)
    assert sorted(project.name for project in workspace.list_projects()) == ["arrival", "flight"]
    project = workspace.search_project("flight")[0]
    runs = [workspace.get_run(project.id, run) for run in workspace.list_runs(project.id)]
    assert sorted(run.timestamp.date() for run in runs if run) == [DAY, date(2013, 3, 2)]
    drift = values(reports, "flight", DAY)
    assert drift["Value drift for delay"] > 0.3
    assert drift["Value drift for carrier"] < 0.1
    assert str(project.id) in again.url_path


def test_the_same_tables_give_the_same_sample() -> None:
    assert thinned(5, 10) == [0, 1, 2, 3, 4]
    many = thinned(1_000_003, 2000)
    assert len(set(many)) == 2000
    assert max(many) > 999_000


def test_only_columns_that_can_be_drawn_are(reports: EvidentlyReports) -> None:
    assert plottable(table(50), table(50)) == ["delay", "<hour>", "carrier", "plane", "rain", "prediction"]
    few = reports.model_copy(update={"plotted_columns": 2})
    page = few.write("flight", DAY, table(200), table(200), PSI).path.read_text()
    assert "<td>carrier</td>" in page
    assert sorted(values(few, "flight", DAY)) == ["Value drift for delay", "Value drift for prediction"]


def test_one_row_is_enough(reports: EvidentlyReports) -> None:
    assert (
        reports.write("flight", DAY, table(40), table(1).drop_columns(["delay"]).append_column("delay", [[1.0]]), PSI).rows == 1
    )


@pytest.mark.parametrize(
    ("reference", "current", "message"),
    [
        (table(9), table(9).slice(0, 0), "flight 2013-03-01: the current table has no rows"),
        (table(0), table(9), "flight 2013-03-01: the reference table has no rows"),
        (table(9), table(9).drop_columns(["rain", "plane"]), "lacks plane, rain"),
        (table(9).select(["empty"]), table(9), "no column has values on both sides"),
    ],
)
def test_bad_input_is_named(reports: EvidentlyReports, reference: pyarrow.Table, current: pyarrow.Table, message: str) -> None:
    with pytest.raises(DataError, match=message):
        reports.write("flight", DAY, reference, current, PSI)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reports = EvidentlyReports(folder=str(tmp_path / "file" / "html"), workspace=str(tmp_path / "workspace"))
    with pytest.raises(StorageError, match="writable"):
        reports.write("flight", DAY, table(50), table(50), PSI)
