"""A rollout whose measurements cannot be written: it is decided all the same, held for a person, and rolled back on harm."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mlops_dagster.assets import rollout, rollout_measurements
from mlops_dagster.core import rollout as engine
from mlops_dagster.core.analysis import Verdict
from mlops_dagster.core.rollout import Action, Phase
from mlops_dagster.core.rollout_gates import Outcome
from tests.lifecycle.rollout_site import spec_of
from tests.serving.test_rollout_answers import Stepping, at


@contextmanager
def file_in_place_of_the_folder(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("")
    yield
    folder.unlink()


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        with (folder / "rest").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert shutil.disk_usage(folder).free == 0
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


Damage = Callable[[Path], Any]
DAMAGES = [file_in_place_of_the_folder, full_disk]


def folder_of(site: Stepping) -> Path:
    return site.tally.path.parent


def decide(site: Stepping, verdict: Verdict, seconds: float) -> Action:
    site.state, action = engine.advance(site.state, verdict, rollout.policy_of(site.spec), at(seconds))
    return action


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_sound_version_is_held_and_goes_on_where_it_was(tmp_path: Path, damage: Damage) -> None:
    site = Stepping(tmp_path, spec_of("m", step_seconds=600))
    site.look(0, 0, 1)
    decide(site, site.look(100, 0, 6), 6)
    with damage(folder_of(site)):
        for number in range(5):
            seen = site.look(200 + 100 * number, 0, 11 + 5 * number)
            assert (seen.outcome, "cannot be" in seen.reasons[0]) == (Outcome.ERROR, True), seen
            action = decide(site, seen, 11 + 5 * number)
        assert (site.state.phase, action.alert) == (Phase.HELD, True)
        assert "5 ERRORs in a row: " in action.reason
        assert "r.json" in action.reason or "r.db" in action.reason
    assert site.look(700, 0, 36).outcome is not Outcome.ERROR
    assert [tick.arms["2"].requests for tick in site.measured().ticks] == [100] * 7, "no tick was lost or joined with another"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_failing_version_is_rolled_back(tmp_path: Path, damage: Damage, from_the_start: bool) -> None:
    site = Stepping(tmp_path, spec_of("m", step_seconds=600))
    if not from_the_start:
        site.look(0, 0, 1)
    with damage(folder_of(site)):
        if from_the_start:
            assert decide(site, site.look(0, 0, 1), 1).reason
        decide(site, site.look(500, 500, 6), 6)
    assert site.state.phase is Phase.ROLLED_BACK
    assert "failed requests" in site.state.reason
    assert site.state.routes == rollout.Routes.all_to("1")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"bounds_ms": [1]}', b"\xff"])
@pytest.mark.parametrize("remembered", [True, False])
def test_damaged_measurements_are_told_once(tmp_path: Path, content: bytes, remembered: bool) -> None:
    site = Stepping(tmp_path, spec_of("m", step_seconds=600))
    site.look(0, 0, 1)
    site.look(100, 0, 6)
    site.tally.path.with_suffix(".json").write_bytes(content)
    if not remembered:
        rollout_measurements._NEWEST.clear()  # another process
    told = site.look(200, 0, 11)
    assert (told.outcome, "r.json were damaged" in told.reasons[0]) == (Outcome.ERROR, True), told
    assert site.look(300, 0, 16).outcome is not Outcome.ERROR
    assert [tick.arms["2"].requests for tick in site.measured().ticks] == [100] * (3 if remembered else 1)
