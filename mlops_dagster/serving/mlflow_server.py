"""MLflow's own scoring server as a child process of whoever asks it, over a Unix socket that has no file."""

import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from mlops_dagster.core.errors import ArtifactError, MlopsError, ServingError

START_SECONDS = 120.0
ANSWER_SECONDS = 60.0
BACKLOG = 1024
MODEL_PATH = "__pyfunc_model_path__"  # mlflow.pyfunc.scoring_server._SERVER_MODEL_PATH


class ModelFailure(MlopsError):
    """The model itself failed on rows that fit its signature."""


class MlflowServer:
    """One child that serves an MLflow model; it lives until `stop`, or until the thread that started it ends.

    The model's files come from memory and lie in a private folder while the child loads them, so that it loads what was hashed.
    `ask` may be called from any thread.
    """

    def __init__(self, files: Mapping[str, bytes], threads: int = 1) -> None:
        self._files = files
        self._threads = threads
        self._address = f"\0mlops-mlflow-{secrets.token_hex(16)}"
        self._child: subprocess.Popen[bytes] | None = None
        self._idle: list[_Connection] = []
        self._stopping = False

    def start(self) -> None:
        """Start it and return when it answers. ArtifactError when it cannot load the model, ServingError when it does not answer."""
        with tempfile.TemporaryDirectory(prefix="mlops-mlflow-") as private:
            for name, content in self._files.items():
                path = Path(private, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._child = self._spawn(private)
            try:
                self._await_answer(self._child)
            except BaseException:
                self.stop()
                raise
        self._files = {}

    @property
    def pid(self) -> int | None:
        """The child's process id; None before `start`."""
        return self._child.pid if self._child else None

    @property
    def ended(self) -> bool:
        """Whether the child ended by itself."""
        return self._child is not None and not self._stopping and self._child.poll() is not None

    def when_ended(self, tell: Callable[[], None]) -> None:
        """Have `tell` called, from another thread, when the child ends before `stop`."""
        child = self._child
        assert child is not None

        def wait() -> None:
            child.wait()
            if not self._stopping:
                tell()

        threading.Thread(target=wait, name="mlflow-server", daemon=True).start()

    def ask(self, path: str, body: bytes | None = None) -> bytes:
        """The body of the answer to a GET, or to a POST of JSON.

        ServingError when there is no answer; ModelFailure (with the child's own words) when the answer is an error.
        """
        status, content = self._exchange(path, body)
        if status == 200:
            return content
        if status in (503, 504):
            raise ServingError(f"MLflow's server answered {status}: {content.decode(errors='replace')[:200]}. Try again later.")
        raise ModelFailure(_reason(content))

    def stop(self) -> None:
        """End the child; returns when it has ended."""
        self._stopping = True
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        while self._idle:
            self._idle.pop().close()

    def _spawn(self, folder: str) -> "subprocess.Popen[bytes]":
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(self._threads))
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONDONTWRITEBYTECODE": "1"}
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(self._address)
            listening.listen(BACKLOG)
            number = listening.fileno()
            return subprocess.Popen(
                [sys.executable, "-m", "mlops_dagster.serving.mlflow_child", str(number), str(os.getpid())],
                env={**os.environ, **threads, **quiet, MODEL_PATH: folder},
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else None,
                pass_fds=[number],
                process_group=0,  # Ctrl-C is the predictor's to act on, which needs this process until its last answer
            )

    def _await_answer(self, child: "subprocess.Popen[bytes]") -> None:
        """The socket listens from the beginning: a request waits there until the model is loaded, and fails when the child ends."""
        ping = _Connection(self._address, START_SECONDS)
        try:
            ping.request("GET", "/ping")
            if ping.getresponse().status == 200:
                return
        except TimeoutError:
            raise ServingError(
                f"MLflow's server did not answer within {START_SECONDS:g} s; see why in its lines above."
            ) from None
        except (OSError, http.client.HTTPException):
            pass
        finally:
            ping.close()
        code = child.wait(ANSWER_SECONDS)
        if code >= 0:
            raise ArtifactError(f"MLflow's server cannot load the model (exit code {code}); the lines before this one say why.")
        raise ServingError(
            f"MLflow's server was ended by signal {-code} while it loaded the model; free memory if there is too little."
        )

    def _exchange(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        """One request. A kept connection may have died since its last use, so it is tried once more on a new one."""
        for connection in filter(None, (self._kept(), _Connection(self._address, ANSWER_SECONDS))):
            try:
                headers = {"content-type": "application/json"} if body is not None else {}
                connection.request("GET" if body is None else "POST", path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
            except TimeoutError:
                connection.close()
                raise ServingError(f"MLflow's server did not answer within {ANSWER_SECONDS:g} s; send fewer rows.") from None
            except (OSError, http.client.HTTPException):
                connection.close()
            else:
                self._idle.append(connection)
                return answer.status, content
        raise ServingError("MLflow's server is gone; it is being started again. Try again in a few seconds.")

    def _kept(self) -> "_Connection | None":
        with suppress(IndexError):
            return self._idle.pop()
        return None


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, address: str, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._address)


def _has_descriptor(stream: object) -> bool:
    """Whether a child can write to a stream (a captured one has no file)."""
    try:
        return stream.fileno() >= 0  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


def _reason(content: bytes) -> str:
    """What the model said: the last line of the traceback that MLflow sends, which goes to this process's log whole."""
    try:
        told = json.loads(content)
        trace = (told.get("stack_trace") or told.get("message") or "").strip()
    except (ValueError, AttributeError):
        trace = content.decode(errors="replace").strip()
    print(trace, file=sys.stderr, flush=True)
    return trace.splitlines()[-1][:500] if trace else "MLflow's server gave no reason"
