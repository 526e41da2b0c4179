"""The e-processes: what they compute, that they are valid under the null at any look, and that they find what they should."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom

from mlops_dagster.core.sequential import (
    History,
    Stream,
    evidence_above,
    evidence_below,
    evidence_of_increase,
    evidence_of_mismatch,
    evidence_within,
    increase_began,
    projection,
    threshold,
)

rates = st.floats(0.001, 0.9)
sizes = st.integers(1, 20_000)
chances = st.one_of(st.just(0.0), st.floats(1e-6, 1))


def divergence(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@given(sizes, sizes, rates, rates, st.sampled_from([0.01, 0.05, 0.3]))
def test_the_projection_is_the_nearest_pair_of_the_null(n_a: int, n_b: int, p_a: float, p_b: float, margin: float) -> None:
    def distance(q: float) -> float:
        return n_a * divergence(p_a, q) + n_b * divergence(p_b, q + margin)

    found = float(projection(float(n_a), float(n_b), np.float64(p_a), np.float64(p_b), margin))
    best = minimize_scalar(distance, bounds=(1e-9, 1 - margin - 1e-9), method="bounded", options={"xatol": 1e-12})["fun"]  # type: ignore[index]
    assert distance(found) <= best + 1e-6 * (1 + abs(best))


@given(
    st.integers(0, 12),
    st.integers(0, 12),
    chances,
    chances,
    st.sampled_from([0.02, 0.2]),
    st.floats(0, 200),
)
def test_one_tick_is_worth_at_most_1_on_average_under_the_null(
    n_a: int, n_b: int, r: float, s: float, effect: float, known: float
) -> None:
    """Exactly, by summing over every outcome: for any rates of the null, equal or not."""
    low, high = min(r, s), max(r, s)
    history = History(200.0, known)
    k_a, k_b = np.meshgrid(np.arange(n_a + 1), np.arange(n_b + 1), indexing="ij")
    shape = (*k_a.shape, 1)
    champion = Stream.of(np.full(shape, n_a), k_a[..., None])
    candidate = Stream.of(np.full(shape, n_b), k_b[..., None])

    def mean(ln_e, p_a: float, p_b: float) -> float:
        weights = binom.pmf(k_a, n_a, p_a) * binom.pmf(k_b, n_b, p_b)
        return float((weights * np.exp(ln_e[..., -1])).sum())

    increase = evidence_of_increase(champion, candidate, effect, history)
    assert mean(increase, high, low) <= 1 + 1e-9, "the candidate is as good or better"
    assert mean(increase, low, low) <= 1 + 1e-9
    within = evidence_within(champion, candidate, effect, history)
    base = low * (1 - effect)
    assert mean(within, base, base + effect) <= 1 + 1e-6, "the candidate is worse by exactly the margin"
    assert mean(within, base, max(high, base + effect)) <= 1 + 1e-6


@given(st.integers(0, 60), chances, st.sampled_from([0.01, 0.05, 0.5]))
def test_one_arm_against_a_limit_is_worth_at_most_1_on_average_under_the_null(n: int, r: float, limit: float) -> None:
    events = np.arange(n + 1)
    stream = Stream.of(np.full((n + 1, 1), n), events[:, None])
    over, under = (np.exp(test(stream, limit)[:, -1]) for test in (evidence_above, evidence_below))
    assert (binom.pmf(events, n, limit * r) * over).sum() <= 1 + 1e-9
    assert (binom.pmf(events, n, limit + (1 - limit) * r) * under).sum() <= 1 + 1e-9


def simulated(p_a, p_b, runs: int, ticks: int, n_a: int, n_b: int, seed: int) -> tuple[Stream, Stream]:
    random = np.random.default_rng(seed)
    shape = (runs, ticks)
    requests = random.poisson(n_a, shape), random.poisson(n_b, shape)
    return tuple(Stream.of(n, random.binomial(n, p)) for n, p in zip(requests, (p_a, p_b), strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("rate", [0.0005, 0.01, 0.2])
def test_equal_arms_looked_at_every_tick_are_rarely_rejected(rate: float) -> None:
    champion, candidate = simulated(rate, rate, 2000, 150, 100, 30, seed=1)
    ever = (evidence_of_increase(champion, candidate, 0.02) >= threshold(0.01)).any(axis=1)
    assert ever.mean() <= 0.01


def test_equal_arms_that_both_drift_are_rarely_rejected() -> None:
    """An outage behind both arms (1 % to 30 % and back) is no fault of the candidate's."""
    drift = 0.01 + 0.29 * np.clip(np.sin(np.linspace(0, 9, 150)), 0, 1)
    champion, candidate = simulated(drift, drift, 2000, 150, 100, 30, seed=2)
    assert (evidence_of_increase(champion, candidate, 0.02) >= threshold(0.01)).any(axis=1).mean() <= 0.01


def test_a_worse_arm_rarely_passes() -> None:
    champion, candidate = simulated(0.01, 0.03, 2000, 150, 100, 30, seed=3)
    assert (evidence_within(champion, candidate, 0.02) >= threshold(0.05)).any(axis=1).mean() <= 0.05


def test_an_equal_arm_passes_and_a_worse_one_is_found() -> None:
    champion, candidate = simulated(0.01, 0.01, 500, 150, 100, 30, seed=4)
    assert (evidence_within(champion, candidate, 0.02) >= threshold(0.05)).any(axis=1).mean() >= 0.99
    champion, candidate = simulated(0.01, 0.03, 500, 150, 100, 30, seed=5)
    assert (evidence_of_increase(champion, candidate, 0.02) >= threshold(0.01)).any(axis=1).mean() >= 0.99


def test_a_fault_that_begins_late_is_found_soon_and_dated() -> None:
    """After 600 good ticks, one answer in five fails: three ticks of ten requests must be enough."""
    bad = np.where(np.arange(606) < 600, 0.01, 0.2)
    champion, candidate = simulated(np.full(606, 0.01), bad, 300, 606, 1000, 50, seed=6)
    found = evidence_of_increase(champion, candidate, 0.02) >= threshold(0.002)
    assert found[:, :600].any(axis=1).mean() <= 0.01
    assert found[:, 602].mean() >= 0.99
    begun = [
        increase_began(Stream(champion.requests[i], champion.events[i]), Stream(candidate.requests[i], candidate.events[i]), 0.02)
        for i in range(50)
    ]
    assert abs(np.median(begun) - 600) <= 1


def test_ticks_in_which_an_arm_has_no_request_say_nothing() -> None:
    champion = Stream.of([100, 0, 100, 100], [1, 0, 1, 1])
    candidate = Stream.of([0, 50, 50, 0], [0, 50, 1, 0])
    within = evidence_within(champion, candidate, 0.05)
    assert within[0] == within[1] == pytest.approx(0)
    assert within[2] == within[3] != within[1]


def test_the_evidence_can_be_looked_at_early() -> None:
    """What one sees at tick t does not depend on what comes later."""
    champion, candidate = simulated(0.02, 0.04, 1, 40, 100, 20, seed=7)
    short = [Stream(s.requests[:, :25], s.events[:, :25]) for s in (champion, candidate)]
    for test in (evidence_of_increase, evidence_within):
        np.testing.assert_allclose(test(champion, candidate, 0.02)[:, :25], test(short[0], short[1], 0.02), rtol=1e-9)


def test_late_starts_are_the_average_that_the_module_describes() -> None:
    """Against a sum over start ticks and alternatives written out in full."""
    _, candidate = simulated(0.05, 0.2, 1, 6, 40, 40, seed=8)
    limit = 0.1
    n, k = candidate.requests[0], candidate.events[0]
    alternatives = [limit + (1 - limit) * share for share in (0.05, 0.1, 0.2, 0.4, 0.8)]
    total = 0.0
    for rate in alternatives:
        factors = (rate / limit) ** k * ((1 - rate) / (1 - limit)) ** (n - k)
        started = sum(np.prod(factors[s:]) / ((s + 1) * (s + 2)) for s in range(6))
        total += (started + 1 / 7) / len(alternatives)
    assert evidence_above(candidate, limit)[0, -1] == pytest.approx(math.log(total))


def test_numbers_stay_finite_for_extreme_counts() -> None:
    for k_a, k_b in [(0, 0), (10**7, 10**7), (0, 10**7), (10**7, 0)]:
        streams = Stream.of([10**7] * 3, [k_a] * 3), Stream.of([10**7] * 3, [k_b] * 3)
        for test in (evidence_of_increase, evidence_within):
            assert np.isfinite(test(*streams, 0.02)).all()
        assert np.isfinite(evidence_above(streams[1], 0.01)).all()
        assert np.isfinite(evidence_below(streams[1], 0.01)).all()


def test_sample_ratio_mismatch() -> None:
    random = np.random.default_rng(9)
    rejected = 0
    for _ in range(300):
        reached = np.cumsum(random.binomial(200, 0.5, 40))
        looks = [evidence_of_mismatch((200 * (t + 1) - int(n), int(n)), 0.5) for t, n in enumerate(reached)]
        rejected += max(looks) >= threshold(0.01)
    assert rejected / 300 <= 0.02
    assert evidence_of_mismatch((5300, 4700), 0.5) >= threshold(0.001)
    assert evidence_of_mismatch((9010, 990), 0.1) < 0


def test_a_mixture_over_every_outcome_is_worth_exactly_1() -> None:
    for share in (0.5, 0.05):
        total = sum(math.exp(evidence_of_mismatch((30 - k, k), share)) * binom.pmf(k, 30, share) for k in range(31))
        assert total == pytest.approx(1)
