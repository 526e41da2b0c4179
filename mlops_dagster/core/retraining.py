"""When to train again: triggers with hysteresis, a cool-down and a budget, from evidence alone."""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

from mlops_dagster.core.spec import Retraining


@dataclass(frozen=True)
class Evaluation:
    """What monitoring found about one day: `violated` is None where there was too little data to say."""

    day: dt.date
    trigger: str
    violated: bool | None
    reason: str


@dataclass(frozen=True)
class TrainingState:
    """What is known of the versions so far; days are those of the data, not of the wall clock."""

    trained_through: dt.date | None
    retrained_on: tuple[dt.date, ...] = ()
    new_labels: int = 0


@dataclass(frozen=True)
class Decision:
    """Whether to retrain, why, and what holds it back where it is wanted but not allowed."""

    retrain: bool
    reasons: tuple[str, ...] = ()
    held_by: str | None = None

    def sentence(self) -> str:
        if not self.reasons:
            return "nothing asks for a retraining"
        why = "; ".join(self.reasons)
        return why if self.held_by is None else f"{why}, but {self.held_by}"


def decide(policy: Retraining, evaluations: Sequence[Evaluation], state: TrainingState, today: dt.date) -> Decision:
    """Decide about `today` (the newest day of data) from the evaluations of the days up to it.

    A trigger fires when at least `violations` of its last `of_last` evaluations are violated and the newest of them is (the rule of
    Databricks' mlops-stacks); days without an answer count as neither. A cool-down and a budget then may hold it.
    """
    if state.trained_through is None:
        return Decision(False)
    reasons = [
        reason
        for trigger in ("drift", "accuracy")
        if trigger in policy.triggers
        for reason in _fired(policy, trigger, evaluations)
    ]
    age = (today - state.trained_through).days
    if "age" in policy.triggers and age >= policy.max_age_days:
        reasons.append(f"age: the newest version was trained on data up to {age} days ago, limit {policy.max_age_days}")
    if "new_labels" in policy.triggers and state.new_labels >= policy.new_labels:
        reasons.append(f"new_labels: {state.new_labels} labelled rows since the last training, enough are {policy.new_labels}")
    return Decision(bool(reasons) and (held := _held_by(policy, state, today)) is None, tuple(reasons), held if reasons else None)


def _fired(policy: Retraining, trigger: str, evaluations: Sequence[Evaluation]) -> list[str]:
    answered = sorted((e for e in evaluations if e.trigger == trigger and e.violated is not None), key=lambda e: e.day)
    last = answered[-policy.of_last :]
    violated = [e for e in last if e.violated]
    if len(violated) < policy.violations or not last[-1].violated:
        return []
    return [
        f"{trigger}: {len(violated)} of the last {len(last)} evaluations violated, the newest of {last[-1].day}: {last[-1].reason}"
    ]


def _held_by(policy: Retraining, state: TrainingState, today: dt.date) -> str | None:
    recent = [day for day in state.retrained_on if 0 <= (today - day).days < 30]
    if state.retrained_on and (since := (today - max(state.retrained_on)).days) < policy.cooldown_days:
        return f"the last retraining was {since} days ago, retraining.cooldown_days is {policy.cooldown_days}"
    if len(recent) >= policy.runs_per_month:
        return f"{len(recent)} retrainings in the last 30 days, retraining.runs_per_month is {policy.runs_per_month}"
    return None
