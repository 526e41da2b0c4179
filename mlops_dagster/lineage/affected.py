"""What a raw partition touched: training sets, versions, deployments and predictions, and what follows if it was bad."""

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlops_dagster.core.errors import DataError, NotFoundError
from mlops_dagster.core.late_data import day_of as day_of_key
from mlops_dagster.core.ledger import Entry
from mlops_dagster.lineage import feature_history, quarantine, request_search, training_record
from mlops_dagster.lineage.carried import CarriedValues
from mlops_dagster.lineage.deployments import spells
from mlops_dagster.lineage.places import Places
from mlops_dagster.lineage.training_record import TrainingRecord
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_versions import DataVersions
from mlops_dagster.resources.registry import Version

PARTITION = re.compile(r"raw_data/(\d{4}-\d{2}-\d{2})")


@dataclass(frozen=True)
class Spread:
    """Where a raw day of a model went; every list is in order of time, moments are ISO 8601.

    `partitions`: its lake keys with their MD5 now (None: no longer there) and every MD5 that they had. `feature_days`: first and last day
    whose features read it, `row_days`: whose rows may use such a feature; the last is None while values that nothing replaced are in use.
    """

    model: str
    partition: str
    quarantined: Mapping[str, Any] | None
    partitions: Sequence[Mapping[str, Any]]
    feature_days: tuple[str, str]
    row_days: tuple[str, str | None]
    training_sets: Sequence[Mapping[str, Any]]
    versions: Sequence[Mapping[str, Any]]
    deployments: Sequence[Mapping[str, Any]]
    predictions: Sequence[Mapping[str, Any]]
    advice: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def day_of(partition: str) -> dt.date:
    """The day of `raw_data/YYYY-MM-DD`. Raises DataError for anything else."""
    found = PARTITION.fullmatch(partition)
    try:
        return dt.date.fromisoformat(found[1] if found else partition)
    except ValueError:
        raise DataError(f"partition {partition!r}: give it as raw_data/YYYY-MM-DD, such as raw_data/2013-02-17") from None


def spread(
    places: Places,
    lake: Lake,
    data: DataVersions,
    registered: Sequence[Version],
    model: str,
    day: dt.date,
    lookback_days: int,
) -> Spread | None:
    """Where a raw day of a model went, or None for a day that it never had. `lookback_days`: of the features as declared now."""
    partitions = _partitions(lake, data, model, day)
    if not partitions:
        return None
    keyed = {key: training_record.load(lake, key) for key in lake.list(f"{model}/{training_record.FOLDER}/")}
    records = [*keyed.values()]
    features = day, day + dt.timedelta(days=lookback_days)
    values = CarriedValues(feature_history.load(lake, data, model, features))
    rows_carrying = values.by_training_set({key: r for key, r in keyed.items() if not r.touches(day) and r.days[-1] >= str(day)})
    touched = [r for r in records if r.touches(day) or rows_carrying.get(r.training_set)]
    versions = [v for v in registered if _rests_on(v, records, touched, day, lookback_days)]
    entries = places.entries(model)
    numbers = {str(v.number) for v in versions}
    live = [s for s in spells(entries, model) if s.version in numbers]
    near = training_record.reached(day, lookback_days)
    last = _last_row_day(values, records, near[1])
    return Spread(
        model,
        f"raw_data/{day}",
        quarantine.read(lake, model)["days"].get(day.isoformat()),
        partitions,
        (features[0].isoformat(), features[1].isoformat()),
        (near[0].isoformat(), last and last.isoformat()),
        _training_sets(touched, rows_carrying, day, partitions, versions),
        [_version(v) for v in versions],
        [_deployment(s.version, s.since, s.until, s.began) for s in live],
        _predictions(places, model, numbers, near, last),
        advice(model, entries, registered, numbers),
    )


def _last_row_day(values: CarriedValues, records: Sequence[TrainingRecord], near: dt.date) -> dt.date | None:
    """The last day whose rows may use one, by the newest training set's views and at least `near`; None where one is still in use."""
    newest = max(records, key=lambda r: r.days[-1], default=None)
    ends = [one.until for one in values.of(newest.views)] if newest else []
    return None if None in ends else max([near, *(end.date() for end in ends if end)])


def _partitions(lake: Lake, data: DataVersions, model: str, day: dt.date) -> list[dict[str, Any]]:
    prefix, name = f"{model}/raw_data/", f"{day}.parquet"
    had: dict[str, list[dict[str, Any]]] = {}
    for revision in reversed(data.history(prefix, only=lambda key: key.rpartition("/")[2] == name)):
        for key, md5 in revision.files.items():
            had.setdefault(key, []).append({"md5": md5, "at": revision.at.isoformat(), "commit": revision.commit})
    untracked = [k for k in lake.list(prefix) if k.rpartition("/")[2] == name and k not in had]
    now = {key: states[-1]["md5"] for key, states in had.items()}
    return [{"key": k, "md5": now.get(k), "revisions": had.get(k, [])} for k in sorted([*had, *untracked])]


def _rests_on(
    version: Version, records: Sequence[TrainingRecord], touched: Sequence[TrainingRecord], day: dt.date, lookback_days: int
) -> bool:
    """By the version's record, or, for one whose record is gone or was never kept, by its days."""
    own = [r for r in records if r.training_set == version.evidence.get("training_set")]
    if version.evidence.get("inputs") and own:
        return any(r in touched for r in own)
    try:
        first, last = (dt.date.fromisoformat(str(version.evidence[name])) for name in ("first_day", "last_day"))
    except (KeyError, ValueError):
        return False
    begin, end = training_record.reach(first, last, lookback_days)
    return begin <= day <= end


def _training_sets(
    touched: Sequence[TrainingRecord],
    rows_carrying: Mapping[str, int],
    day: dt.date,
    partitions: Sequence[Mapping[str, Any]],
    versions: Sequence[Version],
) -> list[dict[str, Any]]:
    now = {p["key"]: p["md5"] for p in partitions}
    told = [
        {
            "training_set": r.training_set,
            "first_day": r.days[0],
            "last_day": r.days[-1],
            "rows_of_the_day": day.isoformat() in r.days,
            "used": r.touches(day),
            "rows_carrying_it": rows_carrying.get(r.training_set, 0),
            "same_as_now": all(now.get(key) == md5 for key, md5 in r.touches(day).items()),
        }
        for r in touched
    ]
    recorded = {r.training_set for r in touched}
    told += [
        {
            "training_set": v.evidence.get("training_set"),
            "first_day": v.evidence.get("first_day"),
            "last_day": v.evidence.get("last_day"),
            "rows_of_the_day": str(v.evidence.get("first_day")) <= day.isoformat(),
            "used": {},
            "rows_carrying_it": 0,
            "same_as_now": None,
        }
        for v in versions
        if v.evidence.get("training_set") not in recorded
    ]
    return sorted(told, key=lambda t: (str(t["last_day"]), str(t["training_set"])))


def _version(version: Version) -> dict[str, Any]:
    approval = version.approval
    return {
        "version": version.number,
        "training_set": version.evidence.get("training_set"),
        "decision": approval.decision if approval else None,
        "aliases": list(version.aliases),
    }


def _deployment(version: str, since: dt.datetime, until: dt.datetime | None, began: Entry) -> dict[str, Any]:
    return {
        "version": int(version),
        "since": since.isoformat(),
        "until": until.isoformat() if until else None,
        "entry": began.sequence,
        "kind": began.kind,
        "reason": began.reason,
    }


def _predictions(
    places: Places, model: str, touched: set[str], near: tuple[dt.date, dt.date], last: dt.date | None
) -> list[dict[str, Any]]:
    """Each collected day with predictions of a touched version (`trained_on_it`), on features of the partition (`featured_by_it`) or,
    after these days, on values of them that nothing had replaced (`may_carry_it`: at most so many)."""
    told = []
    for key, index in request_search.indexes(places, model):
        day, rows = day_of_key(key), index.summary.rows
        trained = sum(n for version, n in index.summary.versions.items() if version in touched)
        featured = rows if near[0] <= day <= near[1] else 0
        carrying = rows if near[1] < day and (last is None or day <= last) else 0
        if trained or featured or carrying:
            told.append({"day": str(day), "trained_on_it": trained, "featured_by_it": featured, "may_carry_it": carrying})
    return told


def advice(model: str, entries: Sequence[Entry], registered: Sequence[Version], touched: set[str]) -> list[str]:
    """What is to be done if the partition was bad: which versions to reject, roll back or retrain."""
    live = sorted({s.version for s in spells(entries, model) if s.until is None and s.version in touched}, key=int)
    champion = next((v for v in registered if "champion" in v.aliases), None)
    previous = next((v for v in registered if "previous" in v.aliases), None)
    waiting = [v for v in registered if str(v.number) in touched and v.approval is None]
    told = [f"reject version {v.number}, which waits for approval: mlops reject {model} {v.number} --by NAME" for v in waiting]
    if champion is not None and str(champion.number) in touched:
        if previous is not None and str(previous.number) not in touched:
            told.append(
                f"version {champion.number} is champion and rests on it; version {previous.number} does not: mlops rollback {model} --by NAME"
            )
        told.append(f"retrain {model} without it (job {model}_train) and replace version {champion.number}")
    elif live:
        told.append(f"end the rollout of version {', '.join(live)}, which rests on it: mlops rollout abort {model} --by NAME")
    return told


def unknown(models: Sequence[str], partition: str) -> NotFoundError:
    """The error for a partition that no model has."""
    return NotFoundError(f"{partition}: no raw partition of {', '.join(models) or 'any model'}; see `mlops data log MODEL`")
