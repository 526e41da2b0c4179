"""What only several processes can do wrong."""

import os
from pathlib import Path

import pytest

from mlops_dagster.core.errors import TransientError
from mlops_dagster.core.search_space import parse_search_space
from mlops_dagster.resources.tuning.ray_tuner import RayTuner

SPACE = parse_search_space({"x": {"min": 0, "max": 1}})


def test_a_worker_that_dies_is_reported_and_its_round_is_tried_again(cluster: None, tmp_path: Path) -> None:
    tuner = RayTuner(folder=str(tmp_path / "tuning"))
    died = tmp_path / "died"

    def dies_once(parameters: dict) -> float:
        if not died.exists():
            died.write_text("")
            os._exit(1)
        return parameters["x"]

    with pytest.raises(TransientError, match="process died") as caught:
        tuner.search("dies", dies_once, SPACE, "random", 4, "maximize", 1)
    assert "in the search 'dies'" in caught.value.__notes__[0]
    assert tuner.search("dies", dies_once, SPACE, "random", 4, "maximize", 1).trials.num_rows == 4


def test_trials_run_beside_each_other(cluster: None, tmp_path: Path) -> None:
    """Each waits until the other has begun: one at a time they would never end."""
    import time

    def meets(parameters: dict) -> float:
        (tmp_path / f"began-{parameters['x']}").write_text("")
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("began-*"))) < 2:
            if time.monotonic() > deadline:
                raise TimeoutError("no other trial began")
            time.sleep(0.05)
        return parameters["x"]

    best = RayTuner(folder=str(tmp_path / "tuning")).search("meets", meets, SPACE, "random", 2, "maximize", 1)
    assert best.trials.num_rows == 2
