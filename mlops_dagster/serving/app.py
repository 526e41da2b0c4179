"""The predictor: both protocols over one model, from a request's arrival to its answer and its line in the log."""

import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from time import perf_counter_ns, time_ns
from typing import Any, Protocol

from mlops_dagster.core.errors import DataError, TransientError
from mlops_dagster.serving import open_inference, protocol, tensors
from mlops_dagster.serving.artifact import RESERVED
from mlops_dagster.serving.inference_log import InferenceLog
from mlops_dagster.serving.log_rows import Event
from mlops_dagster.serving.metrics import Metrics
from mlops_dagster.serving.pages import JSON, Pages
from mlops_dagster.serving.pooled import one_at_a_time
from mlops_dagster.serving.protocol import Batch
from mlops_dagster.serving.rows import InputError, RowReader, check_distinct, event_time, row_id
from mlops_dagster.serving.scoring import Scorer

SHADOW_HEADER = "x-mlops-shadow"
REQUEST_ID_HEADER = "x-request-id"
HEADER_LENGTH = "inference-header-content-length"
MAXIMUM_REQUEST_ID = 256
NO_ROW_ID = "#0"


class OnlineFeatures(Protocol):
    """Completes rows from an online feature store; raises DataError for entities it does not know."""

    def complete(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]: ...


class Predictor:
    """Answers the requests that `dispatch.Server` hands over.

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
        self._maximum = maximum_body_bytes
        self._online = online
        self._pool = pool
        self._scorers = scorers
        self._one = scorer.one if online is None or scorer.concurrent else one_at_a_time(scorer.one)
        self._record = log.append if online is None and scorers is None else one_at_a_time(log.append)
        self._unread: dict[int, tuple[Any, Any]] = {}  # by time of arrival: what to cancel, whom to answer
        self._version_header = ("x-model-version", pages.version)
        v2 = f"/v2/models/{pages.model}"
        self._posts = {
            f"/v1/models/{pages.model}:predict": self._predict_v1,
            f"{v2}/infer": self._infer_v2,
            f"{v2}/versions/{pages.version}/infer": self._infer_v2,
        }

    def __call__(self, scope: Any, proto: Any) -> None:
        """Take one request (granian's RSGI scope and protocol) and see to its answer; never raises."""
        arrived = perf_counter_ns()
        try:
            handler = self._posts.get(scope.path) if scope.method == "POST" else None
            if handler is None:
                self._pages.answer(scope, proto)
                return
            headers = scope.headers
            length = headers.get("content-length")
            if length is None or not length.isdigit():

                def take(body: bytes | None) -> None:
                    if self._received(arrived):
                        self._hand_over(handler, headers, proto, body, arrived)

                gathering = _Gathering(proto, self._maximum, take)
                self._unread[arrived] = gathering, proto
                gathering.more()
            elif int(length) > self._maximum:
                handler(headers, proto, None, arrived)
            else:

                def read(body: Any) -> None:
                    if self._received(arrived):
                        try:
                            content = body.result()
                        except Exception:
                            return  # the caller went away before its body was whole
                        self._hand_over(handler, headers, proto, content, arrived)

                body = proto()
                self._unread[arrived] = body, proto
                body.add_done_callback(read)
        except Exception as error:
            self._pages.broken(proto, error)

    def give_up_bodies(self, after_seconds: float) -> None:
        """Answer 408 to callers whose bodies have been incomplete for so long (to be called now and then, from any thread)."""
        limit = perf_counter_ns() - int(after_seconds * 1e9)
        for arrived in [a for a in list(self._unread) if a < limit]:
            if found := self._unread.pop(arrived, None):
                body, proto = found
                proto.response_bytes(408, [JSON], protocol.error(f"The body was not whole after {after_seconds:g} seconds."))
                body.cancel()

    def _received(self, arrived: int) -> bool:
        """Whether the body is still waited for; from now on it is not."""
        return self._unread.pop(arrived, None) is not None

    def _hand_over(self, handler: Callable[..., None], headers: Any, proto: Any, body: bytes | None, arrived: int) -> None:
        """Answer here, or in the scorers' pool where there is one: the body is here, so waiting for a thread is no fault of it."""
        if self._scorers is None:
            handler(headers, proto, body, arrived)
            return
        try:
            self._scorers.submit(handler, headers, proto, body, arrived)
        except Exception as error:
            kind = "v1" if handler == self._predict_v1 else "v2"
            identity = headers.get(REQUEST_ID_HEADER) or self._next_id()
            self._refuse(proto, kind, identity, headers.get(SHADOW_HEADER) == "1", arrived, error)

    def _predict_v1(self, headers: Any, proto: Any, body: bytes | None, arrived: int) -> None:
        begun = perf_counter_ns()
        shadow = headers.get(SHADOW_HEADER) == "1"
        identity = headers.get(REQUEST_ID_HEADER) or self._next_id()
        try:
            found = protocol.instances(self._whole(body, identity))
            if self._online is not None and any(map(self._reader.lacks_features, found)):
                self._later(self._completed_v1, found, proto, identity, shadow, arrived, begun)
                return
            content = self._v1(found, identity, shadow, arrived, begun)
        except Exception as error:
            self._refuse(proto, "v1", identity, shadow, arrived, error)
            return
        proto.response_bytes(200, [JSON, self._version_header, (REQUEST_ID_HEADER, identity)], content)

    def _v1(self, found: list[Any], identity: str, shadow: bool, arrived: int, begun: int) -> bytes:
        if len(found) != 1:
            return self._v1_rows(found, identity, shadow, arrived, begun)
        instance = found[0]
        row = self._reader.read(instance, 0)
        row_identity, moment = NO_ROW_ID, None
        if type(instance) is dict and len(instance) != len(row):
            row_identity, moment = row_id(instance, 0), event_time(instance.get("event_timestamp"), 0)
        checked = perf_counter_ns()
        labels, probabilities = self._one(row)
        scored = perf_counter_ns()
        content = protocol.answer(labels, probabilities)
        times = (arrived, begun, checked, scored, perf_counter_ns())
        self._record((identity, "v1", shadow, time_ns(), times, 1, row_identity, moment, row, labels, probabilities))
        return content

    def _v1_rows(self, found: list[Any], identity: str, shadow: bool, arrived: int, begun: int) -> bytes:
        batch = self._batch(found)
        checked = perf_counter_ns()
        labels, probabilities = self._scorer.many(batch.columns, batch.count)
        scored = perf_counter_ns()
        listed = labels.reshape(-1).tolist(), None if probabilities is None else probabilities.tolist()
        content = protocol.answer(*listed)
        self._log_batch("v1", batch, identity, shadow, (arrived, begun, checked, scored, perf_counter_ns()), *listed)
        return content

    def _batch(self, found: list[Any]) -> Batch:
        rows = [self._reader.read(instance, number) for number, instance in enumerate(found)]
        ids = [row_id(instance, number) for number, instance in enumerate(found)]
        check_distinct(ids)
        times = [event_time(i.get("event_timestamp"), n) if type(i) is dict else None for n, i in enumerate(found)]
        columns = [protocol.column(list(c), f) for c, f in zip(zip(*rows, strict=True), self._signature.features, strict=True)]
        return Batch(columns, ids, times)

    def _infer_v2(self, headers: Any, proto: Any, body: bytes | None, arrived: int) -> None:
        begun = perf_counter_ns()
        shadow = headers.get(SHADOW_HEADER) == "1"
        identity = headers.get(REQUEST_ID_HEADER)
        try:
            request = open_inference.parse(self._whole(body, identity or ""), headers.get(HEADER_LENGTH), self._scorer.outputs)
            identity = identity or request.id or self._next_id()
            rows = tensors.to_rows(request.tensors, self._signature, self._online is not None)
            if rows is not None:
                self._later(self._completed_v2, (rows, request), proto, identity, shadow, arrived, begun)
                return
            content, length = self._v2(
                tensors.to_batch(request.tensors, self._signature), request, identity, shadow, arrived, begun
            )
        except Exception as error:
            self._refuse(proto, "v2", identity or self._next_id(), shadow, arrived, error)
            return
        self._respond_v2(proto, identity, content, length)

    def _v2(
        self, batch: Batch, request: open_inference.InferRequest, identity: str, shadow: bool, arrived: int, begun: int
    ) -> tuple[bytes, int | None]:
        checked = perf_counter_ns()
        labels, probabilities = self._scorer.many(batch.columns, batch.count)
        scored = perf_counter_ns()
        found = [labels] if probabilities is None else [labels, probabilities]
        results = {s.name: (s, a) for s, a in zip(self._scorer.outputs, found, strict=True)}
        head = {"model_name": self._pages.model, "model_version": self._pages.version, "id": request.id or identity}
        encoded = open_inference.encode(head, results, request.wanted)
        listed = labels.reshape(-1).tolist(), None if probabilities is None else probabilities.tolist()
        self._log_batch("v2", batch, identity, shadow, (arrived, begun, checked, scored, perf_counter_ns()), *listed)
        return encoded

    def _respond_v2(self, proto: Any, identity: str, content: bytes, length: int | None) -> None:
        fixed = [self._version_header, (REQUEST_ID_HEADER, _header_safe(identity))]
        if length is None:
            proto.response_bytes(200, [JSON, *fixed], content)
            return
        binary = ("content-type", "application/octet-stream")
        proto.response_bytes(200, [binary, (HEADER_LENGTH, str(length)), *fixed], content)

    def _log_batch(
        self,
        kind: str,
        batch: Batch,
        identity: str,
        shadow: bool,
        times: tuple[int, int, int, int, int],
        labels: list[Any],
        probabilities: list[list[float]] | None,
    ) -> None:
        event = (
            identity,
            kind,
            shadow,
            time_ns(),
            times,
            batch.count,
            batch.ids,
            batch.times,
            batch.columns,
            labels,
            probabilities,
        )
        self._record(Event(*event))

    def _whole(self, body: bytes | None, identity: str) -> bytes:
        if body is None:
            raise InputError(
                f"The body is larger than the {self._maximum} bytes that this server takes; send fewer rows a request.", 413
            )
        if len(identity) > MAXIMUM_REQUEST_ID:
            raise InputError(f"The header x-request-id has {len(identity)} characters; at most {MAXIMUM_REQUEST_ID} are taken.")
        return body

    # With an online feature store ----------------------------------------------------------------------------------------

    def _later(self, work: Callable[..., None], *arguments: Any) -> None:
        assert self._pool is not None
        self._pool.submit(work, *arguments)

    def _complete(self, found: list[Any]) -> list[Any]:
        """`found` with its incomplete rows completed, in one read of the store."""
        assert self._online is not None
        lacking = [n for n, i in enumerate(found) if self._reader.lacks_features(i)]
        complete = dict(zip(lacking, self._online.complete([found[n] for n in lacking]), strict=True))
        # The store knows the features only: what says which row it is and when stays the caller's.
        return [{**_reserved(i), **complete[n]} if n in complete else i for n, i in enumerate(found)]

    def _completed_v1(self, found: list[Any], proto: Any, identity: str, shadow: bool, arrived: int, begun: int) -> None:
        try:
            content = self._v1(self._complete(found), identity, shadow, arrived, begun)
        except Exception as error:
            self._refuse(proto, "v1", identity, shadow, arrived, error)
            return
        proto.response_bytes(200, [JSON, self._version_header, (REQUEST_ID_HEADER, identity)], content)

    def _completed_v2(
        self, work: tuple[list[Any], Any], proto: Any, identity: str, shadow: bool, arrived: int, begun: int
    ) -> None:
        rows, request = work
        try:
            batch = self._batch(self._complete(rows))
            content, length = self._v2(batch, request, identity, shadow, arrived, begun)
        except Exception as error:
            self._refuse(proto, "v2", identity, shadow, arrived, error)
            return
        self._respond_v2(proto, identity, content, length)

    # What is wrong -------------------------------------------------------------------------------------------------------

    def _refuse(self, proto: Any, kind: str, identity: str, shadow: bool, arrived: int, error: Exception) -> None:
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
        self._metrics.failed(kind, status, shadow, (perf_counter_ns() - arrived) / 1e9)
        safe = _header_safe(identity)
        proto.response_bytes(status, [JSON, self._version_header, (REQUEST_ID_HEADER, safe)], protocol.error(message))


class _Gathering:
    """Collects a body that came without a length, piece by piece, and stops when it grows too large."""

    def __init__(self, proto: Any, maximum: int, then: Callable[[bytes | None], None]) -> None:
        self._stream: Any = proto.__aiter__()
        self._room = maximum
        self._parts: list[bytes] = []
        self._then = then
        self._piece: Any = None

    def more(self) -> None:
        self._piece = self._stream.__anext__()
        self._piece.add_done_callback(self._took)

    def cancel(self) -> None:
        piece, self._piece = self._piece, None
        piece.cancel()

    def _took(self, piece: Any) -> None:
        self._piece = None  # it holds this very function: a circle that no collector sees
        try:
            part = piece.result()
        except BaseException:  # cancelled, or the caller went away: nobody waits for an answer
            self._stream = None
            return
        self._room -= len(part)
        self._parts.append(part)
        if not part or self._room < 0:
            self._stream = None
            self._then(b"".join(self._parts) if self._room >= 0 else None)
        else:
            self.more()


def _header_safe(identity: str) -> str:
    """A request id taken from a body may hold what a header may not."""
    return (
        identity[:MAXIMUM_REQUEST_ID] if identity.isascii() and identity.isprintable() else ascii(identity)[1:MAXIMUM_REQUEST_ID]
    )


def _reserved(instance: Any) -> dict[str, Any]:
    return {name: instance[name] for name in RESERVED if name in instance}
