"""A stage whose storage fails: a clear error, a lake that is as it was, and a run that completes when the storage is back."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.contracts.feature_store.online_servers import free_port
from tests.lifecycle import foreign

Ingest = Callable[..., dict]


@pytest.fixture
def ingest(tmp_path: Path) -> Ingest:
    """Ingest days of the foreign project with the given settings; what `faults_life.py` saw."""
    made = foreign.make(tmp_path)

    def run(first: str, last: str, **settings: str) -> dict:
        environment = {
            **made,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "hunter2",
            "AWS_DEFAULT_REGION": "us-east-1",
            **settings,
        }
        (seen,) = foreign.told("faults_life.py", environment, first, last)
        return seen

    return run


def test_a_remote_that_cannot_be_reached_leaves_the_local_lake_whole_and_the_next_run_sends_it(ingest: Ingest, tmp_path: Path):
    nowhere = f"http://127.0.0.1:{free_port()}"
    # Ours are three; boto's own attempts in each of them would take half a minute.
    settings = {"MLOPS_DVC_REMOTE": "s3://nowhere/versions", "AWS_ENDPOINT_URL": nowhere, "AWS_MAX_ATTEMPTS": "1"}
    seen = ingest("2024-01-01", "2024-01-02", **settings)
    assert "DVC remote s3://nowhere/versions: cannot be reached after 3 attempts" in seen["error"]
    assert "The local lake is whole; check the address, the network and the credentials, then push again" in seen["error"]
    assert "hunter2" not in seen["error"]
    days = [f"late_parcel/raw_data/rows/2024-01-0{n}.parquet" for n in (1, 2)]
    assert [key for key in seen["files"] if key.startswith("late_parcel/raw_data/rows/")] == days
    assert seen["tracked"] == days
    remote = tmp_path / "remote"
    again = ingest("2024-01-01", "2024-01-02", MLOPS_DVC_REMOTE=str(remote))
    assert again["error"] == ""
    assert {key: again["files"][key] for key in days} == {key: seen["files"][key] for key in days}
    assert len(again["tracked"]) == 10  # raw, validated and features of two days, and what the last two were made of
    # Validated rows that are the raw ones are one object.
    assert len([f for f in remote.rglob("*") if f.is_file()]) == len({again["files"][key] for key in again["tracked"]})


def test_a_lake_that_cannot_be_reached_is_tried_again_and_then_named(ingest: Ingest):
    nowhere = f"http://127.0.0.1:{free_port()}"
    seen = ingest("2024-01-01", "2024-01-01", MLOPS_LAKE_URL="s3://nowhere/lake", AWS_ENDPOINT_URL=nowhere)
    assert "lake object s3://nowhere/lake/late_parcel/raw_data/" in seen["error"]
    assert f'Could not connect to the endpoint URL: "{nowhere}' in seen["error"]
    assert "after 4 attempts. Nothing was changed; check the endpoint, the bucket 'nowhere' and the credentials" in seen["error"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MLOPS_ONLINE_STORE", "mysql://u:hunter2@h/db", "MLOPS_ONLINE_STORE is 'mysql://u:***@h/db': use sqlite, redis://"),
        ("MLOPS_LAKE_URL", "https://h/bucket", "MLOPS_LAKE_URL is 'https://h/bucket': use s3://BUCKET/PREFIX"),
        ("MLOPS_DVC_REMOTE", "gs://bucket/x", "MLOPS_DVC_REMOTE is 'gs://bucket/x': use s3://BUCKET/PREFIX"),
        ("MLOPS_MLFLOW_URL", "host:5000", "MLOPS_MLFLOW_URL is 'host:5000': use http(s)://HOST:PORT"),
        ("MLOPS_LEDGER_URL", "oracle+nothing://u:hunter2@h/db", "Use sqlite:////path/ledger.db or postgresql+psycopg://"),
    ],
)
def test_a_wrong_setting_is_told_without_its_password(name: str, value: str, words: str, tmp_path: Path):
    command = [str(Path(sys.executable).parent / "mlops"), "ledger", "verify"]
    environment = {**os.environ, "MLOPS_HOME": str(tmp_path), name: value}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert words in " ".join(done.stderr.split()), done.stderr
    assert "hunter2" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two MiB where the lake will be."""
    folder = tmp_path / "state" / "lake"
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_changes_nothing_and_with_room_the_same_run_completes(
    ingest: Ingest, small_disk: Path, tmp_path: Path
):
    before = ingest("2024-01-01", "2024-01-02")
    assert before["error"] == ""
    rows = 60_000
    random = np.random.default_rng(1)
    sent = pd.Timestamp("2024-01-03T06:00:00Z") + pd.to_timedelta(random.integers(0, 60_000, rows), unit="s")
    large = pd.DataFrame(
        {
            "id": [f"x{n}" for n in random.integers(0, 10**12, rows)],
            "event_timestamp": sent,
            "depot": "d1",
            "weight_kg": random.uniform(size=rows),
            "delivered_at": sent + pd.to_timedelta(1, unit="h"),
            "late": 1.0,
        }
    )
    large.to_csv(tmp_path / "parcels.csv", mode="a", header=False, index=False)
    full = ingest("2024-01-03", "2024-01-03")
    assert "No space left on device" in full["error"]
    assert "free disk space" in full["error"].lower()
    assert full["aside"] == 0
    assert {key: full["files"][key] for key in before["files"]} == before["files"]
    assert set(before["tracked"]) <= set(full["tracked"])
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    after = ingest("2024-01-03", "2024-01-03")
    assert after["error"] == ""
    assert {key: after["files"][key] for key in before["files"]} == before["files"]
    assert "late_parcel/features/depot_record/2024-01-03.parquet" in after["tracked"]
