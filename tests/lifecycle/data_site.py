"""The data stages of the test project in this process: one state folder, one source, any stage of any day at any moment."""

import datetime as dt
from pathlib import Path

import dagster as dg
import pandas as pd
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver

from mlops_dagster import assets, profiles
from mlops_dagster.assets import late_data
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.runs import Runner
from tests.lifecycle import parcels_csv

PROJECT = "tests.lifecycle.own_project.parcels.defs.late_parcel"
FIRST, DAY, LAST = dt.date(2024, 1, 1), dt.date(2024, 1, 6), dt.date(2024, 1, 8)
RAW = f"late_parcel/raw_data/rows/{DAY}.parquet"
VALIDATED = f"late_parcel/validated_data/rows/{DAY}.parquet"


class Site:
    """The project's stages on a state folder of their own, and its source."""

    def __init__(self, folder: Path, csv: Path | None = None) -> None:
        declared = Path(__file__).parent / "own_project/parcels/defs/late_parcel/defs.yaml"
        attributes = yaml.safe_load(declared.read_text())["attributes"]
        attributes["features"]["lookback_days"] = 2
        attributes["training"] |= {"window_days": 6, "test_days": 2}
        self.spec = ModelSpec(name="late_parcel", package=PROJECT, **attributes)
        self.csv, self.corrected = csv or folder / "parcels.csv", 0
        if csv is None:
            parcels_csv.write(self.csv)
        self.resources = profiles.embedded(profiles.Settings(home=folder / "state"))
        self.lake, self.versions = self.resources["data_lake"], self.resources["data_versions"]
        self.defs = dg.Definitions.merge(assets.build(self.spec), dg.Definitions(resources=self.resources))
        self.instance = dg.DagsterInstance.ephemeral()
        self.runner = Runner(self.defs, self.instance)

    def make(self, *stages: str, first: dt.date = DAY, last: dt.date = DAY) -> None:
        only = [dg.AssetKey(["late_parcel", stage]) for stage in stages]
        self.runner.run("late_parcel_ingest", days=(str(first), str(last)), only=only)

    def in_sync(self, first: dt.date = DAY) -> None:
        """Every stage of the days from `first` to those that look back on DAY."""
        self.make("raw_data", "validated_data", "features", first=first, last=DAY + dt.timedelta(days=2))

    def train(self) -> None:
        self.runner.run("late_parcel_train", only=[dg.AssetKey(["late_parcel", "training_set"])])

    def correct(self, *stages: str) -> str:
        """Other weights for the day at the source, then these stages of it; the raw partition's new MD5."""
        self.corrected += 1
        rows = pd.read_csv(self.csv, dtype={"id": str})
        rows.loc[rows["event_timestamp"].str.startswith(str(DAY)), "weight_kg"] += self.corrected
        rows.to_csv(self.csv, index=False)
        self.make("raw_data", *stages)
        return self.raw()

    def raw(self) -> str:
        return self.versions.contents(RAW)[RAW]

    def check(self) -> dg.AssetCheckResult:
        return late_data.check(self.spec, self.lake, self.versions, self.resources["registry"])

    def status(self) -> str:
        graph = self.defs.get_repository_def().asset_graph
        resolver = CachingStaleStatusResolver(self.instance, graph, dg._core.loader.LoadingContextForTest(self.instance))
        return resolver.get_status(dg.AssetKey(["late_parcel", "training_set"])).value
