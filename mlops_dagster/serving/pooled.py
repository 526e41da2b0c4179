"""Predictions in a pool of threads, where the model is slow: the thread that reads requests goes on answering health checks."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any

from mlops_dagster.serving.dispatch import Handler


class Pooled:
    """Passes requests on to `handler`; what waits for a request's body goes on in `pool` once the body is there."""

    def __init__(self, handler: Handler, pool: Executor) -> None:
        self._handler = handler
        self._pool = pool

    def __call__(self, scope: Any, proto: Any) -> None:
        self._handler(scope, _Protocol(proto, self._pool))


class LockedIterator:
    """An iterator whose `next` may be called from any thread."""

    def __init__(self, inner: Iterator[str]) -> None:
        self._next = one_at_a_time(inner.__next__)

    def __iter__(self) -> "LockedIterator":
        return self

    def __next__(self) -> str:
        return self._next()


def one_at_a_time(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, which no two threads do at once."""
    lock = threading.Lock()

    def locked(*arguments: Any) -> Any:
        with lock:
            return work(*arguments)

    return locked


class _Protocol:
    """Granian's protocol object of one request."""

    def __init__(self, inner: Any, pool: Executor) -> None:
        self._inner = inner
        self._pool = pool
        self.response_bytes = inner.response_bytes

    def __call__(self) -> "_Awaited":
        return _Awaited(self._inner(), self._pool)

    def __aiter__(self) -> "_Protocol":
        self._stream = self._inner.__aiter__()
        return self

    def __anext__(self) -> "_Awaited":
        return _Awaited(self._stream.__anext__(), self._pool)


class _Awaited:
    """A future of granian's whose callbacks are called in the pool."""

    def __init__(self, inner: Any, pool: Executor) -> None:
        self._inner = inner
        self._pool = pool
        self.result = inner.result
        self.cancel = inner.cancel

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._inner.add_done_callback(lambda done: self._pool.submit(callback, done))
