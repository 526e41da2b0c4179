"""The commands on a foreign project whose first version has answered two days of requests."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlops_dagster import cli

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="module")
def project(environment):
    """The project's folder, which this process is in for a while, after its life so far."""
    changed = {**environment, "PYTHONPATH": f"{environment['PYTHONPATH']}:{ROOT}"}
    made = subprocess.run(
        [sys.executable, str(HERE / "parcels_life.py")], env=changed, capture_output=True, text=True, timeout=600
    )
    assert made.returncode == 0, made.stderr[-6000:]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLOPS_HOME", "PARCELS_CSV", "PYTHONPATH"):
            patch.setenv(name, environment[name])
        patch.chdir(environment["PYTHONPATH"])
        patch.setattr(sys, "path", [environment["PYTHONPATH"], *sys.path])
        yield Path(environment["PYTHONPATH"])
    for name in [n for n in sys.modules if n.partition(".")[0] == "parcels"]:
        del sys.modules[name]


@pytest.fixture
def mlops(project, capsys, monkeypatch):
    """Runs a command in this process, as the console script would; returns exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlops", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def lake(environment) -> Path:
    return Path(environment["MLOPS_HOME"]) / "lake"


def test_a_prediction_is_traced_to_its_bytes_without_a_heavy_import(project, environment):
    heavy = "print([m for m in ('dagster', 'mlflow', 'pandas', 'sqlalchemy', 'feast') if m in sys.modules], file=sys.stderr)"
    script = f"import sys; from mlops_dagster import cli\ntry: cli.main()\nfinally: {heavy}"
    done = subprocess.run(
        [sys.executable, "-c", script, "trace", "p1805", "--json"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    (found,) = json.loads(done.stdout)
    assert found["request"]["row_id"] == "p1805"
    assert found["logged_in"] == "late_parcel/inference_log/2024-01-31.parquet"
    assert found["features"].keys() == {"depot_late_share", "depot_parcels", "depot_weight", "weight"}
    assert (found["approval"]["by"], found["approval"]["intact"]) == ("tester", True)
    assert found["deployment"]["kind"] == "promotion"
    assert found["evaluation"]["metrics"]["accuracy"] > 0.6
    training_set = found["training_set"]
    manifest = json.loads((lake(environment) / "late_parcel/training_set/current.json").read_bytes())
    assert (training_set["sha256"], training_set["dvc_commit"]) == (manifest["training_set"], manifest["dvc_commit"])
    assert len(training_set["raw_data"]) == 30
    for key, md5 in training_set["raw_data"].items():
        assert f"md5: {md5}" in (lake(environment) / f"{key}.dvc").read_text()
    assert training_set["feature_views"]["depot_record"]["days"] == 30
    assert (len(found["code"]["digest"]), len(found["environment"]), found["notes"]) == (64, 64, [])


def test_a_prediction_of_a_day_that_was_not_collected_yet_is_traced_too(mlops):
    code, out, err = mlops("trace", "p1870")
    assert code == 0, err
    assert "approval, ledger entry 1" in out
    assert "late_parcel/raw_data/rows/2024-01-30.parquet" in out


def test_what_a_raw_day_touched(mlops):
    code, out, err = mlops("affected", "raw_data/2024-01-25", "--json")
    assert code == 0, err
    (found,) = json.loads(out)
    assert [v["version"] for v in found["versions"]] == [1]
    assert found["training_sets"][0]["same_as_now"]
    assert found["deployments"][0]["until"] is None
    assert found["predictions"] == [{"day": "2024-01-31", "trained_on_it": 60, "featured_by_it": 60, "may_carry_it": 0}]
    assert (found["feature_days"], found["row_days"]) == (["2024-01-25", "2024-02-01"], ["2024-01-25", None])
    assert json.loads(mlops("affected", "raw_data/2024-01-20", "--json")[1])[0]["row_days"] == ["2024-01-20", "2024-01-28"]
    _, after, _ = mlops("affected", "raw_data/2024-01-31", "--json")
    (later,) = json.loads(after)
    assert (later["training_sets"], later["versions"], later["advice"]) == ([], [], [])
    assert later["predictions"] == [{"day": "2024-01-31", "trained_on_it": 0, "featured_by_it": 60, "may_carry_it": 0}]


def test_the_data_as_it_was_for_a_version(mlops, environment, tmp_path):
    code, out, _ = mlops("data", "log", "late_parcel", "--json")
    newest = json.loads(out)[0]
    assert (code, newest["stages"]) == (0, {"training_set": 2})
    code, out, err = mlops("data", "checkout", "late_parcel", "--version", "1", "--to", str(tmp_path / "copy"))
    assert code == 0, err
    file = "late_parcel/raw_data/rows/2024-01-17.parquet"
    assert (tmp_path / "copy" / file).read_bytes() == (lake(environment) / file).read_bytes()
    (lake(environment) / file).unlink()
    assert "1 files replaced" in mlops("data", "checkout", "late_parcel", "--version", "1")[1]
    assert (tmp_path / "copy" / file).read_bytes() == (lake(environment) / file).read_bytes()
    assert mlops("data", "diff", "late_parcel", "v1")[1].strip().endswith("no difference")


def test_a_version_is_made_again_from_the_same_data_though_its_code_was_touched(mlops, environment):
    file = Path(environment["PYTHONPATH"]) / "parcels/defs/late_parcel/training.py"
    before = file.read_text()
    file.write_text(before + "\n# a remark\n")
    try:
        code, out, err = mlops("reproduce", "late_parcel", "1", "--json")
    finally:
        file.write_text(before)
    assert code == 0, err
    found = json.loads(out)
    assert "the code is not the one of version 1: late_parcel/training.py" in err.splitlines()[0]
    assert {n: found[n]["same"] for n in ("code", "environment", "data", "metrics")} == {
        "code": False, "environment": True, "data": True, "metrics": True,
    }, found["environment"]  # fmt: skip
    assert found["identical"]


def test_quarantine_says_what_follows_and_is_seen_by_affected(mlops):
    for already in ("", " already"):
        code, out, err = mlops("quarantine", "late_parcel", "raw_data/2024-01-17", "--by", "ana", "--reason", "the scale broke")
        assert code == 0, err
        assert f"is in quarantine{already} (ledger entry " in out
        assert "materialize late_parcel/features again for 8 days, 2024-01-17 … 2024-01-24" in out
        assert "retrain late_parcel without it (job late_parcel_train) and replace version 1" in out
    assert "IN QUARANTINE (by ana: the scale broke)" in mlops("affected", "raw_data/2024-01-17")[1]
    assert "is back in" in mlops("quarantine", "late_parcel", "raw_data/2024-01-17", "--by", "ana", "--undo")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("trace nobody", "no prediction was logged under the request id 'nobody' (late_parcel: 60 collected predictions"),
        ("trace p1805 --model other", "other has no data in this state folder; there is data of: late_parcel"),
        ("affected raw_data/2031-01-01", "raw_data/2031-01-01: no raw partition of late_parcel; see `mlops data log MODEL`"),
        ("affected features/x", "partition 'features/x': give it as raw_data/YYYY-MM-DD"),
        ("quarantine other raw_data/2024-01-17 --by ana", "declares no model 'other'; it declares: late_parcel"),
        ("quarantine late_parcel raw_data/2031-01-01 --by ana", "late_parcel has no raw_data of 2031-01-01; it has 2024-01-01"),
        ("reproduce late_parcel 7", "late_parcel has no version 7; it has: 1"),
        ("data log other", "other has no recorded data here"),
        ("data checkout late_parcel --at 1999-01-01", "late_parcel has no tracked data at revision 1999-01-01"),
        ("data diff late_parcel v1 zzz", "revision 'zzz': no such commit"),
    ],
)
def test_wrong_input_is_told_with_the_remedy(mlops, arguments, words):
    code, _, err = mlops(*arguments.split())
    assert code == 1
    assert words in err
    assert "Traceback" not in err


def test_a_version_without_a_record_of_its_inputs_is_told_and_the_rest_is_traced(mlops, environment):
    inputs = lake(environment) / "late_parcel/training_set/inputs"
    shutil.move(inputs, inputs.with_name("aside"))
    try:
        code, out, err = mlops("trace", "p1805")
    finally:
        shutil.move(inputs.with_name("aside"), inputs)
    assert code == 0, err
    assert "does not exist. Materialize that partition first" in out
    assert "approval, ledger entry 1" in out
