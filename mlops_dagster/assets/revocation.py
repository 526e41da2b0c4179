"""What labels that land after a promotion say of it: whether the version is worse than it was when held out."""

import datetime as dt
import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlops_dagster.assets import rollout_versions
from mlops_dagster.assets.rollout_evidence import LABEL_DAYS
from mlops_dagster.core import sequential
from mlops_dagster.core.analysis import LabelledDay, Verdict, judge_errors, judge_labels
from mlops_dagster.core.answers import right
from mlops_dagster.core.errors import MlopsError
from mlops_dagster.core.rollout import WAY_BACK, Phase, RolloutState
from mlops_dagster.core.rollout_gates import Outcome
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.core.strategies import RolloutPolicy

if TYPE_CHECKING:
    from mlops_dagster.assets.rollout import Parts

Labels = dict[str, LabelledDay]

_log = logging.getLogger(__name__)


@dataclass
class _Seen:
    """What this process knows of one promotion: when it looked, and each day as it was when its files had these stamps."""

    looked: dt.datetime
    days: dict[str, tuple[tuple[str, ...], Labels]] = field(default_factory=dict)


_SEEN: dict[tuple[str, str], _Seen] = {}


def verdict(parts: "Parts", spec: ModelSpec, state: RolloutState, policy: RolloutPolicy, now: dt.datetime) -> Verdict | None:
    """FAIL where the labels of a promoted version prove it worse than at evaluation, or than its predecessor on the same days.

    None where they do not (yet), where there is nothing to go back to, and until `Parts.label_seconds` after the last look. Of a
    regression the mean absolute error counts, its limit being monitoring.max_accuracy_drop over the held-out one.
    """
    if state.phase is not Phase.PROMOTED or state.champion is None or state.strategy == WAY_BACK:
        return None
    seen = _SEEN.get(name := (str(parts.cache), state.rollout_id))
    if seen is not None and (now - seen.looked).total_seconds() < parts.label_seconds:
        return None
    _SEEN[name] = _Seen(now, seen.days if seen else {})
    try:
        expected = _held_out(parts, spec, state.candidate)
        found = None if expected is None else _judged(parts, spec, state, policy, _SEEN[name], expected)
    except MlopsError as error:  # the lake is away: routes must be kept all the same
        _log.warning("labels of %s could not be looked at: %s", spec.name, error)
        return None
    return found if found is not None and found.outcome is Outcome.FAIL else None


def _held_out(parts: "Parts", spec: ModelSpec, version: str) -> float | None:
    """The version's primary metric at evaluation: accuracy, or mean absolute error.

    Of the evidence that was approved, by the ledger: what the registry says meanwhile of the version, and whether it can be asked,
    changes nothing in what was promised of it. Raises NotFoundError where the ledger has no such approval.
    """
    metric = "accuracy" if spec.training.task == "classification" else "mean_absolute_error"
    metrics: Any = rollout_versions.one(parts, spec.name, version, among={}).evidence.get("metrics")
    value = metrics.get(metric) if isinstance(metrics, dict) else None
    return None if value is None else float(value)


def _judged(
    parts: "Parts", spec: ModelSpec, state: RolloutState, policy: RolloutPolicy, seen: _Seen, expected: float
) -> Verdict | None:
    limit = expected * (1 + spec.monitoring.max_accuracy_drop)
    if spec.training.task == "regression" and not limit > 0:
        return None  # nothing is a share of no error at all
    days = _days(parts, spec, state, seen, limit)
    own = [day[state.candidate] for day in days]
    # Days on which both answered are the only ones on which they can be compared.
    beside = [day[state.champion] for day in days if state.champion in day]
    champion = [(day.labelled, day.wrong) for day in beside] if len(beside) == len(own) else []
    if spec.training.task == "regression":
        return judge_errors(own, limit, policy, champion)
    return judge_labels([(day.labelled, day.wrong) for day in own], 1 - expected, policy, champion)


def _days(parts: "Parts", spec: ModelSpec, state: RolloutState, seen: _Seen, limit: float) -> list[Labels]:
    """The labelled days of the promoted version in order; a day is read again when its files were replaced."""
    prefix = f"{spec.name}/live_performance/"
    stamps = parts.lake.stamps(prefix)
    found = []
    for key in sorted(k for k in stamps if k.endswith(".json"))[-LABEL_DAYS:]:
        stamp = (stamps[key], stamps.get(key.removesuffix("json") + "parquet", ""))
        known, labels = seen.days.get(key, ((), {}))
        if known != stamp:
            try:
                labels = _labels(parts, spec, state, key, limit)
            except (MlopsError, ValueError, KeyError, TypeError) as error:
                _log.warning("%s is damaged (%s): materialize live_performance of that day again", key, error)
                continue
            seen.days[key] = (stamp, labels)
        if state.candidate in labels:
            found.append(labels)
    return found


def _labels(parts: "Parts", spec: ModelSpec, state: RolloutState, key: str, limit: float) -> Labels:
    """What a day's live performance says of the two versions that have labels."""
    versions = json.loads(parts.lake.read_bytes(key))["versions"]
    wanted = [version for version in (state.candidate, state.champion) if version in versions]
    if spec.training.task == "regression" and state.candidate in wanted:
        return _errors(parts, spec, key.removesuffix("json") + "parquet", wanted, limit)
    found = {}
    for version in wanted:
        rows = int(versions[version]["rows"])
        found[version] = LabelledDay(rows, min(rows, max(0, round((1 - versions[version].get("accuracy", 1.0)) * rows))))
    return found


def _errors(parts: "Parts", spec: ModelSpec, key: str, versions: list[Any], limit: float) -> Labels:
    import polars as pl

    rows = pl.DataFrame(parts.lake.read(key, ["version", "prediction", "label"])).with_columns(pl.col("label").fill_nan(None))
    wrong = ~right(spec.training.task, spec.rollout.score_tolerance)
    rows = rows.with_columns(wrong=wrong, error=(pl.col("prediction").cast(pl.Float64) - pl.col("label")).abs())
    found = {}
    for version in versions:
        own = rows.filter((pl.col("version") == version) & pl.col("label").is_not_null())
        if own.height:
            capped = sequential.capped(own["error"].fill_null(float("inf")).to_numpy(), limit)
            factors = tuple(sequential.factors_of_mean(capped, limit).tolist())
            found[version] = LabelledDay(own.height, int(own["wrong"].fill_null(True).sum()), float(capped.sum()), factors)
    return found
