"""The servers that the predictor benchmark compares, each started in a process of its own."""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FEATURES = tuple(f"f{i}" for i in range(12))
START_SECONDS = 120


@dataclass(frozen=True)
class Trained:
    """One model in all the forms that the servers want."""

    folder: Path
    sha256: str

    @property
    def onnx(self) -> Path:
        return self.folder / "artifact" / "model.onnx"


@dataclass(frozen=True)
class Kind:
    """A server: how to start it on a port, where to post, and in which form."""

    name: str
    title: str
    command: Callable[[Trained, int], list[str]]
    path: str
    body: bytes
    available: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    url: str
    body: bytes


def train(folder: Path) -> Trained:
    """A LightGBM classifier of 100 trees as ONNX: in our artifact, and in the folders that MLflow and MLServer read."""
    import lightgbm
    import numpy as np
    from onnxmltools import convert_lightgbm
    from onnxmltools.convert.common.data_types import FloatTensorType

    from mlops_dagster.serving.artifact import Feature, Signature, digest, write_signature

    random = np.random.default_rng(0)
    rows = random.normal(size=(20_000, len(FEATURES))).astype(np.float32)
    label = (rows[:, 0] + rows[:, 1] * rows[:, 2] + random.normal(size=len(rows)) > 0.5).astype(int)
    estimator = lightgbm.LGBMClassifier(n_estimators=100, verbose=-1, n_jobs=2).fit(rows, label)
    exported = convert_lightgbm(
        estimator, initial_types=[("features", FloatTensorType([None, len(FEATURES)]))], zipmap=False, target_opset=15
    )
    artifact = folder / "artifact"
    write_signature(artifact, Signature("m", "classification", tuple(Feature(f, "float64") for f in FEATURES), classes=(0, 1)))
    (artifact / "model.onnx").write_bytes(exported.SerializeToString())
    _for_mlserver(folder / "mlserver", artifact / "model.onnx")
    if _has_mlflow():
        from mlflow import onnx as mlflow_onnx

        session = {"intra_op_num_threads": 1}
        mlflow_onnx.save_model(exported, str(folder / "mlflow"), onnx_session_options=session, pip_requirements=["onnxruntime"])
    return Trained(folder, digest(artifact))


def _for_mlserver(folder: Path, model: Path) -> None:
    folder.mkdir()
    settings = {"name": "m", "implementation": "_predictor_mlserver.OnnxModel", "parameters": {"uri": str(model), "version": "1"}}
    (folder / "model-settings.json").write_text(json.dumps(settings))


def _row() -> dict[str, float]:
    return {name: round(0.1234 * i - 0.7, 6) for i, name in enumerate(FEATURES)}


V1_BODY = json.dumps({"instances": [_row()]}, separators=(",", ":")).encode()
V2_BODY = json.dumps(
    {"inputs": [{"name": "features", "shape": [1, len(FEATURES)], "datatype": "FP32", "data": list(_row().values())}]},
    separators=(",", ":"),
).encode()
MLFLOW_BODY = json.dumps({"inputs": [list(_row().values())]}, separators=(",", ":")).encode()


def _ours(model: Trained, port: int) -> list[str]:
    fixed = ["--artifact", str(model.folder / "artifact"), "--sha256", model.sha256, "--model", "m", "--version", "1"]
    return [
        sys.executable,
        "-m",
        "mlops_dagster.serving.server",
        *fixed,
        "--port",
        str(port),
        "--log-root",
        str(model.folder / "log"),
    ]


def _kserve(model: Trained, port: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks._predictor_kserve", str(model.onnx), str(port)]


def _mlserver(model: Trained, port: int) -> list[str]:
    settings = {
        "http_port": port,
        "grpc_port": _free_port(),
        "metrics_port": _free_port(),
        "parallel_workers": 0,
        "debug": False,
        "host": "127.0.0.1",
    }
    (model.folder / "mlserver" / "settings.json").write_text(json.dumps(settings))
    return [str(_mlserver_path()), "start", str(model.folder / "mlserver")]


def _mlflow(model: Trained, port: int) -> list[str]:
    fixed = [
        "models",
        "serve",
        "-m",
        str(model.folder / "mlflow"),
        "--env-manager",
        "local",
        "--host",
        "127.0.0.1",
        "--workers",
        "1",
    ]
    return [sys.executable, "-m", "mlflow", *fixed, "--port", str(port)]


def _mlserver_path() -> str | None:
    return os.environ.get("MLOPS_BENCHMARK_MLSERVER") or shutil.which("mlserver")


def _has_mlserver() -> bool:
    remedy = (
        "install mlserver and onnxruntime into an environment of their own and set MLOPS_BENCHMARK_MLSERVER to its bin/mlserver"
    )
    return _said(_mlserver_path() is not None, "MLServer", remedy)


def _has_mlflow() -> bool:
    return importlib.util.find_spec("mlflow") is not None


def _has_kserve() -> bool:
    return _said(importlib.util.find_spec("kserve") is not None, "KServe", "pip install 'mlops_dagster[kubernetes]'")


def _said(there: bool, name: str, remedy: str) -> bool:
    if not there:
        print(f"{name} is left out of the comparison; to include it: {remedy}", file=sys.stderr)
    return there


@contextlib.contextmanager
def running(kind: Kind, model: Trained) -> Iterator[Running]:
    """Start a server, wait until it predicts, and end it afterwards."""
    port = _free_port()
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # mlflow starts uvicorn by its name
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path, **kind.environment}
    with open(model.folder / f"{kind.name}.log", "w") as output:
        process = subprocess.Popen(kind.command(model, port), cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}{kind.path}"
        _await_answer(process, url, kind.body, model.folder / f"{kind.name}.log")
        yield Running(url, kind.body)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_answer(process: subprocess.Popen[bytes], url: str, body: bytes, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"})
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"{url} gave no prediction: {log.read_text()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


OURS = Kind("ours", "the predictor", _ours, "/v1/models/m:predict", V1_BODY, lambda: True)
KSERVE = Kind("kserve", "KServe 0.21 Python runtime", _kserve, "/v1/models/m:predict", V1_BODY, _has_kserve)
MLSERVER = Kind(
    "mlserver", "MLServer", _mlserver, "/v2/models/m/infer", V2_BODY, _has_mlserver, {"PYTHONPATH": str(ROOT / "benchmarks")}
)
MLFLOW = Kind("mlflow", "mlflow models serve", _mlflow, "/invocations", MLFLOW_BODY, _has_mlflow)
