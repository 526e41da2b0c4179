"""Granian's RSGI worker with requests handed straight to a function, in one Python thread.

Granian reads the socket and speaks HTTP in Rust. Its usual way from there is a thread that wakes an asyncio loop in another thread, twice
for each request (once for the request, once for its body); with a loop whose `call_soon_threadsafe` simply calls, both steps run in
granian's own Python thread. Measured here: 24 to 28 microseconds of CPU a request instead of 47, and nobody else to wait for the
interpreter's lock. Bodies still arrive in Rust, so a slow sender holds up no other caller (which WSGI, as quick, cannot say).

The classes used are those that `granian/server/embed.py` and `granian/_futures.py` use; granian is pinned to the minor version.
"""

import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol

from granian import _granian
from granian._granian import WorkerSignal
from granian.http import HTTP1Settings

# granian's type stubs are behind its classes.
_CallbackScheduler: Any = _granian.CallbackScheduler
_RSGIWorker: Any = _granian.RSGIWorker
_SocketHolder: Any = _granian.SocketHolder
BACKLOG = 1024
MAXIMUM_CONNECTIONS = 1024


class Handler(Protocol):
    """Told of each request as it arrives; must not raise and must see to it that `proto` is answered."""

    def __call__(self, scope: Any, proto: Any) -> None: ...


class _CallingLoop:
    """What granian's futures take for an event loop: a callback is called, here and now."""

    @staticmethod
    def call_soon(callback: Callable[..., Any], *arguments: Any, context: Any = None) -> None:
        callback(*arguments)

    @staticmethod
    def call_soon_threadsafe(callback: Callable[..., Any], *arguments: Any, context: Any = None) -> None:
        callback(*arguments)


class Server:
    """Serves HTTP/1.1 on a bound socket until `stop`."""

    def __init__(self, bound: socket.socket, handler: Handler) -> None:
        self._socket = bound
        self._handler = handler
        self._signal = WorkerSignal()
        self._stopped = threading.Event()
        self._signal.add_cb(self._stopped.set)

    def start(self) -> None:
        """Begin to accept connections."""
        handler = self._handler

        def schedule(watcher: Any) -> None:
            handler(watcher.scope, watcher.proto)

        loop = _CallingLoop()
        scheduler = _CallbackScheduler(loop, None, None, None, None)
        scheduler._schedule_fn = schedule
        holder = _SocketHolder(self._socket.detach(), False, BACKLOG)  # the socket is granian's from here on
        worker = _RSGIWorker(
            1,  # worker id
            (None, holder),
            None,  # no channel to a parent process
            1,  # one Rust thread
            1,  # one Rust thread for blocking file calls (there are none)
            1,  # one Python thread
            30,
            MAXIMUM_CONNECTIONS,
            "1",
            HTTP1Settings(),
            None,
            False,
            None,
            False,
            None,
            None,
            None,
            "tls1.3",
            None,
            [],
            False,
            (None, None),
        )
        worker.serve_mtr(scheduler, loop, self._signal)

    def stop(self) -> None:
        """Stop accepting; requests in flight are answered, idle connections closed."""
        self._signal.set()

    def wait(self, timeout_seconds: float) -> bool:
        """Whether all connections ended within `timeout_seconds` after `stop`."""
        return self._stopped.wait(timeout_seconds)
