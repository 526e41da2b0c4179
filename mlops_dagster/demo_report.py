"""What the demo shows while it runs and at its end."""

import datetime as dt
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.console import Console
from rich.table import Table

from mlops_dagster.assets.lake_paths import day_key, stored_days
from mlops_dagster.core.drift import Profile, psi
from mlops_dagster.core.metrics import PRIMARY

if TYPE_CHECKING:
    from mlops_dagster.demo import Demo


class Progress:
    """A line for each thing that happens, with the seconds since the start; on a terminal the present step stays in view."""

    def __init__(self) -> None:
        self._console, self._begin = Console(), time.monotonic()
        self._status = self._console.status("starting")

    def __enter__(self) -> "Progress":
        self._status.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._status.stop()

    def say(self, text: str) -> None:
        """Something that happened."""
        self._console.print(f"[dim]{time.monotonic() - self._begin:6.1f} s[/dim]  {text}", highlight=False)

    def step(self, name: str, text: str) -> None:
        """What is being done now."""
        self._status.update(f"{name}: {text}")
        if name != "replay" or not self._console.is_terminal:
            self.say(f"{name}: {text}")


def summary(demo: "Demo") -> dict[str, Any]:
    """The demo's result as JSON."""
    lake, spec = demo.resources["data_lake"], demo.spec
    versions = demo.versions()
    retrained = demo.resources["ledger"].entries(spec.name, "retraining")
    metric = PRIMARY[spec.training.task]
    return {
        "model": spec.name,
        "ingested_rows": _ingested(demo),
        "training_rows": versions[0].evidence["rows"],
        "predictions": sum(demo.state["predictions"].values()),
        "versions": [
            {
                "version": v.number,
                "trained_on": f"{v.evidence['first_day']} … {v.evidence['last_day']}",
                metric: v.evidence["metrics"][metric],
                "approved_by": v.approval.by if v.approval else None,
                "live_from": demo.state["live_from"].get(str(v.number)),
            }
            for v in versions
        ],
        "retrained_because": retrained[0].reason if retrained else None,
        "live_accuracy_by_month": _accuracy_by_month(demo),
        "psi_by_month": _psi_by_month(demo),
        "report_paths": [
            report for day in _days(demo, "drift_report") if (report := _json(lake, spec, "drift_report", day)["report"])
        ],
        "seconds": demo.state["seconds"],
    }


def _ingested(demo: "Demo") -> int:
    import pyarrow.parquet as pq

    from mlops_dagster.assets.lake_paths import tables

    lake, main = demo.resources["data_lake"], tables(demo.resources["data_lake"], demo.spec)[0]
    days = stored_days(lake, demo.spec, "raw_data", main)
    return sum(pq.ParquetFile(lake.locate(day_key(demo.spec, "raw_data", d, main))).metadata.num_rows for d in days)


def _days(demo: "Demo", stage: str) -> list[dt.date]:
    return stored_days(demo.resources["data_lake"], demo.spec, stage, suffix="json")


def _json(lake: Any, spec: Any, stage: str, day: dt.date) -> dict[str, Any]:
    return json.loads(lake.read_bytes(day_key(spec, stage, day, suffix="json")))


def _accuracy_by_month(demo: "Demo") -> dict[str, float]:
    lake, spec = demo.resources["data_lake"], demo.spec
    months: dict[str, list[pl.DataFrame]] = {}
    for day in _days(demo, "live_performance"):
        months.setdefault(f"{day:%Y-%m}", []).append(
            pl.DataFrame(lake.read(day_key(spec, "live_performance", day))).drop_nulls("label")
        )
    right = pl.col("prediction") == pl.col("label")
    return {
        month: round(pl.concat(days, how="diagonal_relaxed").select(right.mean()).item(), 4) for month, days in months.items()
    }


def _psi_by_month(demo: "Demo") -> dict[str, dict[str, float]]:
    """Each month's PSI against the reference that its newest day was judged by: a month is the sum of its days."""
    lake, spec = demo.resources["data_lake"], demo.spec
    months: dict[str, list[dict[str, Any]]] = {}
    for day in _days(demo, "drift_report"):
        months.setdefault(f"{day:%Y-%m}", []).append(_json(lake, spec, "drift_report", day))
    found = {}
    for month, days in months.items():
        folder = days[-1]["reference"]
        reference = Profile.from_dict(json.loads(lake.read_bytes(f"{folder}/reference_profile.json")))
        merged = Profile.merge(Profile.from_dict(d["profile"]) for d in days if d["reference"] == folder)
        found[month] = {name: round(value, 4) for name, value in psi(reference, merged).items() if value is not None}
    return found


def show(found: dict[str, Any], root: Path) -> None:
    """Print what happened, when and why, and where to look."""
    console = Console()
    versions = Table(
        "version", "trained on", "held-out accuracy", "approved by", "live from", title="What happened", title_justify="left"
    )
    for v in found["versions"]:
        versions.add_row(str(v["version"]), v["trained_on"], f"{v['accuracy']:.4f}", str(v["approved_by"]), str(v["live_from"]))
    console.print(versions)
    console.print(f"retrained because: {found['retrained_because']}")
    figures = Table("month", "live accuracy", "largest PSI")
    for month, accuracy in found["live_accuracy_by_month"].items():
        largest = sorted(found["psi_by_month"].get(month, {}).items(), key=lambda item: -item[1])[:3]
        figures.add_row(month, f"{accuracy:.4f}", ", ".join(f"{name} {value:.2f}" for name, value in largest))
    console.print(figures)
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in found["seconds"].items())
    console.print(f"{found['ingested_rows']} rows ingested, {found['predictions']} predictions answered; {seconds}")
    console.print(
        f"`mlops up` opens the pages; the newest drift report is {found['report_paths'][-1] if found['report_paths'] else 'none'}"
    )
    console.print(f"everything is under {root}")
