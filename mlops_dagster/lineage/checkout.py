"""A model's part of the lake as it was: in the lake itself, or as a copy in a folder."""

import datetime as dt
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mlops_dagster.core.errors import DataError, NotFoundError
from mlops_dagster.core.late_data import day_of
from mlops_dagster.lineage import origins, quarantine
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_versions import DataVersions


@dataclass(frozen=True)
class Checkout:
    """What was done: the keys that were written and removed, how many were equal already, and the revision that records it (if any)."""

    written: tuple[str, ...]
    removed: tuple[str, ...]
    equal: int
    commit: str | None = None


def revision_named(text: str, commit_of_version: Callable[[int], str]) -> str | dt.datetime:
    """A revision from what a person types: a moment (ISO 8601; UTC where no zone is given), `v3` for the training set of version 3, or a
    commit. Raises whatever `commit_of_version` does."""
    if text[:1] in "vV" and text[1:].isdigit():
        return commit_of_version(int(text[1:]))
    try:
        moment = dt.datetime.fromisoformat(text) if "-" in text else None
    except ValueError:
        raise NotFoundError(
            f"revision {text!r}: neither a moment such as 2013-02-17T12:00, nor v and a version's number, nor a commit of `mlops data log`"
        ) from None
    return text if moment is None else moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


def contents(versions: DataVersions, model: str, revision: str | dt.datetime | None) -> dict[str, str]:
    """Every tracked key of a model with its MD5. Raises NotFoundError where the model has none then."""
    found = versions.contents(f"{model}/", revision)
    if not found:
        raise NotFoundError(f"{model} has no tracked data at revision {revision or 'newest'}; see `mlops data log {model}`")
    return found


def diff(old: Mapping[str, str], new: Mapping[str, str]) -> list[tuple[str, str]]:
    """(added | removed | changed, key) of each key that differs, by key."""
    told = {key: "added" if key not in old else "removed" if key not in new else "changed" for key in {**old, **new}}
    return [(told[key], key) for key in sorted(told) if old.get(key) != new.get(key)]


def in_lake(lake: Lake, versions: DataVersions, model: str, revision: str | dt.datetime) -> Checkout:
    """Make the lake's tracked keys of a model equal to a revision.

    What it replaces is recorded first, and the outcome afterwards, as revisions of their own, so nothing is lost. Each file is replaced
    whole; killed and run again, it completes, its record included. Features that a day in quarantine went into do not come back, and what
    is there in their place stays. Keys that are not tracked (reports, logs, manifests) stay, and so do
    training sets and the records of what they were made of: manifests and versions point at them, and their names are their hashes.

    One at a time, and no decision on quarantine and no storing of features meanwhile. Raises TransientError when another does not end.
    """
    with quarantine.undecided(versions, model):
        return _replaced(lake, versions, model, revision)


def _replaced(lake: Lake, versions: DataVersions, model: str, revision: str | dt.datetime) -> Checkout:
    decided = f"{model}/quarantine/"  # not data: what is out stays out
    wanted, tracked = (
        {key: md5 for key, md5 in found.items() if not key.startswith(decided)}
        for found in (contents(versions, model, revision), versions.contents(f"{model}/"))
    )
    present, stays = set(lake.list(f"{model}/")), _kept_out(lake, versions, model, revision, wanted)
    wanted = {key: md5 for key, md5 in wanted.items() if key not in stays}
    written = origins.differing(lake, wanted)
    gone = {key for key in tracked.keys() - wanted.keys() - stays if not key.startswith(f"{model}/training_set/")}
    removed = sorted(gone & present)
    changing = [*written, *removed]
    # Also what the lake holds already but its newest revision does not: a killed checkout left it so.
    recorded = sorted({*changing, *gone, *(key for key, md5 in wanted.items() if tracked.get(key) != md5)})
    if not recorded:
        return Checkout((), (), len(wanted))
    # All bytes at hand before anything changes; and a moment may mean another revision once one more is recorded.
    sources = {key: versions.restore(key, revision) for key in written}
    if before := [key for key in changing if key in present]:
        versions.record(before, f"{model}: before a checkout")
    for key, source in sources.items():
        lake.write_bytes(key, source.read_bytes())
    for key in removed:
        lake.delete(key)
    named = revision.isoformat() if isinstance(revision, dt.datetime) else revision[:10]
    commit = versions.record(recorded, f"{model}: checkout of {named}").commit
    return Checkout(tuple(written), tuple(removed), len(wanted) - len(written), commit)


def _kept_out(lake: Lake, versions: DataVersions, model: str, revision: str | dt.datetime, wanted: Mapping[str, str]) -> set[str]:
    """The features of a revision, with their origins, that a day went into which is in quarantine now."""
    out, kept, prefix = quarantine.days(lake, model), set[dt.date](), f"{model}/{origins.FOLDER}/features/"
    for key in wanted if out else ():
        if key.startswith(prefix) and out & {*map(day_of, json.loads(versions.restore(key, revision).read_bytes()))}:
            kept.add(day_of(key))
    stages = [key for key in wanted if key.startswith((prefix, f"{model}/features/"))] if kept else []
    return {key for key in stages if day_of(key) in kept}


def in_folder(folder: Lake, versions: DataVersions, model: str, revision: str | dt.datetime) -> Checkout:
    """Copy a revision's keys into another lake (a folder). Raises DataError where that holds other files of the model."""
    wanted = contents(versions, model, revision)
    present = set(folder.list(f"{model}/"))
    foreign = sorted({*(present - wanted.keys()), *origins.differing(folder, {k: wanted[k] for k in present & wanted.keys()})})
    if foreign:
        raise DataError(
            f"--to holds {len(foreign)} files that are not of this revision, for example {foreign[0]}; give an empty folder"
        )
    written = [key for key in wanted if key not in present]
    for key in written:
        folder.write_bytes(key, versions.restore(key, revision).read_bytes())
    return Checkout(tuple(written), (), len(wanted) - len(written))
