"""Raw days that are taken out: no training set takes their rows, and features are made without them.

The ledger holds who took which day out and why; `<model>/quarantine/raw_data.json` in the lake says it to the stages. The features that a
day went into leave the lake with it (their revisions stay), because made again they count as known from their own day on, whereas a
correction beside them would be too late for every old row.
"""

import datetime as dt
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import DataError, NotFoundError, TransientError
from mlops_dagster.core.ledger import QUARANTINE, QUARANTINE_LIFTED, Entry, NewEntry
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources import file_lock
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_versions import DataVersions
from mlops_dagster.resources.ledger import Ledger

WAIT_SECONDS = 300.0  # a backfill stores a year of features in less


@dataclass(frozen=True)
class Decision:
    """Who takes a day out or back in, why, and when."""

    by: str
    reason: str
    at: dt.datetime


@dataclass(frozen=True)
class Change:
    """What a decision led to: its ledger entry, whether it changed anything now, and the days whose features are to be made again."""

    entry: Entry
    changed: bool
    recompute: tuple[dt.date, ...]


def days(lake: Lake, model: str) -> set[dt.date]:
    """The days of a model that are in quarantine."""
    return {dt.date.fromisoformat(day) for day in read(lake, model)["days"]}


def read(lake: Lake, model: str) -> dict[str, Any]:
    """`days`: day -> by, reason, at, entry; `recompute`: days whose features left the lake with a change of that."""
    key = manifest_key(model)
    return json.loads(lake.read_bytes(key)) if key in lake.stamps(f"{model}/quarantine/") else {"days": {}, "recompute": []}


def manifest_key(model: str) -> str:
    """Where the lake says which days are out."""
    return f"{model}/quarantine/raw_data.json"


def require_recomputed(lake: Lake, model: str, window: Iterable[dt.date]) -> None:
    """Raises DataError where features of the window left the lake with a quarantine and were not made again."""
    missing = sorted(set(_missing(lake, model, read(lake, model)["recompute"])) & {day.isoformat() for day in window})
    if missing:
        raise DataError(
            f"features of {model} for {', '.join(missing)} left the lake with a quarantine; materialize {model}/features for "
            f"{missing[0]} … {missing[-1]} first"
        )


def impose(spec: ModelSpec, lake: Lake, versions: DataVersions, ledger: Ledger, day: dt.date, decision: Decision) -> Change:
    """Take a raw day out. Repeated, it completes what a crash left and changes nothing else.

    Raises NotFoundError for a day that is neither in the lake nor in its history.
    """
    if not _known(spec.name, lake, versions, day):
        stored = sorted(k for k in lake.list(f"{spec.name}/raw_data/") if k.endswith(".parquet"))
        there = f"it has {_name(stored[0])} … {_name(stored[-1])}" if stored else "it has no raw data yet"
        raise NotFoundError(f"{spec.name} has no raw_data of {day}; {there}")
    with undecided(versions, spec.name):
        return _change(spec, lake, versions, ledger, day, decision, QUARANTINE)


def lift(spec: ModelSpec, lake: Lake, versions: DataVersions, ledger: Ledger, day: dt.date, decision: Decision) -> Change:
    """Take a day back in. Raises NotFoundError for one that never was in quarantine."""
    if not _decisions(ledger, spec.name, day):
        out = ", ".join(sorted(read(lake, spec.name)["days"])) or "no day is"
        raise NotFoundError(f"raw_data/{day} of {spec.name} is not in quarantine; {out}")
    with undecided(versions, spec.name):
        return _change(spec, lake, versions, ledger, day, decision, QUARANTINE_LIFTED)


@contextmanager
def unchanged(
    spec: ModelSpec, lake: Lake, versions: DataVersions, made: Iterable[dt.date], known: Mapping[str, Any]
) -> Iterator[None]:
    """Keep decisions waiting while features of the days `made` are stored that were computed as `known`, an earlier `read`, says.

    Raises TransientError, before anything is stored, where a day that they look back on was taken out or back in since.
    """
    with undecided(versions, spec.name):
        now, before = read(lake, spec.name)["days"], known["days"]
        back = range(spec.features.lookback_days + 1)
        used = {(day - dt.timedelta(days=i)).isoformat() for day in made for i in back}
        if other := sorted(day for day in used if now.get(day) != before.get(day)):
            raise TransientError(
                f"quarantine of raw_data/{', '.join(other)} of {spec.name} changed while features were computed; nothing was stored, "
                f"materialize {spec.name}/features again"
            )
        yield


def undecided(versions: DataVersions, model: str) -> AbstractContextManager[None]:
    """No decision meanwhile, and one at a time: beside the history, which every process that records in the lake shares, whatever the lake is."""
    return file_lock.held(Path(versions.root).absolute() / ".dvc" / "tmp" / f"{model}.quarantine.lock", WAIT_SECONDS)


def _change(
    spec: ModelSpec, lake: Lake, versions: DataVersions, ledger: Ledger, day: dt.date, decision: Decision, kind: str
) -> Change:
    """Ledger, then features, then the manifest's days: until these say so, a repetition does the rest again.

    What is to be made again is written before anything is deleted, so that a repetition knows it too.
    """
    entry, known = _entry(spec, ledger, day, decision, kind), read(lake, spec.name)
    wanted = kind == QUARANTINE
    why = f"{spec.name}: {kind} of raw_data/{day}"
    if (day.isoformat() in known["days"]) == wanted:
        if manifest_key(spec.name) in lake.stamps(f"{spec.name}/quarantine/"):
            versions.record([manifest_key(spec.name)], why)
        return Change(entry, False, _dates(_missing(lake, spec.name, known["recompute"])))
    told = {"by": entry.actor, "reason": entry.reason, "at": entry.time_iso, "entry": entry.sequence}
    kept = {d: who for d, who in known["days"].items() if d != day.isoformat()} | ({day.isoformat(): told} if wanted else {})
    touched = {(day + dt.timedelta(days=i)).isoformat() for i in range(spec.features.lookback_days + 1)}
    features = f"{spec.name}/features/"
    removed = [k for k in lake.list(features) if _name(k) in touched]
    gone = {*_missing(lake, spec.name, known["recompute"]), *map(_name, removed)} | (touched if not wanted else set())
    if removed:
        versions.record(removed, f"{why}: before it")
        _write(lake, spec.name, known["days"], sorted(gone))
        for key in removed:
            lake.delete(key)
    left = [k for k in versions.contents(features) if _name(k) in touched]
    if left:
        versions.record(left, why)
    recompute = _computable(lake, spec, gone, kept.keys())
    _write(lake, spec.name, kept, recompute)
    versions.record([manifest_key(spec.name)], why)
    return Change(entry, True, _dates(recompute))


def _write(lake: Lake, model: str, out: Mapping[str, Any], recompute: list[str]) -> None:
    lake.write_bytes(manifest_key(model), json.dumps({"days": out, "recompute": recompute}, sort_keys=True).encode())


def _entry(spec: ModelSpec, ledger: Ledger, day: dt.date, decision: Decision, kind: str) -> Entry:
    """The ledger's entry of the decision; the one that is there where the last decision was the same."""
    decided = _decisions(ledger, spec.name, day)
    if decided and decided[-1].kind == kind:
        return decided[-1]
    evidence = {"partition": f"raw_data/{day}", "lookback_days": spec.features.lookback_days}
    subject, key = f"raw_data/{day}", f"{spec.name}:{kind}:{day}:{len(decided)}"
    return ledger.append(NewEntry(kind, spec.name, subject, decision.by, decision.at, decision.reason, evidence, key))


def _computable(lake: Lake, spec: ModelSpec, wanted: Iterable[str], out: Collection[str]) -> list[str]:
    """Those of the days that have rows, outside quarantine, to compute features from."""
    usable = {_name(k) for k in lake.list(f"{spec.name}/validated_data/")} - set(out)
    back = range(spec.features.lookback_days + 1)
    last = max(usable, default="")
    return sorted(
        d
        for d in wanted
        if d <= last and any((dt.date.fromisoformat(d) - dt.timedelta(days=i)).isoformat() in usable for i in back)
    )


def _decisions(ledger: Ledger, model: str, day: dt.date) -> list[Entry]:
    kinds = (QUARANTINE, QUARANTINE_LIFTED)
    return [e for e in ledger.entries(model) if e.kind in kinds and e.subject == f"raw_data/{day}"]


def _known(model: str, lake: Lake, versions: DataVersions, day: dt.date) -> bool:
    prefix = f"{model}/raw_data/"
    return any(_name(key) == day.isoformat() for key in lake.list(prefix)) or any(
        _name(key) == day.isoformat() for revision in versions.history(prefix) for key in revision.files
    )


def _missing(lake: Lake, model: str, recompute: Iterable[str]) -> list[str]:
    """Those of the days that have no features in the lake now."""
    wanted = set(recompute)
    return sorted(wanted - {_name(key) for key in lake.list(f"{model}/features/")}) if wanted else []


def _name(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".parquet")


def _dates(names: Iterable[str]) -> tuple[dt.date, ...]:
    return tuple(dt.date.fromisoformat(name) for name in names)
