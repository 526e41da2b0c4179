"""What every tracking backend must do, on the embedded SQLite store and on a real server."""

import math
import multiprocessing
import sys
import traceback
from pathlib import Path

import pytest
import requests

from mlops_dagster.core.errors import DataError, DeclarationError, NotFoundError, StorageError, TransientError
from mlops_dagster.resources.tracking import Tracking
from mlops_dagster.resources.tracking.mlflow_connection import connect, translated
from mlops_dagster.resources.tracking.mlflow_tracking import MlflowTracking

PARAMETERS = {"learning_rate": 0.1, "boosting": "gbdt", "layers": [3, 4], "early": None}


def run_files(tracking: MlflowTracking, run_id: str, folder: str = "") -> set[str]:
    client = connect(tracking.tracking_uri)
    found: set[str] = set()
    for entry in client.list_artifacts(run_id, folder):
        found |= run_files(tracking, run_id, entry.path) if entry.is_dir else {entry.path}
    return found


def test_satisfies_the_protocol(tracking: MlflowTracking) -> None:
    assert isinstance(tracking, Tracking)


def test_a_run_reads_back_whole(tracking: MlflowTracking, tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "roc.txt").write_text("curve")
    (tmp_path / "notes.md").write_text("x")
    artifacts = {"report/notes.md": tmp_path / "notes.md", "plots": tmp_path / "plots", "raw.bin": b"\x00\x01"}
    ref = tracking.log_run(
        "flight", "whole/2013-03-01", PARAMETERS, {"accuracy": 0.91, "undefined": math.nan}, {"engine": "local"}, artifacts
    )
    run = tracking.read_run("flight", "whole/2013-03-01")
    assert run is not None
    assert run.ref == ref
    assert run.finished
    assert run.parameters == {"learning_rate": "0.1", "boosting": "gbdt", "layers": "[3, 4]", "early": "null"}
    assert run.metrics["accuracy"] == 0.91
    assert math.isnan(run.metrics["undefined"])
    assert run.tags["engine"] == "local"
    assert ref.run_id in ref.url_path
    assert run_files(tracking, ref.run_id) == {"report/notes.md", "plots/roc.txt", "raw.bin"}


def test_a_repeated_key_is_the_same_run_with_the_newest_numbers(tracking: MlflowTracking) -> None:
    first = tracking.log_run("flight", "again", PARAMETERS, {"accuracy": 0.9, "loss": 1.0}, {"a": "1"}, {"f": b"old"})
    assert tracking.log_run("flight", "again", PARAMETERS, {"accuracy": 0.9, "loss": 1.0}, {"a": "1"}, {"f": b"old"}) == first
    assert tracking.log_run("flight", "again", PARAMETERS, {"accuracy": 0.7, "loss": 1.0}, {"a": "2"}, {"f": b"new"}) == first
    run = tracking.read_run("flight", "again")
    assert run is not None
    assert run.metrics == {"accuracy": 0.7, "loss": 1.0}
    assert run.tags["a"] == "2"
    client = connect(tracking.tracking_uri)
    assert [entry.value for entry in client.get_metric_history(first.run_id, "loss")] == [1.0]
    assert Path(client.download_artifacts(first.run_id, "f")).read_bytes() == b"new"


def test_many_entries_need_no_care(tracking: MlflowTracking) -> None:
    names = [f"p{i}" for i in range(230)]
    tracking.log_run("flight", "many", dict.fromkeys(names, 1), dict.fromkeys(names, 1.5), dict.fromkeys(names, "t"), {})
    run = tracking.read_run("flight", "many")
    assert run is not None
    assert len(run.parameters) == len(run.metrics) == 230
    assert set(names) <= set(run.tags)


def test_a_parameter_cannot_change(tracking: MlflowTracking) -> None:
    tracking.log_run("flight", "fixed", {"depth": 3}, {}, {}, {})
    with pytest.raises(DataError, match=r"parameters.depth: run 'fixed' was logged with '3', not '4'"):
        tracking.log_run("flight", "fixed", {"depth": 4}, {}, {}, {})


def test_an_interrupted_run_is_completed(tracking: MlflowTracking) -> None:
    """What a process leaves that was killed after the run was created: found, filled and finished by the next call."""
    client = connect(tracking.tracking_uri)
    tracking.log_run("flight", "other", {}, {}, {}, {})
    experiment = client.get_experiment_by_name("flight")
    assert experiment is not None
    torn = client.create_run(experiment.experiment_id, tags={"mlops.run_key": "torn"})
    before = tracking.read_run("flight", "torn")
    assert before is not None
    assert not before.finished
    ref = tracking.log_run("flight", "torn", {"depth": 3}, {"accuracy": 0.5}, {}, {})
    assert ref.run_id == torn.info.run_id
    after = tracking.read_run("flight", "torn")
    assert after is not None
    assert after.finished
    assert after.metrics == {"accuracy": 0.5}


def test_an_experiment_deleted_in_the_ui_comes_back(tracking: MlflowTracking) -> None:
    tracking.log_run("deleted", "a", {}, {"x": 1.0}, {}, {})
    client = connect(tracking.tracking_uri)
    experiment = client.get_experiment_by_name("deleted")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    tracking.log_run("deleted", "b", {}, {"x": 2.0}, {}, {})
    run = tracking.read_run("deleted", "b")
    assert run is not None
    assert run.metrics == {"x": 2.0}


def test_what_is_not_there_reads_as_none(tracking: MlflowTracking) -> None:
    assert tracking.read_run("flight", "never") is None
    assert tracking.read_run("no-such-experiment", "never") is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"run_key": "a'b"}, DeclarationError, 'run_key: "a\'b"'),
        ({"metrics": {"lift": math.inf}}, DataError, r"metrics.lift: inf"),
        ({"artifacts": {"../x": b""}}, DeclarationError, r"artifacts: '\.\./x'"),
        ({"artifacts": {"x": Path("/no/such/file")}}, NotFoundError, "artifacts.x: /no/such/file"),
        ({"parameters": {"sql": "x" * 6001}}, DeclarationError, "parameters.sql: 6001 characters"),
    ],
)
def test_bad_input_is_named(tracking: MlflowTracking, changes: dict, error: type[Exception], message: str) -> None:
    arguments: dict = {"run_key": "bad", "parameters": {}, "metrics": {}, "tags": {}, "artifacts": {}, **changes}
    with pytest.raises(error, match=message):
        tracking.log_run("flight", **arguments)
    assert tracking.read_run("flight", "bad") is None


def test_an_unknown_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match=r"tracking_uri: 'ftp://u:\*\*\*@x'"):
        MlflowTracking(tracking_uri="ftp://u:hunter2@x").read_run("flight", "x")


def test_an_error_of_the_http_client_is_told_without_a_password() -> None:
    address = "http://u:hunter%4f@127.0.0.1:1"
    for shown in (address, "http://u:hunter%4F@127.0.0.1:1", "https://other:hunter@h"):  # as given, as sent, and another one
        with pytest.raises(StorageError, match="check that its server answers") as error, translated(address):
            raise requests.HTTPError(f"401 Client Error: Unauthorized for url: {shown}/api")
        told = "".join(traceback.format_exception(error.value))
        assert ":***@" in told
        assert "hunter" not in told


def test_a_cause_that_shows_a_password_is_left_out() -> None:
    with pytest.raises(StorageError) as error, translated("http://127.0.0.1:1"):
        raise OSError("not reachable") from ValueError("http://u:hunter2@127.0.0.1:1 was given")
    assert "hunter2" not in "".join(traceback.format_exception(error.value))
    with pytest.raises(StorageError) as error, translated("http://127.0.0.1:1"):
        raise OSError("not reachable")
    assert isinstance(error.value.__cause__, OSError)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="writable"):
        MlflowTracking(tracking_uri=f"sqlite:///{tmp_path}/file/mlflow.db").read_run("flight", "x")


def test_a_server_that_is_away_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TransientError, match=r"127\.0\.0\.1:9"):
        MlflowTracking(tracking_uri="http://127.0.0.1:9").read_run("flight", "x")


def _log_once(uri: str, start: float) -> str:
    import time

    time.sleep(max(0.0, start - time.time()))
    return MlflowTracking(tracking_uri=uri).log_run("flight", "shared", {"depth": 3}, {"accuracy": 0.5}, {}, {"f": b"x"}).run_id


def test_two_processes_meet_at_a_database_that_does_not_exist(tmp_path: Path) -> None:
    import time

    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        start = time.time() + 4
        runs = pool.starmap(_log_once, [(uri, start), (uri, start)])
        pool.close()
        pool.join()  # they end by themselves: `terminate` waits for ever where SIGTERM is ignored
    assert runs[0] == runs[1]


def test_importing_the_module_does_not_import_mlflow() -> None:
    import subprocess

    code = "import sys, mlops_dagster.resources.tracking.mlflow_tracking; print('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
