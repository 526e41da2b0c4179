"""The four strategies as lists of steps, and what a policy refuses."""

import json
from dataclasses import replace

import pytest

from mlops_dagster.core.errors import DeclarationError, NotFoundError
from mlops_dagster.core.rollout_gates import GATES
from mlops_dagster.core.routes import Match, Mirror, Routes, assign
from mlops_dagster.core.strategies import STRATEGIES, RolloutPolicy, Step, count_tests, plan, strategy

DEFAULT = RolloutPolicy()


def steps_of(name: str, **changes) -> tuple[Step, ...]:
    return plan("1", "2", replace(DEFAULT, strategy=name, **changes))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_ends_in_a_watch_with_the_champion_warm(name: str) -> None:
    steps = steps_of(name)
    assert [step.watch for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].routes == Routes.all_to("2", warm=["1"])
    assert steps[-1].minimum_requests == DEFAULT.minimum_requests
    for step in steps:
        assert step.candidate == "2"
        assert {*step.gates, *step.guardrails} <= GATES.keys()
        assert step.gates
        assert Step.from_json(json.loads(json.dumps(step.to_json()))) == step


def test_the_candidate_never_serves_before_a_gate_in_blue_green_and_shadow() -> None:
    for name in ("blue_green", "shadow"):
        assert steps_of(name)[0].routes.serving == ("1",)


def test_canary_defaults() -> None:
    steps = steps_of("canary")
    assert [step.routes.percent("2") for step in steps] == [5, 25, 50, 100]
    assert [step.compare_with for step in steps] == ["1", "1", "1", None]
    assert [step.minimum_seconds for step in steps] == [60, 60, 60, 300]


def test_canary_with_an_equal_baseline() -> None:
    steps = steps_of("canary", baseline_arm=True)
    assert [dict(step.routes.weights) for step in steps[:3]] == [
        {"1": 900, "1@baseline": 50, "2": 50},
        {"1": 500, "1@baseline": 250, "2": 250},
        {"1": 0, "1@baseline": 500, "2": 500},
    ]
    assert {step.compare_with for step in steps[:3]} == {"1@baseline"}


def test_a_canary_step_of_100_percent_compares_with_nobody() -> None:
    last = steps_of("canary", steps_percent=(50.0, 100.0))[1]
    assert last.compare_with is None
    assert not {"errors", "latency"} & {*last.gates}


def test_blue_green_preview_is_reached_by_its_header_only() -> None:
    preview = steps_of("blue_green")[0]
    assert preview.routes == Routes.split({"1": 100, "2": 0}, match=Match("x-mlops-arm", "2", "2"))
    assert (preview.compare_with, preview.minimum_requests) == (None, 50)
    mirrored = steps_of("blue_green", preview_mirror_percent=10)[0]
    assert mirrored.routes.mirror == Mirror("2", 100)
    assert (mirrored.compare_with, mirrored.minimum_requests) == ("1", 500)


def test_shadow_answers_nobody() -> None:
    step = steps_of("shadow", mirror_percent=12.5)[0]
    assert step.routes == Routes.split({"1": 100, "2": 0}, mirror=Mirror("2", 125))
    assert step.pause
    assert not steps_of("shadow", shadow_ends="promote")[0].pause


def test_ab_is_sticky_and_only_its_metric_promotes() -> None:
    step = steps_of("ab_test", ab_percent=30)[0]
    assert step.gates == ("metric", "sample_ratio")
    assert "errors" in step.guardrails
    assert step.maximum_seconds == 14 * 86_400
    assert assign("ada", step.routes) == assign("ada", step.routes)
    other = plan("1", "3", replace(DEFAULT, strategy="ab_test"))[0]
    assert other.routes.sticky != step.routes.sticky, "two experiments divide independently"


def test_alpha_is_split_over_the_tests_of_the_whole_plan() -> None:
    assert count_tests(steps_of("canary")) == 6
    assert count_tests(steps_of("blue_green")) == 3
    assert count_tests(steps_of("ab_test")) == 6
    assert count_tests(()) == 1


def test_the_first_deployment_has_no_steps() -> None:
    assert plan(None, "1", DEFAULT) == ()


def test_an_unknown_strategy_lists_those_there_are() -> None:
    with pytest.raises(NotFoundError, match="'purple': use one of blue_green, canary, shadow, ab_test"):
        strategy("purple")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "purple"}, "strategy is 'purple': use one of"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"alpha": "0.01"}, "alpha is '0.01': give a number"),
        ({"minimum_requests": 0}, "minimum_requests is 0"),
        ({"minimum_requests": 2.5}, "minimum_requests is 2.5: give a whole number"),
        ({"minimum_requests": True}, "minimum_requests is True"),
        ({"step_seconds": -1}, "step_seconds is -1"),
        ({"watch_seconds": float("inf")}, "watch_seconds is inf"),
        ({"step_seconds": float("nan")}, "step_seconds is nan"),
        ({"steps_percent": ()}, "steps_percent is"),
        ({"steps_percent": (25.0, 5.0)}, "must rise"),
        ({"steps_percent": (0.0, 5.0)}, "must rise"),
        ({"steps_percent": (5.05,)}, "steps of 0.1"),
        ({"steps_percent": [5.0]}, "give a tuple of numbers"),
        ({"steps_percent": (60.0,), "baseline_arm": True}, "50 is the most"),
        ({"pauses": (10.0,)}, "pauses names 10"),
        ({"max_p99_latency_ms": 0.0}, "max_p99_latency_ms is 0.0"),
        ({"shadow_ends": "later"}, "shadow_ends is 'later'"),
        ({"ab_percent": 100.0}, "ab_percent is 100"),
        ({"sticky_name": "x y"}, "sticky.name"),
        ({"mirror_percent": 101.0}, "mirror_percent is 101"),
    ],
)
def test_a_wrong_policy_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        replace(DEFAULT, **changes)


def test_a_step_with_a_misspelt_field() -> None:
    with pytest.raises(DeclarationError, match="gate"):
        Step.from_json({**steps_of("canary")[0].to_json(), "gate": 1})
