"""A foreign project whose source gets late rows, in a process of its own; prints what was seen as JSON, a line a step."""

import datetime as dt
import json
import os
from pathlib import Path

import dagster as dg
import pandas as pd
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from parcels.definitions import defs

from mlops_dagster import instance
from mlops_dagster.assets.lake_paths import read_manifest
from mlops_dagster.declared import spec_of
from mlops_dagster.profiles import definitions
from mlops_dagster.runs import Runner

MODEL = "late_parcel"


class LateLife:
    def __init__(self) -> None:
        instance.prepare(Path(os.environ["MLOPS_HOME"]))
        self.instance = dg.DagsterInstance.get()
        self.runner = Runner(defs, self.instance)
        self.resources = dict(definitions().resources or {})
        self.spec = spec_of(MODEL, "parcels")
        self.cursor: str | None = None

    def run(self, step: str, part: str, **how) -> None:
        result = self.runner.run(f"{MODEL}_{part}", **how)
        self.tell(step, checks=checks_of(result))

    def raw_only(self, step: str, day: str) -> None:
        """The raw data of a day without the stages after it."""
        job = defs.resolve_job_def(f"{MODEL}_ingest")
        result = job.execute_in_process(
            instance=self.instance, partition_key=day, asset_selection=[dg.AssetKey([MODEL, "raw_data"])]
        )
        self.tell(step, success=result.success)

    def look(self, step: str) -> None:
        """One look of the sensor with its cursor; what it asks for is run."""
        name = f"{MODEL}_new_data"
        repository, sensor = defs.get_repository_def(), defs.resolve_sensor_def(name)
        resources = {k: r for k, r in repository.get_top_level_resources().items() if k == "data_lake"}
        with dg.build_sensor_context(
            instance=self.instance, repository_def=repository, sensor_name=name, resources=resources, cursor=self.cursor
        ) as context:
            outcome = sensor.evaluate_tick(context)
        self.cursor = outcome.cursor
        checks = {}
        for request in outcome.run_requests or []:
            checks = checks_of(self.runner.run(f"{MODEL}_ingest", day=request.partition_key, tags=request.tags))
        asked = [[r.partition_key, r.run_key, r.tags["mlops/reason"]] for r in outcome.run_requests or []]
        self.tell(step, asked=asked, skipped=outcome.skip_message, checks=checks)

    def stale(self, step: str) -> None:
        """What Dagster itself says of the stages."""
        graph = defs.get_repository_def().asset_graph
        resolver = CachingStaleStatusResolver(self.instance, graph, dg._core.loader.LoadingContextForTest(self.instance))
        days = ["2024-02-02", "2024-02-09", "2024-02-10", "2024-02-11", "2024-02-13", "2024-02-14"]
        seen = {f"{s} {d}": self.status(resolver, s, d) for s in ("validated_data", "features") for d in days}
        self.tell(step, **seen, training_set=self.status(resolver, "training_set"))

    def status(self, resolver: CachingStaleStatusResolver, stage: str, day: str | None = None) -> str:
        return resolver.get_status(dg.AssetKey([MODEL, stage]), day).value

    def tell(self, step: str, **seen) -> None:
        print("SEEN " + json.dumps({"step": step, **seen}, default=str), flush=True)

    def training_rows(self) -> pd.DataFrame:
        manifest = read_manifest(self.resources["data_lake"], self.spec, "training_set")
        return self.resources["data_lake"].read(manifest["key"]).to_pandas().set_index("id").sort_index()


def checks_of(result) -> dict:
    return {
        f"{c.asset_key.path[-1]}.{c.check_name}": [c.passed, c.description, c.severity.value]
        for c in result.get_asset_check_evaluations()
    }


def more_rows(day: str, times: int, prefix: str) -> None:
    """Rows of a day that reach the source late: every one of the day again, under other ids."""
    file = os.environ["PARCELS_CSV"]
    rows = pd.read_csv(file, dtype=str)
    found = rows[rows["event_timestamp"].str.startswith(day)]
    added = [found.assign(id=[f"{prefix}{n}-{i}" for i in found["id"]]) for n in range(times)]
    pd.concat([rows, *added]).to_csv(file, index=False)


def main() -> None:
    life = LateLife()
    life.run("ingest", "ingest", days=("2024-01-01", "2024-02-11"))
    life.run("train", "train")
    life.run("more days", "ingest", days=("2024-02-12", "2024-02-14"))
    life.run("train on all", "train")
    first = life.training_rows()
    life.stale("before")
    life.look("same rows")
    more_rows("2024-02-13", 1, "late")
    life.look("late rows")
    life.look("nothing left")
    life.stale("after late rows")
    more_rows("2024-02-02", 1, "later")
    life.raw_only("only raw data again", "2024-02-02")
    life.stale("after raw data alone")
    life.run("the rest of that day", "ingest", day="2024-02-02")
    life.run("trained with features of both contents", "train", only=[dg.AssetKey([MODEL, "training_set"])])
    for days in (("2024-02-03", "2024-02-09"), ("2024-02-14", "2024-02-14")):
        life.run("features that look back on it", "ingest", days=days, only=[dg.AssetKey([MODEL, "features"])])
    life.run("trained again", "train")
    second = life.training_rows()
    features = ["depot_late_share", "depot_parcels", "depot_weight", "weight"]
    shared = first.index.intersection(second.index)
    life.tell(
        "rows", first=len(first), second=len(second), same=bool(first.loc[shared, features].equals(second.loc[shared, features]))
    )
    life.stale("after training again")
    more_rows("2024-02-14", 30, "flood")
    life.run("a day unlike the others", "ingest", day="2024-02-14")
    life.tell("days", today=dt.date.today())


if __name__ == "__main__":
    main()
