"""What every tuning backend must do."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mlops_dagster.core.errors import DataError, DeclarationError
from mlops_dagster.core.search_space import ALGORITHMS, parse_search_space
from mlops_dagster.resources.tuning import Best, Tuner

SPACE = parse_search_space(
    {
        "x": {"min": -5, "max": 5},
        "rate": {"min": 0.001, "max": 1.0, "log": True},
        "leaves": {"min": 2, "max": 40, "integer": True},
    }
)
MIXED = parse_search_space({"x": {"min": -5, "max": 5}, "kind": {"choices": ["gbdt", "dart", None, 3, True]}})
# Both backends take their proposals from the same study, so that Ray need not show every algorithm again.
ALL = [("optuna", algorithm) for algorithm in ALGORITHMS] + [("ray", "tpe")]


def bowl(parameters: dict[str, Any]) -> float:
    """Best at x = 1, rate = 0.1, leaves = 20, where it is 0."""
    return -((parameters["x"] - 1) ** 2) - math.log10(parameters["rate"] * 10) ** 2 - ((parameters["leaves"] - 20) / 20) ** 2


def tried(best: Best) -> list[dict[str, Any]]:
    return [json.loads(text) for text in best.trials["parameters"].to_pylist()]


def test_satisfies_the_protocol(tuner: Tuner) -> None:
    assert isinstance(tuner, Tuner)


@pytest.mark.parametrize(("tuner", "algorithm"), ALL, indirect=["tuner"])
def test_every_algorithm_searches_the_space(tuner: Tuner, algorithm: str) -> None:
    best = tuner.search("bowl", bowl, SPACE, algorithm, 27, "maximize", 3)
    assert best.trials.num_rows == 27
    assert best.value == max(best.trials["value"].to_pylist()) == pytest.approx(bowl(dict(best.parameters)))
    for parameters in tried(best):
        assert -5 <= parameters["x"] <= 5
        assert 0.001 <= parameters["rate"] <= 1
        assert parameters["leaves"] in range(2, 41)
    assert len({json.dumps(parameters) for parameters in tried(best)}) == 27


@pytest.mark.parametrize(("tuner", "algorithm"), ALL, indirect=["tuner"])
def test_the_seed_decides(tuner: Tuner, algorithm: str) -> None:
    first = tuner.search("a", bowl, SPACE, algorithm, 8, "maximize", 3)
    assert tried(tuner.search("b", bowl, SPACE, algorithm, 8, "maximize", 3)) == tried(first)
    if algorithm != "grid":
        assert tried(tuner.search("a", bowl, SPACE, algorithm, 8, "maximize", 4)) != tried(first)


@pytest.mark.parametrize("tuner", ["optuna"], indirect=True)
def test_model_based_search_beats_chance(tuner: Tuner) -> None:
    chance = tuner.search("bowl", bowl, SPACE, "random", 40, "maximize", 1).value
    assert tuner.search("bowl", bowl, SPACE, "tpe", 40, "maximize", 1).value > chance


def test_minimizing_finds_the_smallest(tuner: Tuner) -> None:
    best = tuner.search("bowl", lambda parameters: -bowl(parameters), SPACE, "random", 10, "minimize", 1)
    assert best.value == min(best.trials["value"].to_pylist())


@pytest.mark.parametrize(
    ("tuner", "algorithm"),
    [("optuna", "random"), ("optuna", "tpe"), ("optuna", "grid"), ("optuna", "halton"), ("ray", "grid")],
    indirect=["tuner"],
)
def test_choices_keep_their_types(tuner: Tuner, algorithm: str) -> None:
    def score(parameters: dict[str, Any]) -> float:
        return 1.0 if parameters["kind"] is True else 0.0

    best = tuner.search("kinds", score, MIXED, algorithm, 25, "maximize", 5)
    assert best.value == 1.0
    assert best.parameters["kind"] is True
    assert {type(parameters["kind"]) for parameters in tried(best)} == {str, type(None), int, bool}


@pytest.mark.parametrize(
    ("tuner", "algorithm"), [("optuna", "random"), ("optuna", "tpe"), ("optuna", "grid"), ("ray", "tpe")], indirect=["tuner"]
)
def test_a_search_that_was_cut_off_goes_on(tuner: Tuner, tmp_path: Path, algorithm: str) -> None:
    whole = tuner.search("undisturbed", bowl, SPACE, algorithm, 8, "maximize", 3)
    calls = tmp_path / "calls"

    def dies_at_the_fourth(parameters: dict[str, Any]) -> float:
        with calls.open("a") as log:
            log.write("x")
        if calls.stat().st_size == 4:
            raise KeyboardInterrupt
        return bowl(parameters)

    with pytest.raises(KeyboardInterrupt):
        tuner.search("cut", dies_at_the_fourth, SPACE, algorithm, 8, "maximize", 3)
    best = tuner.search("cut", dies_at_the_fourth, SPACE, algorithm, 8, "maximize", 3)
    assert tried(best) == tried(whole)
    # The broken trial is tried again; so may be the one that ran beside it.
    total = calls.stat().st_size
    assert total in (9, 10)
    again = tuner.search("cut", dies_at_the_fourth, SPACE, algorithm, 8, "maximize", 3)
    assert again.parameters == best.parameters
    assert calls.stat().st_size == total


def test_trials_without_a_number_are_left_behind(tuner: Tuner) -> None:
    best = tuner.search("half", lambda p: math.nan if p["x"] > 0 else p["x"], SPACE, "random", 20, "maximize", 3)
    states = best.trials["state"].to_pylist()
    assert best.parameters["x"] <= 0
    assert len(states) == 20
    assert set(states) == {"complete", "failed"}
    with pytest.raises(DataError, match="all 5 trials of 'none' gave NaN"):
        tuner.search("none", lambda p: math.nan, SPACE, "tpe", 5, "maximize", 3)


def test_an_objectives_error_says_where(tuner: Tuner) -> None:
    def broken(parameters: dict[str, Any]) -> float:
        raise ZeroDivisionError("no rows")

    with pytest.raises(ZeroDivisionError, match="no rows") as caught:
        tuner.search("broken", broken, SPACE, "random", 3, "maximize", 3)
    assert "in the search 'broken'" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "bayes"}, r"tuning.algorithm: 'bayes' is unknown; use one of random, tpe, grid, cmaes, halton, sobol"),
        ({"direction": "max"}, r"tuning.direction: 'max' is unknown; use one of maximize, minimize"),
        ({"trials": 0}, r"tuning.trials: 0 must be at least 1"),
        ({"algorithm": "grid", "space": MIXED, "trials": 4}, r"5 combinations; give at least as many, not 4"),
    ],
)
def test_bad_questions_are_refused(tuner: Tuner, changes: dict[str, Any], message: str) -> None:
    question: dict[str, Any] = {"algorithm": "random", "trials": 3, "direction": "maximize", "space": SPACE, **changes}
    with pytest.raises(DeclarationError, match=message):
        tuner.search(study="s", objective=bowl, seed=1, **question)
