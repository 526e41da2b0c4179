"""Late data: days that changed after a training set had used them, told by a check and by a data version that makes it stale."""

import datetime as dt
import hashlib
from collections.abc import Iterable
from typing import Any

import dagster as dg

from mlops_dagster.assets.lake_paths import read_manifest
from mlops_dagster.assets.stage import check_result, key
from mlops_dagster.core.errors import NotFoundError
from mlops_dagster.core.late_data import Change, changes
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.lineage import training_record
from mlops_dagster.lineage.training_record import TrainingRecord
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_versions import DataVersions

NAME = "late_data"
CORRECTIONS = "corrections"
AFTER = ("best_parameters", "trained_model", "evaluation")
SHOWN = 5


def corrections(spec: ModelSpec) -> dg.AssetSpec:
    """The node `[<model>, corrections]`: a new data version whenever a day that the training set used has other content.

    Dagster compares no versions of a day-partitioned input of an unpartitioned asset; through this node it shows the training set as
    unsynced.
    """
    return dg.AssetSpec(
        key(spec, CORRECTIONS),
        deps=[key(spec, "raw_data")],
        description="Days of raw data whose content changed after a training set had used it.",
        group_name=spec.name,
        owners=list(spec.owners),
        tags={"mlops/model": spec.name},
    )


def correction(
    spec: ModelSpec, lake: Lake, versions: DataVersions, written: Iterable[str] | None = None
) -> dg.AssetMaterialization | None:
    """What to report after raw partitions were written, or (None) after a training set was made; None where the newest training set used
    none of them in another form."""
    record = newest_record(spec, lake)
    found = changed(spec, versions, record) if record else []
    if not found or (written is not None and not {c.key for c in found} & set(written)):
        return None
    version = hashlib.sha256("\n".join(f"{c.key} {c.now}" for c in found).encode()).hexdigest()
    metadata = {"training_set": record.training_set if record else "", "changes": [c.wording for c in found[:100]]}
    return dg.AssetMaterialization(key(spec, CORRECTIONS), metadata=metadata, tags={"dagster/data_version": version})


def build(spec: ModelSpec) -> dg.AssetChecksDefinition:
    """The check `late_data` of the training set; it runs after each ingestion and after each training set."""

    @dg.asset_check(
        asset=key(spec, "training_set"),
        name=NAME,
        description="No day has other content than when the training set used it.",
        additional_deps=[key(spec, "features")],
        required_resource_keys={"data_lake", "data_versions", "registry"},
    )
    def late_data(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        resources = context.resources
        return check(spec, resources.data_lake, resources.data_versions, resources.registry)

    return late_data


def check(spec: ModelSpec, lake: Lake, versions: DataVersions, registry: Any) -> dg.AssetCheckResult:
    """A warning names the days with the hash that was used and the present one, and the stages and versions that rest on the old content."""
    record = newest_record(spec, lake)
    if record is None:
        return _without_record(spec, lake)
    found = changed(spec, versions, record)
    affected = affected_versions(spec, lake, versions, registry)
    stages = [f"{spec.name}/{stage}" for stage in ("training_set", *_made_of(spec, lake, record))] if found else []
    told = "; ".join(c.wording for c in found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    because = f"the {len(record.raw_data)} partitions that were used have the content that they had"
    if found:
        to_do = " and ".join([*_features_first(spec, record, found), f"{spec.name}/training_set"])
        because = f"{told}. Made of the old content: {', '.join([*stages, *affected])}; materialize {to_do} again"
    elif affected:
        because += f"; versions that were made of other content: {', '.join(affected)}"
    metadata = {
        "training_set": record.training_set,
        "days": sorted({c.day.isoformat() for c in found}),
        "changes": [{"key": c.key, "used": c.used, "now": c.now} for c in found[:1000]],
        "stages": stages,
        "versions": affected,
    }
    return check_result(NAME, not found, because, metadata, warn=True)


def _without_record(spec: ModelSpec, lake: Lake) -> dg.AssetCheckResult:
    try:
        read_manifest(lake, spec, "training_set")
    except NotFoundError:
        return check_result(NAME, True, "there is no training set yet", warn=True)
    because = f"the lake has no record of what the training set was made of; materialize {spec.name}/training_set again"
    return check_result(NAME, False, because, warn=True)


def newest_record(spec: ModelSpec, lake: Lake) -> TrainingRecord | None:
    """What the newest training set was made of; None before there is one, and for one whose record is not in the lake."""
    try:
        inputs = read_manifest(lake, spec, "training_set").get("inputs")
        return training_record.load(lake, inputs["key"], inputs["sha256"]) if inputs else None
    except NotFoundError:
        return None


def changed(spec: ModelSpec, versions: DataVersions, record: TrainingRecord) -> list[Change]:
    """The raw partitions that are not what the record says."""
    days = [dt.date.fromisoformat(day) for day in record.days]
    first, last = training_record.reach(days[0], days[-1], record.lookback_days)
    without = {dt.date.fromisoformat(day) for day in record.quarantined}
    now = versions.contents(f"{spec.name}/raw_data/")
    found = changes(record.raw_data, now, first, last, without)
    known = {c.key for c in found}
    others = [(key, md5) for key, md5s in record.other_raw_data.items() if key not in known for md5 in md5s]
    return found + [Change(key, md5 or None, now.get(key), features=True) for key, md5 in others if md5 != now.get(key)]


def _features_first(spec: ModelSpec, record: TrainingRecord, found: list[Change]) -> list[str]:
    """The features that are to be made again before a training set is; none where all changes are of its rows."""
    days = [c.day for c in found if c.features]
    if not days:
        return []
    last = min(max(days) + dt.timedelta(days=record.lookback_days), dt.date.fromisoformat(record.days[-1]))
    return [f"{spec.name}/features of {min(days)} … {last}"]


def affected_versions(spec: ModelSpec, lake: Lake, versions: DataVersions, registry: Any) -> list[str]:
    """The registered versions whose training set used another content than the present one, such as `version 1 (champion)`."""
    try:
        read_manifest(lake, spec, "model_version")
    except NotFoundError:  # nothing was registered yet: the registry need not be opened
        return []
    told, known = [], {}
    for version in registry.versions(spec.name):
        inputs = version.evidence.get("inputs")
        if not inputs:
            continue
        if inputs["key"] not in known:
            try:
                known[inputs["key"]] = bool(changed(spec, versions, training_record.load(lake, inputs["key"])))
            except NotFoundError:  # nobody can tell any more; `mlops affected` goes by the version's days
                known[inputs["key"]] = False
        if known[inputs["key"]]:
            told.append(f"version {version.number}" + (f" ({', '.join(sorted(version.aliases))})" if version.aliases else ""))
    return told


def _made_of(spec: ModelSpec, lake: Lake, record: TrainingRecord) -> list[str]:
    """The later stages whose newest result was made of this training set."""
    made = []
    for stage in AFTER:
        try:
            if read_manifest(lake, spec, stage).get("training_set") == record.training_set:
                made.append(stage)
        except NotFoundError:
            continue
    return made
