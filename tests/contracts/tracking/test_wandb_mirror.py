"""The mirror writes files that W&B's own code reads, without network, and never stands in the way of MLflow."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlops_dagster.core.errors import StorageError
from mlops_dagster.resources.tracking import Tracking
from mlops_dagster.resources.tracking.mlflow_tracking import MlflowTracking
from mlops_dagster.resources.tracking.wandb_mirror import MirroredTracking, WandbMirror
from mlops_dagster.resources.tracking.wandb_records import records, wait_until_written

pytest.importorskip("wandb")
RUN: dict[str, Any] = {
    "parameters": {"learning_rate": 0.1, "layers": [3, 4]},
    "metrics": {"accuracy": 0.91},
    "tags": {"engine": "local"},
    "artifacts": {"report/notes.md": b"fine"},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any call home would fail at once and be in the log."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.fixture
def mirror(tmp_path: Path) -> WandbMirror:
    return WandbMirror(folder=str(tmp_path))


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"summary": {}, "files": []}
    for record in records(next(folder.glob("*.wandb"))):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.update(project=record.run.project, id=record.run.run_id, name=record.run.display_name)
            found["config"] = {entry.key: json.loads(entry.value_json) for entry in record.run.config.update}
        elif kind == "summary":
            found["summary"] |= {
                entry.key or entry.nested_key[0]: json.loads(entry.value_json) for entry in record.summary.update
            }
        elif kind == "files":
            found["files"] += [entry.path for entry in record.files.files]
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def test_wandbs_own_records_hold_the_run(mirror: WandbMirror) -> None:
    folder = mirror.log_run("flight", "whole/1", **RUN)
    run = read(folder)
    assert (run["project"], run["name"], run["exit"]) == ("flight", "whole/1", 0)
    assert run["config"]["parameters"] == {"learning_rate": 0.1, "layers": [3, 4]}
    assert run["config"]["tags"] == {"engine": "local"}
    assert run["summary"]["accuracy"] == 0.91
    assert "report/notes.md" in run["files"]
    assert (folder / "files" / "report" / "notes.md").read_bytes() == b"fine"


def test_wandbs_command_finds_it_for_upload(mirror: WandbMirror) -> None:
    folder = mirror.log_run("flight", "whole/1", **RUN)
    command = [sys.executable, "-m", "wandb", "beta", "sync", "--dry-run", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Would sync 1 run(s)" in done.stdout + done.stderr


def test_a_repeated_key_is_one_run(mirror: WandbMirror) -> None:
    first = mirror.log_run("flight", "again", **RUN)
    assert mirror.log_run("flight", "again", **RUN) == first
    changed = mirror.log_run("flight", "again", **{**RUN, "metrics": {"accuracy": 0.5}})
    mirror.log_run("flight", "other", **RUN)
    folders = sorted(Path(mirror.folder, "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert changed in folders
    assert read(changed)["summary"]["accuracy"] == 0.5


def test_a_run_that_was_cut_off_is_replaced(mirror: WandbMirror) -> None:
    folder = mirror.log_run("flight", "torn", **RUN)
    (folder / "mlops-content-sha256").unlink()
    torn = folder.rename(folder.with_name(folder.name.replace("offline-run-2", "offline-run-1")))
    again = mirror.log_run("flight", "torn", **RUN)
    assert not torn.exists()
    assert read(again)["summary"]["accuracy"] == 0.91


def test_a_long_run_is_read_over_several_blocks(mirror: WandbMirror) -> None:
    long = {f"p{number}": "x" * 3000 for number in range(40)}
    run = read(mirror.log_run("flight", "long", **{**RUN, "parameters": long}))
    assert run["config"]["parameters"] == long
    assert run["exit"] == 0


def test_a_file_without_an_end_is_not_taken_for_whole(mirror: WandbMirror) -> None:
    folder = mirror.log_run("flight", "short", **RUN)
    file = next(folder.glob("*.wandb"))
    file.write_bytes(file.read_bytes()[:-3])
    waited: list[float] = []
    with pytest.raises(StorageError, match="did not finish writing"):
        wait_until_written(folder, sleep=waited.append, tries=3)
    assert len(waited) == 3


def test_the_mirror_never_stops_a_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    primary = MlflowTracking(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    broken = WandbMirror(folder=str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match="writable"):
        broken.log_run("flight", "k", **RUN)
    tracking = MirroredTracking(primary=primary, mirror=broken)
    assert isinstance(tracking, Tracking)
    tracking.log_run("flight", "k", **RUN)
    assert "its W&B mirror" in caplog.text
    run = tracking.read_run("flight", "k")
    assert run is not None
    assert run.metrics == {"accuracy": 0.91}


def test_both_hold_the_run(tmp_path: Path) -> None:
    primary = MlflowTracking(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    tracking = MirroredTracking(primary=primary, mirror=WandbMirror(folder=str(tmp_path)))
    ref = tracking.log_run("flight", "k", **RUN)
    folder = next(Path(tmp_path, "wandb").glob("offline-run-*"))
    assert read(folder)["config"]["tags"] == {"engine": "local", "mlflow_run_id": ref.run_id}
