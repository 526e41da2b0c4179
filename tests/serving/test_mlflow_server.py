"""Models without an ONNX form: MLflow's own server behind the same predictor, over real processes."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import httpx
import numpy as np
import odd_estimators
import pandas as pd
import psutil
import pytest
from gateway_hosts import eventually, pid_of, predict_url, ready, serving_host
from odd_estimators import FAILS_AT, WAITS_AT, Far, Votes
from predictor_processes import Model, Process, Starter, children, command, launch, wait_until
from test_server_process import listening, run

from mlops_dagster.core.errors import ArtifactError, DeclarationError
from mlops_dagster.core.routes import Routes
from mlops_dagster.resources.serving import Arm
from mlops_dagster.resources.training import mlflow_export
from mlops_dagster.serving import server
from mlops_dagster.serving.app import Predictor
from mlops_dagster.serving.artifact import Feature, Signature, digest, load, write_signature
from mlops_dagster.serving.http_server import Server
from mlops_dagster.serving.inference_log import InferenceLog
from mlops_dagster.serving.metrics import Metrics
from mlops_dagster.serving.mlflow_scoring import opened
from mlops_dagster.serving.pages import Pages
from mlops_dagster.serving.pooled import BoundedPool, LockedIterator
from mlops_dagster.serving.segments import days, read_segments
from mlops_dagster.serving.server import bind

FEATURES = (
    Feature("distance", "float64", nullable=True),
    Feature("hour", "int64", nullable=True),
    Feature("rush", "bool", nullable=True),
    Feature("carrier", "string"),
)
EXPORTED = "odd_estimators"


def stored(folder: Path, estimator: object, signature: Signature, rows: pd.DataFrame) -> Model:
    mlflow_export.write(folder, estimator, signature, EXPORTED)
    write_signature(folder, signature)
    return Model(folder, digest(folder), signature, estimator, rows)


@pytest.fixture(scope="session")
def rows() -> pd.DataFrame:
    random = np.random.default_rng(3)
    found = pd.DataFrame({"distance": random.normal(size=40) * 1e9 + 1 / 3, "hour": random.integers(0, 24, 40)})
    found["rush"] = found["hour"] > 12
    found["carrier"] = np.array(["AA", "B6", "Ünï", "UA"], dtype=object)[np.arange(40) % 4]
    return found


@pytest.fixture(scope="session")
def votes_model(rows: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A classifier of four types of columns, all but one of which may lack values."""
    estimator = Votes().fit(rows, np.arange(40) % 2)
    signature = Signature("m", "classification", FEATURES, classes=(0, 1), onnx_input="columns")
    return stored(tmp_path_factory.mktemp("votes") / "artifact", estimator, signature, rows)


@pytest.fixture(scope="session")
def votes(votes_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One predictor of `votes_model` for all tests that do not end it."""
    process = launch(command(votes_model, "--log-root", str(tmp_path_factory.mktemp("log"))))
    yield process
    process.kill()


def ask(process: Process, instances: list, **headers: str) -> httpx.Response:
    return httpx.post(f"{process.url}/v1/models/m:predict", json={"instances": instances}, headers=headers, timeout=30)


def child_of(pid: int) -> psutil.Process:
    (child,) = children(pid, "mlflow_child")
    return child


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_v1_answers_what_the_estimator_does(votes: Process, votes_model: Model) -> None:
    native, chances = votes_model.estimator.predict(votes_model.rows), votes_model.estimator.predict_proba(votes_model.rows)
    answer = ask(votes, votes_model.instances(40)).json()
    assert answer == {"predictions": native.tolist(), "probabilities": chances.tolist()}
    assert len(set(native.tolist())) == 2
    one = ask(votes, votes_model.instances(1)).json()
    assert one == {"predictions": native[:1].tolist(), "probabilities": chances[:1].tolist()}


def test_missing_values_have_the_types_of_training(votes: Process, votes_model: Model) -> None:
    given = [{"distance": None, "hour": None, "rush": None, "carrier": "AA"}, votes_model.instances(1)[0]]
    frame = pd.DataFrame(given).astype({"rush": object})
    assert ask(votes, given).json()["probabilities"] == votes_model.estimator.predict_proba(frame).tolist()
    assert ask(votes, given[:1]).status_code == 200
    assert ask(votes, [{**given[1], "distance": 3}]).status_code == 200


def test_v2_answers_the_same_with_named_outputs(votes: Process, votes_model: Model) -> None:
    tensors = [
        {"name": f.name, "shape": [40], "datatype": kind, "data": votes_model.rows[f.name].tolist()}
        for f, kind in zip(FEATURES, ("FP64", "INT64", "BOOL", "BYTES"), strict=True)
    ]
    answer = httpx.post(f"{votes.url}/v2/models/m/infer", json={"id": "mine", "inputs": tensors}, timeout=30)
    label, chances = answer.json()["outputs"]
    assert (answer.headers["x-request-id"], label["datatype"], chances["shape"]) == ("mine", "INT64", [40, 2])
    assert label["data"] == votes_model.estimator.predict(votes_model.rows).tolist()
    assert chances["data"] == votes_model.estimator.predict_proba(votes_model.rows).reshape(-1).tolist()
    described = httpx.get(f"{votes.url}/v2/models/m").json()
    assert described["platform"] == "mlflow_pyfunc"
    assert [(o["name"], o["datatype"], o["shape"]) for o in described["outputs"]] == [
        ("label", "INT64", [-1]),
        ("probabilities", "FP64", [-1, 2]),
    ]


def test_answers_are_logged_and_counted(votes: Process, votes_model: Model, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        sent = list(pool.map(lambda n: ask(votes, votes_model.instances(n % 3 + 1), **{"x-request-id": f"log-{n}"}), range(60)))
    assert {s.status_code for s in sent} == {200}
    assert [s.headers["x-request-id"] for s in sent] == [f"log-{n}" for n in range(60)]
    anonymous = {ask(votes, votes_model.instances(1)).headers["x-request-id"] for _ in range(5)}
    assert len(anonymous) == 5
    assert votes.flush()["log"]["waiting"] == 0
    root = Path(votes.popen.args[votes.popen.args.index("--log-root") + 1])  # type: ignore[index,union-attr]
    logged = pd.concat(read_segments(root, "m", day).to_pandas() for day in days(root, "m"))
    mine = logged[logged["request_id"].str.startswith("log-")]
    assert len(mine) == sum(n % 3 + 1 for n in range(60))
    first = mine[mine["request_id"] == "log-0"].iloc[0]
    assert first["score"] == votes_model.estimator.predict_proba(votes_model.rows.head(1))[0, 1]
    assert first["features"]["carrier"] == "AA"
    metrics = httpx.get(f"{votes.url}/metrics").text
    assert 'protocol="v1",code="200"' in metrics


def test_a_body_in_pieces_is_answered(votes: Process, votes_model: Model) -> None:
    def pieces() -> Iterator[bytes]:
        whole = json.dumps({"instances": votes_model.instances(2)}).encode()
        yield whole[:30]
        yield whole[30:]

    assert httpx.post(f"{votes.url}/v1/models/m:predict", content=pieces(), timeout=30).status_code == 200


def test_a_model_that_fails_is_told_in_its_own_words(votes: Process, votes_model: Model) -> None:
    answer = ask(votes, [{**votes_model.instances(1)[0], "distance": FAILS_AT}])
    assert answer.status_code == 500
    assert answer.json()["error"] == "The model could not answer: ModelFailure: ValueError: a distance of 666 is beyond me"
    assert ask(votes, votes_model.instances(1)).status_code == 200


def test_health_and_other_callers_do_not_wait_for_a_slow_answer(votes: Process, votes_model: Model) -> None:
    slow = [{**votes_model.instances(1)[0], "distance": WAITS_AT}]
    with ThreadPoolExecutor(1) as pool:
        begun = time.monotonic()
        waiting = pool.submit(ask, votes, slow)
        time.sleep(0.2)
        assert httpx.get(f"{votes.url}/v2/health/ready").status_code == 200
        assert ask(votes, votes_model.instances(1)).status_code == 200
        assert time.monotonic() - begun < 1.4
        assert waiting.result().status_code == 200


@pytest.fixture
def with_store(votes_model: Model) -> Iterator[tuple[str, Server]]:
    """A predictor in this process that has a feature store, two threads for its model, and room for one request more."""
    artifact = load(votes_model.folder, votes_model.sha256)
    metrics = Metrics("m", "1", "champion")
    with opened(artifact) as scorer, BoundedPool(2, 1, "mlflow") as scorers, ThreadPoolExecutor(1) as store:
        log = InferenceLog(None, scorer.signature, "m", "1", "champion", metrics, ZoneInfo("UTC"))
        pages = Pages(scorer, "m", "1", "champion", artifact.sha256, "0", log, metrics)
        ids = LockedIterator(map(str, itertools.count()))
        predictor = Predictor(scorer, pages, log, metrics, ids, 100_000, SimpleNamespace(complete=list), store, scorers)  # type: ignore[arg-type]
        bound = bind("127.0.0.1", 0)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1/models/m:predict"
        listening_server = Server(bound, predictor, predictor.maximum_body_bytes)
        listening_server.start()
        yield url, listening_server
        listening_server.stop()
        assert listening_server.wait(10)


def test_requests_are_answered_side_by_side_wait_without_blame_and_no_more_than_there_is_room_for(
    with_store: tuple[str, Server], votes_model: Model
) -> None:
    url, listening_server = with_store
    body = {"instances": [{**votes_model.instances(1)[0], "distance": WAITS_AT}]}
    ended: list[float] = []

    def ask_slowly(_: int) -> int:
        status = httpx.post(url, json=body, timeout=30).status_code
        ended.append(time.monotonic())
        return status

    with ThreadPoolExecutor(3) as callers:
        slow = callers.map(ask_slowly, range(3))
        time.sleep(0.6)
        listening_server.give_up_bodies(0.0)  # the third body is whole, though no thread has it yet
        refused = httpx.post(url, json=body, headers={"x-request-id": "mine"})
        assert (refused.status_code, refused.headers["x-request-id"]) == (503, "mine")
        assert "3 requests are being answered or wait already" in refused.json()["error"]
        assert list(slow) == [200] * 3
    assert ended[1] - ended[0] < 1.2, "two at once, not one after the other"
    assert httpx.post(url, json={"instances": votes_model.instances(1)}).status_code == 200


class Files(dict[str, bytes]):
    """A dictionary that can be seen to be gone."""


def test_the_predictor_does_not_hold_the_models_bytes(votes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read = load(votes_model.folder, votes_model.sha256)
    files = Files(read.native)
    seen, given = weakref.ref(files), [replace(read, native=files)]
    del read, files
    held: list[bool] = []
    monkeypatch.setattr(server, "load", lambda *_: given.pop())
    monkeypatch.setattr(server, "_answer", lambda *_: held.append(seen() is not None) or 0)
    before = signal.getsignal(signal.SIGTERM)
    try:
        arguments = ["--artifact", str(votes_model.folder), "--sha256", votes_model.sha256, "--model", "m", "--version", "1"]
        assert server.main([*arguments, "--port", "0"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert held == [False]


def test_a_mixed_model_is_answered_and_refused_as_with_onnx(
    start: Starter, mixed_model: Model, served_mixed: Process, tmp_path: Path
) -> None:
    twin = stored(tmp_path / "artifact", mixed_model.estimator, mixed_model.signature, mixed_model.rows)
    served = start(twin)
    with_onnx, with_mlflow = (ask(p, mixed_model.instances(30)).json() for p in (served_mixed, served))
    assert with_mlflow["predictions"] == with_onnx["predictions"]
    assert np.allclose(with_mlflow["probabilities"], with_onnx["probabilities"], atol=1e-5)
    good = mixed_model.instances(1)[0]
    wrong = [
        {"instances": [{**good, "hour": 1.5}]},
        {"instances": [{**good, "hour": None}]},
        {"instances": [{**good, "wrong": 1}]},
        {"instances": [{k: v for k, v in good.items() if k != "carrier"}]},
        {"instances": [{**good, "carrier": 3}]},
        {"instances": []},
        {"rows": 1},
    ]
    for body in wrong:
        said = [httpx.post(f"{p.url}/v1/models/m:predict", json=body) for p in (served_mixed, served)]
        assert said[0].status_code == said[1].status_code == 400
        assert said[0].json() == said[1].json()
    tensor = {"name": "hour", "shape": [1], "datatype": "FP32", "data": [1]}
    said = [httpx.post(f"{p.url}/v2/models/m/infer", json={"inputs": [tensor]}) for p in (served_mixed, served)]
    assert (said[0].status_code, said[0].json()) == (said[1].status_code, said[1].json())


@pytest.mark.parametrize(("task", "value"), [("classification", False), ("regression", True)])
def test_a_plain_class_that_only_predicts(start: Starter, rows: pd.DataFrame, tmp_path: Path, task: str, value: bool) -> None:
    estimator = Far(value)
    signature = Signature("m", task, FEATURES, classes=None if value else (0, 1), onnx_input="columns", probabilities=False)
    model = stored(tmp_path / "artifact", estimator, signature, rows)
    process = start(model, "--log-root", str(tmp_path / "log"))
    assert ask(process, model.instances(40)).json() == {"predictions": [v + 0 for v in estimator.predict(rows).tolist()]}
    outputs = httpx.get(f"{process.url}/v2/models/m").json()["outputs"]
    assert [(o["name"], o["datatype"]) for o in outputs] == [("variable", "FP64") if value else ("label", "INT64")]
    assert process.flush()["log"]["written"] == 40


@pytest.mark.parametrize("file", ["mlflow/estimator.pkl", "mlflow/code/estimator_pyfunc.py", "mlflow/MLmodel", "mlflow/extra"])
def test_other_bytes_are_never_unpickled(votes_model: Model, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(votes_model.folder, folder)
    with open(folder / file, "ab") as stream:
        stream.write(b"\n")
    ended = run(command(Model(**{**vars(votes_model), "folder": folder})))
    assert ended.returncode == 3
    assert "its bytes changed" in ended.stderr
    assert "listens" not in ended.stdout


def test_an_estimator_that_cannot_be_loaded_ends_with_3(votes_model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(votes_model.folder, folder)
    (folder / "mlflow/estimator.pkl").write_bytes(b"cno_such_module\nEstimator\n.")
    ended = run(command(Model(**{**vars(votes_model), "folder": folder, "sha256": digest(folder)})))
    assert ended.returncode == 3
    assert "No module named 'no_such_module'" in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("mlops predictor: MLflow's server cannot load the model")


def test_an_artifact_has_one_model(votes_model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(votes_model.folder, folder)
    (folder / "model.onnx").write_bytes(b"model")
    with pytest.raises(ArtifactError, match=r"both model\.onnx and mlflow/MLmodel"):
        load(folder, digest(folder))


def test_an_estimator_that_cannot_be_stored_is_named(votes_model: Model, tmp_path: Path) -> None:
    estimator = Far(True)
    estimator.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(DeclarationError, match="training.format: Far cannot be pickled .*keep open files, connections"):
        mlflow_export.write(tmp_path / "a", estimator, votes_model.signature, EXPORTED)
    regression = Signature("m", "regression", FEATURES, onnx_input="columns")
    with pytest.raises(DeclarationError, match="task: regression does not fit Votes"):
        mlflow_export.write(tmp_path / "b", votes_model.estimator, regression, EXPORTED)


def test_the_process_ends_with_its_server_and_the_server_with_it(start: Starter, votes_model: Model, tmp_path: Path) -> None:
    process = start(votes_model, "--log-root", str(tmp_path))
    assert ask(process, votes_model.instances(3)).status_code == 200
    child_of(process.popen.pid).kill()
    assert process.popen.wait(10) == 6
    assert "MLflow's server ended by itself" in process.text()
    assert sum(read_segments(tmp_path, "m", day).num_rows for day in days(tmp_path, "m")) == 3
    process = start(votes_model)
    child = child_of(process.popen.pid)
    process.kill()
    wait_until(lambda: gone(child))


def test_a_request_in_flight_when_it_stops_is_answered(start: Starter, votes_model: Model) -> None:
    process = start(votes_model)
    child = child_of(process.popen.pid)
    slow = [{**votes_model.instances(1)[0], "distance": WAITS_AT}]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, process, slow)
        time.sleep(0.4)
        process.popen.send_signal(signal.SIGTERM)
        assert waiting.result().status_code == 200
    assert process.popen.wait(10) == 0
    assert gone(child)
    assert not listening(process.port)


def test_a_stop_while_it_starts_leaves_nothing(votes_model: Model, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command(votes_model), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_until(lambda: bool(children(process.pid, "mlflow_child")), 30)
        child = child_of(process.pid)
        assert list(tmp_path.glob("mlops-mlflow-*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    wait_until(lambda: not child.is_running())
    assert list(tmp_path.glob("mlops-mlflow-*")) == []


def test_callers_of_the_gateway_are_served_again_after_its_end(votes_model: Model, tmp_path: Path) -> None:
    arm = Arm("1", str(votes_model.folder), votes_model.sha256, "champion")
    with serving_host(tmp_path / "host") as serving:
        serving.apply("m", [arm], Routes.all_to("1"))
        ready(serving, "m")

        def answered() -> bool:
            return httpx.post(predict_url(serving, "m"), json={"instances": votes_model.instances(1)}).status_code == 200

        assert answered()
        first = pid_of(serving, "m", arm)
        child_of(first).kill()
        assert eventually(lambda: pid_of(serving, "m", arm) != first)
        assert eventually(answered, 60)
        child = child_of(pid_of(serving, "m", arm))
    assert not child.is_running()


def test_what_is_stored_needs_neither_its_module_nor_this_package(votes_model: Model) -> None:
    assert odd_estimators.__name__.encode() not in (votes_model.folder / "mlflow/estimator.pkl").read_bytes().split(b"Votes")[0]
    code = (votes_model.folder / "mlflow/code/estimator_pyfunc.py").read_text()
    assert "import mlops_dagster" not in code
    assert "from mlops_dagster" not in code
