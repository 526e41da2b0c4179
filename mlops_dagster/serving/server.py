"""One predictor process: `python -m mlops_dagster.serving.server --artifact DIR --sha256 HEX --model NAME --version V --port P …`."""

import argparse
import gc
import itertools
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zoneinfo import ZoneInfo

from mlops_dagster.core.errors import ArtifactError, MlopsError, ServingError, StorageError
from mlops_dagster.serving.app import OnlineFeatures, Predictor
from mlops_dagster.serving.artifact import load
from mlops_dagster.serving.http_server import BACKLOG, Server
from mlops_dagster.serving.inference_log import InferenceLog
from mlops_dagster.serving.metrics import Metrics
from mlops_dagster.serving.mlflow_scoring import MlflowScorer, opened
from mlops_dagster.serving.pages import Pages
from mlops_dagster.serving.parentage import die_with_parent
from mlops_dagster.serving.pooled import BoundedPool, LockedIterator
from mlops_dagster.serving.scoring import Scorer

EXIT_USAGE, EXIT_ARTIFACT, EXIT_PORT, EXIT_LOG, EXIT_MODEL = 2, 3, 4, 5, 6
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SWITCH_INTERVAL_SECONDS = 0.0005
FEATURE_STORE_THREADS = 4
MLFLOW_THREADS = 8
WAITING = 256  # requests for a thread of either, each with its body
SWEEP_SECONDS, BODY_SECONDS = 1.0, 30.0
GC_THRESHOLDS = (50_000, 20, 100)  # answers wait in tuples for their chunk and form no cycles


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mlops_dagster.serving.server", description="Serve one version of one model over HTTP."
    )
    add = parser.add_argument
    add("--artifact", type=Path, required=True, help="the model folder")
    add(
        "--sha256", required=True, help="the digest that was registered; a folder with another digest is not served (exit code 3)"
    )
    add("--model", required=True, type=_name, help="name in the routes")
    add("--version", required=True, type=_name, help="version in the routes, headers and log")
    add("--arm", default="champion", type=_name, help="role in a rollout, for the log and the metrics")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, required=True, help="0 takes any free port and prints it")
    add("--log-root", type=Path, help="folder of the inference log; without it nothing is logged")
    add("--feature-repo", type=Path, help="Feast repository that completes rows which lack features")
    add("--timezone", type=_zone, default=ZoneInfo("UTC"), help="the model's time zone: it says which day a row belongs to")
    add("--maximum-body-bytes", type=int, default=16 * 1024 * 1024, help="larger bodies are refused with 413")
    add("--flush-seconds", type=float, default=0.25, help="how often answered rows are stored")
    add("--drain-seconds", type=float, default=0.0, help="after SIGTERM: answer on, but not ready, for so long before closing")
    add("--grace-seconds", type=float, default=20.0, help="after that: how long requests in flight may take")
    add("--onnx-threads", type=int, default=1, help="threads of ONNX Runtime (or of MLflow's server) for one request")
    add("--die-with-parent", action="store_true", help="stop when the process that started this one is gone")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code (0 clean stop, 3 artifact, 4 port, 5 log, 6 MLflow's server ended)."""
    chosen = arguments(given)
    if chosen.die_with_parent:
        die_with_parent(os.getppid())
    try:
        artifact = load(chosen.artifact, chosen.sha256)
        if artifact.native:  # its start takes seconds, and a stop in between must not leave its files behind
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        sha256, definitions, opening = artifact.sha256, artifact.definitions, opened(artifact, chosen.onnx_threads)
        del artifact  # the model's bytes, which the scorer or MLflow's server has from here on
        with opening as scorer:
            return _answer(chosen, sha256, definitions, scorer)
    except ArtifactError as error:
        return _fail(EXIT_ARTIFACT, error)
    except ServingError as error:
        return _fail(EXIT_MODEL, error)


def _answer(chosen: argparse.Namespace, sha256: str, definitions: bytes | None, scorer: Scorer) -> int:
    """All around the scorer, and then `serve`."""
    try:
        bound = bind(chosen.host, chosen.port)
    except OSError as error:
        return _fail(
            EXIT_PORT,
            f"cannot listen on {chosen.host}:{chosen.port}: {error.strerror}. Stop what uses the port, or choose another --port.",
        )
    metrics = Metrics(chosen.model, chosen.version, chosen.arm)
    try:
        online, pool = _online(chosen, definitions)
        log = InferenceLog(
            chosen.log_root,
            scorer.signature,
            chosen.model,
            chosen.version,
            chosen.arm,
            metrics,
            chosen.timezone,
            flush_seconds=chosen.flush_seconds,
        )
    except StorageError as error:
        return _fail(EXIT_LOG, error)
    except MlopsError as error:
        return _fail(EXIT_USAGE, error)
    pages = Pages(scorer, chosen.model, chosen.version, chosen.arm, sha256, _software(), log, metrics)
    ids: Iterator[str] = request_ids()
    scorers = None
    if isinstance(scorer, MlflowScorer):
        # It may take long, and health checks must not wait for it.
        ids, scorers = LockedIterator(ids), BoundedPool(MLFLOW_THREADS, WAITING, "mlflow")
    predictor = Predictor(scorer, pages, log, metrics, ids, chosen.maximum_body_bytes, online, pool, scorers)
    return serve(bound, predictor, scorer, pages, log, chosen.drain_seconds, chosen.grace_seconds)


def serve(
    bound: socket.socket,
    predictor: Predictor,
    scorer: Scorer,
    pages: Pages,
    log: InferenceLog,
    drain_seconds: float,
    grace_seconds: float,
) -> int:
    """Answer requests until SIGTERM or SIGINT (then drain and return 0), or until MLflow's server has ended; store the log."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)  # the log's thread gives way to an answer sooner than after the usual 5 ms
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    host, port = bound.getsockname()[:2]
    lost = _watch(scorer, asked)
    server = Server(bound, predictor, predictor.maximum_body_bytes)
    log.start()
    server.start()
    print(
        f"mlops predictor: {pages.model} {pages.version} ({pages.arm}) listens on http://{host}:{port} pid {os.getpid()}",
        flush=True,
    )
    while not asked.wait(SWEEP_SECONDS):
        server.give_up_bodies(BODY_SECONDS)
    pages.draining = True
    server.drain()
    time.sleep(0 if lost.is_set() else drain_seconds)
    server.stop()
    in_time = server.wait(grace_seconds)
    status = log.close()
    left = "" if in_time else f", connections still open after {grace_seconds:g} s were cut"
    print(f"mlops predictor: stopped; {status.written} rows logged, {status.waiting + status.dropped} not{left}", flush=True)
    return _fail(EXIT_MODEL, "MLflow's server ended by itself, so this process ends too") if lost.is_set() else 0


def _watch(scorer: Scorer, asked: threading.Event) -> threading.Event:
    """An event that is set, with `asked`, when MLflow's server ends by itself."""
    lost = threading.Event()

    def ended() -> None:
        lost.set()
        asked.set()

    if isinstance(scorer, MlflowScorer):
        scorer.server.when_ended(ended)
    return lost


def bind(host: str, port: int) -> socket.socket:
    """A socket of our own alone (no SO_REUSEPORT, so that a taken port is an error); raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bound.bind((host, port))
    bound.listen(BACKLOG)
    return bound


def request_ids() -> Iterator[str]:
    """Ids that no other process gives: a random prefix of this process, and a count."""
    prefix = secrets.token_hex(8)
    return (f"{prefix}-{number:x}" for number in itertools.count(1))


def _online(chosen: argparse.Namespace, definitions: bytes | None) -> tuple[OnlineFeatures | None, BoundedPool | None]:
    if chosen.feature_repo is None:
        return None, None
    from mlops_dagster.serving.transformer import OnlineFeatures as FeastFeatures

    found = FeastFeatures(chosen.feature_repo, chosen.model, definitions=definitions)
    return found, BoundedPool(FEATURE_STORE_THREADS, WAITING, "feature-store")


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise argparse.ArgumentTypeError(f"{value!r} may hold letters, digits, '.', '_' and '-' only")
    return value


def _zone(value: str) -> ZoneInfo:
    try:
        return ZoneInfo(value)
    except (OSError, ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{value!r} is no time zone (such as America/New_York): {error}") from None


def _software() -> str:
    try:
        return version("mlops_dagster")
    except PackageNotFoundError:
        return "0"


def _fail(code: int, message: object) -> int:
    print(f"mlops predictor: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    # A thread that still computes for a caller who was cut off must not hold up the end.
    code = main()
    sys.stdout.flush()
    os._exit(code)
