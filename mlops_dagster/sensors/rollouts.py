"""Rollouts: an approved version starts one; a running one goes on, holds, is promoted or rolled back, tick by tick."""

import datetime as dt

import dagster as dg

from mlops_dagster.assets import approvals, jobs, rollout
from mlops_dagster.assets.deployment import described
from mlops_dagster.assets.rollout import Parts, Tick
from mlops_dagster.assets.stage import key
from mlops_dagster.core.errors import MlopsError
from mlops_dagster.core.rollout import Phase
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.registry import Version

# Dagster's daemon looks every 5 s and counts the interval from the end of the last tick: asking for 5 gave a tick every 10 s.
TICK_SECONDS = 1


def build(spec: ModelSpec) -> dg.SensorDefinition:
    """The sensor `<model>_rollouts`. Nothing moves without an approval, so it runs by default."""

    @dg.sensor(
        name=f"{spec.name}_rollouts",
        job_name=jobs.name(spec.name, "deploy"),
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Brings in each approved version by the declared strategy and shows phase, weights and verdict on `deployment`.",
        required_resource_keys=rollout.RESOURCES,
        tags={"mlops/model": spec.name},
    )
    def rollouts(context: dg.SensorEvaluationContext):
        parts, now = Parts.of(context.resources), dt.datetime.now(dt.UTC)
        found = rollout.tick(parts, spec, now)  # first: nothing that keeps the next version waiting may hold up what runs
        version, trouble = waiting(parts, spec, now)
        trouble += [found.trouble] if found and found.trouble else []
        requests = [request(spec, version)] if version else []
        for message in (*trouble, *([found.action.reason] if found and found.action.alert else [])):
            context.log.warning(message)
        if found is None and not requests:
            return dg.SkipReason("; ".join(["no version is approved yet", *trouble]))
        events = [event(spec, parts, found)] if found and found.changed else []
        reason = None if requests or found is None else "; ".join([f"{found.state.phase}: {found.action.reason}", *trouble])
        return dg.SensorResult(run_requests=requests, asset_events=events, skip_reason=reason)

    return rollouts


def waiting(parts: Parts, spec: ModelSpec, now: dt.datetime) -> tuple[Version | None, list[str]]:
    """The version to bring in, and what a person must know: approvals that do not count, a registry that cannot be asked.

    Raises MlopsError, the registry's, only before the first rollout, when nothing is known of the model yet.
    """
    try:
        version = rollout.waiting(parts, spec, now)
    except MlopsError as error:
        if rollout.current(parts, spec.name) is None:
            raise
        return None, [str(error)]
    return version, approvals.refusals(spec.name, now)


def request(spec: ModelSpec, version: Version) -> dg.RunRequest:
    """The run that starts the rollout of an approved version."""
    by = version.approval.by if version.approval else "unknown"
    return dg.RunRequest(
        run_key=f"{spec.name}:deploy:{rollout.rollout_id(version)}",
        tags={"mlops/reason": f"version {version.number} was approved by {by}", "mlops/trigger": "rollouts"},
    )


def event(spec: ModelSpec, parts: Parts, found: Tick) -> dg.AssetMaterialization | dg.AssetObservation:
    """A promotion or a way back is a new state of the deployment; everything else an observation of it."""
    metadata = described(found.state, parts)
    if found.verdict:
        metadata |= {
            "verdict": str(found.verdict.outcome),
            "reasons": "; ".join(found.verdict.reasons),
            "evidence": found.verdict.evidence,
        }
    if found.state.phase is Phase.PROMOTED:
        return dg.AssetMaterialization(key(spec, "deployment"), metadata=metadata, description=found.state.reason)
    return dg.AssetObservation(key(spec, "deployment"), metadata=metadata, description=found.state.reason)
