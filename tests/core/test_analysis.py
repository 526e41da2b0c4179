"""Verdicts from measurements: every outcome of every gate, and that nothing promotes without evidence."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from mlops_dagster.core.analysis import Outcome, Units, Verdict, count_units, judge, judge_down, judge_labels, judge_start
from mlops_dagster.core.measurements import Counters, Measurements
from mlops_dagster.core.rollout import Phase, advance, begin, verdict_on
from mlops_dagster.core.routes import Routes, Sticky, assign
from mlops_dagster.core.strategies import RolloutPolicy, Step, count_tests, plan

T0 = datetime(2013, 3, 1, tzinfo=UTC)
TICK = timedelta(seconds=5)
BOUNDS = (10.0, 20.0, 50.0, 100.0)
FAST = (0.80, 0.14, 0.05, 0.008, 0.002)
SLOW = (0.0, 0.0, 0.3, 0.65, 0.05)


class Traffic:
    """Two arms under simulated traffic, measured every five seconds."""

    def __init__(self, seed: int = 0, history: Counters | None = None) -> None:
        self.random = np.random.default_rng(seed)
        self.now = T0
        self.totals: dict[str, Counters] = {"1": self.zero(), "2": self.zero()}
        self.measurements = Measurements(BOUNDS, history=history or Counters()).observe(T0, self.totals)

    def zero(self) -> Counters:
        return Counters(latency=(0,) * (len(BOUNDS) + 1))

    def tick(self, times: int = 1, **arms: dict | None) -> "Traffic":
        """`one=` and `two=`: the arms' requests per tick, share of errors, and shares of the latency buckets."""
        for _ in range(times):
            self.now += TICK
            for name, arm in (("1", arms.get("one")), ("2", arms.get("two"))):
                if arm is not None:
                    self.totals[name] = self.grown(self.totals[name], **arm)
            self.measurements = self.measurements.observe(self.now, self.totals)
        return self

    def grown(self, total: Counters, n: int = 100, errors: float = 0.01, latency=FAST, **counts) -> Counters:
        drawn = self.random.multinomial(n, latency)
        more = {"requests": n, "errors": int(self.random.binomial(n, errors)), "answers": n, **counts}
        fields = {name: getattr(total, name) + count for name, count in more.items()}
        return Counters(latency=tuple(int(a + b) for a, b in zip(total.latency, drawn, strict=True)), **fields)

    def verdict(self, step: Step, policy: RolloutPolicy, since: datetime = T0, tests: int = 6) -> Verdict:
        return judge(step, tests, since, self.measurements, policy, self.now)


def steps_of(strategy: str = "canary", **changes) -> tuple[RolloutPolicy, tuple[Step, ...]]:
    policy = RolloutPolicy(strategy=strategy, **changes)
    return policy, plan("1", "2", policy)


CANARY, CANARY_STEPS = steps_of()
BIG, SMALL = {"n": 950}, {"n": 50}


def test_equal_arms_pass_with_the_numbers_behind_it() -> None:
    verdict = Traffic().tick(40, one=BIG, two=SMALL).verdict(CANARY_STEPS[0], CANARY)
    assert verdict.outcome is Outcome.PASS
    assert verdict.requests == 2000
    assert verdict.evidence["requests"] == {"2": 2000, "1": 38_000}
    assert verdict.evidence["gates"]["errors"]["outcome"] == "PASS"
    assert any("failed requests" in reason for reason in verdict.reasons)
    assert json.loads(json.dumps(verdict.to_json(), allow_nan=False))["outcome"] == "PASS"


def test_too_few_requests_are_inconclusive_however_good() -> None:
    traffic = Traffic(history=Counters(requests=100_000, errors=10, latency=(90_000, 9_000, 500, 400, 100)))
    for _ in range(9):
        traffic.tick(1, one={"n": 950, "errors": 0}, two={"n": 50, "errors": 0, "latency": (1, 0, 0, 0, 0)})
        verdict = traffic.verdict(CANARY_STEPS[0], CANARY)
        assert verdict.outcome is Outcome.INCONCLUSIVE
        assert any("of 500 requests to arm 2" in reason for reason in verdict.reasons)
    traffic.tick(1, one={"n": 950, "errors": 0}, two={"n": 50, "errors": 0, "latency": (1, 0, 0, 0, 0)})
    assert traffic.verdict(CANARY_STEPS[0], CANARY).outcome is Outcome.PASS


def test_a_starved_champion_is_too_few_requests_too() -> None:
    verdict = Traffic().tick(40, one={"n": 5}, two={"n": 950}).verdict(CANARY_STEPS[0], CANARY)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert any("200 of 500 requests to arm 1" in reason for reason in verdict.reasons)


def test_no_metrics_is_an_error() -> None:
    never = judge(CANARY_STEPS[0], 5, T0, Measurements(BOUNDS), CANARY, T0)
    assert (never.outcome, never.requests) == (Outcome.ERROR, 0)
    traffic = Traffic().tick(40, one=BIG, two=SMALL)
    traffic.now += timedelta(seconds=CANARY.max_metric_age_seconds)
    assert traffic.verdict(CANARY_STEPS[0], CANARY).outcome is Outcome.PASS
    traffic.now += timedelta(seconds=1)
    old = traffic.verdict(CANARY_STEPS[0], CANARY)
    assert old.outcome is Outcome.ERROR
    assert "no metrics of arm '2' since 2013-03-01T00:03:20" in old.reasons[0]


def test_one_arm_that_goes_silent_is_an_error_too() -> None:
    traffic = Traffic().tick(40, one=BIG, two=SMALL)
    del traffic.totals["1"]
    for _ in range(13):
        traffic.now += TICK
        traffic.totals["2"] = traffic.grown(traffic.totals["2"])
        traffic.measurements = traffic.measurements.observe(traffic.now, traffic.totals)
    verdict = traffic.verdict(CANARY_STEPS[0], CANARY)
    assert verdict.outcome is Outcome.ERROR
    assert "arm '1'" in verdict.reasons[0]


def test_metrics_without_latencies_do_not_pass() -> None:
    traffic = Traffic()
    traffic.totals = {"1": Counters(), "2": Counters()}
    for number in range(1, 60):
        traffic.now += TICK
        traffic.totals = {"1": Counters(requests=950 * number), "2": Counters(requests=50 * number)}
        traffic.measurements = traffic.measurements.observe(traffic.now, traffic.totals)
    assert traffic.verdict(CANARY_STEPS[0], CANARY).outcome is Outcome.INCONCLUSIVE


def test_failures_are_found_within_seconds() -> None:
    traffic = Traffic().tick(20, one=BIG, two=SMALL)
    ticks = 0
    while traffic.tick(1, one=BIG, two={"n": 50, "errors": 0.2}).verdict(CANARY_STEPS[0], CANARY).outcome is not Outcome.FAIL:
        ticks += 1
        assert ticks < 3
    verdict = traffic.verdict(CANARY_STEPS[0], CANARY)
    assert any("failed requests" in reason and "proven worse" in reason for reason in verdict.reasons)
    assert abs(verdict.evidence["gates"]["errors"]["since_tick"] - 20) <= 1


def test_ten_times_slower_is_found_within_seconds() -> None:
    traffic = Traffic().tick(10, one=BIG, two=SMALL).tick(2, one=BIG, two={"n": 50, "latency": SLOW})
    verdict = traffic.verdict(CANARY_STEPS[0], CANARY)
    assert verdict.outcome is Outcome.FAIL
    assert any("answers slower than 20 ms" in reason for reason in verdict.reasons)


def test_a_version_that_refuses_what_the_champion_accepts_fails() -> None:
    traffic = Traffic().tick(20, one={"n": 950, "refused": 20}, two={"n": 50, "refused": 1})
    assert traffic.verdict(CANARY_STEPS[0], CANARY).outcome is Outcome.PASS
    verdict = traffic.tick(2, one={"n": 950, "refused": 20}, two={"n": 50, "refused": 50}).verdict(CANARY_STEPS[0], CANARY)
    assert verdict.outcome is Outcome.FAIL
    assert any("refused requests (4xx)" in reason and "proven worse" in reason for reason in verdict.reasons)


def test_mistakes_of_callers_fail_nobody() -> None:
    """The rate of 4xx rises and falls with who calls, in both arms alike."""
    failed = 0
    for seed in range(100):
        traffic = Traffic(seed)
        for tick in range(30):
            share = 0.6 if tick % 10 > 6 else 0.02
            one, two = ({"n": n, "errors": 0, "refused": int(traffic.random.binomial(n, share))} for n in (950, 50))
            failed += traffic.tick(1, one=one, two=two).verdict(CANARY_STEPS[0], CANARY).outcome is Outcome.FAIL
    assert failed == 0


def test_answers_that_were_not_counted_do_not_pass() -> None:
    verdict = Traffic().tick(40, one={"n": 950, "answers": 0}, two={"n": 50, "answers": 0}).verdict(CANARY_STEPS[0], CANARY)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "refused requests (4xx): nothing to compare yet" in verdict.reasons


def test_one_bad_answer_among_few_is_no_evidence() -> None:
    policy, steps = steps_of(alpha=0.5)
    assert Traffic().tick(1, one=BIG, two={"n": 1, "errors": 1}).verdict(steps[0], policy).outcome is Outcome.INCONCLUSIVE
    few = Traffic().tick(1, one=BIG, two={"n": 19, "errors": 1}).verdict(steps[0], policy)
    assert few.outcome is Outcome.INCONCLUSIVE
    assert Traffic().tick(1, one=BIG, two={"n": 20, "errors": 1}).verdict(steps[0], policy).outcome is Outcome.FAIL


def test_what_is_proven_but_does_not_matter_passes() -> None:
    """0.6 % more errors in ten million requests, where 2 % was declared: certain, and not worth a rollback."""
    one, two = {"n": 500_000, "errors": 0.010}, {"n": 500_000, "errors": 0.016}
    verdict = Traffic().tick(20, one=one, two=two).verdict(CANARY_STEPS[0], CANARY)
    gate = verdict.evidence["gates"]["errors"]
    assert gate["ln_e_harm"] > np.log(500)
    assert verdict.outcome is Outcome.PASS


def test_an_outage_behind_both_arms_fails_nobody() -> None:
    traffic = Traffic().tick(20, one=BIG, two=SMALL)
    for _ in range(20):
        traffic.tick(1, one={"n": 950, "errors": 0.4}, two={"n": 50, "errors": 0.4})
        verdict = traffic.verdict(CANARY_STEPS[0], CANARY)
        assert verdict.outcome is Outcome.INCONCLUSIVE
    assert any("the champion too is over the limit" in reason for reason in verdict.reasons)


def test_a_champion_with_few_requests_that_is_over_the_limit_too_excuses() -> None:
    traffic = Traffic(4).tick(40, one={"n": 15, "errors": 0.065}, two={"n": 950, "errors": 0.065})
    verdict = traffic.verdict(CANARY_STEPS[0], CANARY)
    gate = verdict.evidence["gates"]["error_limit"]
    assert gate["ln_e_over"] > np.log(500)
    assert gate["champion"] > 0.05
    assert gate["outcome"] == "INCONCLUSIVE"


def test_the_absolute_limits_hold_in_the_watch() -> None:
    watch = CANARY_STEPS[-1]
    assert Traffic().tick(20, two={"n": 500}).verdict(watch, CANARY).outcome is Outcome.PASS
    failing = Traffic().tick(20, two={"n": 500, "errors": 0.09}).verdict(watch, CANARY)
    assert failing.outcome is Outcome.FAIL
    assert any("limit of 5.0%" in reason for reason in failing.reasons)
    slow = Traffic().tick(20, two={"n": 500, "latency": (0.5, 0.2, 0.2, 0.05, 0.05)}).verdict(watch, CANARY)
    assert slow.outcome is Outcome.FAIL
    assert any("slower than 100 ms" in reason for reason in slow.reasons)


def test_over_the_limit_but_not_proven_is_inconclusive() -> None:
    policy, steps = steps_of(max_error_rate=0.05, minimum_requests=50)
    traffic = Traffic()
    traffic.totals["2"] = Counters(requests=100, errors=6, latency=(100, 0, 0, 0, 0))
    traffic.now += TICK
    traffic.measurements = traffic.measurements.observe(traffic.now, traffic.totals)
    assert traffic.verdict(steps[-1], policy).outcome is Outcome.INCONCLUSIVE


def test_each_step_needs_requests_and_evidence_of_its_own() -> None:
    traffic = Traffic().tick(40, one=BIG, two=SMALL)
    since = traffic.now
    assert traffic.verdict(CANARY_STEPS[1], CANARY, since).outcome is Outcome.INCONCLUSIVE
    traffic.tick(1, one=BIG, two=SMALL)
    verdict = traffic.verdict(CANARY_STEPS[1], CANARY, since)
    assert (verdict.outcome, verdict.requests) == (Outcome.INCONCLUSIVE, 50)
    half = traffic.measurements.observe(traffic.now + TICK, traffic.totals)
    began_inside = judge(CANARY_STEPS[1], 5, since + timedelta(seconds=1), half, CANARY, traffic.now + TICK)
    assert began_inside.requests == 0, "a tick that began before the step is not the step's"


def test_the_tick_after_a_pause_without_looks_is_the_steps_though_its_sample_is_older() -> None:
    policy, steps = steps_of("ab_test")
    since, late = T0 + timedelta(seconds=0.8), T0 + timedelta(seconds=90)
    totals = {arm: Counters(600, 6, (600, 0, 0, 0, 0), units=60) for arm in ("1", "2")}
    measurements = Measurements(BOUNDS).observe(T0, {}).observe(late, totals)
    verdict = judge(steps[0], count_tests(steps), since, measurements, policy, late)
    assert verdict.evidence["gates"]["sample_ratio"]["units"] == {"1": 60, "2": 60}
    assert (verdict.outcome, verdict.requests) == (Outcome.INCONCLUSIVE, 600)
    before = judge(steps[0], count_tests(steps), T0 + timedelta(seconds=10), measurements, policy, late)
    assert before.requests == 0, "too much of it was before"


def test_the_quantile_of_the_champion_is_fixed_before_it_is_used() -> None:
    step, policy = CANARY_STEPS[0], CANARY
    early = Traffic(3).tick(1, one={"n": 150}, two={"n": 150, "latency": SLOW}).verdict(step, policy)
    assert "not known before 200 answers" in " ".join(early.reasons)
    traffic = Traffic(3).tick(2, one=BIG, two={"n": 150})
    bound = traffic.verdict(step, policy).evidence["gates"]["latency"]["slower_than_ms"]
    traffic.tick(30, one={"n": 950, "latency": SLOW}, two={"n": 50, "latency": SLOW})
    assert traffic.verdict(step, policy).evidence["gates"]["latency"]["slower_than_ms"] == bound == 20


def test_labels_that_land_during_a_canary_only_roll_back() -> None:
    good = Traffic().tick(40, one={"n": 950, "labelled": 900, "wrong": 90}, two={"n": 50, "labelled": 45, "wrong": 4})
    assert good.verdict(CANARY_STEPS[0], CANARY).outcome is Outcome.PASS
    bad = Traffic().tick(40, one={"n": 950, "labelled": 900, "wrong": 90}, two={"n": 50, "labelled": 45, "wrong": 9})
    verdict = bad.verdict(CANARY_STEPS[0], CANARY)
    assert verdict.outcome is Outcome.FAIL
    assert any("wrong predictions" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("disagreed", "shifted", "outcome"),
    [(0.03, 0.02, Outcome.PASS), (0.2, 0.02, Outcome.FAIL), (0.03, 0.3, Outcome.FAIL), (0.1, 0.1, Outcome.INCONCLUSIVE)],
)
def test_shadow(disagreed: float, shifted: float, outcome: Outcome) -> None:
    policy, steps = steps_of("shadow")
    counts = {"compared": 100, "disagreed": int(100 * disagreed), "shifted": int(100 * shifted)}
    verdict = Traffic().tick(40, one={"n": 100}, two={"n": 100, **counts}).verdict(steps[0], policy, tests=count_tests(steps))
    assert verdict.outcome is outcome


def test_a_shadow_whose_answers_were_not_joined_does_not_pass() -> None:
    policy, steps = steps_of("shadow")
    verdict = Traffic().tick(40, one={"n": 100}, two={"n": 100}).verdict(steps[0], policy)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "0 of 500 answers compared" in " ".join(verdict.reasons)


@pytest.mark.parametrize(
    ("one", "two", "ticks", "outcome", "reason"),
    [
        (20, 30, 120, Outcome.PASS, "proven better"),
        (30, 20, 120, Outcome.FAIL, "proven worse"),
        (20, 20, 120, Outcome.FAIL, "is excluded, so the champion stays"),
        (20, 21, 120, Outcome.INCONCLUSIVE, "neither shown nor excluded"),
        (20, 24, 6, Outcome.INCONCLUSIVE, "neither shown nor excluded"),
        (20, 90, 4, Outcome.INCONCLUSIVE, "400 trials of 500"),
    ],
)
def test_ab(one: int, two: int, ticks: int, outcome: Outcome, reason: str) -> None:
    policy, steps = steps_of("ab_test", ab_minimum_effect=0.02)
    arms = [{"n": 100, "trials": 100, "successes": successes, "units": 30} for successes in (one, two)]
    verdict = Traffic().tick(ticks, one=arms[0], two=arms[1]).verdict(steps[0], policy, tests=count_tests(steps))
    assert verdict.outcome is outcome
    assert reason in " ".join(verdict.reasons)


def test_ab_guardrails_roll_back_a_winner() -> None:
    policy, steps = steps_of("ab_test")
    one = {"n": 100, "trials": 100, "successes": 20, "units": 30}
    two = {"n": 100, "errors": 0.04, "trials": 100, "successes": 30, "units": 30}
    verdict = Traffic().tick(60, one=one, two=two).verdict(steps[0], policy)
    assert verdict.outcome is Outcome.FAIL
    assert "failed requests" in " ".join(verdict.reasons)


def test_ab_with_a_wrong_sample_ratio_is_an_error_though_it_would_win() -> None:
    policy, steps = steps_of("ab_test")
    one = {"n": 100, "trials": 100, "successes": 20, "units": 40}
    for units in (20, 0):
        two = {"n": 100, "trials": 100, "successes": 30, "units": units}
        verdict = Traffic().tick(60, one={**one, "units": 40 if units else 0}, two=two).verdict(steps[0], policy)
        assert verdict.outcome is Outcome.ERROR
        assert "sample ratio" in " ".join(verdict.reasons)


def test_units_of_an_inference_log() -> None:
    routes = Routes.split({"1": 50, "2": 50}, sticky=Sticky("header", "x", "s"))
    seen = [(f"u{i}", assign(f"u{i}", routes)) for i in range(1000)] * 3
    units = count_units(seen, routes)
    assert sum(units.per_arm.values()) == 1000
    assert units.misassigned == 0
    assert count_units([("u0", "9")], routes) == Units({"1": 0, "2": 0}, 1)


def test_starting() -> None:
    assert judge_start(None).outcome is Outcome.ERROR
    assert judge_start(False).outcome is Outcome.INCONCLUSIVE
    assert judge_start(True, ["row 1: expected 1, got 0"]).reasons == ("smoke prediction: row 1: expected 1, got 0",)
    assert judge_start(True).outcome is Outcome.PASS


def test_a_candidate_whose_server_is_gone_fails() -> None:
    policy = RolloutPolicy(max_down_seconds=15, max_restarts=3)
    assert judge_down("2", 14.9, 2, policy) is None
    for down, restarts, reason in ((15.0, 0, "down for 15 s"), (0.0, 3, "died 3 times")):
        verdict = judge_down("2", down, restarts, policy)
        assert verdict is not None
        assert verdict.outcome is Outcome.FAIL
        assert reason in verdict.reasons[0]


def days(count: int, labelled: int, wrong_share: float, seed: int = 0) -> list[tuple[int, int]]:
    return [(labelled, int(k)) for k in np.random.default_rng(seed).binomial(labelled, wrong_share, count)]


def test_labels_that_land_days_later_revoke_or_confirm() -> None:
    policy = RolloutPolicy()
    assert judge_labels([], 0.1, policy).outcome is Outcome.INCONCLUSIVE
    assert judge_labels(days(1, 100, 0.1), 0.1, policy).outcome is Outcome.INCONCLUSIVE
    assert judge_labels(days(7, 900, 0.1), 0.1, policy).outcome is Outcome.PASS
    worse = judge_labels(days(3, 900, 0.2), 0.1, policy)
    assert worse.outcome is Outcome.FAIL
    assert "limit of 15.00%" in worse.reasons[0]
    within = judge_labels(days(7, 900, 0.13), 0.1, policy, champion=days(7, 900, 0.08, seed=1))
    assert within.outcome is Outcome.FAIL
    assert "of the version before, on the same days" in within.reasons[0]
    json.dumps(within.to_json(), allow_nan=False)


def test_labels_of_equal_versions_looked_at_daily_rarely_revoke() -> None:
    policy = RolloutPolicy()
    revoked = 0
    for seed in range(150):
        landed = days(30, 100, 0.15, seed)
        looks = (judge_labels(landed[:day], 0.1, policy).outcome for day in range(1, 31))
        revoked += Outcome.FAIL in looks
    assert revoked / 150 <= 0.02


@pytest.mark.parametrize("strategy", ["canary", "blue_green", "shadow", "ab_test"])
def test_a_whole_rollout_on_simulated_traffic(strategy: str) -> None:
    """The real judge and the real engine: a good version ends promoted (or waits for its human), never on too few requests."""
    policy = RolloutPolicy(strategy=strategy, shadow_seconds=200, shadow_ends="promote", ab_minimum_effect=0.02)
    state, _ = advance(begin("r", "m", "1", "2", policy, T0)[0], judge_start(True), policy, T0)
    traffic = Traffic(1)
    for _ in range(400):
        step = state.current
        if step is None:
            break
        share = max(0.05, step.routes.percent("2") / 100)
        more = {"compared": 100, "disagreed": 2, "shifted": 1, "trials": 100, "units": 10}
        one, two = ({"n": int(1000 * s), **more, "successes": w} for s, w in ((1 - share, 20), (share, 40)))
        traffic.tick(1, one=one if share < 1 else None, two=two)
        verdict = verdict_on(state, traffic.measurements, policy, traffic.now)
        assert verdict is not None
        before, (state, _) = state, advance(state, verdict, policy, traffic.now)
        if state.step != before.step or state.phase is Phase.PROMOTED:
            assert verdict.requests >= step.minimum_requests
    assert state.phase is Phase.PROMOTED
