"""Carrying out rollouts: one tick reads the ledger, judges, decides by core.rollout, records, and makes the servers equal to it."""

import datetime as dt
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlops_dagster.assets import approvals, revocation, rollout_evidence, rollout_measurements, rollout_versions
from mlops_dagster.assets.smoke import failures as smoke_failures
from mlops_dagster.core import rollout as engine
from mlops_dagster.core.analysis import Verdict, judge_down, judge_start
from mlops_dagster.core.errors import MlopsError, RolloutError, ServingError, StorageError
from mlops_dagster.core.rollout import Act, Action, Command, Phase, RolloutState
from mlops_dagster.core.rollout_gates import Outcome
from mlops_dagster.core.routes import BASELINE, Routes, version_of
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.core.strategies import RolloutPolicy
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.inference_segments import InferenceSegments
from mlops_dagster.resources.ledger import Ledger
from mlops_dagster.resources.live_metrics import LiveMetrics
from mlops_dagster.resources.registry import Registry, Version
from mlops_dagster.resources.serving import Arm, ArmState, Serving, ServingOptions
from mlops_dagster.resources.serving import Phase as ServerPhase

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
_JUDGED_COMMANDS = ("promote", "resume")
"""Commands that bring the candidate to more callers."""

_log = logging.getLogger(__name__)


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
        """See `rollout_versions.known`."""
        return rollout_versions.known(self, model)

    def version(self, model: str, number: str) -> Version:
        """See `rollout_versions.one`."""
        return rollout_versions.one(self, model, number, self.versions(model))


@dataclass(frozen=True)
class Tick:
    """What one look found and did; `changed` when the ledger has a new entry of it, `trouble` what kept it from being carried out."""

    state: RolloutState
    action: Action
    verdict: Verdict | None
    changed: bool
    trouble: str = ""


def policy_of(spec: ModelSpec) -> RolloutPolicy:
    """The declaration's rollout and monitoring sections as a policy."""
    return spec.rollout.policy(
        max_p99_latency_ms=spec.monitoring.max_p99_latency_ms,
        accuracy_drop=min(max(spec.monitoring.max_accuracy_drop, 0.001), 0.999),
        sticky_salt=spec.name,
    )


def rollout_id(version: Version, before: int = 0) -> str:
    """The same approval gives the same rollout; `before`: how many this version had, where a person starts one more."""
    again = f"/again/{before}" if before else ""
    return f"{version.model}-{version.number}-{version.registered_hash[:12]}{again}"


def current(parts: Parts, model: str) -> RolloutState | None:
    """The newest rollout of a model as the ledger has it."""
    return engine.replay(parts.ledger.entries(model), model)


def champion_of(state: RolloutState | None) -> str | None:
    """The version that serves, by the ledger: the registry may not know it yet, or not any more."""
    if state is None:
        return None
    return state.candidate if state.phase is Phase.PROMOTED else state.champion


def waiting(parts: Parts, spec: ModelSpec, now: dt.datetime) -> Version | None:
    """The newest approved version that is newer than the champion and was not rolled out yet."""
    valid = approvals.adopt(parts.registry, parts.ledger, spec.name, now)
    champion = champion_of(current(parts, spec.name))
    newest = valid[-1] if valid else None
    if newest is None or (champion is not None and newest.number <= int(champion)):
        return None
    return None if parts.ledger.find(f"rollout/{rollout_id(newest)}/0") else newest


def chosen(parts: Parts, spec: ModelSpec, number: int, now: dt.datetime) -> Version:
    """The approved version that a person wants to bring in, also once more. Raises NotFoundError, or RolloutError where it may not be."""
    valid = {v.number: v for v in approvals.adopt(parts.registry, parts.ledger, spec.name, now)}
    version = approvals.find(parts.registry, spec.name, number)
    if number not in valid:
        raise RolloutError(f"version {number} of {spec.name} is not approved as it is now; approve it with `mlops approve` first")
    state = current(parts, spec.name)
    if state is not None and not state.phase.final and state.candidate == str(number):
        raise RolloutError(f"version {number} of {spec.name} is being brought in already: {state.phase}")
    return version


def start(parts: Parts, spec: ModelSpec, version: Version, now: dt.datetime, again: bool = False) -> Tick:
    """Begin the rollout of an approved version, `again` where it had one already; one that runs is superseded first."""
    running = current(parts, spec.name)
    champion, before = champion_of(running), 0
    if again:
        base = f"rollout/{rollout_id(version)}/"
        told = (entry.key for entry in parts.ledger.entries(spec.name) if entry.key.startswith(base) and "/back" not in entry.key)
        before = sum(key.endswith("/0") for key in told)
    state, action = engine.begin(rollout_id(version, before), spec.name, champion, str(version.number), policy_of(spec), now)
    if running is not None and not running.phase.final:
        command(parts, spec, Command("supersede", reason=f"version {version.number} is approved"), now)
    return _record(parts, spec, None, state, action, None, now)


def command(parts: Parts, spec: ModelSpec, wanted: Command, now: dt.datetime) -> Tick | None:
    """Apply a person's command to the running rollout; None without one. A refused command says why in the action.

    A version that may not go live is neither promoted nor resumed: raises MlopsError where the registry cannot be asked that.
    """
    state = current(parts, spec.name)
    if state is None:
        return None
    if wanted.name in _JUDGED_COMMANDS and engine.refusal(state, wanted) is None:
        inadmissible = rollout_versions.inadmissible(parts, spec, state)
        if inadmissible is not None:
            why = f"{wanted.name} is refused: {'; '.join(inadmissible.reasons)}"
            return Tick(state, Action(Act.NONE, why, refused=True), inadmissible, changed=False)
    new, action = engine.advance(state, wanted, policy_of(spec), now)
    return _record(parts, spec, state, new, action, wanted, now)


def roll_back(parts: Parts, spec: ModelSpec, wanted: Command, now: dt.datetime, leave: str | None = None) -> Tick | None:
    """Back to the version before: ends a running rollout, or undoes the last promotion. None where there never was a rollout.

    `leave`: the version to be undone. Without it, a promotion is undone only where nothing but a failed way back came after it: who
    asks twice to end a rollout must not undo the promotion before it too. Raises RolloutError where there is nothing to go back to.
    """
    state, found = current(parts, spec.name), engine.standing(parts.ledger.entries(spec.name), spec.name)
    if leave is not None and state is not None and (serves := state.candidate if found is None else champion_of(state)) != leave:
        raise RolloutError(f"version {leave} of {spec.name} is not what a rollback would undo now: that is version {serves}.")
    if state is None or not state.phase.final:
        return command(parts, spec, wanted, now)
    plain = state.phase is Phase.PROMOTED or state.strategy == engine.WAY_BACK
    if found is None or not (plain or leave):
        serves = f"; to go back from version {state.champion}, which serves, add --from {state.champion}" if found else ""
        raise RolloutError(f"rollout {state.rollout_id} is over ({state.phase}) and has nothing to undo{serves}.")
    why = f"rollback by {wanted.actor}: {wanted.reason}".rstrip(": ")
    new, action = engine.way_back(found.promotion, policy_of(spec), now, why, found.ways_back)
    begun = _record(parts, spec, None, new, action, wanted, now)
    trouble: list[str] = []
    with _noted(trouble):  # a version that is still warm serves now; one that must start first is the sensor's
        begun = replace(tick(parts, spec, now) or begun, changed=True)
    return replace(begun, trouble="; ".join(trouble)) if trouble else begun


def tick(parts: Parts, spec: ModelSpec, now: dt.datetime) -> Tick | None:
    """One look at the running rollout: judge, decide, record, carry out; also repairs what a crash left half done.

    Raises MlopsError where what was decided earlier cannot be carried out; a decision of this look is told in any case.
    """
    state = current(parts, spec.name)
    if state is None:
        return None
    if state.phase.final:
        found = engine.standing(parts.ledger.entries(spec.name), spec.name)
        # A way back that failed waits for a person: asked for again by itself, it would fail again at every look.
        revoked = (
            revocation.verdict(parts, spec, found.promotion, policy_of(spec), now) if found and not found.ways_back else None
        )
        if found and revoked:
            new, action = engine.way_back(found.promotion, policy_of(spec), now, f"labels: {'; '.join(revoked.reasons)}")
            return _looked(parts, spec, _decided(parts, None, new, action, revoked, now), now)
        carry_out(parts, spec, state, now)
        return Tick(state, Action(Act.NONE, str(state.phase)), None, changed=False)
    verdict = _judged(parts, spec, state, now)
    new, action = engine.advance(state, verdict, policy_of(spec), now)
    return _looked(parts, spec, _decided(parts, state, new, action, verdict, now), now)


def _looked(parts: Parts, spec: ModelSpec, found: Tick, now: dt.datetime) -> Tick:
    trouble: list[str] = []
    if found.changed:
        with _noted(trouble):
            carry_out(parts, spec, found.state, now)
    return replace(found, trouble="; ".join(trouble))


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
    found = _decided(parts, old, new, action, signal, now)
    if found.changed:
        carry_out(parts, spec, found.state, now)
    return found


def _decided(
    parts: Parts, old: RolloutState | None, new: RolloutState, action: Action, signal: Verdict | Command | None, now: dt.datetime
) -> Tick:
    verdict = signal if isinstance(signal, Verdict) else None
    if new == old:
        return Tick(new, action, verdict, changed=False)
    told = engine.state_of(parts.ledger.append(engine.record(old, new, action, signal, now)))
    return Tick(told, action, verdict, changed=True)


def carry_out(parts: Parts, spec: ModelSpec, state: RolloutState, now: dt.datetime) -> None:
    """Make servers, routes and aliases equal to the state; every part of it is safe to repeat.

    Aliases that cannot be set now are left to the next look: they only show in the registry what the ledger says.
    """
    routes, arms = engine.desired(state, now)
    if routes is None:
        if state.phase.final:
            parts.serving.remove(spec.name)
            return
        routes, arms = Routes.all_to(state.candidate), (state.candidate,)
    versions = parts.versions(spec.name)
    running = [_arm(parts, spec, key, versions, state) for key in dict.fromkeys((*routes.arms, *arms))]
    parts.serving.apply(spec.name, running, routes, options_of(parts, spec))
    try:
        _set_aliases(parts, spec, state, versions)
    except MlopsError as error:
        _log.warning("the registry's aliases of %s could not be set and wait for the next look: %s", spec.name, error)


def options_of(parts: Parts, spec: ModelSpec) -> ServingOptions:
    """How the model is served, apart from versions and weights."""
    repo = Path(parts.feature_store.root) / spec.name
    return ServingOptions(
        feature_repo=str(repo),
        time_zone=spec.source.partitions.timezone,
        grace_seconds=min(spec.rollout.keep_warm_seconds, 300.0),
        timeout_seconds=spec.serving.timeout_seconds,
        requests_per_second=spec.serving.requests_per_second,
    )


def _arm(parts: Parts, spec: ModelSpec, key: str, versions: dict[str, Version], state: RolloutState) -> Arm:
    """A version's server and its part: a champion or previous version may stand in for a dead arm, a candidate may not."""
    version, part = rollout_versions.one(parts, spec.name, version_of(key), versions), "champion"
    if key.endswith(BASELINE):
        part = "baseline"
    elif key == state.candidate and state.phase is not Phase.PROMOTED:
        part = "candidate"
    elif key != state.candidate and state.phase is Phase.PROMOTED:
        part = "previous"
    return Arm(str(version.number), str(rollout_versions.artifact_of(parts, spec, version)), version.digest, part)


def _set_aliases(parts: Parts, spec: ModelSpec, state: RolloutState, versions: dict[str, Version]) -> None:
    """Make the aliases of the versions that the registry still has those of the state."""
    held = {alias: number for number, version in versions.items() for alias in version.aliases}
    wanted = {"challenger": None if state.phase.final else state.candidate}
    if (champion := champion_of(state)) is not None:
        wanted["champion"] = champion
    if state.phase is Phase.PROMOTED:
        wanted["previous"] = state.champion
        if held.get("candidate") == state.candidate:
            wanted["candidate"] = None
    for alias, number in wanted.items():
        if held.get(alias) != number and (number is None or number in versions):
            parts.registry.set_alias(spec.name, alias, int(number) if number else None)


def _judged(parts: Parts, spec: ModelSpec, state: RolloutState, now: dt.datetime) -> Verdict:
    """The verdict of this look. What stands in its way makes it an ERROR, but never hides harm that is proven all the same."""
    trouble: list[str] = []
    with _noted(trouble):
        if (inadmissible := rollout_versions.inadmissible(parts, spec, state)) is not None:
            return inadmissible
    with _noted(trouble):
        carry_out(parts, spec, state, now)
    verdict = Verdict(Outcome.ERROR)
    with _noted(trouble):
        verdict = _verdict(parts, spec, state, now)
    goes_back = state.strategy == engine.WAY_BACK and verdict.outcome is Outcome.PASS
    if not trouble or verdict.outcome is Outcome.FAIL or goes_back:
        return verdict
    return replace(verdict, outcome=Outcome.ERROR, reasons=tuple(dict.fromkeys(trouble)))


@contextmanager
def _noted(trouble: list[str]) -> Iterator[None]:
    try:
        yield
    except MlopsError as error:
        trouble.append(str(error))


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
    preview = step.routes.match is not None and step.routes.mirror is None
    if preview and judged.outcome is not Outcome.FAIL and judged.requests < step.minimum_requests:
        # No caller reaches this preview by weight: what it must answer before the switch are our own requests.
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
