"""The declaration: defaults, and a clear word about every wrong field."""

import dataclasses
import datetime as dt
from pathlib import Path

import pytest
from pydantic import ValidationError

from mlops_dagster.core import spec as spec_module
from mlops_dagster.core.rollout_section import DERIVED_FIELDS, Rollout
from mlops_dagster.core.spec import ModelDeclaration, ModelSpec, Partitions, Section
from mlops_dagster.core.strategies import RolloutPolicy
from mlops_dagster.resources.serving import DEFAULT_OPTIONS

MINIMAL = {
    "source": {"read": ".source.read_day", "schema": ".source.Rows", "partitions": {"start": "2013-01-01"}},
    "features": {"define": ".features.views", "compute": ".features.compute"},
    "label": {"column": "late"},
    "training": {"train": ".training.train"},
}


def declare(**sections):
    return ModelDeclaration.model_validate({**MINIMAL, **sections})


def test_defaults_are_the_seeds_numbers():
    spec = ModelSpec(name="m", package="p", **declare().model_dump(exclude_unset=True))
    assert (spec.active_gate.metric, spec.active_gate.limit) == ("accuracy", 0.9)
    monitoring = spec.monitoring
    assert (monitoring.max_psi, monitoring.max_p99_latency_ms, monitoring.max_accuracy_drop) == (0.3, 100, 0.05)
    assert monitoring.max_requests_per_second == 10_000
    assert spec.rollout.strategy == "canary"
    assert spec.approval == "manual"
    assert spec.serving.model_dump() == {name: getattr(DEFAULT_OPTIONS, name) for name in type(spec.serving).model_fields}


def test_a_regression_is_gated_by_its_baseline():
    spec = ModelSpec(name="m", package="p", **{**MINIMAL, "training": {"train": ".t.t", "task": "regression"}})
    assert (spec.active_gate.metric, spec.active_gate.limit, spec.active_gate.gain_over_baseline) == (
        "mean_absolute_error",
        None,
        0.0,
    )


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"rolout": {}}, "rolout"),
        ({"monitoring": {"max_psy": 0.3}}, "max_psy"),
        ({"monitoring": {"max_psi": "high"}}, "max_psi"),
        ({"serving": {"timeout_seconds": 101}}, "serving.timeout_seconds"),
        ({"serving": {"requests_per_second": 0}}, "serving.requests_per_second"),
        ({"gate": {"metric": "acuracy"}}, "gate.metric 'acuracy' is unknown; use one of accuracy"),
        ({"gate": {"metric": "r2"}}, "does not fit training.task 'classification'"),
        ({"gate": {"metric": "log_loss", "minimum": 1}}, "use gate.maximum"),
        ({"rollout": {"steps_percent": [50, 5]}}, "must rise"),
        ({"rollout": {"strategy": "bluegreen"}}, "blue_green"),
        ({"tuning": {"engine": "local"}}, "tuning.parameters is empty"),
        ({"tuning": {"engine": "local", "parameters": {"a": {"min": 2, "max": 1}}}}, "min 2 must be below max 1"),
        ({"training": {"train": "no_dots"}}, "training.train"),
        ({"training": {"train": ".t.t", "window_days": 7, "test_days": 7}}, "leaves nothing of window_days"),
        ({"retraining": {"violations": 6}}, "can never be reached"),
    ],
)
def test_a_wrong_field_is_named_with_its_remedy(sections, words):
    with pytest.raises(ValidationError, match=words.replace("(", r"\(")):
        declare(**sections)


def test_days_begin_and_end_in_their_time_zone():
    partitions = Partitions(start=dt.date(2013, 1, 1), timezone="America/New_York")
    begin, end = partitions.bounds(dt.date(2013, 3, 10))
    # Summer time begins on that day: it has 23 hours.
    assert end.astimezone(dt.UTC) - begin.astimezone(dt.UTC) == dt.timedelta(hours=23)
    assert partitions.day_of(dt.datetime(2013, 3, 11, 3, 59, tzinfo=dt.UTC)) == dt.date(2013, 3, 10)


def test_an_unknown_time_zone_and_days_in_the_wrong_order():
    with pytest.raises(ValidationError, match="IANA"):
        Partitions(start=dt.date(2013, 1, 1), timezone="New York")
    with pytest.raises(ValidationError, match="swap"):
        Partitions(start=dt.date(2013, 1, 2), end=dt.date(2013, 1, 1))


def test_a_rollout_declares_what_its_policy_knows_with_the_same_defaults():
    policy = RolloutPolicy()
    declared = {name: getattr(policy, name) for name in Rollout.model_fields}
    assert {field.name for field in dataclasses.fields(RolloutPolicy)} == declared.keys() | set(DERIVED_FIELDS)
    assert Rollout().policy() == policy
    changed = {name: _other(value) for name, value in declared.items() if isinstance(value, int | float)}
    changed["preview_mirror_percent"] = 0.5
    assert {n: getattr(Rollout(**changed).policy(), n) for n in changed} == changed


def _other(value):
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("ab_metric", "clicks", "rollout.ab_metric is 'clicks': use accuracy, answered, score"),
        ("sticky_name", "no spaces here", "sticky.name"),
        ("pauses", [7], "rollout.pauses names 7"),
        ("mirror_percent", 12.34, "rollout.mirror_percent is 12.34: percents go in steps of 0.1"),
        ("max_restarts", 0, "greater than or equal to 1"),
        ("max_disagreement", 1, "less than 1"),
        ("preview_header", "a b", "match.header"),
    ],
)
def test_a_wrong_rollout_is_an_error_of_the_declaration(field, value, words):
    with pytest.raises(ValidationError, match=words):
        Rollout(**{field: value})


def test_every_field_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "declaration.md").read_text()
    sections = [
        m for m in vars(spec_module).values() if isinstance(m, type) and issubclass(m, Section) and m not in (Section, ModelSpec)
    ]
    fields = {info.alias or name for section in sections for name, info in section.model_fields.items()}
    assert {f for f in fields if f"`{f}`" not in text and f".{f}`" not in text} == set()
