"""Retraining decisions: hysteresis, cool-down, budget, age, labels."""

import datetime as dt
import itertools

from hypothesis import given
from hypothesis import strategies as st

from mlops_dagster.core.retraining import Evaluation, TrainingState, decide
from mlops_dagster.core.spec import Retraining

DAY = dt.date(2013, 3, 10)
TRAINED = TrainingState(dt.date(2013, 2, 28))


def drift(*violated: bool | None, trigger: str = "drift") -> list[Evaluation]:
    first = DAY - dt.timedelta(days=len(violated) - 1)
    return [Evaluation(first + dt.timedelta(days=i), trigger, v, f"PSI of day {i}") for i, v in enumerate(violated)]


def test_two_of_five_and_the_newest():
    assert decide(Retraining(), drift(True, False, False, False, True), TRAINED, DAY).retrain
    assert not decide(Retraining(), drift(False, False, False, False, True), TRAINED, DAY).retrain
    assert not decide(Retraining(), drift(True, True, True, True, False), TRAINED, DAY).retrain
    assert not decide(Retraining(), drift(True, False, False, False, False, True), TRAINED, DAY).retrain


def test_days_without_an_answer_are_neither():
    assert decide(Retraining(), drift(True, None, None, None, None, True), TRAINED, DAY).retrain
    assert not decide(Retraining(), drift(None, None, None), TRAINED, DAY).retrain


def test_the_reason_names_trigger_days_and_figure():
    decision = decide(Retraining(), drift(True, True), TRAINED, DAY)
    assert decision.reasons == ("drift: 2 of the last 2 evaluations violated, the newest of 2013-03-10: PSI of day 1",)


def test_only_declared_triggers_count():
    assert not decide(Retraining(triggers=["accuracy"]), drift(True, True), TRAINED, DAY).retrain
    assert decide(Retraining(triggers=["accuracy"]), drift(True, True, trigger="accuracy"), TRAINED, DAY).retrain


def test_cool_down_holds_and_says_so():
    state = TrainingState(dt.date(2013, 2, 28), (DAY - dt.timedelta(days=6),))
    decision = decide(Retraining(), drift(True, True), state, DAY)
    assert not decision.retrain
    assert "cooldown_days is 7" in decision.sentence()
    assert decide(
        Retraining(), drift(True, True), TrainingState(dt.date(2013, 2, 28), (DAY - dt.timedelta(days=7),)), DAY
    ).retrain


def test_budget_of_any_thirty_days():
    past = tuple(DAY - dt.timedelta(days=8 + i) for i in range(2))
    decision = decide(Retraining(runs_per_month=2), drift(True, True), TrainingState(dt.date(2013, 1, 1), past), DAY)
    assert not decision.retrain
    assert "runs_per_month is 2" in decision.sentence()


def test_age_and_new_labels():
    assert decide(Retraining(), [], TrainingState(DAY - dt.timedelta(days=90)), DAY).retrain
    assert not decide(Retraining(), [], TrainingState(DAY - dt.timedelta(days=89)), DAY).retrain
    labels = Retraining(triggers=["new_labels"], new_labels=10)
    assert decide(labels, [], TrainingState(DAY, new_labels=10), DAY).retrain
    assert not decide(labels, [], TrainingState(DAY, new_labels=9), DAY).retrain


def test_nothing_to_retrain_before_the_first_version():
    assert not decide(Retraining(), drift(True, True), TrainingState(None), DAY).retrain


@given(st.lists(st.sampled_from([True, False, None]), min_size=40, max_size=400))
def test_however_evidence_comes_budget_and_cool_down_hold(violated):
    """Replay any history day by day, always retraining when told to: never two within the cool-down, never more than the budget."""
    policy = Retraining(runs_per_month=3, cooldown_days=5)
    done: list[dt.date] = []
    first = dt.date(2013, 1, 1)
    evaluations = [Evaluation(first + dt.timedelta(days=i), "drift", v, "") for i, v in enumerate(violated)]
    for i in range(len(evaluations)):
        today = evaluations[i].day
        if decide(policy, evaluations[: i + 1], TrainingState(first, tuple(done)), today).retrain:
            done.append(today)
    assert all((b - a).days >= 5 for a, b in itertools.pairwise(done))
    assert all(sum(0 <= (d - other).days < 30 for other in done) <= 3 for d in done)
