"""The predictor: both protocols over one model, from a request's arrival to its answer and its line in the log."""

import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from time import perf_counter_ns, time_ns
from typing import Any, Protocol

from mlops_dagster.core.errors import DataError, TransientError
from mlops_dagster.serving import open_inference, protocol, tensors
from mlops_dagster.serving.http_connection import Request
from mlops_dagster.serving.inference_log import InferenceLog
from mlops_dagster.serving.log_rows import Event
from mlops_dagster.serving.metrics import Metrics
from mlops_dagster.serving.pages import JSON, Pages
from mlops_dagster.serving.pooled import one_at_a_time
from mlops_dagster.serving.protocol import Batch
from mlops_dagster.serving.rows import InputError, RowReader, check_distinct, event_time, event_times, row_id
from mlops_dagster.serving.scoring import Scorer

SHADOW_HEADER = b"x-mlops-shadow"
REQUEST_ID_HEADER = "x-request-id"
REQUEST_ID = REQUEST_ID_HEADER.encode()
HEADER_LENGTH_HEADER = "inference-header-content-length"
HEADER_LENGTH = HEADER_LENGTH_HEADER.encode()
MAXIMUM_REQUEST_ID = 256
NO_ROW_ID = "#0"


class OnlineFeatures(Protocol):
    """Completes rows from an online feature store; raises DataError for entities it does not know."""

    def complete(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]: ...


class Predictor:
    """Answers the requests that `http_server.Server` hands over.

    `online` completes rows that lack features, in `pool`, because a feature store may be slow; without it every request is answered in the
    thread it arrives in, or in `scorers`, where a model is slow too: once its body is whole. What a pool refuses with TransientError is
    answered with 503. `request_ids` gives ids to requests that bring none.
    """

    def __init__(
        self,
        scorer: Scorer,
        pages: Pages,
        log: InferenceLog,
        metrics: Metrics,
        request_ids: Iterator[str],
        maximum_body_bytes: int,
        online: OnlineFeatures | None = None,
        pool: Executor | None = None,
        scorers: Executor | None = None,
    ) -> None:
        self._signature = scorer.signature
        self._scorer = scorer
        self._reader = RowReader(scorer.signature, completes=online is not None)
        self._pages = pages
        self._metrics = metrics
        self._next_id = request_ids.__next__
        self.maximum_body_bytes = maximum_body_bytes
        self._online = online
        self._pool = pool
        self._scorers = scorers
        self._one = scorer.one if online is None or scorer.concurrent else one_at_a_time(scorer.one)
        self._record = log.append if online is None and scorers is None else one_at_a_time(log.append)
        self._version_header = ("x-model-version", pages.version)
        v2 = f"/v2/models/{pages.model}"
        self._posts = {
            f"/v1/models/{pages.model}:predict": self._predict_v1,
            f"{v2}/infer": self._infer_v2,
            f"{v2}/versions/{pages.version}/infer": self._infer_v2,
        }

    def __call__(self, request: Request) -> None:
        """Take one request and see to its answer; never raises."""
        try:
            handler = self._posts.get(request.path) if request.method == "POST" else None
            if handler is None:
                self._pages.answer(request)
            elif self._scorers is None:
                handler(request)
            else:
                self._hand_over(handler, request)
        except Exception as error:
            self._pages.broken(request, error)

    def _hand_over(self, handler: Callable[[Request], None], request: Request) -> None:
        """Answer in the scorers' pool: the body is here, so waiting for a thread is no fault of it."""
        assert self._scorers is not None
        try:
            self._scorers.submit(handler, request)
        except Exception as error:
            kind = "v1" if handler == self._predict_v1 else "v2"
            self._refuse(request, kind, request.header(REQUEST_ID) or self._next_id(), error)

    def _predict_v1(self, asked: Request) -> None:
        begun = perf_counter_ns()
        identity = asked.header(REQUEST_ID) or self._next_id()
        try:
            found = protocol.instances(self._whole(asked.body, identity))
            if self._online is not None and any(map(self._reader.lacks_features, found)):
                self._later(self._completed_v1, found, asked, identity, begun)
                return
            content = self._v1(found, asked, identity, begun)
        except Exception as error:
            self._refuse(asked, "v1", identity, error)
            return
        asked.answer(200, [JSON, self._version_header, (REQUEST_ID_HEADER, identity)], content)

    def _v1(self, found: list[Any], asked: Request, identity: str, begun: int) -> bytes:
        if len(found) != 1:
            return self._v1_rows(found, asked, identity, begun)
        instance = found[0]
        row = self._reader.read(instance, 0)
        row_identity, moment = NO_ROW_ID, None
        if type(instance) is dict and len(instance) != len(row):
            row_identity, moment = row_id(instance, 0), event_time(instance.get("event_timestamp"), 0)
        checked = perf_counter_ns()
        labels, probabilities = self._one(row)
        scored = perf_counter_ns()
        content = protocol.answer(labels, probabilities)
        times = (asked.arrived, begun, checked, scored, perf_counter_ns())
        self._record((identity, "v1", _is_shadow(asked), time_ns(), times, 1, row_identity, moment, row, labels, probabilities))
        return content

    def _v1_rows(self, found: list[Any], asked: Request, identity: str, begun: int) -> bytes:
        batch = self._batch(found)
        checked = perf_counter_ns()
        labels, probabilities = self._scorer.many(batch.columns, batch.count)
        scored = perf_counter_ns()
        listed = labels.reshape(-1).tolist(), None if probabilities is None else probabilities.tolist()
        content = protocol.answer(*listed)
        self._log_batch("v1", batch, asked, identity, (begun, checked, scored), *listed)
        return content

    def _batch(self, found: list[Any]) -> Batch:
        rows = [self._reader.read(instance, number) for number, instance in enumerate(found)]
        ids = [row_id(instance, number) for number, instance in enumerate(found)]
        check_distinct(ids)
        times = event_times([i.get("event_timestamp") if type(i) is dict else None for i in found])
        columns = [protocol.column(list(c), f) for c, f in zip(zip(*rows, strict=True), self._signature.features, strict=True)]
        return Batch(columns, ids, times)

    def _infer_v2(self, asked: Request) -> None:
        begun = perf_counter_ns()
        identity = asked.header(REQUEST_ID)
        try:
            request = open_inference.parse(
                self._whole(asked.body, identity or ""), asked.header(HEADER_LENGTH), self._scorer.outputs
            )
            identity = identity or request.id or self._next_id()
            rows = tensors.to_rows(request.tensors, self._signature, self._online is not None)
            if rows is not None:
                self._later(self._completed_v2, rows, request, asked, identity, begun)
                return
            content, length = self._v2(tensors.to_batch(request.tensors, self._signature), request, asked, identity, begun)
        except Exception as error:
            self._refuse(asked, "v2", identity or self._next_id(), error)
            return
        self._respond_v2(asked, identity, content, length)

    def _v2(
        self, batch: Batch, request: open_inference.InferRequest, asked: Request, identity: str, begun: int
    ) -> tuple[bytes, int | None]:
        checked = perf_counter_ns()
        labels, probabilities = self._scorer.many(batch.columns, batch.count)
        scored = perf_counter_ns()
        found = [labels] if probabilities is None else [labels, probabilities]
        results = {s.name: (s, a) for s, a in zip(self._scorer.outputs, found, strict=True)}
        head = {"model_name": self._pages.model, "model_version": self._pages.version, "id": request.id or identity}
        encoded = open_inference.encode(head, results, request.wanted)
        listed = labels.reshape(-1).tolist(), None if probabilities is None else probabilities.tolist()
        self._log_batch("v2", batch, asked, identity, (begun, checked, scored), *listed)
        return encoded

    def _respond_v2(self, asked: Request, identity: str, content: bytes, length: int | None) -> None:
        fixed = [self._version_header, (REQUEST_ID_HEADER, _header_safe(identity))]
        if length is None:
            asked.answer(200, [JSON, *fixed], content)
            return
        binary = ("content-type", "application/octet-stream")
        asked.answer(200, [binary, (HEADER_LENGTH_HEADER, str(length)), *fixed], content)

    def _log_batch(
        self,
        kind: str,
        batch: Batch,
        asked: Request,
        identity: str,
        steps: tuple[int, int, int],
        labels: list[Any],
        probabilities: list[list[float]] | None,
    ) -> None:
        times = (asked.arrived, *steps, perf_counter_ns())
        rows = (batch.count, batch.ids, batch.times, batch.columns)
        self._record(Event(identity, kind, _is_shadow(asked), time_ns(), times, *rows, labels, probabilities))

    def _whole(self, body: bytes | None, identity: str) -> bytes:
        if body is None:
            raise InputError(
                f"The body is larger than the {self.maximum_body_bytes} bytes that this server takes; send fewer rows a request.",
                413,
            )
        if len(identity) > MAXIMUM_REQUEST_ID:
            raise InputError(f"The header x-request-id has {len(identity)} characters; at most {MAXIMUM_REQUEST_ID} are taken.")
        return body

    # With an online feature store ----------------------------------------------------------------------------------------

    def _later(self, work: Callable[..., None], *arguments: Any) -> None:
        assert self._pool is not None
        self._pool.submit(work, *arguments)

    def _complete(self, found: list[Any]) -> list[Any]:
        """`found` with its incomplete rows completed, in one read of the store; what a row brings itself is checked and stays."""
        assert self._online is not None
        lacking = [n for n, i in enumerate(found) if self._reader.lacks_features(i)]
        sent = [{**found[n], **self._reader.sent(found[n], n)} for n in lacking]
        complete = zip(lacking, sent, self._online.complete(sent), strict=True)
        whole = {n: {**stored, **own} for n, own, stored in complete}
        return [whole.get(n, instance) for n, instance in enumerate(found)]

    def _completed_v1(self, found: list[Any], asked: Request, identity: str, begun: int) -> None:
        try:
            content = self._v1(self._complete(found), asked, identity, begun)
        except Exception as error:
            self._refuse(asked, "v1", identity, error)
            return
        asked.answer(200, [JSON, self._version_header, (REQUEST_ID_HEADER, identity)], content)

    def _completed_v2(
        self, rows: list[Any], request: open_inference.InferRequest, asked: Request, identity: str, begun: int
    ) -> None:
        try:
            content, length = self._v2(self._batch(self._complete(rows)), request, asked, identity, begun)
        except Exception as error:
            self._refuse(asked, "v2", identity, error)
            return
        self._respond_v2(asked, identity, content, length)

    # What is wrong -------------------------------------------------------------------------------------------------------

    def _refuse(self, asked: Request, kind: str, identity: str, error: Exception) -> None:
        """4xx for what the caller can mend; 500 for what only we can."""
        if isinstance(error, InputError):
            status, message = error.status, str(error)
        elif isinstance(error, DataError):
            status, message = 422, str(error)
        elif isinstance(error, TransientError):
            status, message = 503, str(error)
        else:
            status, message = 500, f"The model could not answer: {type(error).__name__}: {error}"
            traceback.print_exception(error, file=sys.stderr)
        self._metrics.failed(kind, status, _is_shadow(asked), (perf_counter_ns() - asked.arrived) / 1e9)
        safe = _header_safe(identity)
        asked.answer(status, [JSON, self._version_header, (REQUEST_ID_HEADER, safe)], protocol.error(message))


def _is_shadow(asked: Request) -> bool:
    return asked.headers.get(SHADOW_HEADER) == b"1"


def _header_safe(identity: str) -> str:
    """A request id taken from a body may hold what a header may not."""
    return (
        identity[:MAXIMUM_REQUEST_ID] if identity.isascii() and identity.isprintable() else ascii(identity)[1:MAXIMUM_REQUEST_ID]
    )
