"""Retraining: when drift, lost accuracy, age or new labels ask for it and neither cool-down nor budget forbids it."""

import datetime as dt
import json
from collections.abc import Iterator
from typing import Any

import dagster as dg

from mlops_dagster.assets import jobs
from mlops_dagster.assets.lake_paths import day_key, stored_days
from mlops_dagster.core.ledger import RETRAINING, Entry, NewEntry
from mlops_dagster.core.retraining import Decision, Evaluation, TrainingState, decide
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake


def build(spec: ModelSpec) -> dg.SensorDefinition:
    """The sensor `<model>_retraining`. What it trains still waits for its gate and its approval, so it runs by default."""

    @dg.sensor(
        name=f"{spec.name}_retraining",
        job_name=jobs.name(spec.name, "train"),
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Trains a new version when monitoring asks for one; the decision and its evidence are in the ledger.",
        required_resource_keys={"data_lake", "registry", "ledger"},
        tags={"mlops/model": spec.name},
    )
    def retraining(context: dg.SensorEvaluationContext):
        lake, ledger = context.resources.data_lake, context.resources.ledger
        past = ledger.entries(spec.name, RETRAINING)
        found = list(evaluations(spec, lake))
        state = training_state(spec, lake, context.resources.registry, past)
        today = max((e.day for e in found), default=None)
        decision = decide(spec.retraining, found, state, today) if today else Decision(False)
        if today and decision.retrain:
            past = [*past, ledger.append(entry(spec, decision, state, today, dt.datetime.now(dt.UTC)))]
        # The newest decision is asked for at every tick: the run key makes it one run, and none is lost if this process dies here.
        return request(spec, past[-1]) if past else dg.SkipReason(decision.sentence())

    return retraining


def evaluations(spec: ModelSpec, lake: Lake) -> Iterator[Evaluation]:
    """What the stored drift reports and live performance say of the last days."""
    for day in stored_days(lake, spec, "drift_report", suffix="json")[-spec.retraining.of_last :]:
        report = json.loads(lake.read_bytes(day_key(spec, "drift_report", day, suffix="json")))
        violated = {"PASS": False, "FAIL": True}.get(report["outcome"])
        yield Evaluation(day, "drift", violated, "; ".join(report["reasons"][:3]) or "within the limits")
    for day in stored_days(lake, spec, "live_performance", suffix="json")[-spec.retraining.of_last :]:
        window = json.loads(lake.read_bytes(day_key(spec, "live_performance", day, suffix="json")))["window"]
        if window:
            yield Evaluation(day, "accuracy", window["violated"], window["reason"])


def training_state(spec: ModelSpec, lake: Lake, registry: Any, past: list[Entry]) -> TrainingState:
    """The newest version's last day of data, the days of the past decisions, and the labelled rows since."""
    versions = registry.versions(spec.name)
    trained = dt.date.fromisoformat(str(versions[-1].evidence["last_day"])) if versions else None
    labelled = sum(
        json.loads(lake.read_bytes(day_key(spec, "live_performance", day, suffix="json")))["labelled"]
        for day in (
            stored_days(lake, spec, "live_performance", suffix="json") if "new_labels" in spec.retraining.triggers else []
        )
        if trained and day > trained
    )
    return TrainingState(trained, tuple(dt.date.fromisoformat(e.subject) for e in past), labelled)


def entry(spec: ModelSpec, decision: Decision, state: TrainingState, today: dt.date, now: dt.datetime) -> NewEntry:
    """The ledger's record of a decision to retrain; one per day of data."""
    return NewEntry(
        kind=RETRAINING,
        model=spec.name,
        subject=today.isoformat(),
        actor="sensor:retraining",
        time=now,
        reason="; ".join(decision.reasons),
        evidence={"trained_through": str(state.trained_through), "new_labels": state.new_labels},
        key=f"{spec.name}:retraining:{today}",
    )


def request(spec: ModelSpec, decided: Entry) -> dg.RunRequest:
    """The training run of a decision, on the data up to its day."""
    return dg.RunRequest(
        run_key=decided.key,
        run_config={"ops": {f"{spec.name}__training_set": {"config": {"through": decided.subject}}}},
        tags={"mlops/reason": decided.reason[:200], "mlops/trigger": "retraining"},
    )
