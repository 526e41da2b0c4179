"""The questions that a step of a rollout asks of its measurements, one function each.

A gate FAILs only when harm is proven (by a test that may be looked at every tick) *and* matters (the difference observed since it
began is at least half the declared effect: with enough traffic a hundredth of a percent can be proven too). It PASSes only when
harm of the declared size is excluded. Everything between is INCONCLUSIVE.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Any

import numpy as np

from mlops_dagster.core import sequential
from mlops_dagster.core.measurements import Counters, Measurements
from mlops_dagster.core.sequential import Floats, History, Stream
from mlops_dagster.core.strategies import RolloutPolicy, Step

SLOW_SHARE = 0.05  # latencies are compared by how many are above the champion's quantile of 1 - SLOW_SHARE
P99_SHARE = 0.01  # "the 99th percentile is at most L" is "at most this share is above L"
MISASSIGNED_SHARE = 0.01  # of the sticky keys; beyond it the arms of an A/B test are not what they should be
QUANTILE_REQUESTS = 200  # answers of the champion from which on its quantile is known well enough; it is then fixed


class Outcome(StrEnum):
    """What measurements say. Neither INCONCLUSIVE (not enough yet) nor ERROR (nothing to go by) ever promotes."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    ERROR = "ERROR"


@dataclass(frozen=True)
class Finding:
    """One gate's answer, why, and the numbers (JSON)."""

    outcome: Outcome
    reason: str
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One arm's counts as arrays over the ticks; `latency` has shape (ticks, buckets)."""

    name: str
    columns: dict[str, Floats]
    latency: Floats

    @classmethod
    def of(cls, name: str, measurements: Measurements) -> "Arm":
        counters = [tick.arms.get(name, _NOTHING) for tick in measurements.ticks]
        table = np.array([_PICK(c) for c in counters], dtype=np.float64).reshape(-1, len(_COLUMNS))
        empty = (0,) * (len(measurements.bounds_ms) + 1)
        latency = np.array([c.latency or empty for c in counters], dtype=np.float64).reshape(-1, len(empty))
        return cls(name, dict(zip(_COLUMNS, table.T, strict=True)), latency)

    def stream(self, whole: str, part: str) -> Stream:
        return Stream(self.columns[whole], self.columns[part])

    def slower(self, bucket: int) -> Stream:
        """Answers in the buckets after `bucket`, among those with a latency."""
        return Stream(self.latency.sum(axis=1), self.latency[:, bucket + 1 :].sum(axis=1))


@dataclass(frozen=True)
class Look:
    """Everything a gate may use: the arms over all ticks of the rollout; the present step's begin with tick `first`."""

    step: Step
    policy: RolloutPolicy
    bounds_ms: tuple[float, ...]
    history: Counters
    first: int
    candidate: Arm
    control: Arm | None
    tests: int
    seconds: float = 0.0  # from the step's begin until the last tick

    @property
    def fail_at(self) -> float:
        return sequential.threshold(self.policy.alpha / self.tests)

    @property
    def pass_at(self) -> float:
        return sequential.threshold(self.policy.beta)


def errors(look: Look) -> Finding:
    """The candidate's share of failed requests against the champion's over the same time."""
    control = _control(look)
    history = History(look.history.requests, look.history.errors)
    champion, candidate = (arm.stream("requests", "errors") for arm in (control, look.candidate))
    return _compare(look, champion, candidate, history, look.policy.error_rate_increase, "failed requests")


def refusals(look: Look) -> Finding:
    """The share of answers 4xx against the champion's over the same time: callers' own mistakes reach both arms alike."""
    champion, candidate = (arm.stream("answers", "refused") for arm in (_control(look), look.candidate))
    return _compare(look, champion, candidate, History(), look.policy.error_rate_increase, "refused requests (4xx)")


def latency(look: Look) -> Finding:
    """The share of answers above the champion's 95th percentile, candidate against champion over the same time."""
    control = _control(look)
    bucket, begin = _quantile_bucket(look, control)
    if bucket is None:
        return Finding(
            Outcome.INCONCLUSIVE, f"the champion's 95th percentile is not known before {QUANTILE_REQUESTS} answers", {}
        )
    known = np.arange(len(control.latency)) >= begin
    champion, candidate = (_masked(arm.slower(bucket), known) for arm in (control, look.candidate))
    history = History(float(sum(look.history.latency)), float(sum(look.history.latency[bucket + 1 :])))
    bound = look.bounds_ms[bucket]
    found = _compare(look, champion, candidate, history, look.policy.slow_share_increase, f"answers slower than {bound:g} ms")
    return Finding(found.outcome, found.reason, {**found.evidence, "slower_than_ms": bound})


def quality(look: Look) -> Finding:
    """The share of wrong predictions among those whose label has landed; says nothing while there are no labels."""
    if look.control is None or not look.candidate.columns["labelled"].any():
        return Finding(Outcome.PASS, "no labels yet", {})
    champion, candidate = (arm.stream("labelled", "wrong") for arm in (look.control, look.candidate))
    return _compare(look, champion, candidate, History(), look.policy.accuracy_drop, "wrong predictions")


def error_limit(look: Look) -> Finding:
    """The candidate's share of failed requests against the absolute limit."""
    return _limit(look, lambda arm: arm.stream("requests", "errors"), look.policy.max_error_rate, "failed requests")


def latency_limit(look: Look) -> Finding:
    """The candidate's 99th percentile against the absolute limit, by the share of answers above it."""
    limit = look.policy.max_p99_latency_ms
    # A limit between two bounds is judged by the next one above: an answer counts as too slow only when it surely was.
    bucket = min(int(np.searchsorted(look.bounds_ms, limit)), len(look.bounds_ms) - 1)
    found = _limit(look, lambda arm: arm.slower(bucket), P99_SHARE, f"answers slower than {look.bounds_ms[bucket]:g} ms")
    return Finding(found.outcome, found.reason, {**found.evidence, "slower_than_ms": look.bounds_ms[bucket]})


def disagreement(look: Look) -> Finding:
    """How often the shadow's answer differs from the champion's to the same request."""
    return _agreement(look, "disagreed", look.policy.max_disagreement, "answers that differ from the champion's")


def score_shift(look: Look) -> Finding:
    """How often the shadow's score is farther than `score_tolerance` from the champion's for the same request."""
    what = f"scores more than {look.policy.score_tolerance:g} from the champion's"
    return _agreement(look, "shifted", look.policy.max_score_shift, what)


def metric(look: Look) -> Finding:
    """The pre-declared metric of an A/B test: PASS for a proven gain of the minimum effect, FAIL for a loss or no such gain."""
    policy = look.policy
    champion, candidate = (_from(arm.stream("trials", "successes"), look.first) for arm in (_control(look), look.candidate))
    evidence = _rates(champion, candidate)
    trials = int(min(champion.requests.sum(), candidate.requests.sum()))
    if trials < look.step.minimum_requests:
        return Finding(Outcome.INCONCLUSIVE, f"{policy.ab_metric}: {trials} trials of {look.step.minimum_requests}", evidence)
    gain = float(candidate.rate - champion.rate)
    effect = policy.ab_minimum_effect
    better = float(sequential.evidence_of_increase(champion, candidate, effect)[-1])
    worse = float(sequential.evidence_of_increase(candidate, champion, effect)[-1])
    futile = float(sequential.evidence_within(champion, candidate, effect)[-1])
    evidence |= {"gain": gain, "ln_e_better": better, "ln_e_worse": worse, "ln_e_no_such_gain": futile}
    if worse >= look.fail_at and gain < 0:
        return Finding(Outcome.FAIL, f"{policy.ab_metric} is proven worse by {-gain:.2%}", evidence)
    if better >= look.fail_at and gain >= effect:
        return Finding(Outcome.PASS, f"{policy.ab_metric} is proven better by {gain:.2%}", evidence)
    if futile >= look.pass_at:
        return Finding(Outcome.FAIL, f"{policy.ab_metric}: a gain of {effect:.2%} is excluded, so the champion stays", evidence)
    return Finding(Outcome.INCONCLUSIVE, f"{policy.ab_metric}: a gain of {effect:.2%} is neither shown nor excluded", evidence)


def sample_ratio(look: Look) -> Finding:
    """Whether the sticky keys reached the arms in the ratio of the weights; if not, the test's data mean nothing (an ERROR)."""
    control = _control(look)
    counts = [int(arm.columns["units"][look.first :].sum()) for arm in (control, look.candidate)]
    percents = [look.step.routes.percent(arm.name) for arm in (control, look.candidate)]
    strayed = sum(int(arm.columns["misassigned"][look.first :].sum()) for arm in (control, look.candidate))
    evidence: dict[str, Any] = {"units": {control.name: counts[0], look.candidate.name: counts[1]}, "percent": percents}
    evidence["misassigned"] = strayed
    if not any(counts):
        # Keys are counted some seconds after the requests that brought them.
        wait = look.seconds < look.policy.max_metric_age_seconds
        outcome = Outcome.INCONCLUSIVE if wait else Outcome.ERROR
        return Finding(outcome, "no sticky keys were counted: the sample ratio cannot be checked", evidence)
    if strayed > MISASSIGNED_SHARE * sum(counts):
        return Finding(Outcome.ERROR, f"{strayed} of {sum(counts)} sticky keys reached an arm that is not theirs", evidence)
    found = sequential.evidence_of_mismatch((counts[0], counts[1]), percents[1] / sum(percents))
    evidence["ln_e"] = found
    if found >= sequential.threshold(look.policy.sample_ratio_alpha):
        return Finding(Outcome.ERROR, f"sample ratio mismatch: {counts[0]} and {counts[1]} keys at weights {percents}", evidence)
    return Finding(Outcome.PASS, "the sample ratio fits the weights", evidence)


GATES: dict[str, Callable[[Look], Finding]] = {
    "errors": errors,
    "refusals": refusals,
    "latency": latency,
    "error_limit": error_limit,
    "latency_limit": latency_limit,
    "disagreement": disagreement,
    "score_shift": score_shift,
    "quality": quality,
    "metric": metric,
    "sample_ratio": sample_ratio,
}

_NOTHING = Counters()
_COLUMNS = (
    "requests",
    "errors",
    "compared",
    "disagreed",
    "shifted",
    "labelled",
    "wrong",
    "trials",
    "successes",
    "units",
    "misassigned",
    "answers",
    "refused",
)
_PICK = attrgetter(*_COLUMNS)


def _compare(look: Look, champion: Stream, candidate: Stream, history: History, effect: float, what: str) -> Finding:
    """Harm against the champion: proven and relevant (FAIL), excluded in this step (PASS), or neither."""
    evidence = _rates(_from(champion, look.first), _from(candidate, look.first))
    if not candidate.requests.any() or not champion.requests.any():
        return Finding(Outcome.INCONCLUSIVE, f"{what}: nothing to compare yet", evidence)
    harm = float(sequential.evidence_of_increase(champion, candidate, effect, history)[-1])
    evidence["ln_e_harm"] = harm
    if harm >= look.fail_at and candidate.requests.sum() >= look.policy.minimum_requests_to_fail:
        begin = sequential.increase_began(champion, candidate, effect, history)
        since = _rates(_from(champion, begin), _from(candidate, begin))
        worse = (since["candidate"] or 0.0) - (since["champion"] or 0.0)
        if worse >= effect / 2:
            reason = f"{what}: {since['candidate']:.2%} against the champion's {since['champion'] or 0:.2%}, proven worse"
            return Finding(Outcome.FAIL, reason, {**evidence, "since_tick": begin, "since": since})
    within = sequential.evidence_within(champion, candidate, effect, history, look.first)
    evidence["ln_e_within"] = float(within[-1]) if len(within) else 0.0
    if evidence["ln_e_within"] >= look.pass_at:
        return Finding(Outcome.PASS, f"{what}: an increase of {effect:.1%} is excluded", evidence)
    return Finding(Outcome.INCONCLUSIVE, f"{what}: an increase of {effect:.1%} is neither shown nor excluded", evidence)


def _limit(look: Look, pick: Callable[[Arm], Stream], limit: float, what: str) -> Finding:
    """An absolute limit. A champion that breaks it just as well is no reason to go back to the champion."""
    stream = pick(look.candidate)
    rate = _rate(_from(stream, look.first))
    evidence: dict[str, Any] = {"candidate": rate, "limit": limit}
    if rate is None:
        return Finding(Outcome.INCONCLUSIVE, f"{what}: none counted yet", evidence)
    over = evidence["ln_e_over"] = float(sequential.evidence_above(stream, limit)[-1])
    if look.control is not None:
        beside = pick(look.control)
        evidence["champion"] = _rate(_from(beside, look.first))
        champion_over = float(sequential.evidence_above(beside, limit)[-1])
        if (evidence["champion"] or 0.0) > limit or champion_over >= look.pass_at:
            return Finding(Outcome.INCONCLUSIVE, f"{what}: the champion too is over the limit of {limit:.1%}", evidence)
    if over >= look.fail_at and stream.requests.sum() >= look.policy.minimum_requests_to_fail:
        return Finding(Outcome.FAIL, f"{what}: proven over the limit of {limit:.1%} ({rate:.2%} in this step)", evidence)
    if rate > limit:
        return Finding(Outcome.INCONCLUSIVE, f"{what}: {rate:.2%} is over the limit of {limit:.1%}, not yet proven", evidence)
    return Finding(Outcome.PASS, f"{what}: within the limit of {limit:.1%}", evidence)


def _agreement(look: Look, part: str, limit: float, what: str) -> Finding:
    stream = look.candidate.stream("compared", part)
    total = int(stream.requests.sum())
    evidence: dict[str, Any] = {"share": _rate(stream), "limit": limit, "compared": total}
    if total < look.step.minimum_requests:
        return Finding(Outcome.INCONCLUSIVE, f"{what}: {total} of {look.step.minimum_requests} answers compared", evidence)
    over, under = (float(test(stream, limit)[-1]) for test in (sequential.evidence_above, sequential.evidence_below))
    evidence |= {"ln_e_over": over, "ln_e_under": under}
    if over >= look.fail_at:
        return Finding(Outcome.FAIL, f"{what}: {evidence['share']:.2%} is over the limit of {limit:.1%}", evidence)
    if under >= look.pass_at:
        return Finding(Outcome.PASS, f"{what}: proven under the limit of {limit:.1%}", evidence)
    return Finding(Outcome.INCONCLUSIVE, f"{what}: neither over nor under {limit:.1%} is shown", evidence)


def _quantile_bucket(look: Look, control: Arm) -> tuple[int | None, int]:
    """The bucket whose upper bound is nearest to the champion's 95th percentile, and the first tick that may use it.

    It is fixed once `QUANTILE_REQUESTS` answers are known, from those alone: a threshold chosen with later data would be biased.
    """
    known = np.asarray(look.history.latency or (0,) * (len(look.bounds_ms) + 1), dtype=np.float64)
    begin = 0
    if known.sum() < QUANTILE_REQUESTS:
        totals = known + np.cumsum(control.latency, axis=0)
        enough = np.flatnonzero(totals.sum(axis=1) >= QUANTILE_REQUESTS)
        if not len(enough):
            return None, 0
        begin, known = int(enough[0]) + 1, totals[enough[0]]
    above = 1 - np.cumsum(known)[:-1] / known.sum()
    return int(np.argmin(np.abs(above - SLOW_SHARE))), begin


def _control(look: Look) -> Arm:
    if look.control is None:
        raise ValueError(f"step {look.step.name!r} compares with nobody, so its gates must not be comparisons")
    return look.control


def _from(stream: Stream, first: int) -> Stream:
    return Stream(stream.requests[first:], stream.events[first:])


def _masked(stream: Stream, known: Any) -> Stream:
    return Stream(stream.requests * known, stream.events * known)


def _rate(stream: Stream) -> float | None:
    total = float(stream.requests.sum())
    return float(stream.events.sum()) / total if total else None


def _rates(champion: Stream, candidate: Stream) -> dict[str, Any]:
    return {"champion": _rate(champion), "candidate": _rate(candidate)}
