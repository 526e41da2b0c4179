"""All answers that are not predictions: health, readiness, metadata, metrics, administration."""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import orjson

from mlops_dagster.serving import open_inference, protocol
from mlops_dagster.serving.http_connection import Request
from mlops_dagster.serving.inference_log import InferenceLog, LogStatus
from mlops_dagster.serving.metrics import CONTENT_TYPE, Metrics
from mlops_dagster.serving.scoring import Scorer

JSON = ("content-type", "application/json")
SERVER_NAME = "mlops-predictor"
EXTENSIONS = ["binary_tensor_data"]
Page = Callable[[], tuple[int, bytes]]


class Pages:
    """Answers by path; `draining` makes every readiness answer a 503 while predictions go on."""

    def __init__(
        self, scorer: Scorer, model: str, version: str, arm: str, sha256: str, software: str, log: InferenceLog, metrics: Metrics
    ) -> None:
        self.model, self.version, self.arm = model, version, arm
        self.draining = False
        self._sha256 = sha256
        self._log = log
        self._metrics = metrics
        v2 = f"/v2/models/{model}"
        metadata = open_inference.metadata(
            model, version, scorer.platform, scorer.inputs, scorer.outputs, _properties(scorer, arm, sha256)
        )
        server = orjson.dumps({"name": SERVER_NAME, "version": software, "extensions": EXTENSIONS})
        listed = orjson.dumps({"models": [model]})
        ready = self._ready({"name": model, "ready": True})
        self._pages: dict[str, Page] = {
            "/": lambda: (200, b'{"status":"alive"}'),
            "/v1/models": lambda: (200, listed),
            f"/v1/models/{model}": ready,
            "/v2": lambda: (200, server),
            "/v2/health/live": lambda: (200, b'{"live":true}'),
            "/v2/health/ready": self._ready({"ready": True}),
            "/v2/models": lambda: (200, listed),
            "/admin/status": lambda: (200, orjson.dumps(self._status(log.status()))),
        }
        for prefix in (v2, f"{v2}/versions/{version}"):
            self._pages[prefix] = lambda: (200, metadata)
            self._pages[f"{prefix}/ready"] = ready
        self._posts = {f"/v1/models/{model}:predict", f"{v2}/infer", f"{v2}/versions/{version}/infer", "/admin/flush"}

    def answer(self, request: Request) -> None:
        """Answer any request that is not a prediction of this model."""
        method, path = request.method, request.path.rstrip("/") or "/"
        if method == "POST" and path == "/admin/flush":
            self._log.flush_then(lambda status: request.answer(200, [JSON], orjson.dumps(self._status(status))))
        elif method == "GET" and path == "/metrics":
            threading.Thread(target=self._answer_metrics, args=(request,), name="metrics", daemon=True).start()
        elif method == "GET" and (page := self._pages.get(path)):
            status, content = page()
            request.answer(status, [JSON], content)
        else:
            status, message = self._wrong(method, path)
            request.answer(status, [JSON], protocol.error(message))

    def _answer_metrics(self, request: Request) -> None:
        try:
            self._log.count()
            request.answer(200, [("content-type", CONTENT_TYPE)], self._metrics.render())
        except Exception as error:
            self.broken(request, error)

    def broken(self, request: Request, error: Exception) -> None:
        """Last resort: an error outside any prediction."""
        traceback.print_exception(error, file=sys.stderr)
        request.answer(500, [JSON], protocol.error(f"{type(error).__name__}: {error}"))

    def _ready(self, content: dict[str, Any]) -> Page:
        yes = orjson.dumps(content)
        no = orjson.dumps(
            {**content, "ready": False, "error": f"The server of model {self.model} is stopping; it takes no new callers."}
        )
        return lambda: (503, no) if self.draining else (200, yes)

    def _status(self, log: LogStatus) -> dict[str, Any]:
        return {
            "model": self.model,
            "version": self.version,
            "arm": self.arm,
            "sha256": self._sha256,
            "pid": os.getpid(),
            "ready": not self.draining,
            "log": asdict(log),
        }

    def _wrong(self, method: str, path: str) -> tuple[int, str]:
        if path in self._posts:
            return 405, f"{path} takes POST, not {method}."
        if path in self._pages or path == "/metrics":
            return 405, f"{path} takes GET, not {method}."
        if path.startswith(("/v1/models/", "/v2/models/")):
            return 404, f"{path[:200]} is not served here; this server has the model {self.model!r}, version {self.version!r}."
        return (
            404,
            f"There is no {path[:200]}. Predictions: POST /v1/models/{self.model}:predict or /v2/models/{self.model}/infer.",
        )


def _properties(scorer: Scorer, arm: str, sha256: str) -> dict[str, str]:
    signature = scorer.signature
    return {
        "task": signature.task,
        "features": ",".join(f"{f.name}:{f.dtype}{'?' if f.nullable else ''}" for f in signature.features),
        "entities": ",".join(signature.entities),
        "request": ",".join(f"{r.name}:{r.dtype}" for r in signature.request),
        "classes": ",".join(map(str, signature.classes or ())),
        "arm": arm,
        "sha256": sha256,
    }
