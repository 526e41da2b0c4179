"""The same graph on servers: a lake and a DVC remote in S3, the online store in Redis or PostgreSQL, the ledger in PostgreSQL."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.contracts.data_lake.s3_server import s3_server
from tests.contracts.feature_store.online_servers import postgres_server, redis_server
from tests.lifecycle import parcels_csv

HERE = Path(__file__).parent
SECRET = "hunter-2:#{x}"


@pytest.fixture(scope="module", params=["redis", "postgres"])
def seen(request, tmp_path_factory) -> dict[str, dict]:
    """What each step of `backends_life.py` saw."""
    folder = tmp_path_factory.mktemp("servers")
    shutil.copytree(HERE / "own_project", folder / "project")
    parcels_csv.write(folder / "parcels.csv")
    with s3_server() as s3, postgres_server() as postgres, redis_server(folder) as redis:
        bucket = f"life-{uuid.uuid4().hex}"
        s3.resource().get_client().create_bucket(Bucket=bucket)
        database = f"127.0.0.1:{postgres['port']}/postgres"
        password = "hunter-2%3A%23%7Bx%7D"
        if request.param == "redis":
            online = f"redis://:{password}@{redis['connection_string']}/1"
            port = redis["connection_string"].rpartition(":")[2]
            subprocess.run(
                ["redis-cli", "-p", port, "config", "set", "requirepass", SECRET], check=True, stdout=subprocess.DEVNULL
            )
        else:
            online = f"postgresql://feast:{password}@{database}?sslmode=disable"
        environment = {
            **os.environ,
            **s3.environment(),
            "AWS_ENDPOINT_URL": s3.endpoint,
            "MLOPS_LAKE_URL": f"s3://{bucket}/lake",
            "MLOPS_DVC_REMOTE": f"s3://{bucket}/versions",
            "MLOPS_ONLINE_STORE": online,
            "MLOPS_LEDGER_URL": f"postgresql+psycopg://feast@{database}",
            "MLOPS_WANDB_PROJECT": "parcels",
            "WANDB_MODE": "offline",
            "PYTHONPATH": str(folder / "project"),
            "PARCELS_CSV": str(folder / "parcels.csv"),
            "MLOPS_HOME": str(folder / "state"),
            "SECRET": "hunter-2",
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder),
        }
        command = [sys.executable, str(HERE / "backends_life.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=HERE)
    lines = [json.loads(line.removeprefix("SEEN ")) for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert done.returncode == 0, f"after {[line['step'] for line in lines]}: {done.stderr[-6000:]}"
    return {line.pop("step"): line for line in lines}


def test_every_check_of_ingestion_training_and_deployment_passes(seen):
    for step in ("ingest", "train", "deploy"):
        assert {name: why for name, (passed, why) in seen[step]["checks"].items() if not passed} == {}
    assert "6 entities" in seen["ingest"]["checks"]["features.online_equals_offline"][1]


def test_a_prediction_by_entity_key_reads_that_online_store(seen):
    online, answers = seen["asked"]["online"], seen["asked"]["answers"]
    assert [row["depot_late_share"] is None for row in online] == [False, False, True]
    scores = [answer["predictions"][0] for answer in answers]
    assert len(scores) == 3
    assert len({json.dumps(score) for score in scores}) > 1, scores


def test_a_replayed_day_is_answered_logged_and_monitored(seen):
    assert seen["replayed"]["sent"] == 60
    checks = seen["monitor 2024-01-31"]["checks"]
    assert checks["inference_log.volume"][0], checks


def test_data_and_decisions_lie_on_the_servers_and_no_file_holds_the_password(seen):
    stored = seen["stored"]
    assert stored["lake"].startswith("s3://life-")
    assert (stored["days"], stored["tracked"], stored["unsent"]) == (31, 31, 0)
    assert stored["local_lake"] is False
    assert "promotion" in stored["ledger"]
    assert stored["broken"] == "None"
    assert stored["mirrored"] == 1
    assert stored["leaked"] == []
