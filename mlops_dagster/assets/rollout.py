"""Carrying out rollouts: one tick reads the ledger, judges, decides by core.rollout, records, and makes the servers equal to it."""

import datetime as dt
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlops_dagster.assets import approvals, revocation, rollout_evidence, rollout_measurements
from mlops_dagster.assets.smoke import failures as smoke_failures
from mlops_dagster.core import rollout as engine
from mlops_dagster.core.analysis import Verdict, judge_down, judge_start
from mlops_dagster.core.errors import (
    ApprovalError,
    ArtifactError,
    MlopsError,
    NotFoundError,
    ServingError,
    StorageError,
    TransientError,
)
from mlops_dagster.core.rollout import Act, Action, Command, Phase, RolloutState
from mlops_dagster.core.rollout_gates import Outcome
from mlops_dagster.core.routes import BASELINE, Routes, version_of
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.core.strategies import RolloutPolicy
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.inference_segments import InferenceSegments
from mlops_dagster.resources.ledger import Ledger
from mlops_dagster.resources.live_metrics import LiveMetrics
from mlops_dagster.resources.registry import ApprovalState, Registry, Version, approval_state
from mlops_dagster.resources.serving import Arm, ArmState, Serving, ServingOptions
from mlops_dagster.resources.serving import Phase as ServerPhase
from mlops_dagster.serving import artifact

RESOURCES = {
    "artifact_cache",
    "data_lake",
    "feature_store",
    "inference_segments",
    "ledger",
    "live_metrics",
    "registry",
    "serving",
}
_UNAPPROVED = {
    ApprovalState.NONE: "is not approved any more",
    ApprovalState.REJECTED: "was rejected",
    ApprovalState.VOID: "is not approved any more: its metrics, data or artifact are not those that were approved",
}
_KNOWN: dict[tuple[str, str], dict[str, Version]] = {}
"""A model's versions as the registry had them last, by their number."""
_VERIFIED: dict[Path, artifact.Stamps] = {}
"""The files of the artifacts that had the right digest; the folder's name is that digest."""


@dataclass(frozen=True)
class Parts:
    """The systems that a rollout touches."""

    registry: Registry
    ledger: Ledger
    serving: Serving
    live_metrics: LiveMetrics
    lake: Lake
    feature_store: Any
    cache: Path
    inference_segments: InferenceSegments
    settle_seconds: float = 15.0  # answers are compared this long after they were given: longer than a request may take
    label_seconds: float = 30.0  # how often the lake is asked for labels

    @classmethod
    def of(cls, resources: Any) -> "Parts":
        """From a Dagster context's resources (see RESOURCES)."""
        return cls(
            resources.registry,
            resources.ledger,
            resources.serving,
            resources.live_metrics,
            resources.data_lake,
            resources.feature_store,
            Path(resources.artifact_cache.root),
            resources.inference_segments,
        )

    def versions(self, model: str) -> dict[str, Version]:
        """The model's versions by number; while the registry is away, those that it had last: a way back must not wait for it."""
        try:
            _KNOWN[str(self.cache), model] = {str(v.number): v for v in self.registry.versions(model)}
        except TransientError:
            if (str(self.cache), model) not in _KNOWN:
                raise
        return _KNOWN[str(self.cache), model]


@dataclass(frozen=True)
class Tick:
    """What one look found and did; `changed` when the ledger has a new entry of it."""

    state: RolloutState
    action: Action
    verdict: Verdict | None
    changed: bool


def policy_of(spec: ModelSpec) -> RolloutPolicy:
    """The declaration's rollout and monitoring sections as a policy."""
    return spec.rollout.policy(
        max_p99_latency_ms=spec.monitoring.max_p99_latency_ms,
        accuracy_drop=min(max(spec.monitoring.max_accuracy_drop, 0.001), 0.999),
        sticky_salt=spec.name,
    )


def rollout_id(version: Version) -> str:
    """The same approval gives the same rollout."""
    return f"{version.model}-{version.number}-{version.registered_hash[:12]}"


def current(parts: Parts, model: str) -> RolloutState | None:
    """The newest rollout of a model as the ledger has it."""
    return engine.replay(parts.ledger.entries(model), model)


def champion_of(versions: Iterable[Version]) -> Version | None:
    """The version that the registry calls champion."""
    return next((v for v in versions if "champion" in v.aliases), None)


def waiting(parts: Parts, spec: ModelSpec, now: dt.datetime) -> Version | None:
    """The newest approved version that is newer than the champion and was not rolled out yet."""
    valid = approvals.adopt(parts.registry, parts.ledger, spec.name, now)
    champion = champion_of(parts.registry.versions(spec.name))
    newest = valid[-1] if valid else None
    if newest is None or (champion is not None and newest.number <= champion.number):
        return None
    return None if parts.ledger.find(f"rollout/{rollout_id(newest)}/0") else newest


def start(parts: Parts, spec: ModelSpec, version: Version, now: dt.datetime) -> Tick:
    """Begin the rollout of an approved version; one that runs already is superseded first."""
    running = current(parts, spec.name)
    if running is not None and running.phase.final:
        carry_out(parts, spec, running, now)  # after a crash the registry may not know the last champion yet
    champion = champion_of(parts.registry.versions(spec.name))
    state, action = engine.begin(
        rollout_id(version), spec.name, str(champion.number) if champion else None, str(version.number), policy_of(spec), now
    )
    if running is not None and not running.phase.final:
        command(parts, spec, Command("supersede", reason=f"version {version.number} is approved"), now)
    return _record(parts, spec, None, state, action, None, now)


def command(parts: Parts, spec: ModelSpec, wanted: Command, now: dt.datetime) -> Tick | None:
    """Apply a person's command to the running rollout; None without one. A refused command says why in the action."""
    state = current(parts, spec.name)
    if state is None:
        return None
    new, action = engine.advance(state, wanted, policy_of(spec), now)
    return _record(parts, spec, state, new, action, wanted, now)


def roll_back(parts: Parts, spec: ModelSpec, wanted: Command, now: dt.datetime) -> Tick | None:
    """Back to the version before: ends a running rollout, or undoes the last promotion. None where there never was a rollout.

    Raises RolloutError where there is nothing to go back to.
    """
    state = current(parts, spec.name)
    if state is None or not state.phase.final:
        return command(parts, spec, wanted, now)
    new, action = engine.way_back(state, policy_of(spec), now, f"rollback by {wanted.actor}: {wanted.reason}".rstrip(": "))
    return _record(parts, spec, None, new, action, wanted, now)


def tick(parts: Parts, spec: ModelSpec, now: dt.datetime) -> Tick | None:
    """One look at the running rollout: judge, decide, record, carry out; also repairs what a crash left half done."""
    state = current(parts, spec.name)
    if state is None:
        return None
    if state.phase.final:
        revoked = revocation.verdict(parts, spec, state, policy_of(spec), now)
        if revoked is not None:
            new, action = engine.way_back(state, policy_of(spec), now, f"labels: {'; '.join(revoked.reasons)}")
            return _record(parts, spec, None, new, action, revoked, now)
        carry_out(parts, spec, state, now)
        return Tick(state, Action(Act.NONE, str(state.phase)), None, changed=False)
    verdict = _judged(parts, spec, state, now)
    new, action = engine.advance(state, verdict, policy_of(spec), now)
    if new == state:
        return Tick(state, action, verdict, changed=False)
    return _record(parts, spec, state, new, action, verdict, now)


def _record(
    parts: Parts,
    spec: ModelSpec,
    old: RolloutState | None,
    new: RolloutState,
    action: Action,
    signal: Verdict | Command | None,
    now: dt.datetime,
) -> Tick:
    """First the ledger, then the world: what the ledger says is done now or by the next tick."""
    if new == old:
        return Tick(new, action, signal if isinstance(signal, Verdict) else None, changed=False)
    told = engine.state_of(parts.ledger.append(engine.record(old, new, action, signal, now)))
    carry_out(parts, spec, told, now)
    return Tick(told, action, signal if isinstance(signal, Verdict) else None, changed=True)


def carry_out(parts: Parts, spec: ModelSpec, state: RolloutState, now: dt.datetime) -> None:
    """Make servers, routes and aliases equal to the state; every part of it is safe to repeat."""
    routes, arms = engine.desired(state, now)
    if routes is None:
        if state.phase.final:
            parts.serving.remove(spec.name)
            return
        routes, arms = Routes.all_to(state.candidate), (state.candidate,)
    versions = parts.versions(spec.name)
    running = [_arm(parts, spec, key, versions, state) for key in dict.fromkeys((*routes.arms, *arms))]
    parts.serving.apply(spec.name, running, routes, options_of(parts, spec))
    _set_aliases(parts, spec, state, versions)


def options_of(parts: Parts, spec: ModelSpec) -> ServingOptions:
    """How the model is served, apart from versions and weights."""
    repo = Path(parts.feature_store.root) / spec.name
    return ServingOptions(
        feature_repo=str(repo),
        time_zone=spec.source.partitions.timezone,
        grace_seconds=min(spec.rollout.keep_warm_seconds, 300.0),
    )


def _arm(parts: Parts, spec: ModelSpec, key: str, versions: dict[str, Version], state: RolloutState) -> Arm:
    """A version's server and its part: a champion or previous version may stand in for a dead arm, a candidate may not."""
    version, part = versions.get(version_of(key)), "champion"
    if version is None:
        raise NotFoundError(
            f"version {version_of(key)} of {spec.name} is to serve, but is no longer in the registry; restore it there"
        )
    if key.endswith(BASELINE):
        part = "baseline"
    elif key == state.candidate and state.phase is not Phase.PROMOTED:
        part = "candidate"
    elif key != state.candidate and state.phase is Phase.PROMOTED:
        part = "previous"
    return Arm(str(version.number), str(_artifact(parts, spec, version)), version.digest, part)


def _artifact(parts: Parts, spec: ModelSpec, version: Version) -> Path:
    """The version's artifact on this machine, fetched once; its files are hashed once a process, and again when they change.

    The predictor compares the bytes that it loads with the digest itself.
    """
    folder = parts.cache / spec.name / version.digest
    if folder.is_dir():
        found = artifact.stamps(folder)  # before the bytes, so that a change in between is seen next time
        if _VERIFIED.get(folder) == found:
            return folder
        if artifact.digest(folder) == version.digest:
            _VERIFIED[folder] = found
            return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    return parts.registry.fetch(spec.name, version.number, folder)


def _set_aliases(parts: Parts, spec: ModelSpec, state: RolloutState, versions: dict[str, Version]) -> None:
    promoted = state.phase is Phase.PROMOTED
    wanted: dict[str, int | None] = {"challenger": None if state.phase.final else int(state.candidate)}
    if promoted:
        wanted |= {"champion": int(state.candidate), "previous": int(state.champion) if state.champion else None}
        if "candidate" in versions[state.candidate].aliases:
            wanted["candidate"] = None
    held = {alias: v.number for v in versions.values() for alias in v.aliases}
    for alias, number in wanted.items():
        if held.get(alias) != number:
            parts.registry.set_alias(spec.name, alias, number)


def _judged(parts: Parts, spec: ModelSpec, state: RolloutState, now: dt.datetime) -> Verdict:
    """The verdict of this look. What stands in its way makes it an ERROR, but never hides harm that is proven all the same."""
    trouble: list[str] = []
    with _noted(trouble):
        if (inadmissible := _inadmissible(parts, spec, state)) is not None:
            return inadmissible
    with _noted(trouble):
        carry_out(parts, spec, state, now)
    verdict = Verdict(Outcome.ERROR)
    with _noted(trouble):
        verdict = _verdict(parts, spec, state, now)
    if not trouble or verdict.outcome is Outcome.FAIL or (state.strategy == engine.WAY_BACK and verdict.reasons):
        return verdict
    return replace(verdict, outcome=Outcome.ERROR, reasons=tuple(dict.fromkeys(trouble)))


@contextmanager
def _noted(trouble: list[str]) -> Iterator[None]:
    try:
        yield
    except MlopsError as error:
        trouble.append(str(error))


def _inadmissible(parts: Parts, spec: ModelSpec, state: RolloutState) -> Verdict | None:
    """FAIL where the candidate may not go live (any more): it is gone, its approval does not hold, or its stored bytes changed.

    Raises ApprovalError while an approval is not bound yet.
    """
    goes_back = state.strategy == engine.WAY_BACK  # to what served before: that needs no approval, nor the registry
    versions = parts.versions(spec.name) if goes_back else {str(v.number): v for v in parts.registry.versions(spec.name)}
    version = versions.get(state.candidate)
    if version is None:
        return Verdict(Outcome.FAIL, (f"version {state.candidate} is no longer in the registry",))
    approval = approval_state(version)
    if not goes_back and approval is ApprovalState.UNBOUND:
        # Tags that somebody is setting in the registry's UI: the next look of `waiting` binds them, or says why not.
        raise ApprovalError(f"the approval of version {state.candidate} was set by hand and is not bound to its evidence yet")
    if not goes_back and approval is not ApprovalState.APPROVED:
        return Verdict(Outcome.FAIL, (f"version {state.candidate} {_UNAPPROVED[approval]}",))
    if state.phase is Phase.PENDING:
        try:
            _artifact(parts, spec, version)
        except ArtifactError as error:
            return Verdict(Outcome.FAIL, (str(error),))
    return None


def _verdict(parts: Parts, spec: ModelSpec, state: RolloutState, now: dt.datetime) -> Verdict:
    try:
        seen = parts.serving.observe(spec.name)
    except ServingError as error:
        return Verdict(Outcome.ERROR, (str(error),))
    failed = seen.arms.get(state.candidate)
    if failed is not None and failed.phase is ServerPhase.FAILED:
        return Verdict(Outcome.FAIL, (f"version {state.candidate} cannot be served: {failed.reason}",))
    if state.phase is Phase.PENDING or state.current is None:
        ready = failed is not None and failed.phase is ServerPhase.READY and (state.champion is not None or seen.ready)
        return judge_start(ready, smoke_failures(parts, spec, state.candidate) if ready else ())
    step, policy = state.current, policy_of(spec)
    if failed is not None and (gone := _gone(parts, spec, state, failed, policy, now)) is not None:
        return gone
    measurements, problem = rollout_measurements.measured(parts, spec, state, now)
    judged = engine.verdict_on(state, measurements, policy, now)
    if judged is None:
        return Verdict(Outcome.INCONCLUSIVE, ("nothing to judge",))
    judged = replace(judged, evidence={**judged.evidence, **_described(parts, spec, state)})
    if problem is not None and judged.outcome is not Outcome.FAIL:
        return replace(judged, outcome=Outcome.ERROR, reasons=(problem,))
    if step.routes.match is not None and judged.outcome is not Outcome.FAIL and judged.requests < step.minimum_requests:
        # No caller reaches a preview by weight: what it must answer before the switch are our own requests.
        wrong = smoke_failures(parts, spec, state.candidate, step.minimum_requests - judged.requests)
        if wrong:
            return Verdict(Outcome.FAIL, tuple(f"preview: {failure}" for failure in wrong))
    return judged


def _gone(
    parts: Parts, spec: ModelSpec, state: RolloutState, arm: ArmState, policy: RolloutPolicy, now: dt.datetime
) -> Verdict | None:
    """FAIL when the candidate's server keeps dying or stays away, which callers do not notice: other arms stand in for it."""
    # Deaths of an earlier rollout of the same version, whose server ran on, are not this one's.
    try:
        before = rollout_evidence.tally_of(parts, spec, state).first("deaths", arm.deaths)
    except StorageError:  # told by `rollout_measurements`; how long the server is away counts all the same
        before = arm.deaths
    restarts = arm.deaths - min(arm.deaths, before)
    down = now.timestamp() - arm.down_since if arm.down_since is not None else 0.0
    return judge_down(state.candidate, down, restarts, policy)


def _described(parts: Parts, spec: ModelSpec, state: RolloutState) -> dict[str, Any]:
    try:
        return rollout_evidence.described(rollout_evidence.tally_of(parts, spec, state))
    except StorageError:  # told by `rollout_measurements`
        return {}
