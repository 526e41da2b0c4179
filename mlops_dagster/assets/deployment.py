"""Stage 9: the approved version on its servers, brought in by the model's rollout strategy."""

import datetime as dt
import time
from typing import Any

import dagster as dg

from mlops_dagster.assets import rollout
from mlops_dagster.assets.rollout import Parts, Tick
from mlops_dagster.assets.smoke import failures
from mlops_dagster.assets.stage import check_result, stage
from mlops_dagster.core.rollout import Phase, RolloutState
from mlops_dagster.core.rollout_gates import Outcome
from mlops_dagster.core.spec import ModelSpec

STAGE = "deployment"
CHECKS = {
    "server_ready": ("The version's server is ready and its routes are live.", False),
    "smoke_prediction": ("The served version answers what its artifact answers.", False),
}
TICK_SECONDS = 0.25
AFTER_ERROR_SECONDS = 5.0
"""As often as the sensor looks: a system that is away for a second shall not use up `max_consecutive_errors`."""


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, deployment]`."""

    @stage(
        spec,
        STAGE,
        description="The approved version behind the gateway. A first version goes live at once, a later one by the declared strategy.",
        kinds={"envoy", spec.training.format},
        needs=["model_version"],
        resources=rollout.RESOURCES,
        checks=CHECKS,
    )
    def deployment(context: dg.AssetExecutionContext):
        parts = Parts.of(context.resources)
        version = rollout.waiting(parts, spec, dt.datetime.now(dt.UTC))
        if version is not None:
            rollout.start(parts, spec, version, dt.datetime.now(dt.UTC))
        state = until_started(parts, spec)
        if state is None:
            versions = ", ".join(str(v.number) for v in parts.registry.versions(spec.name)) or "none"
            raise dg.Failure(
                f"{spec.name} has no approved version (registered: {versions}); approve one with `mlops approve {spec.name} VERSION --by NAME`",
                allow_retries=False,
            )
        if state.phase in (Phase.ROLLED_BACK, Phase.ABORTED) and version is not None:
            raise dg.Failure(f"version {state.candidate} of {spec.name} was not brought in: {state.reason}", allow_retries=False)
        return dg.MaterializeResult(
            metadata=described(state, parts),
            data_version=dg.DataVersion(f"{state.rollout_id}/{state.revision}"),
            check_results=_checks(parts, spec, state),
        )

    return deployment


def until_started(parts: Parts, spec: ModelSpec) -> RolloutState | None:
    """Tick until the version's server has started (or failed); what follows is the rollout sensor's."""
    found: Tick | None = rollout.tick(parts, spec, dt.datetime.now(dt.UTC))
    while found is not None and found.state.phase is Phase.PENDING:
        time.sleep(AFTER_ERROR_SECONDS if found.verdict and found.verdict.outcome is Outcome.ERROR else TICK_SECONDS)
        found = rollout.tick(parts, spec, dt.datetime.now(dt.UTC))
    if found is not None and found.state.current is not None:
        # The first look at a step only sets the start of what is measured: made now, the sensor's first one has something to judge.
        found = rollout.tick(parts, spec, dt.datetime.now(dt.UTC))
    return found.state if found else None


def described(state: RolloutState, parts: Parts) -> dict[str, Any]:
    """What a person wants to see of a deployment."""
    weights = {w["arm"]: w["percent"] for w in state.routes.to_json()["weights"]} if state.routes else {}
    mirror = {state.routes.mirror.arm: state.routes.mirror.per_mille / 10} if state.routes and state.routes.mirror else {}
    entry = parts.ledger.find(f"rollout/{state.rollout_id}/{state.revision}")
    # Kept outside the ledger, its place and hash show later whether the entry is still the same (`mlops ledger verify`).
    receipt = {"ledger_sequence": entry.sequence, "ledger_hash": entry.hash} if entry else {}
    return {
        "phase": str(state.phase),
        "strategy": state.strategy,
        "candidate": state.candidate,
        "champion": state.candidate if state.phase is Phase.PROMOTED else state.champion or "none",
        "weights_percent": weights,
        **({"mirror_percent": mirror} if mirror else {}),
        "reason": state.reason,
        "endpoint": f"{parts.serving.endpoint(state.model)}/v1/models/{state.model}:predict",
        **receipt,
    }


def _checks(parts: Parts, spec: ModelSpec, state: RolloutState) -> list[dg.AssetCheckResult]:
    seen = parts.serving.observe(spec.name)
    told = "; ".join(f"version {key}: {arm.phase} {arm.reason}".strip() for key, arm in seen.arms.items())
    live = state.candidate if state.champion is None or state.phase is Phase.PROMOTED else state.champion
    wrong = failures(parts, spec, live)
    return [
        check_result("server_ready", seen.ready, f"{told}{seen.pending}{seen.problem}"),
        check_result("smoke_prediction", not wrong, "; ".join(wrong) or f"version {live} answers as evaluated"),
    ]
