"""A project elsewhere that installs this package: its own data, its own model, the whole life of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lifecycle import foreign


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The project copied to a folder of its own, its CSV, and an empty state folder."""
    return foreign.make(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def seen(environment) -> dict[str, dict]:
    """What each step of `life.py` saw."""
    return foreign.steps("life.py", environment)


def test_thirty_days_are_ingested_with_every_check_green(seen):
    assert seen["ingest"]["made"] == ["features", "raw_data", "validated_data"]
    assert {name for name, (passed, _) in seen["ingest"]["checks"].items() if not passed} == set()
    assert "online_equals_offline" in " ".join(seen["ingest"]["checks"])


def test_training_registers_a_version_whose_checks_passed(seen):
    assert seen["train"]["made"] == ["best_parameters", "evaluation", "model_version", "trained_model", "training_set"]
    assert all(passed for passed, _ in seen["train"]["checks"].values()), seen["train"]["checks"]


def test_nothing_is_deployed_before_it_is_approved(seen):
    assert "mlops approve late_parcel VERSION --by NAME" in seen["deploy unapproved"]["error"]


def test_the_approved_version_is_live_and_champion(seen):
    assert all(passed for passed, _ in seen["deploy"]["checks"].values()), seen["deploy"]["checks"]
    assert "champion" in seen["live"]["aliases"]
    assert "('1', 1000)" in seen["live"]["serving"]


def test_every_request_of_the_replayed_days_is_logged_and_judged(seen):
    assert seen["replayed"]["sent"] == [60, 60, 60]
    checks = seen["monitor 2024-02-16"]["checks"]
    assert checks["inference_log.volume"][0]
    assert checks["inference_log.p99_latency"][0], checks["inference_log.p99_latency"]
    assert "accuracy" in checks["live_performance.online_accuracy"][1]


def test_heavier_parcels_are_seen_as_drift(seen):
    passed, because = seen["monitor 2024-02-16"]["checks"]["drift_report.psi"]
    assert not passed
    assert "weight" in because


def test_drift_retrains_once_however_often_the_sensor_looks(seen):
    assert (seen["retrained"]["runs"], seen["retrained"]["again"]) == (1, 0)
    assert len(seen["retrained"]["why"]) == 1
    assert "drift: " in seen["retrained"]["why"][0]


def test_the_second_version_comes_in_by_its_strategy_and_the_ledger_holds(seen):
    last = seen["second live"]
    assert last["deployed"] == 1
    assert last["phases"].count("promotion") == 2
    assert "rollout_step" in last["phases"]
    assert last["aliases"] == {"1": ["previous"], "2": ["champion"]}
    assert last["broken"] == "None"


def test_a_rollback_brings_the_version_before_back(seen):
    back = seen["back"]
    assert (back["phase"], back["version"]) == ("promoted", "1")
    assert back["aliases"]["1"] == ["champion"]
    assert "('1', 1000)" in back["routes"]


def test_dg_finds_nothing_wrong_and_the_component_is_listed(environment):
    project = Path(environment["PYTHONPATH"])
    dg = Path(sys.executable).parent / "dg"
    for command in (["check", "yaml"], ["check", "defs"]):
        done = subprocess.run([str(dg), *command], env=environment, capture_output=True, text=True, cwd=project, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_misspelt_field_is_told_with_its_line(environment, tmp_path):
    shutil.copytree(foreign.HERE / "own_project", tmp_path / "project")
    file = tmp_path / "project/parcels/defs/late_parcel/defs.yaml"
    file.write_text(file.read_text().replace("minimum_rows", "minimum_row"))
    dg = Path(sys.executable).parent / "dg"
    changed = {**environment, "PYTHONPATH": str(tmp_path / "project")}
    command = [str(dg), "check", "yaml"]
    done = subprocess.run(command, env=changed, capture_output=True, text=True, cwd=tmp_path / "project", timeout=300)
    assert done.returncode != 0
    assert "minimum_row" in done.stdout
    assert "defs.yaml:15" in done.stdout, done.stdout
