"""What a training set was made of, written beside it when it is made: its days, raw partitions and feature views with their hashes."""

import datetime as dt
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.errors import DataError, NotFoundError
from mlops_dagster.lineage.places import ReadableLake
from mlops_dagster.resources.data_lake import Lake

if TYPE_CHECKING:
    from mlops_dagster.core.spec import ModelSpec

FOLDER = "training_set/inputs"


@dataclass(frozen=True)
class FeatureView:
    """A view as a training set used it: `definition`, SHA-256 of its SQL; `data`, SHA-256 over the MD5 of its `days` partitions; the join
    `keys` of its values (None: not recorded), and `ttl_seconds`, for how long one is used that nothing replaces (None: for ever)."""

    definition: str
    data: str
    days: int
    keys: Sequence[str] | None = None
    ttl_seconds: float | None = None


@dataclass(frozen=True)
class Inputs:
    """What a training set reads, as it was before it was read: `files`, stage -> lake key -> MD5; the raw partitions as in a
    TrainingRecord; the days in quarantine."""

    files: Mapping[str, Mapping[str, str]]
    raw_data: Mapping[str, str]
    other_raw_data: Mapping[str, Sequence[str]]
    quarantined: Sequence[dt.date]


@dataclass(frozen=True)
class TrainingRecord:
    """The inputs of a training set. `raw_data`: lake key -> MD5, of every partition that its rows or their features were computed from;
    `other_raw_data`: key -> every other MD5 that some of the features were computed from ('': before the partition was there)."""

    training_set: str
    key: str
    days: Sequence[str]
    lookback_days: int
    tables: Sequence[str]
    raw_data: Mapping[str, str]
    views: Mapping[str, FeatureView]
    quarantined: Sequence[str] = field(default=())
    other_raw_data: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def touches(self, day: dt.date) -> dict[str, str]:
        """The raw partitions of a day that went into it, with the MD5 that they had."""
        return {key: md5 for key, md5 in self.raw_data.items() if key.rpartition("/")[2] == f"{day.isoformat()}.parquet"}


def reach(first: dt.date, last: dt.date, lookback_days: int) -> tuple[dt.date, dt.date]:
    """The raw days that the rows of first … last may come from: a feature of the end of the day before reads `lookback_days` further back."""
    return first - dt.timedelta(days=lookback_days + 1), last


def reached(day: dt.date, lookback_days: int) -> tuple[dt.date, dt.date]:
    """The days whose rows a raw day may reach; the inverse of `reach`. A value that is not replaced is used for longer: see `carried`."""
    return day, day + dt.timedelta(days=lookback_days + 1)


def describe(
    spec: "ModelSpec",
    read: Inputs,
    queries: Mapping[str, str],
    lifetimes: Mapping[str, tuple[Sequence[str], float | None]],
    tables: Sequence[str],
    training_set: Mapping[str, Any],
    days: Sequence[dt.date],
) -> TrainingRecord:
    """The record of a training set over `days`; `queries`: view -> SQL, `lifetimes`: view -> join keys and TTL."""
    first, last = reach(days[0], days[-1], spec.features.lookback_days)
    views = {}
    for view, sql in sorted(queries.items()):
        own = {key: md5 for key, md5 in read.files["features"].items() if key.startswith(f"{spec.name}/features/{view}/")}
        lines = "\n".join(f"{md5}  {key}" for key, md5 in sorted(own.items()))
        keys, ttl = lifetimes.get(view, (None, None))
        views[view] = FeatureView(_sha256(sql.encode()), _sha256(lines.encode()), len(own), keys, ttl)
    return TrainingRecord(
        training_set["training_set"],
        training_set["key"],
        [day.isoformat() for day in days],
        spec.features.lookback_days,
        list(tables),
        read.raw_data,
        views,
        [day.isoformat() for day in sorted(read.quarantined) if first <= day <= last],
        read.other_raw_data,
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


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
