"""A declared space is read whole or refused with the field that is wrong."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.core.search_space import Choices, Range, SearchSpace, parse_search_space


def test_the_declared_forms_are_read() -> None:
    space = parse_search_space(
        {
            "learning_rate": {"min": 0.01, "max": 0.3, "log": True},
            "num_leaves": {"min": 15, "max": 127.0, "integer": True},
            "boosting": {"choices": ["gbdt", "dart", None, 1, True]},
        }
    )
    assert space.parameters == {
        "learning_rate": Range(0.01, 0.3, log=True),
        "num_leaves": Range(15, 127, integer=True),
        "boosting": Choices(("gbdt", "dart", None, 1, True)),
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, r"p: min and max is missing"),
        ({"min": 1}, r"p: max is missing"),
        ({"min": 2, "max": 1}, r"p: min 2 must be below max 1"),
        ({"min": "a", "max": 1}, r"p\.min: 'a' must be a finite number"),
        ({"min": True, "max": 3}, r"p\.min: True must be a finite number"),
        ({"min": 0, "max": math.inf}, r"p\.max: inf must be a finite number"),
        ({"min": 0, "max": 1, "log": True}, r"p\.min: 0 must be above 0 on a logarithmic scale"),
        ({"min": 0, "max": 1, "log": "yes"}, r"p\.log: 'yes' must be true or false"),
        ({"min": 0.5, "max": 2, "integer": True}, r"p: min 0\.5 and max 2 must be whole numbers"),
        ({"min": 0, "max": 1, "step": 2}, r"p: step is unknown; a range has integer, log, max, min"),
        ({"choices": []}, r"p\.choices: \[\] must be a list with at least one value"),
        ({"choices": "abc"}, r"p\.choices: 'abc' must be a list"),
        ({"choices": [1, [2]]}, r"p\.choices: \[2\] must be text, a number, true, false or null"),
        ({"choices": [1, 1]}, r"p\.choices: \[1, 1\] names a value twice"),
        ({"choices": [1], "min": 0}, r"p: min cannot stand beside choices"),
        ([1, 2], r"p: \[1, 2\] must be \{min, max\} or \{choices"),
    ],
)
def test_what_is_wrong_is_named(entry: Any, message: str) -> None:
    with pytest.raises(DeclarationError, match=rf"tuning\.parameters\.{message}"):
        parse_search_space({"p": entry})


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(DeclarationError, match=r"tuning\.parameters: is empty"):
        parse_search_space({})


def test_a_grid_is_regular() -> None:
    space = SearchSpace({"rate": Range(0.01, 1, log=True), "leaves": Range(1, 4, integer=True), "kind": Choices(("a", "b"))})
    grid = space.grid(18)
    assert grid["rate"] == pytest.approx((0.01, 0.1, 1.0))
    assert grid["leaves"] == (1, 2, 4)
    assert len(space.combinations(18)) == 18


ranges = st.tuples(st.integers(1, 50), st.integers(1, 50), st.booleans(), st.booleans()).map(
    lambda drawn: Range(drawn[0], drawn[0] + drawn[1], drawn[2], drawn[3])
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), ranges, min_size=1), st.integers(1, 200))
def test_a_grid_has_distinct_points_within_the_space_and_never_too_many(parameters: dict[str, Range], trials: int) -> None:
    points = SearchSpace(parameters).combinations(trials)
    assert 1 <= len(points) <= trials
    assert len({tuple(point.values()) for point in points}) == len(points)
    for point in points:
        for name, value in point.items():
            one = parameters[name]
            assert one.minimum <= value <= one.maximum  # pyright: ignore[reportOperatorIssue]
            assert isinstance(value, int) or not one.integer
