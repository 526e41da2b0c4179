"""What a training set was made of, written beside it when it is made: its days, raw partitions and feature views with their hashes."""

import datetime as dt
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.errors import DataError, NotFoundError
from mlops_dagster.lineage.places import ReadableLake
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_versions import DataVersions

if TYPE_CHECKING:
    from mlops_dagster.core.spec import ModelSpec

FOLDER = "training_set/inputs"


@dataclass(frozen=True)
class FeatureView:
    """A view as a training set used it: `definition`, SHA-256 of its SQL; `data`, SHA-256 over the MD5 of its `days` partitions."""

    definition: str
    data: str
    days: int


@dataclass(frozen=True)
class TrainingRecord:
    """The inputs of a training set. `raw_data`: lake key -> MD5, of every partition that its rows or their features may come from."""

    training_set: str
    key: str
    days: Sequence[str]
    lookback_days: int
    tables: Sequence[str]
    raw_data: Mapping[str, str]
    views: Mapping[str, FeatureView]
    quarantined: Sequence[str] = field(default=())

    def touches(self, day: dt.date) -> dict[str, str]:
        """The raw partitions of a day that went into it, with the MD5 that they had."""
        return {key: md5 for key, md5 in self.raw_data.items() if key.rpartition("/")[2] == f"{day.isoformat()}.parquet"}


def reach(first: dt.date, last: dt.date, lookback_days: int) -> tuple[dt.date, dt.date]:
    """The raw days that the rows of first … last may come from: a feature of the end of the day before reads `lookback_days` further back."""
    return first - dt.timedelta(days=lookback_days + 1), last


def reached(day: dt.date, lookback_days: int) -> tuple[dt.date, dt.date]:
    """The days whose rows a raw day may reach; the inverse of `reach`. A value that is not replaced is used for longer, up to its view's TTL."""
    return day, day + dt.timedelta(days=lookback_days + 1)


def files_of(
    spec: "ModelSpec", versions: DataVersions, days: Sequence[dt.date], quarantined: Iterable[dt.date]
) -> dict[str, dict[str, str]]:
    """Stage -> key -> MD5 of what a training set over `days` may be made of, as the lake's newest revision has it. Taken before its rows
    are read and again afterwards, it tells whether these are the files that were read."""
    first, last = reach(days[0], days[-1], spec.features.lookback_days)
    without = {"raw_data": set(quarantined), "validated_data": set(quarantined), "features": set()}
    return {s: _between(versions.contents(f"{spec.name}/{s}/"), first, last, out) for s, out in without.items()}


def describe(
    spec: "ModelSpec",
    files: Mapping[str, Mapping[str, str]],
    queries: Mapping[str, str],
    tables: Sequence[str],
    training_set: Mapping[str, Any],
    days: Sequence[dt.date],
    quarantined: Sequence[dt.date],
) -> TrainingRecord:
    """The record of a training set over `days`; `files`: its `files_of`, `queries`: view -> SQL."""
    first, last = reach(days[0], days[-1], spec.features.lookback_days)
    views = {}
    for view, sql in sorted(queries.items()):
        own = {key: md5 for key, md5 in files["features"].items() if key.startswith(f"{spec.name}/features/{view}/")}
        lines = "\n".join(f"{md5}  {key}" for key, md5 in sorted(own.items()))
        views[view] = FeatureView(_sha256(sql.encode()), _sha256(lines.encode()), len(own))
    return TrainingRecord(
        training_set["training_set"],
        training_set["key"],
        [day.isoformat() for day in days],
        spec.features.lookback_days,
        list(tables),
        files["raw_data"],
        views,
        [day.isoformat() for day in sorted(quarantined) if first <= day <= last],
    )


def store(lake: Lake, model: str, record: TrainingRecord) -> dict[str, str]:
    """Keep a record under its own hash; returns its key and SHA-256, which identify it in manifest and evidence."""
    content = json.dumps(asdict(record), sort_keys=True, separators=(",", ":")).encode()
    sha256 = _sha256(content)
    key = f"{model}/{FOLDER}/{sha256[:16]}.json"
    lake.write_bytes(key, content)
    return {"key": key, "sha256": sha256}


def load(lake: ReadableLake, key: str, sha256: str | None = None) -> TrainingRecord:
    """A record from the lake. Raises NotFoundError where it is gone, DataError where it is not the one that was approved."""
    content = lake.read_bytes(key)
    if sha256 is not None and _sha256(content) != sha256:
        raise DataError(f"{key} was changed after the training set was made; `mlops data checkout` brings the recorded one back")
    found = json.loads(content)
    return TrainingRecord(**{**found, "views": {view: FeatureView(**v) for view, v in found["views"].items()}})


def of_version(lake: ReadableLake, model: str, version: str, evidence: Mapping[str, Any]) -> TrainingRecord:
    """The record of a version's training set. Raises NotFoundError for a version from before records were kept, DataError for a changed one."""
    inputs = evidence.get("inputs")
    if not inputs:
        raise NotFoundError(
            f"version {version} of {model} was registered without a record of its training set's inputs; `mlops data checkout {model} "
            f"--version {version} --to FOLDER` shows the lake as it was, and a version that is trained now has one"
        )
    return load(lake, inputs["key"], inputs["sha256"])


def _between(files: Mapping[str, str], first: dt.date, last: dt.date, without: set[dt.date]) -> dict[str, str]:
    kept = {}
    for key, md5 in files.items():
        try:
            day = dt.date.fromisoformat(key.rpartition("/")[2].partition(".")[0])
        except ValueError:
            continue
        if first <= day <= last and day not in without:
            kept[key] = md5
    return kept


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
