"""Canaries by the thousand: the gates of `core.rollout_gates` and the rules of `core.rollout`, tick by tick, all runs at once.

`replayed` puts one of the runs through the real `judge` and `advance`; the benchmark compares both before it reports anything.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from mlops_dagster.core.analysis import judge_start
from mlops_dagster.core.measurements import Counters, Measurements
from mlops_dagster.core.rollout import Phase, advance, begin, verdict_on
from mlops_dagster.core.rollout_gates import P99_SHARE, SLOW_SHARE
from mlops_dagster.core.sequential import (
    History,
    Stream,
    factors_above,
    factors_of_increase,
    factors_within,
    increase_began,
    threshold,
)
from mlops_dagster.core.strategies import RolloutPolicy, count_tests, plan

BOUNDS_MS = (50.0, 100.0)  # the champion's 95th percentile is at the first, the absolute limit at the second
HISTORY = Counters(requests=10_000, errors=100, latency=(9_500, 470, 30))
T0 = datetime(2013, 3, 1, tzinfo=UTC)
EVENTS = ("errors", "slow", "over_limit")
NORMAL_995 = 2.5758  # the 99.5 % quantile of the normal distribution
RUNNING, PROMOTED, ROLLED_BACK, HELD = 0, 1, 2, 3


@dataclass(frozen=True)
class Truth:
    """What one arm really does: shares of failed answers, of answers over 50 ms, and of those how many are over 100 ms."""

    errors: float = 0.01
    slow: float = SLOW_SHARE
    over_limit_of_slow: float = 0.06


@dataclass(frozen=True)
class World:
    """The traffic and the two arms; the candidate turns into `later` at tick `turns` (None: it stays what it is)."""

    requests_per_second: float
    candidate: Truth
    champion: Truth = Truth()
    tick_seconds: float = 5.0
    later: Truth | None = None
    turns: int = 0


class Counts:
    """Counts of one arm per run and tick (arrays of runs x ticks), their sums so far, and those since the present step began."""

    def __init__(self, runs: int, ticks: int) -> None:
        self.by_tick = {name: np.zeros((runs, ticks), dtype=np.int32) for name in ("requests", *EVENTS)}
        self.total = {name: np.zeros(runs) for name in self.by_tick}
        self.in_step = {name: np.zeros(runs) for name in self.by_tick}

    def draw(self, tick: int, rows: np.ndarray, mean: np.ndarray, truth: Truth, random: np.random.Generator) -> None:
        requests = random.poisson(mean)
        slow = random.binomial(requests, truth.slow)
        errors, over = random.binomial(requests, truth.errors), random.binomial(slow, truth.over_limit_of_slow)
        for name, drawn in zip(self.by_tick, (requests, errors, slow, over), strict=True):
            self.by_tick[name][rows, tick] = drawn
            self.total[name][rows] += drawn
            self.in_step[name][rows] += drawn

    def enter_step(self, rows: np.ndarray) -> None:
        for sums in self.in_step.values():
            sums[rows] = 0

    def stream(self, event: str, rows, ticks: slice) -> Stream:
        return Stream.of(self.by_tick["requests"][rows, ticks], self.by_tick[event][rows, ticks])


@dataclass
class Fleet:
    """All runs: where each stands, and what was counted."""

    policy: RolloutPolicy
    world: World
    champion: Counts
    candidate: Counts
    phase: np.ndarray
    ended: np.ndarray
    fewest: float  # requests of an arm in a step that was left
    ztest: np.ndarray

    def share(self, phase: int) -> float:
        return float((self.phase == phase).mean())


class Late:
    """The capital of one late-start mixture per run: `core.sequential._mix` with `late`, one tick at a time."""

    def __init__(self, runs: int, alternatives: int) -> None:
        self.started = np.full((runs, alternatives), -np.inf)

    def step(self, factors: np.ndarray, rows: np.ndarray, tick: int) -> np.ndarray:
        entering = -np.log((tick + 1) * (tick + 2))
        self.started[rows] = np.logaddexp(self.started[rows], entering) + factors
        mixed = np.logaddexp.reduce(self.started[rows], axis=1) - np.log(factors.shape[1])
        return np.logaddexp(mixed, -np.log(tick + 2))


def simulate(world: World, policy: RolloutPolicy, runs: int, ticks: int, seed: int) -> Fleet:
    """`runs` canaries until each is final or held, looked at every tick."""
    random = np.random.default_rng(seed)
    fleet = Fleet(
        policy,
        world,
        Counts(runs, ticks),
        Counts(runs, ticks),
        np.zeros(runs, dtype=int),
        np.full(runs, ticks),
        np.inf,
        np.zeros(runs, dtype=bool),
    )
    engine = _Engine(fleet)
    for tick in range(ticks):
        rows = np.flatnonzero(fleet.phase == RUNNING)
        if not len(rows):
            break
        engine.draw(tick, rows, random)
        engine.decide(tick, rows)
    return fleet


class _Engine:
    def __init__(self, fleet: Fleet) -> None:
        policy, runs = fleet.policy, len(fleet.phase)
        self.fleet, self.policy = fleet, policy
        self.steps = plan("1", "2", policy)
        self.percent = np.array([step.routes.percent("2") for step in self.steps])
        self.fail_at = threshold(policy.alpha / count_tests(self.steps))
        self.pass_at = threshold(policy.beta)
        self.step = np.zeros(runs, dtype=int)
        self.first = np.zeros(runs, dtype=int)  # the first tick of the present step
        self.effects = {"errors": policy.error_rate_increase, "slow": policy.slow_share_increase}
        self.limits = {"errors": policy.max_error_rate, "over_limit": P99_SHARE}
        self.histories = {"errors": History(10_000, 100), "slow": History(10_000, 500)}
        self.harm: dict[str, Late] = {}
        self.over: dict[tuple[str, str], Late] = {}
        self.within = {event: np.zeros((runs, 4)) for event in self.effects}

    def draw(self, tick: int, rows: np.ndarray, random: np.random.Generator) -> None:
        world = self.fleet.world
        total = world.requests_per_second * world.tick_seconds
        share = self.percent[self.step[rows]] / 100
        truth = world.later if world.later is not None and tick >= world.turns else world.candidate
        self.fleet.champion.draw(tick, rows, total * (1 - share), world.champion, random)
        self.fleet.candidate.draw(tick, rows, total * share, truth, random)

    def decide(self, tick: int, rows: np.ndarray) -> None:
        compared = self.step[rows] < len(self.steps) - 1
        enough_to_fail = self.fleet.candidate.total["requests"][rows] >= self.policy.minimum_requests_to_fail
        failed = np.zeros(len(rows), dtype=bool)
        passed = np.ones(len(rows), dtype=bool)
        for event in self.effects:
            harm, within = self._compare(event, tick, rows)
            suspects = np.flatnonzero(compared & enough_to_fail & (harm >= self.fail_at))
            failed[[i for i in suspects if self._matters(event, tick, rows[i])]] = True
            passed &= ~compared | (within >= self.pass_at)
        for event, limit in self.limits.items():
            over, champion_over = (self._over(arm, event, limit, tick, rows) for arm in ("candidate", "champion"))
            rate, champion_rate = (self._step_rate(arm, event, rows) for arm in ("candidate", "champion"))
            excused = compared & ((champion_rate > limit) | (champion_over >= self.pass_at))
            failed |= (over >= self.fail_at) & enough_to_fail & ~excused & ~np.isnan(rate)
            passed &= (rate <= limit) & ~excused
        self._naive(rows)
        self._move(tick, rows, failed, passed & ~failed, compared)

    def _move(self, tick: int, rows: np.ndarray, failed: np.ndarray, passed: np.ndarray, compared: np.ndarray) -> None:
        fleet = self.fleet
        waited = (tick + 1 - self.first[rows]) * fleet.world.tick_seconds
        champion, candidate = (arm.in_step["requests"][rows] for arm in (fleet.champion, fleet.candidate))
        least = np.minimum(candidate, np.where(compared, champion, np.inf))
        minimum_seconds = np.array([step.minimum_seconds for step in self.steps])[self.step[rows]]
        forward = passed & (least >= self.policy.minimum_requests) & (waited >= minimum_seconds)
        done = forward & ~compared
        late = ~failed & ~forward & (waited >= minimum_seconds + self.policy.max_inconclusive_seconds)
        fleet.fewest = min(fleet.fewest, least[forward].min(initial=np.inf))
        for which, phase in ((failed, ROLLED_BACK), (done, PROMOTED), (late, HELD)):
            fleet.phase[rows[which]] = phase
            fleet.ended[rows[which]] = tick
        on = rows[forward & compared]
        self.step[on] += 1
        self.first[on] = tick + 1
        for capital in self.within.values():
            capital[on] = 0.0
        for arm in (fleet.champion, fleet.candidate):
            arm.enter_step(on)

    def _compare(self, event: str, tick: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        champion, candidate = (
            arm.stream(event, rows, slice(tick, tick + 1)) for arm in (self.fleet.champion, self.fleet.candidate)
        )
        history = self._known(event, tick, rows)
        harm = factors_of_increase(champion, candidate, self.effects[event], history)[..., 0]
        mixture = self.harm.setdefault(event, Late(len(self.fleet.phase), harm.shape[1]))
        within = factors_within(champion, candidate, self.effects[event], history)[..., 0]
        self.within[event][rows] += within
        return mixture.step(harm, rows, tick), np.logaddexp.reduce(self.within[event][rows], axis=1) - np.log(within.shape[1])

    def _known(self, event: str, tick: int, rows: np.ndarray) -> History:
        """The history before the rollout (as it is weighted) and all ticks before this one, as one history."""
        before, arm = self.histories[event].weighted(), self.fleet.champion
        sums = [arm.total[name][rows] - arm.by_tick[name][rows, tick] for name in ("requests", event)]
        return History(before.requests + sums[0][:, None], before.events + sums[1][:, None], full=True)

    def _matters(self, event: str, tick: int, row: int) -> bool:
        ticks = slice(0, tick + 1)
        champion, candidate = (arm.stream(event, row, ticks) for arm in (self.fleet.champion, self.fleet.candidate))
        begin = increase_began(champion, candidate, self.effects[event], self.histories[event])
        rates = [s.events[begin:].sum() / max(1.0, s.requests[begin:].sum()) for s in (champion, candidate)]
        return rates[1] - rates[0] >= self.effects[event] / 2

    def _over(self, arm: str, event: str, limit: float, tick: int, rows: np.ndarray) -> np.ndarray:
        counts: Counts = getattr(self.fleet, arm)
        factors = factors_above(counts.stream(event, rows, slice(tick, tick + 1)), limit)[..., 0]
        mixture = self.over.setdefault((arm, event), Late(len(self.fleet.phase), factors.shape[1]))
        return mixture.step(factors, rows, tick)

    def _step_rate(self, arm: str, event: str, rows: np.ndarray) -> np.ndarray:
        sums = getattr(self.fleet, arm).in_step
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[event][rows] / sums["requests"][rows]

    def _naive(self, rows: np.ndarray) -> None:
        """The usual test at every tick: two proportions, one-sided, alpha of 1 % split over errors and slow answers."""
        a, b = self.fleet.champion.total, self.fleet.candidate.total
        n_a, n_b = np.maximum(a["requests"][rows], 1), np.maximum(b["requests"][rows], 1)
        for event in self.effects:
            k_a, k_b = a[event][rows], b[event][rows]
            pooled = (k_a + k_b) / (n_a + n_b)
            spread = np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
            score = (k_b / n_b - k_a / n_a) / np.maximum(spread, 1e-12)
            self.fleet.ztest[rows] |= (score > NORMAL_995) & (n_b >= self.policy.minimum_requests)


def replayed(fleet: Fleet, run: int) -> tuple[int, int]:
    """The phase in which, and the tick at which, the real `judge` and `advance` end for one run's counts."""
    policy, width = fleet.policy, timedelta(seconds=fleet.world.tick_seconds)
    state, _ = advance(begin("r", "m", "1", "2", policy, T0)[0], judge_start(True), policy, T0)
    totals = {arm: Counters(latency=(0, 0, 0)) for arm in ("1", "2")}
    ticks = fleet.champion.by_tick["requests"].shape[1]
    measurements = Measurements(bounds_ms=BOUNDS_MS, history=HISTORY).observe(T0, totals)
    for tick in range(ticks):
        now = T0 + (tick + 1) * width
        totals = {"1": _grown(totals["1"], fleet.champion, run, tick), "2": _grown(totals["2"], fleet.candidate, run, tick)}
        measurements = measurements.observe(now, totals)
        verdict = verdict_on(state, measurements, policy, now)
        assert verdict is not None
        state, _ = advance(state, verdict, policy, now)
        ended = {Phase.PROMOTED: PROMOTED, Phase.ROLLED_BACK: ROLLED_BACK, Phase.HELD: HELD}.get(state.phase)
        if ended is not None:
            return ended, tick
    return RUNNING, ticks


def _grown(total: Counters, counts: Counts, run: int, tick: int) -> Counters:
    requests, errors, slow, over = (int(counts.by_tick[name][run, tick]) for name in counts.by_tick)
    buckets = (requests - slow, slow - over, over)
    latency = tuple(old + new for old, new in zip(total.latency, buckets, strict=True))
    answers = total.answers + requests
    return Counters(requests=total.requests + requests, errors=total.errors + errors, latency=latency, answers=answers)
