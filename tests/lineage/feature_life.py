"""Raw days, their features and what was made of them, without the stages that make them."""

import datetime as dt
from collections.abc import Collection, Iterable

import pyarrow as pa

from mlops_dagster.lineage import origins, training_record
from mlops_dagster.lineage.affected import Spread, spread
from mlops_dagster.lineage.places import Places
from mlops_dagster.lineage.request_search import store_index
from mlops_dagster.lineage.training_record import FeatureView, TrainingRecord
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.data_versions.dvc import DvcVersions
from mlops_dagster.resources.registry import Version

NOW = dt.datetime(2024, 2, 1, tzinfo=dt.UTC)
BAD, LOOKBACK = dt.date(2024, 1, 3), 1


def day(number: int) -> dt.date:
    return dt.date(2024, 1, number)


def at(number: int, hour: int = 0) -> dt.datetime:
    return dt.datetime(2024, 1, number, hour, tzinfo=dt.UTC)


def raw(number: int) -> str:
    return f"m/raw_data/rows/{day(number)}.parquet"


def feature(number: int) -> str:
    return f"m/features/v/{day(number)}.parquet"


class History:
    """Raw days and a view of a lake: depot `a` sends every day, `b` on the third for the last time until it `returns`."""

    def __init__(self, lake: FolderLake, tmp_path, ttl_days: float | None, returns: int = 99) -> None:
        self.lake, self.versions = lake, DvcVersions(root=lake.root)
        self.view = FeatureView("sql", "data", 20, ["depot"], ttl_days and ttl_days * 86_400)
        self.places = Places(lake, lambda: lake, tmp_path / "segments", lambda model: [], lambda: ["m"])
        for number in range(1, 21):
            lake.write(raw(number), pa.table({"n": [number]}))
        self.versions.record(lake.list("m/"), "in")
        both = [n for n in range(1, 21) if n <= BAD.day + LOOKBACK or n >= returns]
        self.made({n: ["a", "b"] if n in both else ["a"] for n in range(1, 21)})

    def made(self, depots: dict[int, list[str]], without: Collection[int] = (), kept: bool = True) -> None:
        """Features of days in which these depots have a value, recorded; `without`: raw days they are made without; `kept`: with origins."""
        keys = []
        for number, names in depots.items():
            # A day's features look back on the day before it and are known at its end.
            moments = pa.array([at(number + 1)] * len(names), pa.timestamp("us", "UTC"))
            rows = {"depot": pa.array(names, pa.string()), "x": pa.array([1.0 + len(without)] * len(names))}
            self.lake.write(feature(number), pa.table({**rows, "event_timestamp": moments, "created_timestamp": moments}))
            used = [n for n in range(number - LOOKBACK, number + 1) if n > 0 and n not in without]
            keys += [feature(number)]
            if kept:
                keys.append(origins.store(self.lake, "m", "features", day(number), {raw(n): "md5" for n in used}))
        self.versions.record(keys, "features")

    def taken_out(self, numbers: Iterable[int]) -> None:
        keys = [feature(n) for n in numbers]
        for key in keys:
            self.lake.delete(key)
        self.versions.record(keys, "out")

    def training_set(
        self,
        first: int,
        last: int,
        *depots: str,
        name: str = "",
        without: Collection[int] = (),
        zone: str = "UTC",
        recorded: bool = True,
    ) -> Version:
        """A registered version of the rows of these depots at noon of each day; `without`: raw days in quarantine."""
        name, days = name or f"{first}-{last}", range(first, last + 1)
        moments = pa.array([at(n, 12) for n in days for _ in depots], pa.timestamp("us", "UTC")).cast(pa.timestamp("us", zone))
        key = f"m/training_set/{name}.parquet"
        self.lake.write(key, pa.table({"depot": list(depots) * len(days), "event_timestamp": moments}))
        used = {raw(n): "md5" for n in range(first - LOOKBACK - 1, last + 1) if n > 0 and n not in without}
        record = TrainingRecord(name, key, [str(day(n)) for n in days], LOOKBACK, ["rows"], used, {"v": self.view})
        inputs = training_record.store(self.lake, "m", record)
        if recorded:
            self.versions.record([key, inputs["key"]], f"training set {name}")
        return Version("m", last, "d", {"training_set": name, "inputs": inputs}, "h", NOW, "u")

    def predicted(self, number: int) -> None:
        key = f"m/inference_log/{day(number)}.parquet"
        log = {
            "request_id": ["r1", "r2"],
            "version": ["1", "1"],
            "logged_at": pa.array([at(number)] * 2, pa.timestamp("us", "UTC")),
        }
        self.lake.write(key, pa.table(log))
        store_index(self.lake, "m", str(day(number)), pa.table(log), at(number))

    def spread(self, *registered: Version) -> Spread:
        found = spread(self.places, self.lake, self.versions, registered, "m", BAD, LOOKBACK)
        assert found is not None
        return found

    def carrying(self) -> dict[str, int]:
        """Training set -> rows that carry a value of the bad day, of the touched ones."""
        return {t["training_set"]: t["rows_carrying_it"] for t in self.spread().training_sets}
