"""Labels of a regression that land after its promotion: worse is found, equal is left alone, and one absurd label is nothing."""

import json

import numpy as np
import pytest

from mlops_dagster.core import sequential
from mlops_dagster.core.analysis import LabelledDay, Outcome, judge_errors
from mlops_dagster.core.strategies import RolloutPolicy


def landed(errors: np.ndarray, limit: float = 1.0) -> LabelledDay:
    """A day's absolute errors, of which those over 1.5 are called wrong."""
    capped = sequential.capped(errors, limit)
    factors = tuple(sequential.factors_of_mean(capped, limit).tolist())
    return LabelledDay(len(errors), int((errors > 1.5).sum()), float(capped.sum()), factors)


def test_errors_of_a_regression_that_land_days_later_revoke() -> None:
    random, policy = np.random.default_rng(0), RolloutPolicy()
    assert judge_errors([], 1.0, policy).outcome is Outcome.INCONCLUSIVE
    at_limit = [landed(random.exponential(1.0, 300)) for _ in range(7)]
    assert judge_errors(at_limit, 1.0, policy).outcome is Outcome.INCONCLUSIVE
    worse = judge_errors([landed(random.exponential(1.3, 300)) for _ in range(5)], 1.0, policy)
    assert (worse.outcome, worse.reasons[0].endswith("is over the limit of 1")) == (Outcome.FAIL, True), worse
    for absurd in (1e12, np.nan):
        glitch = judge_errors([landed(np.array([0.5] * 10 + [absurd]))], 1.0, policy)
        assert glitch.outcome is Outcome.INCONCLUSIVE, "a single label proves nothing"
    beside = judge_errors(at_limit, 1.5, policy, champion=[(300, 20)] * 7)
    assert (beside.outcome, "of the version before, on the same days" in beside.reasons[0]) == (Outcome.FAIL, True), beside
    json.dumps(beside.to_json(), allow_nan=False)


@pytest.mark.parametrize("draw", ["exponential", "lognormal"])
def test_errors_at_the_limit_looked_at_daily_rarely_revoke(draw: str) -> None:
    random, policy, revoked = np.random.default_rng(1), RolloutPolicy(), 0
    for _ in range(200):
        errors = random.exponential(1.0, (30, 60)) if draw == "exponential" else random.lognormal(-0.72, 1.2, (30, 60))
        seen = [landed(day) for day in errors]
        revoked += any(judge_errors(seen[:days], 1.0, policy).outcome is Outcome.FAIL for days in range(1, 31))
    assert revoked / 200 <= 0.02
