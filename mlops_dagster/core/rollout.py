"""The rollout of one version as a pure state machine: `advance(state, signal, policy, now) -> (state, action)`.

**Carrying it out.** What is decided is first written to the ledger and then done:

1. `state = replay(ledger.entries(model))`
2. `new, action = advance(state, verdict_or_command, policy, now)`
3. if `new != state`: `told = ledger.append(record(state, new, action, …))`; `state_of(told)` is what holds. The key is the
   rollout's id and the state's revision, so of two processes that decide at once one finds the other's entry, and a decision
   that is taken again after a crash finds its own.
4. make the servers and routes equal to `new.arms` and `new.routes` (every action is that difference; doing it again is safe).

A crash between any two of these is repaired by the next tick. Nothing but the ledger is needed to go on: `replay` gives the state
with all its counters.

**Rules.** Only PASS moves forward; INCONCLUSIVE and ERROR never do, but end in HELD (with an alert) when they last too long. FAIL
leads back from every phase that is not final, also while paused or held. Final phases stay; to undo a promotion later (labels
that landed, a command), `way_back` begins a new rollout in the other direction.
"""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from mlops_dagster.core.analysis import Outcome, Verdict, judge
from mlops_dagster.core.errors import RolloutError
from mlops_dagster.core.measurements import Measurements
from mlops_dagster.core.rollout_state import (
    COMMANDS,
    WAY_BACK,
    Act,
    Action,
    Command,
    Phase,
    RolloutState,
    Standing,
    record,
    replay,
    replay_all,
    standing,
    state_of,
)
from mlops_dagster.core.routes import Routes
from mlops_dagster.core.strategies import RolloutPolicy, Step, count_tests, plan

__all__ = [
    "COMMANDS",
    "WAY_BACK",
    "Act",
    "Action",
    "Command",
    "Phase",
    "RolloutState",
    "Standing",
    "advance",
    "begin",
    "desired",
    "record",
    "refusal",
    "replay",
    "replay_all",
    "standing",
    "state_of",
    "verdict_on",
    "way_back",
]


def begin(
    rollout_id: str, model: str, champion: str | None, candidate: str, policy: RolloutPolicy, now: datetime, reason: str = ""
) -> tuple[RolloutState, Action]:
    """The first state of a rollout. Raises RolloutError when the candidate is the champion.

    `rollout_id` must be the same when the same decision is taken again, for example the id of the approval.
    """
    if candidate == champion:
        raise RolloutError(f"version {candidate} of {model} is the champion already: there is nothing to roll out.")
    steps = plan(champion, candidate, policy)
    strategy = policy.strategy if champion is not None else "first"
    return _begin(rollout_id, model, champion, candidate, steps, strategy, now, reason)


def way_back(
    done: RolloutState, policy: RolloutPolicy, now: datetime, reason: str, failed: int = 0
) -> tuple[RolloutState, Action]:
    """The rollout that undoes a promotion: straight to the version before, as soon as its server is ready (at once while warm).

    Its id follows from the promotion's and how many ways back from it `failed` before, so the promotion is undone once however
    often this is asked. Raises RolloutError when there is nothing to go back to.
    """
    if done.phase is not Phase.PROMOTED:
        raise RolloutError(
            f"rollout {done.rollout_id} is {done.phase}: only a promotion can be undone; abort or roll back a running one."
        )
    if done.champion is None:
        raise RolloutError(f"{done.model} has nothing to go back to: version {done.candidate} was its first deployment.")
    if done.strategy == WAY_BACK:
        raise RolloutError(
            f"{done.model} went back to version {done.candidate} already: start the rollout of a version to change it again."
        )
    again = f"/{failed + 1}" if failed else ""
    return _begin(f"{done.rollout_id}/back{again}", done.model, done.candidate, done.champion, (), WAY_BACK, now, reason)


def advance(state: RolloutState, signal: Verdict | Command, policy: RolloutPolicy, now: datetime) -> tuple[RolloutState, Action]:
    """The next state and what is to be done, for a verdict or a command; never raises, and final states stay as they are."""
    if isinstance(signal, Command):
        why = refusal(state, signal)
        if why is not None:
            return state, Action(Act.NONE, why, refused=True)
        return _COMMANDS[signal.name](state, signal, policy, now)
    if state.phase.final:
        return state, Action(Act.NONE, f"the rollout is over: {state.phase}")
    if signal.outcome is Outcome.FAIL:
        return _back(state, Phase.ROLLED_BACK, "; ".join(signal.reasons) or "FAIL", now, alert=True)
    if state.phase in (Phase.PAUSED, Phase.HELD):
        return state, Action(Act.NONE, f"{state.phase}: waits for a human")
    if signal.outcome is Outcome.ERROR:
        return _error(state, signal, policy, now)
    return _decided(state, signal, policy, now)


def refusal(state: RolloutState, command: Command) -> str | None:
    """Why `command` is not allowed now, or None when it is."""
    if state.phase.final:
        back = " Use a way back to undo a promotion." if command.name == "rollback" and state.phase is Phase.PROMOTED else ""
        return f"rollout {state.rollout_id} is over ({state.phase}): {command.name} has nothing to act on.{back}"
    if command.name == "pause" and state.phase in (Phase.PAUSED, Phase.HELD):
        return f"rollout {state.rollout_id} is {state.phase} already."
    if command.name == "resume" and state.phase not in (Phase.PAUSED, Phase.HELD):
        return f"rollout {state.rollout_id} is {state.phase}, neither paused nor held: there is nothing to resume."
    if command.name == "promote" and state.step < 0:
        return f"version {state.candidate} is not ready to serve yet: wait until its server is, or abort."
    if command.name == "rollback" and state.strategy == WAY_BACK:
        return f"{state.model} is going back to version {state.candidate} already; abort to stay with version {state.champion}."
    if command.name == "rollback" and state.champion is None:
        return f"{state.model} has nothing to go back to: version {state.candidate} is its first. Use abort to give it up."
    return None


def verdict_on(state: RolloutState, measurements: Measurements, policy: RolloutPolicy, now: datetime) -> Verdict | None:
    """`analysis.judge` for the present step; None before the first step and when the rollout is over."""
    if state.current is None:
        return None
    return judge(state.current, count_tests(state.steps), state.entered_at, measurements, policy, now)


def desired(state: RolloutState, now: datetime) -> tuple[Routes | None, tuple[str, ...]]:
    """What must be true of the gateway and of the serving host now: the routes, and the arms that run.

    After a promotion the old version stays warm until `warm_until`; from then on it is left out.
    """
    if state.phase is Phase.PROMOTED and state.routes and state.warm_until and now >= state.warm_until:
        routes = Routes.all_to(state.candidate)
        return routes, routes.arms
    return state.routes, state.arms


def _begin(
    rollout_id: str,
    model: str,
    champion: str | None,
    candidate: str,
    steps: tuple[Step, ...],
    strategy: str,
    now: datetime,
    reason: str,
) -> tuple[RolloutState, Action]:
    routes = Routes.all_to(champion, warm=[candidate]) if champion is not None else None
    why = reason or f"version {candidate} is approved"
    state = RolloutState(rollout_id, model, strategy, champion, candidate, steps, Phase.PENDING, -1, now, routes, reason=why)
    return state, Action(Act.START_ARM, why, routes, candidate)


def _error(state: RolloutState, verdict: Verdict, policy: RolloutPolicy, now: datetime) -> tuple[RolloutState, Action]:
    reason = "; ".join(verdict.reasons) or "ERROR"
    counted = _change(state, errors=state.errors + 1)
    if counted.errors >= policy.max_consecutive_errors:
        return _hold(replace(counted, revision=state.revision), f"{counted.errors} ERRORs in a row: {reason}")
    step = state.current
    if step is not None and _late(state, step, now):
        return _out_of_time(state, step, now)
    return counted, Action(Act.NONE, reason)


def _decided(state: RolloutState, verdict: Verdict, policy: RolloutPolicy, now: datetime) -> tuple[RolloutState, Action]:
    """PASS or INCONCLUSIVE in a running phase."""
    calm = _change(state, errors=0) if state.errors else state
    waited = (now - state.entered_at).total_seconds()
    step = state.current
    if step is None:
        if verdict.outcome is Outcome.PASS:
            return _forward(state, policy, now)
        if waited >= policy.start_seconds:
            return _back(
                state, Phase.ROLLED_BACK, f"version {state.candidate} was not ready after {waited:.0f} s", now, alert=True
            )
        return calm, Action(Act.NONE, "starting")
    if verdict.outcome is Outcome.PASS and verdict.requests >= step.minimum_requests and waited >= step.minimum_seconds:
        return _forward(state, policy, now)
    if _late(state, step, now):
        return _out_of_time(state, step, now)
    if step.maximum_seconds is None and waited >= step.minimum_seconds + policy.max_inconclusive_seconds:
        return _hold(state, f"{step.name}: no verdict after {waited:.0f} s: {'; '.join(verdict.reasons)}")
    return calm, Action(Act.NONE, "; ".join(verdict.reasons))


def _late(state: RolloutState, step: Step, now: datetime) -> bool:
    return step.maximum_seconds is not None and (now - state.entered_at).total_seconds() >= step.maximum_seconds


def _out_of_time(state: RolloutState, step: Step, now: datetime) -> tuple[RolloutState, Action]:
    reason = f"{step.name}: inconclusive after {step.maximum_seconds:.0f} s, so version {state.champion} stays"
    return _back(state, Phase.ROLLED_BACK, reason, now, alert=False)


def _forward(state: RolloutState, policy: RolloutPolicy, now: datetime, why: str = "passed") -> tuple[RolloutState, Action]:
    """The gates have passed: wait for the declared pause, enter the next step, or promote."""
    step = state.current
    if step is not None and step.pause and not state.passed:
        paused = _change(state, phase=Phase.PAUSED, passed=True, errors=0, reason=f"{step.name}: passed; waits to be resumed")
        return paused, Action(Act.NONE, paused.reason, alert=True)
    reason = f"{step.name if step else 'start'}: {why}"
    if state.step + 1 >= len(state.steps):
        return _promote(state, policy, now, reason)
    return _enter(state, state.step + 1, now, reason)


def _enter(state: RolloutState, number: int, now: datetime, reason: str) -> tuple[RolloutState, Action]:
    step = state.steps[number]
    phase = Phase.WATCHING if step.watch else Phase.STEPPING
    entered = _change(
        state,
        phase=phase,
        step=number,
        entered_at=now,
        routes=step.routes,
        errors=0,
        passed=False,
        reason=f"{reason}; now {step.name}",
    )
    return entered, Action(Act.SET_ROUTES, entered.reason, step.routes)


def _promote(state: RolloutState, policy: RolloutPolicy, now: datetime, reason: str) -> tuple[RolloutState, Action]:
    old = [state.champion] if state.champion is not None and state.strategy != WAY_BACK else []
    routes = Routes.all_to(state.candidate, warm=old)
    warm_until = now + timedelta(seconds=policy.keep_warm_seconds) if old else None
    why = state.reason if state.strategy == WAY_BACK else reason
    done = _change(
        state, phase=Phase.PROMOTED, entered_at=now, routes=routes, errors=0, passed=False, warm_until=warm_until, reason=why
    )
    return done, Action(Act.PROMOTE, why, routes, state.candidate)


def _back(state: RolloutState, phase: Phase, reason: str, now: datetime, alert: bool) -> tuple[RolloutState, Action]:
    """Every request to the champion, and the end; before a first deployment there is none, and nothing serves."""
    routes = Routes.all_to(state.champion) if state.champion is not None else None
    ended = _change(state, phase=phase, entered_at=now, routes=routes, errors=0, passed=False, reason=reason)
    return ended, Action(Act.ROLL_BACK, reason, routes, state.champion, alert)


def _hold(state: RolloutState, reason: str) -> tuple[RolloutState, Action]:
    held = _change(state, phase=Phase.HELD, errors=0, reason=reason)
    return held, Action(Act.HOLD, reason, state.routes, alert=True)


def _pause(state: RolloutState, command: Command, policy: RolloutPolicy, now: datetime) -> tuple[RolloutState, Action]:
    paused = _change(state, phase=Phase.PAUSED, errors=0, passed=False, reason=_why(command))
    return paused, Action(Act.NONE, paused.reason)


def _resume(state: RolloutState, command: Command, policy: RolloutPolicy, now: datetime) -> tuple[RolloutState, Action]:
    """After a declared pause on to what follows; otherwise the present step again from its beginning."""
    if state.passed:
        return _forward(state, policy, now, _why(command))
    if state.step < 0:
        pending = _change(state, phase=Phase.PENDING, entered_at=now, errors=0, reason=_why(command))
        return pending, Action(Act.START_ARM, pending.reason, state.routes, state.candidate)
    return _enter(state, state.step, now, _why(command))


def _force(state: RolloutState, command: Command, policy: RolloutPolicy, now: datetime) -> tuple[RolloutState, Action]:
    """A human's promotion: from before the watch into the watch, from the watch to the end."""
    last = len(state.steps) - 1
    if state.step < last:
        return _enter(state, last, now, _why(command))
    return _promote(state, policy, now, _why(command))


def _abort(state: RolloutState, command: Command, policy: RolloutPolicy, now: datetime) -> tuple[RolloutState, Action]:
    return _back(state, Phase.ABORTED, _why(command), now, alert=False)


def _rollback(state: RolloutState, command: Command, policy: RolloutPolicy, now: datetime) -> tuple[RolloutState, Action]:
    return _back(state, Phase.ROLLED_BACK, _why(command), now, alert=False)


def _supersede(state: RolloutState, command: Command, policy: RolloutPolicy, now: datetime) -> tuple[RolloutState, Action]:
    return _back(state, Phase.SUPERSEDED, _why(command), now, alert=False)


_COMMANDS = {
    "pause": _pause,
    "resume": _resume,
    "promote": _force,
    "abort": _abort,
    "rollback": _rollback,
    "supersede": _supersede,
}


def _change(state: RolloutState, **changes: Any) -> RolloutState:
    return replace(state, revision=state.revision + 1, **changes)


def _why(command: Command) -> str:
    return f"{command.name} by {command.actor}" + (f": {command.reason}" if command.reason else "")
