"""A load generator for one machine: requests at a fixed rate over kept-alive connections, whatever the answers take (open
loop).
"""

import asyncio
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """One request: when it was due, and when its answer was whole (both seconds of `time.perf_counter`); status 0: no answer."""

    due: float
    done: float
    status: int
    version: str


@dataclass
class Load:
    """Runs in a thread of its own between `start` and `stop`; `answers` grows meanwhile.

    A connection that breaks before an answer is a failed request (status 0), as it would be to a caller that does not retry.
    """

    url: str
    body: bytes
    per_second: float
    connections: int = 32
    headers: tuple[str, ...] = ()
    answers: list[Answer] = field(default_factory=list)

    def start(self) -> "Load":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> list[Answer]:
        self._stop.set()
        self._thread.join(timeout=60)
        return self.answers

    def __enter__(self) -> "Load":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _run(self) -> None:
        due: asyncio.Queue[float | None] = asyncio.Queue()
        workers = [asyncio.create_task(self._connection(due)) for _ in range(self.connections)]
        begin, sent = time.perf_counter(), 0
        while not self._stop.is_set():
            while sent < (time.perf_counter() - begin) * self.per_second:
                due.put_nowait(begin + sent / self.per_second)
                sent += 1
            await asyncio.sleep(0.001)
        for _ in workers:
            due.put_nowait(None)
        await asyncio.gather(*workers)

    async def _connection(self, due: "asyncio.Queue[float | None]") -> None:
        target = urlsplit(self.url)
        lines = (f"POST {target.path} HTTP/1.1", f"host: {target.netloc}", f"content-length: {len(self.body)}", *self.headers)
        request = "\r\n".join((*lines, "content-type: application/json", "", "")).encode() + self.body
        streams = None
        while (moment := await due.get()) is not None:
            try:
                streams = streams or await asyncio.open_connection(target.hostname, target.port)
                streams[1].write(request)
                status, version, keep = await _answer(streams[0])
                self.answers.append(Answer(moment, time.perf_counter(), status, version))
                if not keep:
                    streams[1].close()
                    streams = None
            except (OSError, asyncio.IncompleteReadError, ValueError, IndexError):
                self.answers.append(Answer(moment, time.perf_counter(), 0, ""))
                if streams is not None:
                    streams[1].close()
                streams = None
        if streams is not None:
            streams[1].close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, str, bool]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    first, *lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if ": " in line)
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
        await reader.readline()
    else:
        await reader.readexactly(int(headers.get("content-length", "0")))
    return int(first.split()[1]), headers.get("x-model-version", ""), headers.get("connection") != "close"


@contextmanager
def in_another_process(load: Load) -> Iterator[list[Answer]]:
    """Run `load` in a process of its own, so that it is not held up by this one; its answers are in the list at the end.

    `time.perf_counter` is one clock for all processes of a machine (CLOCK_MONOTONIC).
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(load, theirs), daemon=True)
    process.start()
    answers: list[Answer] = []
    try:
        ours.recv()  # it has begun
        yield answers
        ours.send("stop")
        answers += ours.recv()
    finally:
        process.join(10)
        process.terminate()


def _child(load: Load, parent: Connection) -> None:
    with load:
        parent.send("begun")
        parent.recv()
    parent.send(load.answers)


def outcome(answers: Iterable[Answer]) -> Counter[tuple[int, str]]:
    """How many answers there were by status and version."""
    return Counter((answer.status, answer.version) for answer in answers)


def latency_ms(answers: Iterable[Answer], quantile: float) -> float:
    """A quantile of the latencies, from when a request was due, in milliseconds."""
    ordered = sorted(answer.done - answer.due for answer in answers)
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1000
