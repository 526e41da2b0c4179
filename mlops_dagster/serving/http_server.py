"""HTTP/1.1 for a predictor: uvloop reads and writes, llhttp (httptools) parses, and each whole request is handed to a function.

All of it happens in one thread, and a request of one read is answered within that read: on a machine with few cores, handing requests
from thread to thread costs more than answering them (see docs/adr/0007). Slow senders wait in their connections and hold up nobody.
"""

import asyncio
import resource
import socket
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import uvloop

from mlops_dagster.serving.http_connection import Connection, Handler

BACKLOG = 1024
IDLE_SECONDS = 300.0
MAXIMUM_CONNECTIONS = 1024
OTHER_FILES = 64  # of the process: the log's, the model's, the feature store's
UNFINISHED_BYTES = 256 * 1024 * 1024


class Server:
    """Serves HTTP/1.1 on a bound socket until `stop`; `handler` must not raise, and answers each request now or later."""

    def __init__(self, bound: socket.socket, handler: Handler, maximum_body_bytes: int = 16 * 1024 * 1024) -> None:
        self._socket = bound
        self.handle = handler
        self.maximum_body_bytes = maximum_body_bytes
        self.maximum_connections = most_connections()
        self.maximum_unfinished_bytes = max(UNFINISHED_BYTES, 4 * maximum_body_bytes)
        self.unfinished_bytes = 0  # of requests that are not whole, without the first part of each
        self.connections: set[Connection] = set()
        self.draining = self._stopping = False
        self.date = formatdate(usegmt=True)
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._listener: asyncio.AbstractServer | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self.thread_id = 0

    def start(self) -> None:
        """Begin to accept connections."""
        self._listener = self.loop.run_until_complete(
            self.loop.create_server(lambda: Connection(self), sock=self._socket, backlog=BACKLOG)
        )
        self._tick()
        self._thread.start()

    def drain(self) -> None:
        """From now on each answer ends its connection, so that callers go elsewhere before `stop`."""
        self.draining = True

    def stop(self) -> None:
        """Stop accepting; requests in flight are answered, idle connections closed."""
        self.in_loop(self._stop)

    def wait(self, timeout_seconds: float) -> bool:
        """Whether all connections ended within `timeout_seconds` after `stop`; those that did not are cut."""
        in_time = self._ended.wait(timeout_seconds)
        self.in_loop(self._cut)
        self._thread.join()
        return in_time

    def give_up_bodies(self, after_seconds: float) -> None:
        """Answer 408 to callers whose requests have been incomplete for so long, cut those who have not read their answers for so long,
        and close what was not used for IDLE_SECONDS (to be called now and then, from any thread).
        """
        now = time.perf_counter_ns()
        before, idle_before = now - int(after_seconds * 1e9), now - int(IDLE_SECONDS * 1e9)
        self.in_loop(lambda: [connection.give_up(before, idle_before) for connection in tuple(self.connections)])

    def in_loop(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Have `call` called in the loop's thread, soon; after the end of the loop, never."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(call, *arguments)

    def make_room(self, newest: Connection) -> bool:
        """Close the connection that has been unused for longest; False where all of them are in use."""
        unused = [c for c in self.connections if c.idle and c is not newest]
        if unused:
            min(unused, key=lambda c: c.quiet_since).give_way()
        return bool(unused)

    def lost(self, connection: Connection) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        if self._stopping and not self.connections:
            self._ended.set()

    def _run(self) -> None:
        self.thread_id = threading.get_ident()
        self.loop.run_forever()
        self.loop.close()

    def _tick(self) -> None:
        self.date = formatdate(usegmt=True)
        self.loop.call_later(1, self._tick)

    def _stop(self) -> None:
        assert self._listener
        self.draining = self._stopping = True
        self._listener.close()
        for connection in tuple(self.connections):
            if connection.idle:
                connection.close()
        if not self.connections:
            self._ended.set()

    def _cut(self) -> None:
        for connection in tuple(self.connections):
            connection.cut()
        self.loop.call_soon(self.loop.stop)


def most_connections() -> int:
    """As many connections as the process may open, after raising that limit as far as it goes without privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAXIMUM_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAXIMUM_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAXIMUM_CONNECTIONS, soft - OTHER_FILES))
