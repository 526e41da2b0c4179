"""A rollout carried out in a world that may stop before or after any single effect: it must end as if it had not."""

from datetime import UTC, datetime, timedelta

import pytest

from mlops_dagster.core.analysis import Outcome, Verdict
from mlops_dagster.core.ledger import Entry, live_at, seal, verify
from mlops_dagster.core.rollout import Command, Phase, RolloutState, advance, begin, desired, record, replay, state_of
from mlops_dagster.core.routes import Routes
from mlops_dagster.core.strategies import STRATEGIES, RolloutPolicy

T0 = datetime(2013, 3, 1, tzinfo=UTC)
PASS = Verdict(Outcome.PASS, ("good",), {}, 10_000)
FAIL = Verdict(Outcome.FAIL, ("bad",), {}, 10_000)
ERROR = Verdict(Outcome.ERROR, ("no metrics",))


class Crash(Exception):
    pass


class World:
    """A ledger, a gateway, a serving host and a registry in memory; the process dies before its `dies_at`-th effect, once."""

    def __init__(self, rules: RolloutPolicy, script, dies_at: int | None) -> None:
        self.rules, self.script, self.dies_at = rules, script, dies_at
        self.entries: list[Entry] = []
        self.routes: Routes | None = Routes.all_to("1")
        self.running = {"1"}
        self.champion = "1"
        self.effects = 0
        self.now = T0
        self.history: list[Routes | None] = []

    def effect(self) -> None:
        self.effects += 1
        if self.effects == self.dies_at:
            raise Crash

    def append(self, new) -> Entry:
        self.effect()
        for entry in self.entries:
            if entry.key == new.key:
                return entry
        self.entries.append(seal(new, self.entries[-1].receipt if self.entries else None))
        self.effect()
        return self.entries[-1]

    def realise(self, state: RolloutState) -> None:
        routes, arms = desired(state, self.now)
        for arm in set(arms) - self.running:
            self.effect()
            self.running.add(arm)
        if routes is not None and routes != self.routes:
            self.effect()
            self.routes = routes
            self.history.append(routes)
        champion = state.candidate if state.phase is Phase.PROMOTED else state.champion
        if champion != self.champion:
            self.effect()
            self.champion = champion  # type: ignore[assignment]
        for arm in self.running - set(arms):
            self.effect()
            self.running.discard(arm)
        assert routes is None or set(routes.arms) <= self.running, "a route never leads to a server that does not run"

    def tick(self) -> None:
        state = replay(self.entries)
        if state is None:
            first, action = begin("r1", "m", "1", "2", self.rules, self.now)
            state = state_of(self.append(record(None, first, action, None, self.now)))
        self.realise(state)
        signal = self.script(state)
        new, action = advance(state, signal, self.rules, self.now)
        if new != state:
            new = state_of(self.append(record(state, new, action, signal, self.now)))
        self.realise(new)

    def run(self) -> None:
        for _ in range(60):
            self.now += timedelta(seconds=100)
            try:
                self.tick()
            except Crash:
                self.dies_at = None


def good(state: RolloutState) -> Verdict | Command:
    return Command("resume", "ada") if state.phase is Phase.PAUSED else PASS


def bad_in_the_watch(state: RolloutState) -> Verdict | Command:
    return FAIL if state.phase is Phase.WATCHING else good(state)


def bad_at_once(state: RolloutState) -> Verdict | Command:
    return FAIL if state.step == 0 else good(state)


def blind(state: RolloutState) -> Verdict | Command:
    return good(state) if state.step < 0 else ERROR


def aborted(state: RolloutState) -> Verdict | Command:
    return Command("abort", "ada") if state.step == 0 else good(state)


@pytest.mark.parametrize("script", [good, bad_in_the_watch, bad_at_once, blind, aborted])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_crash_before_or_after_any_effect_changes_nothing(strategy: str, script) -> None:
    rules = RolloutPolicy(strategy=strategy, shadow_seconds=150, pauses=(25.0,), keep_warm_seconds=600, ab_maximum_seconds=4000)

    def outcome(world: World) -> tuple:
        final = replay(world.entries)
        assert final is not None
        kept = [(entry.key, entry.kind) for entry in world.entries]
        return final.phase, final.step, final.errors, world.routes, world.running, world.champion, kept, world.history

    undisturbed = World(rules, script, None)
    undisturbed.run()
    expected = outcome(undisturbed)
    assert undisturbed.effects >= 4
    for dies_at in range(1, undisturbed.effects + 1):
        world = World(rules, script, dies_at)
        world.run()
        assert world.dies_at is None, "it did crash"
        assert verify(world.entries) is None
        assert outcome(world) == expected, f"crash before effect {dies_at}"


def test_two_processes_that_decide_at_once_agree_on_the_first() -> None:
    rules = RolloutPolicy()
    world = World(rules, good, None)
    world.tick()
    state = replay(world.entries)
    assert state is not None
    one, one_action = advance(state, FAIL, rules, T0 + timedelta(seconds=70))
    two, two_action = advance(state, Command("pause", "ada"), rules, T0 + timedelta(seconds=70))
    told_one = world.append(record(state, one, one_action, FAIL, T0))
    told_two = world.append(record(state, two, two_action, None, T0))
    assert told_one == told_two
    assert state_of(told_two) == one == replay(world.entries)


def test_the_ledger_tells_what_was_live() -> None:
    world = World(RolloutPolicy(step_seconds=90, watch_seconds=90), good, None)
    world.run()
    assert live_at(world.entries, "m", T0) is None
    shares = [live_at(world.entries, "m", T0 + timedelta(seconds=s)).routes.percent("2") for s in (150, 250, 350, 450, 9999)]  # type: ignore[union-attr]
    assert shares == [5, 25, 50, 100, 100]
    assert live_at(world.entries, "m", T0 + timedelta(seconds=150)).version == "1"  # type: ignore[union-attr]
