"""The check that compares a day's features with what the deployed version was trained on."""

import datetime as dt
import json
from collections.abc import Mapping
from typing import Any

import dagster as dg
import pyarrow as pa

from mlops_dagster.assets.lake_paths import read_manifest
from mlops_dagster.assets.stage import check_result
from mlops_dagster.core.drift import Profile
from mlops_dagster.core.errors import NotFoundError, TransientError
from mlops_dagster.core.expectations import Departure, departures, learned
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake

NAME = "learned_expectations"
SHOWN = 5

Days = Mapping[dt.date, Mapping[str, pa.Table]]


def check(spec: ModelSpec, lake: Lake, registry: Any, new: Days) -> dg.AssetCheckResult:
    """Ranges, categories and missing shares of every view's day against the reference profile; a warning names what departs.

    The features are judged, not the validated rows, because the reference is a profile of features: the same names and units.
    Of request-time values there is no row before somebody asks; the drift report judges those.
    """
    if not spec.expectations.enabled:
        return check_result(NAME, True, "expectations.enabled is false", warn=True)
    try:
        reference = reference_of(spec, lake, registry)
    except TransientError as error:
        return check_result(NAME, False, f"not judged: {error}", warn=True)
    if reference is None:
        return check_result(NAME, True, "no version has been registered yet, so there is no reference", warn=True)
    version, profile = reference
    expected = {n: e for n, e in learned(profile, spec.expectations.range_slack).items() if n not in spec.expectations.exclude}
    limits = spec.expectations.max_outside_share, spec.expectations.missing_slack
    found = {f"{day} {view}": departures(expected, rows, *limits) for day, views in new.items() for view, rows in views.items()}
    judged = sorted(expected.keys() & {name for views in new.values() for rows in views.values() for name in rows.column_names})
    return _result(version, judged, {where: d for where, d in found.items() if d})


def reference_of(spec: ModelSpec, lake: Lake, registry: Any) -> tuple[str, Profile] | None:
    """The champion's reference profile, before there is one the newest version's, with its name; None before any version."""
    try:
        newest = read_manifest(lake, spec, "model_version")
    except NotFoundError:  # answered by the lake alone, so that a first ingestion opens no registry
        return None
    champion = next((v for v in registry.versions(spec.name) if "champion" in v.aliases), None)
    number, digest = (champion.number, champion.digest) if champion else (newest["version"], newest["digest"])
    stored = lake.read_bytes(f"{spec.name}/trained_model/{digest}/reference_profile.json")
    return f"version {number}", Profile.from_dict(json.loads(stored))


def _result(version: str, judged: list[str], found: Mapping[str, list[Departure]]) -> dg.AssetCheckResult:
    told = [f"{where}: {d.reason}" for where, several in found.items() for d in several]
    more = f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    because = "; ".join(told[:SHOWN]) + more if told else f"{len(judged)} features are as {version} was trained on"
    metadata = {
        "reference": version,
        "judged": judged,
        "columns": sorted({d.column for several in found.values() for d in several}),
        "departures": {
            where: {
                d.column: {"outside": d.outside_share, "missing": d.missing_share, "examples": list(d.examples)} for d in several
            }
            for where, several in list(found.items())[:100]
        },
    }
    return check_result(NAME, not told, because, metadata, warn=True)
