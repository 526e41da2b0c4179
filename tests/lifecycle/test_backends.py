"""The same graph on servers: a lake and a DVC remote in S3, the online store in Redis or PostgreSQL, the ledger in PostgreSQL,
tracking and registry in an MLflow server (beside PostgreSQL) or a file (beside Redis).
"""

import json
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from tests.contracts.data_lake.s3_server import s3_server
from tests.contracts.feature_store.online_servers import postgres_server, redis_server
from tests.contracts.tracking.mlflow_server import free_port, serve
from tests.lifecycle import foreign

SECRET = "hunter-2:#{x}"


@pytest.fixture(scope="module", params=["redis", "postgres"])
def seen(request, tmp_path_factory) -> dict[str, dict]:
    """What each step of `backends_life.py` saw."""
    folder = tmp_path_factory.mktemp("servers")
    made = foreign.make(folder)
    shutil.copy(foreign.HERE / "study.py", folder / "project/parcels/defs/")
    tracking = serve(folder) if request.param == "postgres" else nullcontext("")
    with s3_server() as s3, postgres_server() as postgres, redis_server(folder) as redis, tracking as mlflow_url:
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
            **made,
            **s3.environment(),
            "AWS_ENDPOINT_URL": s3.endpoint,
            "MLOPS_LAKE_URL": f"s3://{bucket}/lake",
            "MLOPS_DVC_REMOTE": f"s3://{bucket}/versions",
            "MLOPS_ONLINE_STORE": online,
            "MLOPS_LEDGER_URL": f"postgresql+psycopg://feast@{database}",
            "MLOPS_WANDB_PROJECT": "parcels",
            "WANDB_MODE": "offline",
            "SECRET": "hunter-2",
            # Once is enough: these commands know of the lake and the ledger, not of the online store.
            "COMMANDS": str(folder / "copy") if request.param == "redis" else "",
            **({"MLOPS_MLFLOW_URL": mlflow_url} if mlflow_url else {}),
        }
        seen = foreign.steps("backends_life.py", environment)
        address = mlflow_url or f"sqlite:///{folder}/state/mlflow/mlflow.db"
        seen["mlflow"] = {"address": address, **kept_by_mlflow(address)}
        if mlflow_url:
            seen["up"] = up(environment, folder / "project")
    return seen


def kept_by_mlflow(address: str) -> dict[str, Any]:
    """What MLflow's own client finds there of the life."""
    client = MlflowClient(tracking_uri=address, registry_uri=address)
    experiment = client.get_experiment_by_name("late_parcel")
    assert experiment is not None
    model = client.get_registered_model("late_parcel")
    return {
        "runs": {run.info.run_id: run.to_dictionary()["data"] for run in client.search_runs([experiment.experiment_id])},
        "artifacts": {
            run.info.run_id: [file.path for file in client.list_artifacts(run.info.run_id)]
            for run in client.search_runs([experiment.experiment_id])
        },
        "aliases": dict(model.aliases),
        "versions": [(v.version, v.run_id, v.tags) for v in client.search_model_versions("name = 'late_parcel'")],
    }


def up(environment: Mapping[str, str], project: Path) -> dict[str, Any]:
    """`mlops up` until it has told what is where: its words, and the commands of all processes that it started."""
    ports = [part for name in ("dagster", "mlflow", "evidently") for part in (f"--{name}-port", str(free_port()))]
    command = [str(Path(sys.executable).parent / "mlops"), "up", *ports]
    output = project / "up.log"
    with output.open("w") as log:
        running = subprocess.Popen(command, env=environment, cwd=project, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while "Ctrl-C stops" not in output.read_text() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        commands = [" ".join(p.cmdline()) for p in psutil.Process(running.pid).children(recursive=True)]
        running.send_signal(signal.SIGINT)
        code = running.wait(60)
    return {"told": output.read_text(), "code": code, "commands": commands}


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


def test_runs_versions_and_approvals_are_in_the_mlflow_that_is_named(seen):
    kept, on_server = seen["mlflow"], seen["mlflow"]["address"].startswith("http")
    assert seen["stored"]["local_mlflow"] is not on_server
    ((number, trained, tags),) = kept["versions"]
    assert (int(number), tags["mlops.approval"], tags["mlops.approved_by"]) == (1, "approved", "tester")
    assert {alias: int(at) for alias, at in kept["aliases"].items()} == {"champion": 1}
    assert "accuracy" in json.loads(tags["mlops.evidence.metrics"])
    assert kept["runs"][trained]["metrics"]["train_rows"] == 1380
    assert any(path.startswith("model-") for path in kept["artifacts"][trained])
    assert "deployment" in seen["deploy"]["made"]


def test_an_asset_beside_the_model_logs_to_the_same_experiment(seen):
    assert seen["study"]["made"] == ["study"]
    kept = seen["mlflow"]
    (study,) = (run_id for run_id, run in kept["runs"].items() if "heavy_kg" in run["params"])
    assert (kept["runs"][study]["params"], kept["runs"][study]["metrics"]) == ({"heavy_kg": "9.0"}, {"gain": 0.125})
    assert kept["artifacts"][study] == ["rule.json"]
    assert "dagster_run_id" in kept["runs"][study]["tags"]


def test_up_links_the_mlflow_that_is_named_and_starts_none(seen):
    if "up" not in seen:
        return  # `tests/lifecycle/test_up.py` has the other case
    up = seen["up"]
    assert up["code"] == 0, up["told"]
    assert seen["mlflow"]["address"] in up["told"]
    assert [command for command in up["commands"] if "dagster" in command], up
    assert [command for command in up["commands"] if "mlflow server" in command] == []


def test_data_and_decisions_lie_on_the_servers_and_no_file_holds_the_password(seen):
    stored = seen["stored"]
    assert stored["lake"].startswith("s3://life-")
    assert (stored["days"], stored["tracked"], stored["unsent"]) == (31, 31, 0)
    assert stored["local_lake"] is False
    assert "promotion" in stored["ledger"]
    assert stored["broken"] == "None"
    assert stored["mirrored"] == 1
    assert stored["leaked"] == []


def test_every_command_that_follows_data_works_on_a_lake_in_s3(seen, request):
    if "commands" not in seen:
        assert request.node.callspec.params["seen"] == "postgres"
        return
    said = {name: told for name, told in seen["commands"].items() if isinstance(told, list)}
    assert {name: told for name, told in said.items() if told[0] != (name == "missing")} == {}
    of = {name: json.loads(said[name][1]) for name in ("log", "trace", "trace collected", "affected", "reproduce")}
    assert [revision["stages"] for revision in of["log"][:3]] == [
        {"features": 1, "origins": 1}, {"validated_data": 1, "origins": 1}, {"raw_data": 1},
    ]  # fmt: skip
    for name in ("trace", "trace collected"):
        (found,) = of[name]
        assert (len(found["training_set"]["raw_data"]), found["approval"]["by"], found["notes"]) == (30, "tester", [])
    (touched,) = of["affected"]
    assert (touched["row_days"], [v["version"] for v in touched["versions"]]) == (["2024-01-20", "2024-01-28"], [1])
    assert touched["predictions"][0]["trained_on_it"] >= 60
    assert of["reproduce"]["identical"], said["reproduce"]
    assert "152 files written, 0 were there already" in said["copy"][1]
    assert "for 8 days, 2024-01-20 … 2024-01-27" in said["quarantine"][1]
    assert "removed  late_parcel/features/depot_record/2024-01-20.parquet" in said["diff"][1]
    assert "IN QUARANTINE (by ana" in said["affected after"][1]
    assert "8 files replaced, 5 removed" in said["checkout"][1]
    assert (seen["commands"]["out"], seen["commands"]["same"]) == (True, True)
    assert "raw_data/2031-01-01: no raw partition of late_parcel" in said["missing"][2]
