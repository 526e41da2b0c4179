"""Tests that stay valid however often one looks: e-processes for counts.

An *e-process* is a non-negative process whose expectation is at most 1 at any stopping time while the null hypothesis holds, so
by Ville's inequality the chance that it *ever* reaches 1/alpha is at most alpha (Ramdas, Gruenwald, Vovk & Shafer 2023,
"Game-theoretic statistics and safe anytime-valid inference", Statistical Science 38). All functions here give its natural
logarithm after every tick; compare with `threshold(alpha)`.

**Two rates.** A tick gives n_a, k_a (requests and events of the champion) and n_b, k_b (of the candidate). A tick's factor is
the likelihood ratio of a point alternative (p_a, p_b) and its projection (q_a, q_b) onto the null: the minimiser of
n_a KL(p_a|q_a) + n_b KL(p_b|q_b) (Turner, Ly & Gruenwald 2024, "Generic E-variables for exact sequential k-sample tests that
allow for optional stopping", JSPI 230; with a margin: Turner & Gruenwald 2023, "Exact anytime-valid confidence intervals for
contingency tables and beyond", Stat. Prob. Letters 198). Its expectation under any (r_a, r_b) of the null is
f_a^n_a f_b^n_b with f_g = 1 + (r_g - q_g)(p_g - q_g)/(q_g(1 - q_g)); q being the minimiser over a convex set says
n_a(f_a - 1) + n_b(f_b - 1) <= 0, and the inequality of the means then that the product is at most 1. This needs neither large
numbers nor a known split, and holds when the rates drift, as long as the null holds tick by tick.

**Alternatives.** p_a is the champion's rate *before* the tick (predictable), p_b = p_a + d for a grid of d around the declared
effect; averages of e-processes are e-processes. **Late faults.** A product that has lost money for an hour would be slow to
notice a fault that begins then, so the capital is spread over start ticks with weights 1/(s(s+1)), as in e-detectors
(Shin, Ramdas & Rinaldo 2024, "E-detectors: a nonparametric framework for sequential change detection", NEJSDS 2).

Arrays have the ticks as their last axis; axes before it are independent runs (the benchmark's simulations).
They are written out here because no kept Python library was found that has them for two streams: confseq (last release 2023)
compiles C++ and bounds one mean or quantile, avinf is for linear models, `safestats` by the authors of the test is in R.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_LEAST = 1e-6  # no rate is taken to be nearer to 0 or 1: one surprise then costs a finite amount
_PRIOR_EVENTS, _PRIOR_REQUESTS = 0.5, 50.0  # the champion's rate before anything is known: 1 %, worth 50 requests
HISTORY_REQUESTS = 2000.0
BETS = (0.02, 0.08, 0.3)  # from means a few percent over the limit to twice it
CAP = 20.0


@dataclass(frozen=True)
class Stream:
    """Events out of requests, tick by tick, of one arm; arrays of the same shape with the ticks last."""

    requests: Floats
    events: Floats

    @classmethod
    def of(cls, requests: Any, events: Any) -> "Stream":
        return cls(np.asarray(requests, dtype=np.float64), np.asarray(events, dtype=np.float64))

    @property
    def rate(self) -> Floats:
        """The rate over all ticks; NaN without a request."""
        total = self.requests.sum(axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.events.sum(axis=-1) / total


@dataclass(frozen=True)
class History:
    """Events out of requests of the champion before the first tick: it sharpens the first ticks and is not needed.

    A long past counts for `HISTORY_REQUESTS` requests at most (the present may differ), unless `full`.
    """

    requests: Any = 0.0
    events: Any = 0.0
    full: bool = False

    def weighted(self) -> "History":
        """The same rate with no more than the weight that the past may have."""
        if self.full or self.requests <= HISTORY_REQUESTS:
            return self
        return History(HISTORY_REQUESTS, self.events * HISTORY_REQUESTS / self.requests)


def threshold(alpha: float) -> float:
    """The logarithm that an e-process must reach to reject at level `alpha`: ln(1/alpha)."""
    return math.log(1 / alpha)


def evidence_of_increase(champion: Stream, candidate: Stream, effect: float, history: History = History()) -> Floats:
    """ln e after each tick against "the candidate's rate is at most the champion's"; `effect` is the increase worth finding."""
    return _mix(factors_of_increase(champion, candidate, effect, history), late=True)


def increase_began(champion: Stream, candidate: Stream, effect: float, history: History = History()) -> int:
    """The tick (from 0) from which on the data speak most for an increase; for one run, not for many."""
    factors = factors_of_increase(champion, candidate, effect, history)
    sums = np.cumsum(factors, axis=-1)
    ticks = np.arange(1, factors.shape[-1] + 1, dtype=np.float64)
    gains = sums[:, -1:] - sums + factors - np.log(ticks * (ticks + 1))
    return int(np.unravel_index(np.argmax(gains), gains.shape)[1])


def evidence_within(champion: Stream, candidate: Stream, margin: float, history: History = History(), first: int = 0) -> Floats:
    """ln e after each tick against "the candidate's rate is the champion's plus `margin` or more".

    Only ticks from `first` on count as evidence; the ones before still tell the champion's rate.
    """
    return _mix(factors_within(champion, candidate, margin, history, first), late=False)


def evidence_above(stream: Stream, limit: float) -> Floats:
    """ln e after each tick against "the rate is at most `limit`"."""
    return _mix(factors_above(stream, limit), late=True)


def evidence_below(stream: Stream, limit: float) -> Floats:
    """ln e after each tick against "the rate is `limit` or more"."""
    return _mix(np.stack([_ratio(stream, limit * share, limit) for share in (0.05, 0.25, 0.5, 0.75)], axis=-2), late=False)


def evidence_of_mean(factors: Floats) -> Floats:
    """ln e after each tick against "the mean is at most the limit", from each tick's `factors_of_mean` [alternatives, ticks]."""
    return _mix(factors, late=True)


def evidence_of_mismatch(counts: tuple[int, int], share: float) -> float:
    """ln e against "each unit reaches the second arm with chance `share`", from how many reached each arm so far.

    A Beta mixture of likelihood ratios (Lindon & Malek 2022, "Anytime-valid inference for multinomial count data", NeurIPS 35);
    it depends on the counts alone, so nothing has to be kept between looks.
    """
    first, second = counts
    weight = 4 / min(share, 1 - share)
    a, b = (1 - share) * weight, share * weight
    mixture = _log_beta(a + first, b + second) - _log_beta(a, b)
    return mixture - first * math.log(1 - share) - second * math.log(share)


def factors_of_increase(champion: Stream, candidate: Stream, effect: float, history: History = History()) -> Floats:
    """ln of each tick's likelihood ratio for each alternative; the alternatives are the axis before the last."""
    base = _rate_before(champion, history)
    shifts = [effect / 2 * 2**j for j in range(_doublings(effect / 2, 0.9))]
    return np.stack([_factor(champion, candidate, base, _clip(base + shift), 0.0) for shift in shifts], axis=-2)


def factors_within(champion: Stream, candidate: Stream, margin: float, history: History = History(), first: int = 0) -> Floats:
    """ln of each tick's likelihood ratio, from tick `first` on, for each alternative (the axis before the last)."""
    base = _rate_before(champion, history)[..., first:]
    old, new = (Stream(stream.requests[..., first:], stream.events[..., first:]) for stream in (champion, candidate))
    shifts = (-base / 2, 0.0, margin / 4, margin / 2)
    return np.stack([_factor(old, new, base, _clip(base + shift), margin) for shift in shifts], axis=-2)


def factors_above(stream: Stream, limit: float) -> Floats:
    """ln of each tick's likelihood ratio for each alternative over `limit` (the axis before the last)."""
    rates = [limit + (1 - limit) * share for share in _spread(limit)]
    return np.stack([_ratio(stream, rate, limit) for rate in rates], axis=-2)


def capped(values: Floats, limit: float) -> Floats:
    """The values, none above CAP times the limit (what is not a number counts as that), so that no single one proves anything."""
    return np.minimum(np.where(np.isnan(values), np.inf, values), CAP * limit)


def factors_of_mean(values: Floats, limit: float) -> Floats:
    """ln of one tick's factor for each bet, from the tick's values (none below 0, see `capped`); shape (bets,).

    Of a value v >= 0 whose mean is at most the limit, 1 + b (v / limit - 1) with 0 <= b < 1 has at most 1 as its mean, whatever
    its distribution (betting on a mean: Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting",
    JRSS B 86); a cap only lowers it.
    """
    return np.array([np.log1p(bet * (values / limit - 1)).sum() for bet in BETS])


def projection(n_a: Any, n_b: Any, p_a: Any, p_b: Any, margin: float) -> Floats:
    """The q_a that minimises n_a KL(p_a|q_a) + n_b KL(p_b|q_a + margin): the nearest pair of rates that differ by `margin`.

    Without a margin it is the weighted mean; with one the root of a cubic in closed form (Miettinen & Nurminen 1985, Statistics
    in Medicine 4, appendix I), which lies where both rates are in (0, 1).
    """
    total = n_a + n_b
    x_a, x_b = n_a * p_a, n_b * p_b
    if margin == 0:
        return (x_a + x_b) / total
    c2 = ((n_b + 2 * n_a) * margin - total - x_a - x_b) / total
    c1 = ((n_a * margin - total - 2 * x_a) * margin + x_a + x_b) / total
    c0 = x_a * margin * (1 - margin) / total
    third = c2 / 3
    half = third * third * third - c1 * third / 2 + c0 / 2
    radius = np.copysign(np.sqrt(np.maximum(third * third - c1 / 3, 1e-200)), half)
    angle = (math.pi + np.arccos(np.clip(half / (radius * radius * radius), -1, 1))) / 3
    root = 2 * radius * np.cos(angle) - third
    return np.clip(root, max(0.0, -margin) + 1e-12, min(1.0, 1 - margin) - 1e-12)


def _rate_before(champion: Stream, history: History) -> Floats:
    """The champion's rate as known before each tick."""
    known = history.weighted()
    events = _PRIOR_EVENTS + known.events + _before(champion.events)
    requests = _PRIOR_REQUESTS + known.requests + _before(champion.requests)
    return _clip(events / requests)


def _before(counts: Floats) -> Floats:
    return np.cumsum(counts, axis=-1) - counts


def _factor(champion: Stream, candidate: Stream, p_a: Floats, p_b: Floats, margin: float) -> Floats:
    """ln of each tick's likelihood ratio; 0 where an arm has no request, for then nothing is compared."""
    n_a, n_b = champion.requests, candidate.requests
    both = (n_a > 0) & (n_b > 0)
    q_a = projection(np.where(both, n_a, 1.0), np.where(both, n_b, 1.0), p_a, p_b, margin)
    ratio = _ratio(champion, p_a, q_a) + _ratio(candidate, p_b, q_a + margin)
    return np.where(both, ratio, 0.0)


def _ratio(stream: Stream, p: Any, q: Any) -> Floats:
    """ln of the likelihood ratio of the rates p and q."""
    rest = stream.requests - stream.events
    return stream.events * np.log(p / q) + rest * np.log((1 - p) / (1 - q))


def _mix(factors: Floats, late: bool) -> Floats:
    """ln of the average over alternatives (axis -2) of the products over ticks; `late` spreads each over start ticks as well.

    With C_t the sum of the factors to tick t, an alternative that starts at tick s is worth C_t - C_(s-1), and what has not
    started keeps its weight: the weights 1/(s(s+1)) that are still to come after tick t sum to 1/(t+1).
    """
    sums = np.cumsum(factors, axis=-1)
    if not late:
        return np.logaddexp.reduce(sums, axis=-2) - math.log(factors.shape[-2])
    ticks = np.arange(1, factors.shape[-1] + 1, dtype=np.float64)
    started = sums + np.logaddexp.accumulate(factors - sums - np.log(ticks * (ticks + 1)), axis=-1)
    mixed = np.logaddexp.reduce(started, axis=-2) - math.log(factors.shape[-2])
    return np.logaddexp(mixed, -np.log(ticks + 1))


def _clip(rate: Floats) -> Floats:
    return np.clip(rate, _LEAST, 1 - _LEAST)


def _doublings(least: float, most: float) -> int:
    return max(1, 1 + math.floor(math.log2(most / least))) if least < most else 1


def _spread(limit: float) -> list[float]:
    """Shares of the way from `limit` to 1, doubling from a move of about the limit's own size (at least 0.001) to 0.64."""
    least = min(0.64, max(limit, 0.001) / 2)
    return [least * 2**j for j in range(_doublings(least, 0.9))]


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
