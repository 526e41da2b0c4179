"""What each day's validated rows and features were computed from: the MD5 of the raw partitions.

A stage keeps it at `<model>/origins/<stage>/<day>.json` and records it in one revision with what it stored. A raw partition may have been
corrected since, its validation and its features still to come: what it holds now is then not what a training set is made of.
"""

import datetime as dt
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from mlops_dagster.core.errors import NotFoundError, TransientError
from mlops_dagster.core.late_data import day_of
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_versions import DataVersions

FOLDER = "origins"
READ_AT_ONCE = 8


def store(lake: Lake, model: str, stage: str, day: dt.date, raw_data: Mapping[str, str]) -> str:
    """Keep what a day of a stage was made of (raw key -> MD5); returns the lake's key, to be recorded with the day."""
    key = f"{model}/{FOLDER}/{stage}/{day}.json"
    lake.write_bytes(key, json.dumps(raw_data, sort_keys=True).encode())
    return key


def load(
    lake: Lake, versions: DataVersions, model: str, stage: str, days: Iterable[dt.date], back_days: int = 0
) -> dict[dt.date, dict[str, str]]:
    """Day -> raw key -> MD5. For a day that was made before origins were kept: what is recorded now of it and `back_days` before it."""
    there = set(lake.list(f"{model}/{FOLDER}/{stage}/"))
    keys = {day: f"{model}/{FOLDER}/{stage}/{day}.json" for day in sorted(days)}
    known = [day for day, key in keys.items() if key in there]
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        found = dict(zip(known, map(json.loads, pool.map(lake.read_bytes, [keys[day] for day in known])), strict=True))
    back, now = dt.timedelta(days=back_days), {}
    if len(known) < len(keys):
        now = versions.contents(f"{model}/raw_data/", only=of_days(min(keys) - back, max(keys)))
    return {day: found[day] if day in found else {key: now[key] for key in between(now, day - back, day)} for day in keys}


def recorded(
    versions: DataVersions, model: str, stage: str, first: dt.date, last: dt.date, without: Collection[dt.date] = ()
) -> dict[str, str]:
    """Key -> MD5, by the newest revision, of a stage's partitions of first … last and of their origins."""
    found: dict[str, str] = {}
    for prefix in _prefixes(model, stage):
        found |= versions.contents(prefix, only=of_days(first, last, without))
    return found


def require_recorded(
    lake: Lake,
    versions: DataVersions,
    model: str,
    stage: str,
    before: Mapping[str, str],
    span: tuple[dt.date, dt.date, Collection[dt.date]],
    made: str,
) -> None:
    """Called after a stage's partitions were read: raises TransientError unless the lake holds, byte for byte, what it held by the
    revision from `before` they were read. `span`: as for `recorded`; `made`: what is made of them."""
    now = recorded(versions, model, stage, *span)
    other = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    present = [key for prefix in _prefixes(model, stage) for key in between(lake.list(prefix), *span)]
    changed = sorted(other.union(differing(lake, before), (key for key in present if key not in before)))
    if changed:
        raise TransientError(
            f"{len(changed)} inputs of {made} changed while it was made, or are of a run that was killed before it recorded them, for "
            f"example {changed[0]}; wait until the run that changes them has ended, or materialize {model}/{stage} of these days again, "
            f"then materialize {made} again"
        )


def differing(lake: Lake, files: Mapping[str, str]) -> list[str]:
    """The keys (key -> MD5) whose bytes in the lake are others, or gone."""
    stamps: dict[str, str] = {}
    for folder in {key.rpartition("/")[0] for key in files if "://" in lake.locate(key)}:
        stamps |= lake.stamps(f"{folder}/")  # the ETag of an S3 object that came in one piece is its MD5
    unsure = [key for key, md5 in files.items() if stamps.get(key) != md5]
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        found = list(pool.map(lambda key: md5_of(lake, key), unsure))
    return [key for key, md5 in zip(unsure, found, strict=True) if md5 != files[key]]


def raw_used(
    lake: Lake, versions: DataVersions, model: str, window: list[dt.date], lookback_days: int, without: Collection[dt.date]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The raw partitions that the rows of a window and their features come from: key -> MD5, and key -> every other MD5 that some of the
    features come from ('': they were computed when the partition was not there yet)."""
    first, last = window[0] - dt.timedelta(days=lookback_days + 1), window[-1]
    stored = versions.contents(f"{model}/features/", only=of_days(window[0] - dt.timedelta(days=1), last))
    featured = sorted({day_of(key) for key in stored})
    rows = load(lake, versions, model, "validated_data", window)
    features = load(lake, versions, model, "features", featured, lookback_days)
    raw = {key: md5 for day in featured for key, md5 in features[day].items()}
    raw |= {key: md5 for day in window for key, md5 in rows[day].items()}
    raw = {key: raw[key] for key in between(raw, first, last, without)}
    other: dict[str, set[str]] = {}
    for day in featured:
        for key in between(raw, day - dt.timedelta(days=lookback_days), day):
            if (md5 := features[day].get(key, "")) != raw[key]:
                other.setdefault(key, set()).add(md5)
    return raw, {key: sorted(md5s) for key, md5s in sorted(other.items())}


def between(keys: Iterable[str], first: dt.date, last: dt.date, without: Collection[dt.date] = ()) -> Iterator[str]:
    """Those of the keys that are partitions of the days first … last."""
    return filter(of_days(first, last, without), keys)


def of_days(first: dt.date, last: dt.date, without: Collection[dt.date] = ()) -> Callable[[str], bool]:
    """Whether a key is a partition of one of the days first … last."""

    def asked(key: str) -> bool:
        try:
            day = day_of(key)
        except ValueError:
            return False
        return first <= day <= last and day not in without

    return asked


def md5_of(lake: Lake, key: str) -> str | None:
    """The MD5 of a key's bytes; None where it is not in the lake."""
    try:
        return md5(lake.read_bytes(key))
    except NotFoundError:
        return None


def md5(content: bytes) -> str:
    """MD5 (hex), as DVC names contents."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _prefixes(model: str, stage: str) -> tuple[str, str]:
    return f"{model}/{stage}/", f"{model}/{FOLDER}/{stage}/"
