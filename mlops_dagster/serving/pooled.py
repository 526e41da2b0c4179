"""Work in threads, where the model or a store is slow: the thread that reads requests goes on answering health checks."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mlops_dagster.core.errors import ServingError


class BoundedPool(ThreadPoolExecutor):
    """So many threads, and so much that may wait for them; more is refused at once with ServingError."""

    def __init__(self, threads: int, waiting: int, name: str) -> None:
        super().__init__(threads, name)
        self._most = threads + waiting
        self._room = threading.BoundedSemaphore(self._most)

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        """See Executor.submit."""
        if not self._room.acquire(blocking=False):
            raise ServingError(
                f"{self._most} requests are being answered or wait already. Try again later, or send fewer at once."
            )
        try:
            future = super().submit(work, *arguments, **named)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future


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
