"""Measurements in; PASS, FAIL, INCONCLUSIVE or ERROR out, with reasons and evidence."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from mlops_dagster.core import sequential
from mlops_dagster.core.measurements import Measurements
from mlops_dagster.core.rollout_gates import GATES, Arm, Finding, Look, Outcome
from mlops_dagster.core.routes import Routes, assign
from mlops_dagster.core.sequential import Stream
from mlops_dagster.core.strategies import RolloutPolicy, Step

__all__ = [
    "LabelledDay",
    "Outcome",
    "Units",
    "Verdict",
    "count_units",
    "judge",
    "judge_down",
    "judge_errors",
    "judge_labels",
    "judge_start",
]

STEP_SHARE = 0.9
"""How much of a tick must lie in a step for it to be the step's. A step is entered after the sample that its first tick begins with,
so that tick is never wholly inside; after a pause without looks it holds nearly all that the step has."""


@dataclass(frozen=True)
class Verdict:
    """What is to be thought of the candidate now; `requests` is the least that an arm answered in this step."""

    outcome: Outcome
    reasons: tuple[str, ...] = ()
    evidence: dict[str, Any] = field(default_factory=dict)
    requests: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, to be recorded with what was decided."""
        return {
            "outcome": str(self.outcome),
            "reasons": list(self.reasons),
            "requests": self.requests,
            "evidence": self.evidence,
        }


def judge(step: Step, tests: int, since: datetime, measurements: Measurements, policy: RolloutPolicy, now: datetime) -> Verdict:
    """The verdict on a step entered at `since`; `tests` is `strategies.count_tests` of the whole plan, over which alpha is split.

    No metrics, or none younger than `max_metric_age_seconds`, is an ERROR; fewer than the step's minimum of requests in an arm is
    INCONCLUSIVE, unless harm is proven already. Only a PASS of every gate is a PASS.
    """
    arms = [step.candidate, *([step.compare_with] if step.compare_with else [])]
    if (missing := _without_metrics(arms, since, measurements, policy, now)) is not None:
        return Verdict(Outcome.ERROR, (missing,), {"step": step.name})
    if not measurements.ticks:
        return Verdict(Outcome.INCONCLUSIVE, ("no requests yet",), {"step": step.name})
    look = _look(step, tests, since, measurements, policy)
    findings = {name: GATES[name](look) for name in (*step.gates, *step.guardrails)}
    requests = {arm.name: int(arm.columns["requests"][look.first :].sum()) for arm in (look.candidate, look.control) if arm}
    evidence = {
        "step": step.name,
        "requests": requests,
        "gates": {name: {"outcome": str(found.outcome), **found.evidence} for name, found in findings.items()},
    }
    outcome, reasons = _combined(step, findings, requests)
    return Verdict(outcome, reasons, evidence, min(requests.values()))


def judge_start(ready: bool | None, smoke_failures: Sequence[str] = ()) -> Verdict:
    """The verdict while an arm starts: ready and its smoke predictions right; `ready` None: the host cannot be asked."""
    if ready is None:
        return Verdict(Outcome.ERROR, ("the serving host does not answer",))
    if not ready:
        return Verdict(Outcome.INCONCLUSIVE, ("not ready yet",))
    if smoke_failures:
        return Verdict(Outcome.FAIL, tuple(f"smoke prediction: {failure}" for failure in smoke_failures))
    return Verdict(Outcome.PASS, ("ready; smoke predictions are right",))


def judge_down(arm: str, down_seconds: float, restarts: int, policy: RolloutPolicy) -> Verdict | None:
    """FAIL for a candidate whose server stays away or keeps dying, by what the serving host says; None when it runs.

    Without this a dead candidate would have no metrics, which is an ERROR and only holds the rollout. Never ask it of the
    champion, which is down through no fault of the candidate's.
    """
    evidence = {"down_seconds": down_seconds, "restarts": restarts}
    if restarts >= policy.max_restarts:
        return Verdict(Outcome.FAIL, (f"the server of arm {arm} died {restarts} times",), evidence)
    if down_seconds >= policy.max_down_seconds:
        return Verdict(Outcome.FAIL, (f"the server of arm {arm} has been down for {down_seconds:.0f} s",), evidence)
    return None


def judge_labels(
    candidate: Sequence[tuple[int, int]],
    baseline_wrong_share: float,
    policy: RolloutPolicy,
    champion: Sequence[tuple[int, int]] = (),
) -> Verdict:
    """The verdict of labels that land after a promotion, from (labelled, wrong) per day in the order of landing.

    FAIL (revoke the promotion) when the share of wrong predictions is proven to be over the one at evaluation by more than
    `accuracy_drop`, or over the champion's on the same days by a relevant margin; PASS when neither can be so any more. No labels
    is INCONCLUSIVE: labels take their time.
    """
    limit = min(baseline_wrong_share + policy.accuracy_drop, 0.999)
    stream = Stream.of([n for n, _ in candidate], [k for _, k in candidate])
    total = int(stream.requests.sum())
    if not total:
        return Verdict(Outcome.INCONCLUSIVE, ("no labels yet",), {"limit": limit})
    share = float(stream.rate)
    over, under = (float(test(stream, limit)[-1]) for test in (sequential.evidence_above, sequential.evidence_below))
    evidence: dict[str, Any] = {"labelled": total, "wrong_share": share, "limit": limit, "ln_e_over": over, "ln_e_under": under}
    fail_at = sequential.threshold(policy.alpha / (2 if champion else 1))
    if over >= fail_at and share > limit:
        return Verdict(Outcome.FAIL, (f"wrong predictions: {share:.2%} is over the limit of {limit:.2%}",), evidence, total)
    if (reason := _worse_than(champion, stream, policy, fail_at, evidence)) is not None:
        return Verdict(Outcome.FAIL, (reason,), evidence, total)
    if under >= sequential.threshold(policy.beta) and total >= policy.minimum_requests:
        return Verdict(Outcome.PASS, (f"wrong predictions: {share:.2%} is proven under {limit:.2%}",), evidence, total)
    return Verdict(Outcome.INCONCLUSIVE, (f"wrong predictions: {share:.2%} of {total}, not yet decided",), evidence, total)


@dataclass(frozen=True)
class LabelledDay:
    """A day's labels of one version: how many, and how many predictions were wrong; of a regression also the sum of the capped
    absolute errors and the day's `sequential.factors_of_mean` against their limit.
    """

    labelled: int
    wrong: int
    error: float = 0.0
    factors: tuple[float, ...] = ()


def judge_errors(
    candidate: Sequence[LabelledDay], limit: float, policy: RolloutPolicy, champion: Sequence[tuple[int, int]] = ()
) -> Verdict:
    """As `judge_labels`, for a regression: FAIL when the mean absolute error is proven over `limit`, or when wrong predictions
    (farther from the label than the tolerance) are proven more than the champion's on the same days. Never PASS.
    """
    total = sum(day.labelled for day in candidate)
    if not total:
        return Verdict(Outcome.INCONCLUSIVE, ("no labels yet",), {"limit": limit})
    mean = sum(day.error for day in candidate) / total
    over = float(sequential.evidence_of_mean(np.array([day.factors for day in candidate]).T)[-1])
    evidence: dict[str, Any] = {"labelled": total, "mean_absolute_error": mean, "limit": limit, "ln_e_over": over}
    fail_at = sequential.threshold(policy.alpha / (2 if champion else 1))
    if over >= fail_at and mean > limit:
        return Verdict(Outcome.FAIL, (f"mean absolute error: {mean:.4g} is over the limit of {limit:.4g}",), evidence, total)
    stream = Stream.of([day.labelled for day in candidate], [day.wrong for day in candidate])
    if (reason := _worse_than(champion, stream, policy, fail_at, evidence)) is not None:
        return Verdict(Outcome.FAIL, (reason,), evidence, total)
    return Verdict(Outcome.INCONCLUSIVE, (f"mean absolute error: {mean:.4g} of {total}, not over {limit:.4g}",), evidence, total)


def _worse_than(
    champion: Sequence[tuple[int, int]], candidate: Stream, policy: RolloutPolicy, fail_at: float, evidence: dict[str, Any]
) -> str | None:
    """Why the candidate is proven, by a relevant margin, to be wrong more often than the champion on the same days, or None."""
    if not champion:
        return None
    beside, share = Stream.of([n for n, _ in champion], [k for _, k in champion]), float(candidate.rate)
    harm = float(sequential.evidence_of_increase(beside, candidate, policy.accuracy_drop)[-1])
    evidence |= {"champion_wrong_share": float(beside.rate) if beside.requests.any() else None, "ln_e_harm": harm}
    if harm < fail_at or share - float(beside.rate) < policy.accuracy_drop / 2:
        return None
    return f"wrong predictions: {share:.2%} against {float(beside.rate):.2%} of the version before, on the same days"


@dataclass(frozen=True)
class Units:
    """How many different sticky keys reached each arm, and how many of them an arm that they should not have reached."""

    per_arm: dict[str, int]
    misassigned: int


def count_units(seen: Iterable[tuple[str, str]], routes: Routes) -> Units:
    """What an inference log's (sticky key, arm) pairs say of an A/B test: its units, and who was not where `assign` puts them."""
    pairs = set(seen)
    per_arm = Counter(arm for _, arm in pairs)
    return Units({arm: per_arm.get(arm, 0) for arm in routes.serving}, sum(assign(key, routes) != arm for key, arm in pairs))


def _without_metrics(
    arms: list[str], since: datetime, measurements: Measurements, policy: RolloutPolicy, now: datetime
) -> str | None:
    """Why there is nothing to go by, or None; an arm that was just started has as long as metrics may be old."""
    if measurements.began is None:
        return "no metrics: the counters have not been read yet"
    for arm in arms:
        seen = max((tick.at for tick in reversed(measurements.ticks[-50:]) if arm in tick.arms), default=None)
        known = seen or max(since, measurements.began)
        if (now - known).total_seconds() > policy.max_metric_age_seconds:
            return f"no metrics of arm {arm!r} since {known.isoformat(timespec='seconds')}"
    return None


def _look(step: Step, tests: int, since: datetime, measurements: Measurements, policy: RolloutPolicy) -> Look:
    lasted = zip(measurements.starts(), (tick.at for tick in measurements.ticks), strict=True)
    inside = ((end - max(start, since)) >= STEP_SHARE * (end - start) for start, end in lasted)
    first = next((number for number, is_inside in enumerate(inside) if is_inside), len(measurements.ticks))
    return Look(
        step,
        policy,
        measurements.bounds_ms,
        measurements.history,
        first,
        Arm.of(step.candidate, measurements),
        Arm.of(step.compare_with, measurements) if step.compare_with else None,
        tests,
        (measurements.ticks[-1].at - since).total_seconds(),
    )


def _combined(step: Step, findings: dict[str, Finding], requests: dict[str, int]) -> tuple[Outcome, tuple[str, ...]]:
    """Proven harm comes first, then what cannot be known, then what is not known yet."""
    by_outcome = {outcome: [f for f in findings.values() if f.outcome == outcome] for outcome in Outcome}
    for outcome in (Outcome.FAIL, Outcome.ERROR):
        if found := by_outcome[outcome]:
            return outcome, tuple(finding.reason for finding in found)
    few = [
        f"{count} of {step.minimum_requests} requests to arm {arm}"
        for arm, count in requests.items()
        if count < step.minimum_requests
    ]
    open_gates = [findings[name].reason for name in step.gates if findings[name].outcome is Outcome.INCONCLUSIVE]
    if few or open_gates:
        return Outcome.INCONCLUSIVE, (*few, *open_gates)
    return Outcome.PASS, tuple(findings[name].reason for name in step.gates)
