"""The rollout engine: what each phase does, what can never happen, and that a crash anywhere changes nothing."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_dagster.core.analysis import Outcome, Verdict, judge_start
from mlops_dagster.core.errors import LedgerError, RolloutError
from mlops_dagster.core.ledger import APPROVAL, Entry, NewEntry, seal, verify
from mlops_dagster.core.rollout import (
    COMMANDS,
    Act,
    Command,
    Phase,
    RolloutState,
    advance,
    begin,
    desired,
    record,
    refusal,
    replay,
    replay_all,
    state_of,
    way_back,
)
from mlops_dagster.core.routes import Routes
from mlops_dagster.core.strategies import STRATEGIES, RolloutPolicy

T0 = datetime(2013, 3, 1, tzinfo=UTC)
PASS = Verdict(Outcome.PASS, ("good",), {}, 10_000)
FAIL = Verdict(Outcome.FAIL, ("bad",), {}, 10_000)
UNKNOWN = Verdict(Outcome.INCONCLUSIVE, ("few",), {}, 3)
ERROR = Verdict(Outcome.ERROR, ("no metrics",))


def policy(strategy: str = "canary", **changes) -> RolloutPolicy:
    return replace(RolloutPolicy(strategy=strategy), **changes)


def started(rules: RolloutPolicy, champion: str | None = "1") -> RolloutState:
    return begin("r1", "m", champion, "2", rules, T0)[0]


def drive(state: RolloutState, signals, rules: RolloutPolicy, seconds: float = 400.0) -> RolloutState:
    for number, signal in enumerate(signals, start=1):
        state, _ = advance(state, signal, rules, T0 + timedelta(seconds=seconds * number))
    return state


def test_a_canary_that_passes_everywhere() -> None:
    rules = policy(pauses=(25.0,))
    state = started(rules)
    assert (state.phase, state.routes, state.arms) == (Phase.PENDING, Routes.all_to("1", warm=["2"]), ("1", "2"))
    shares, acts = [], []
    for tick in range(1, 8):
        signal = Command("resume", "ada") if state.phase is Phase.PAUSED else PASS
        state, action = advance(state, signal, rules, T0 + timedelta(seconds=400 * tick))
        shares.append(state.routes.percent("2"))  # type: ignore[union-attr]
        acts.append(str(action.act))
    assert shares == [5, 25, 25, 50, 100, 100, 100]
    assert acts == ["set_routes", "set_routes", "none", "set_routes", "set_routes", "promote", "none"]
    assert state.phase is Phase.PROMOTED
    assert state.routes == Routes.all_to("2", warm=["1"])


def test_a_step_lasts_as_long_as_declared_however_good_it_is() -> None:
    rules = policy(step_seconds=60)
    state, _ = advance(started(rules), PASS, rules, T0)
    for seconds in (0, 30, 59):
        same, action = advance(state, PASS, rules, T0 + timedelta(seconds=seconds))
        assert same == state
        assert action.act is Act.NONE
    assert advance(state, PASS, rules, T0 + timedelta(seconds=60))[0].step == 1


def test_a_pass_with_fewer_than_the_minimum_of_requests_is_none() -> None:
    rules = policy(minimum_requests=500)
    state, _ = advance(started(rules), PASS, rules, T0)
    few = replace(PASS, requests=499)
    assert advance(state, few, rules, T0 + timedelta(hours=0.5))[0] == state
    assert advance(state, few, rules, T0 + timedelta(hours=2))[0].phase is Phase.HELD
    assert advance(state, replace(PASS, requests=500), rules, T0 + timedelta(hours=0.5))[0].step == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fail_leads_back_from_every_phase(strategy: str) -> None:
    rules = policy(strategy)
    ways = [[], [PASS], [PASS, Command("pause")], [PASS] + [ERROR] * 5, [PASS, PASS], [PASS, PASS, PASS]]
    for way in ways:
        before = drive(started(rules), way, rules)
        if before.phase.final:
            continue
        state, action = advance(before, FAIL, rules, T0 + timedelta(hours=1))
        assert (state.phase, action.act, action.alert) == (Phase.ROLLED_BACK, Act.ROLL_BACK, True)
        assert state.routes == action.routes == Routes.all_to("1")
        assert "bad" in state.reason


def test_the_fifth_error_in_a_row_holds_and_tells_a_human() -> None:
    rules = policy(max_consecutive_errors=5)
    state = drive(started(rules), [PASS], rules)
    for _ in range(4):
        state, action = advance(state, ERROR, rules, T0 + timedelta(seconds=410))
        assert (state.phase, action.act) == (Phase.STEPPING, Act.NONE)
    held, action = advance(state, ERROR, rules, T0 + timedelta(seconds=410))
    assert (held.phase, action.act, action.alert) == (Phase.HELD, Act.HOLD, True)
    assert held.routes == state.routes
    calm, _ = advance(state, UNKNOWN, rules, T0 + timedelta(seconds=410))
    assert calm.errors == 0
    assert drive(calm, [ERROR] * 4, rules).phase is Phase.STEPPING


def test_held_waits_for_a_human_even_when_things_look_good() -> None:
    rules = policy()
    held = drive(started(rules), [PASS, *[ERROR] * 5], rules, seconds=10)
    assert advance(held, PASS, rules, T0 + timedelta(days=3))[0] == held
    resumed, action = advance(held, Command("resume", "ada", "metrics are back"), rules, T0 + timedelta(days=3))
    assert (resumed.phase, resumed.step, resumed.routes) == (Phase.STEPPING, held.step, held.routes)
    assert resumed.entered_at == T0 + timedelta(days=3)
    assert action.act is Act.SET_ROUTES


def test_too_long_inconclusive_holds() -> None:
    rules = policy(step_seconds=60, max_inconclusive_seconds=600)
    state = drive(started(rules), [PASS], rules, seconds=1)
    assert advance(state, UNKNOWN, rules, T0 + timedelta(seconds=660))[0] == state
    held, action = advance(state, UNKNOWN, rules, T0 + timedelta(seconds=661))
    assert (held.phase, action.alert) == (Phase.HELD, True)


def test_a_predictor_that_never_becomes_ready() -> None:
    rules = policy(start_seconds=120)
    state = started(rules)
    waiting, action = advance(state, judge_start(False), rules, T0 + timedelta(seconds=119))
    assert waiting == state
    assert action.act is Act.NONE
    failed, action = advance(state, judge_start(False), rules, T0 + timedelta(seconds=120))
    assert (failed.phase, failed.routes, action.alert) == (Phase.ROLLED_BACK, Routes.all_to("1"), True)
    wrong, _ = advance(state, judge_start(True, ["expected 1, got 0"]), rules, T0)
    assert wrong.phase is Phase.ROLLED_BACK
    assert "expected 1" in wrong.reason


def test_the_first_deployment_goes_live_when_its_smoke_predictions_are_right() -> None:
    rules = policy()
    state = started(rules, champion=None)
    assert (state.routes, state.arms) == (None, ("2",))
    done, action = advance(state, judge_start(True), rules, T0)
    assert (done.phase, done.routes, action.act) == (Phase.PROMOTED, Routes.all_to("2"), Act.PROMOTE)
    gone, _ = advance(state, FAIL, rules, T0)
    assert (gone.phase, gone.routes, gone.arms) == (Phase.ROLLED_BACK, None, ())


def test_an_ab_test_out_of_time_keeps_the_champion() -> None:
    rules = policy("ab_test", ab_maximum_seconds=3600)
    for late in (UNKNOWN, ERROR):
        state = drive(started(rules), [PASS], rules, seconds=1)
        assert advance(state, late, rules, T0 + timedelta(seconds=3600))[0].phase is Phase.STEPPING
        ended, action = advance(state, late, rules, T0 + timedelta(seconds=3601))
        assert (ended.phase, ended.routes, action.act) == (Phase.ROLLED_BACK, Routes.all_to("1"), Act.ROLL_BACK)
        assert "inconclusive" in ended.reason


def test_a_shadow_ends_with_a_human_by_default() -> None:
    for ends, phase in (("hold", Phase.PAUSED), ("promote", Phase.WATCHING)):
        rules = policy("shadow", shadow_ends=ends)
        state = drive(started(rules), [PASS, PASS], rules, seconds=3700)
        assert state.phase is phase
    rules = policy("shadow")
    paused = drive(started(rules), [PASS, PASS], rules, seconds=3700)
    assert paused.routes.serving == ("1",)  # type: ignore[union-attr]
    watched, _ = advance(paused, Command("resume", "ada"), rules, T0 + timedelta(days=1))
    assert watched.phase is Phase.WATCHING


def test_a_human_promotes_by_way_of_the_watch() -> None:
    rules = policy()
    assert refusal(started(rules), Command("promote")) is not None
    stepping = drive(started(rules), [PASS], rules)
    watching, action = advance(stepping, Command("promote", "ada", "seen enough"), rules, T0 + timedelta(hours=1))
    assert (watching.phase, action.act) == (Phase.WATCHING, Act.SET_ROUTES)
    promoted, action = advance(watching, Command("promote", "ada"), rules, T0 + timedelta(hours=1))
    assert (promoted.phase, action.act) == (Phase.PROMOTED, Act.PROMOTE)


def test_the_watch_goes_back_by_one_change_of_weights() -> None:
    rules = policy("blue_green")
    watching = drive(started(rules), [PASS, PASS], rules)
    assert watching.phase is Phase.WATCHING
    assert watching.routes == Routes.all_to("2", warm=["1"])
    back, action = advance(watching, Command("rollback", "ada", "users complain"), rules, T0 + timedelta(hours=1))
    assert action.routes == back.routes == Routes.all_to("1")
    assert set(back.arms) <= set(watching.arms), "nothing has to be started for the way back"


def test_commands_that_make_no_sense_change_nothing_and_say_why() -> None:
    rules = policy()
    stepping = drive(started(rules), [PASS], rules)
    done = drive(stepping, [Command("abort")], rules)
    for state, name in [(stepping, "resume"), (started(rules), "promote"), *((done, name) for name in COMMANDS)]:
        same, action = advance(state, Command(name), rules, T0)
        assert same == state
        assert action.refused
        assert action.reason
    with pytest.raises(RolloutError, match="'explode' is unknown: use one of pause"):
        Command("explode")


def test_the_champion_itself_cannot_be_rolled_out() -> None:
    with pytest.raises(RolloutError, match="is the champion already"):
        begin("r", "m", "2", "2", policy(), T0)


def test_the_old_version_stays_warm_and_is_then_left_out() -> None:
    rules = policy(keep_warm_seconds=3600)
    done = drive(started(rules), [PASS] * 5, rules)
    assert done.phase is Phase.PROMOTED
    assert done.warm_until is not None
    assert desired(done, done.warm_until - timedelta(seconds=1)) == (Routes.all_to("2", warm=["1"]), ("2", "1"))
    assert desired(done, done.warm_until) == (Routes.all_to("2"), ("2",))


def test_a_promotion_is_undone_once() -> None:
    rules = policy()
    done = drive(started(rules), [PASS] * 5, rules)
    back, action = way_back(done, rules, T0 + timedelta(days=7), "labels: accuracy fell by 8 %")
    assert (back.champion, back.candidate, back.routes) == ("2", "1", Routes.all_to("2", warm=["1"]))
    assert action.act is Act.START_ARM
    assert way_back(done, rules, T0 + timedelta(days=8), "again")[0].rollout_id == back.rollout_id
    errors, _ = advance(back, ERROR, rules, T0 + timedelta(days=7))
    undone, action = advance(errors, judge_start(True), rules, T0 + timedelta(days=7))
    assert (undone.phase, undone.routes, action.act) == (Phase.PROMOTED, Routes.all_to("1"), Act.PROMOTE)
    assert record(back, undone, action, PASS, T0).kind == "rollback"
    assert "accuracy fell" in undone.reason
    with pytest.raises(RolloutError, match="went back to version 1 already"):
        way_back(undone, rules, T0, "")


def test_nothing_to_go_back_to() -> None:
    rules = policy()
    first = drive(started(rules, champion=None), [PASS], rules)
    with pytest.raises(RolloutError, match="nothing to go back to"):
        way_back(first, rules, T0, "")
    with pytest.raises(RolloutError, match="only a promotion"):
        way_back(started(rules), rules, T0, "")


# Properties: what holds for any sequence of verdicts and commands.

policies = st.builds(
    lambda name, steps, pauses, baseline, mirror, ends, pause: RolloutPolicy(
        strategy=name,
        steps_percent=steps,
        pauses=steps[:1] if pauses else (),
        baseline_arm=baseline,
        preview_mirror_percent=mirror,
        shadow_ends=ends,
        pause_before_switch=pause,
        ab_maximum_seconds=5000.0,
        minimum_requests=100,
    ),
    st.sampled_from(sorted(STRATEGIES)),
    st.sampled_from([(5.0, 25.0, 50.0), (0.1,), (10.0, 50.0)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 100.0]),
    st.sampled_from(["hold", "promote"]),
    st.booleans(),
)
verdicts = st.builds(
    lambda outcome, requests: Verdict(outcome, ("because",), {"n": requests}, requests),
    st.sampled_from(sorted(Outcome)),
    st.sampled_from([0, 49, 50, 99, 100, 100_000]),
)
signals = st.one_of(verdicts, st.builds(Command, st.sampled_from(COMMANDS), st.just("ada")))
moments = st.integers(0, 4000)
runs = st.lists(st.tuples(signals, moments), max_size=40)


@settings(max_examples=300, deadline=None)
@given(policies, st.sampled_from(["1", None]), runs)
def test_what_can_never_happen(rules: RolloutPolicy, champion: str | None, run) -> None:
    now = T0
    state, action = begin("r1", "m", champion, "2", rules, now)
    entries: list[Entry] = [seal(record(None, state, action, None, now), None)]
    for signal, seconds in run:
        now += timedelta(seconds=seconds)
        before = state
        state, action = advance(before, signal, rules, now)

        assert (state != before) == (state.revision == before.revision + 1), "every change is counted, and nothing else"
        assert not before.phase.final or state == before, "final phases stay"
        if state.routes is not None:
            assert sum(weight for _, weight in state.routes.weights) == 1000
            assert state.routes.serving, "an arm always serves"
            assert set(state.routes.arms) <= set(state.arms), "every arm that is named runs"
        assert state.routes is not None or champion is None, "the champion serves until another does"
        if isinstance(signal, Verdict):
            moved = state.step != before.step or state.phase is Phase.PROMOTED != before.phase
            if signal.outcome is not Outcome.PASS:
                assert not moved, "only PASS moves forward"
            elif moved and before.current is not None:
                assert signal.requests >= before.current.minimum_requests, "never with too few requests"
            if signal.outcome is Outcome.FAIL:
                assert state.phase.final
        if action.act in (Act.SET_ROUTES, Act.PROMOTE, Act.ROLL_BACK):
            assert action.routes == state.routes
        if state != before:
            entries.append(seal(record(before, state, action, signal, now), entries[-1].receipt))
        assert replay(entries) == state, "the ledger alone gives the state"
    assert verify(entries) is None
    assert len({entry.key for entry in entries}) == len(entries)
    assert RolloutState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_replay_reads_one_models_newest_rollout_only() -> None:
    rules = policy()
    first, action = begin("a", "m", "1", "2", rules, T0)
    other, other_action = begin("b", "n", "7", "8", rules, T0)
    entries = [seal(record(None, first, action, None, T0), None)]
    entries.append(seal(record(None, other, other_action, None, T0), entries[0].receipt))
    assert replay(entries, "m") == first
    assert replay(entries, "n") == other
    assert replay([], "m") is None
    assert replay_all(entries) == {"m": first, "n": other}
    newer, newer_action = advance(other, PASS, rules, T0)
    entries.append(seal(record(other, newer, newer_action, PASS, T0), entries[1].receipt))
    assert replay_all(entries[2:], replay_all(entries[:2])) == replay_all(entries) == {"m": first, "n": newer}
    with pytest.raises(LedgerError, match="holds no rollout state"):
        state_of(seal(NewEntry(APPROVAL, "m", "2", "ada", T0, "good", {}, "key"), None))
    promoted = entries[0].evidence_json.replace('"phase":"pending"', '"phase":"promoted"')
    assert promoted != entries[0].evidence_json
    with pytest.raises(LedgerError, match=r"ledger entry 1 \(rollout_started\) of m was changed after it was written"):
        replay([replace(entries[0], evidence_json=promoted)], "m")
