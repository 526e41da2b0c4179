"""HTTP/1.1 for a predictor: uvloop reads and writes, llhttp (httptools) parses, and each whole request is handed to a function.

All of it happens in one thread, and a request of one read is answered within that read: on a machine with few cores, handing requests
from thread to thread costs more than answering them (see docs/adr/0007). Slow senders wait in their connections and hold up nobody.
"""

import asyncio
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import httptools
import orjson
import uvloop

BACKLOG = 1024
MAXIMUM_CONNECTIONS = 1024
MAXIMUM_HEAD_BYTES = 64 * 1024
LINGER_SECONDS = 2.0
UPGRADE_HEADERS = (b"connection", b"upgrade", b"http2-settings")
STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n" for s in HTTPStatus}
ERROR_HEADERS = (("content-type", "application/json"),)

Header = tuple[str, str]
Handler = Callable[["Request"], None]


class Request:
    """A whole request, and the way to answer it, once.

    `headers`: lower-case names and values as they came; `body` is None where it was larger than the server takes; `arrived` is the
    perf_counter time (ns) of its first byte; `path` is without query, percent signs decoded.
    """

    __slots__ = ("_connection", "arrived", "body", "headers", "method", "path")

    def __init__(
        self, connection: "_Connection", method: str, path: str, headers: dict[bytes, bytes], body: bytes | None, arrived: int
    ) -> None:
        self._connection = connection
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.arrived = arrived

    def header(self, name: bytes) -> str | None:
        """The value of the header `name` (lower case), or None."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def answer(self, status: int, headers: Sequence[Header], content: bytes) -> None:
        """Send the answer; from any thread. What the caller no longer waits for is dropped."""
        connection = self._connection
        if threading.get_ident() == connection.server.thread_id:
            connection.answered(status, headers, content)
        else:
            connection.server.in_loop(connection.answered, status, headers, content)


class _Connection(asyncio.Protocol):
    """One caller: requests are answered one after the other, in their order."""

    def __init__(self, server: "Server") -> None:
        self.server = server
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Callable[[], None]] = deque()  # what came while an answer was due
        self._due = False  # a request is with the handler
        self._closing = False  # the connection ends with the next answer, or has ended
        self._ignoring = self._old = self._bodiless = False
        self._begun: int | None = None  # when the request that is not yet whole began
        self._in_head = False
        self._reset()

    def _reset(self) -> None:
        self._url, self._headers, self._parts = b"", {}, []
        self._room, self._head_bytes = self.server.maximum_body_bytes, 0

    # What asyncio calls ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._write = transport.write
        self.server.connections.add(self)
        if len(self.server.connections) > MAXIMUM_CONNECTIONS:
            self._refuse(503, f"This server has {MAXIMUM_CONNECTIONS} connections already; try again.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._ignoring = self._closing = True
        self._begun = None
        self._waiting.clear()
        self.server.lost(self)

    def pause_writing(self) -> None:
        """The caller does not read its answers: nor are its requests read."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._waiting:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._ignoring:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._stop_reading(400, f"This is not an HTTP/1.1 request: {error}.")
        if self._in_head and not self._ignoring:
            self._head_bytes += len(data)
            if self._head_bytes > MAXIMUM_HEAD_BYTES:
                self._stop_reading(431, f"The request's line and headers are longer than {MAXIMUM_HEAD_BYTES} bytes.")

    def _stay(self, rest: bytes) -> None:
        """Another protocol is offered (h2c by Java's client, a web socket) and not taken up: read the same request without the offer."""
        method, url, headers = self._parser.get_method(), self._url, self._headers
        if method == b"CONNECT":
            self._stop_reading(400, "This server is no proxy.")
            return
        self._reset()
        self._parser = httptools.HttpRequestParser(self)
        kept = b"".join(b"%s: %s\r\n" % field for field in headers.items() if field[0] not in UPGRADE_HEADERS)
        self.data_received(b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method, url, kept, rest))

    # What the parser calls -------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begun = time.perf_counter_ns()
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        headers = self._headers
        if self._parser.should_upgrade():
            return
        if int(headers.get(b"content-length") or 0) > self._room:  # the parser lets digits through only
            self._too_large()
        elif b"expect" in headers and headers[b"expect"].lower() == b"100-continue" and not (self._due or self._ignoring):
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, part: bytes) -> None:
        self._room -= len(part)
        if self._room >= 0:
            self._parts.append(part)
        else:
            self._too_large()

    def on_message_complete(self) -> None:
        if self._ignoring or self._parser.should_upgrade():
            return
        parts = self._parts
        self._take(parts[0] if len(parts) == 1 else b"".join(parts), self._parser.should_keep_alive())

    # Requests and answers --------------------------------------------------------------------------------------------------

    def _too_large(self) -> None:
        if not self._ignoring:
            self._take(None, keep=False)
            self._ignoring = True

    def _take(self, body: bytes | None, keep: bool) -> None:
        """Hand over what was read, or keep it until the answer before it is sent."""
        arrived, self._begun = self._begun or time.perf_counter_ns(), None
        parser = self._parser
        request = Request(self, parser.get_method().decode(), _path(self._url), self._headers, body, arrived)
        old = parser.get_http_version() == "1.0"
        self._reset()
        if self._due:
            self._waiting.append(partial(self._hand_over, request, keep, old))
            self._transport.pause_reading()
        else:
            self._hand_over(request, keep, old)

    def _hand_over(self, request: Request, keep: bool, old: bool) -> None:
        self._due, self._old, self._bodiless = True, old, request.method == "HEAD"
        self._closing = self._closing or not keep
        self.server.handle(request)

    def answered(self, status: int, headers: Sequence[Header], content: bytes) -> None:
        """Send the answer that is due, and go on with what waits; in the loop's thread."""
        if not self._due:
            return
        self._due = False
        if self._transport.is_closing():
            return
        if self._closing or self.server.stopping:
            self._send(status, [*headers, ("connection", "close")], content)
            self._end()
            return
        self._send(status, [*headers, ("connection", "keep-alive")] if self._old else headers, content)
        if self._waiting:
            self._waiting.popleft()()
            if not self._waiting:
                self._transport.resume_reading()

    def _send(self, status: int, headers: Sequence[Header], content: bytes) -> None:
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers])
        head = f"{STATUS_LINES[status]}{fields}content-length: {len(content)}\r\ndate: {self.server.date}\r\n\r\n"
        self._write(head.encode("latin-1") + (b"" if self._bodiless else content))

    def _stop_reading(self, status: int, message: str) -> None:
        """Refuse what came, after the answers before it."""
        self._ignoring, self._begun, self._in_head = True, None, False
        if self._due:
            self._waiting.append(lambda: self._refuse(status, message))
        else:
            self._refuse(status, message)

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, [*ERROR_HEADERS, ("connection", "close")], orjson.dumps({"error": message}))
        self._end()

    def _end(self) -> None:
        """Close, but not before the caller could read the answer: closing with bytes unread would take it back."""
        self._closing = self._ignoring = True
        self._waiting.clear()
        self._transport.write_eof()
        self._transport.resume_reading()
        self.server.loop.call_later(LINGER_SECONDS, self._transport.close)

    def give_up(self, before: int) -> None:
        """Refuse a request that began before `before` (perf_counter, ns) and is not whole yet."""
        if self._begun is not None and self._begun < before:
            seconds = (time.perf_counter_ns() - self._begun) / 1e9
            self._stop_reading(408, f"The request was not whole after {seconds:.1f} seconds.")

    def close_if_idle(self) -> None:
        if not self._due and self._begun is None:
            self._transport.close()

    def cut(self) -> None:
        self._transport.abort()


class Server:
    """Serves HTTP/1.1 on a bound socket until `stop`; `handler` must not raise, and answers each request now or later."""

    def __init__(self, bound: socket.socket, handler: Handler, maximum_body_bytes: int = 16 * 1024 * 1024) -> None:
        self._socket = bound
        self.handle = handler
        self.maximum_body_bytes = maximum_body_bytes
        self.connections: set[_Connection] = set()
        self.stopping = False
        self.date = formatdate(usegmt=True)
        self.loop = uvloop.new_event_loop()
        self._listener: asyncio.AbstractServer | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self.thread_id = 0

    def start(self) -> None:
        """Begin to accept connections."""
        self._listener = self.loop.run_until_complete(
            self.loop.create_server(lambda: _Connection(self), sock=self._socket, backlog=BACKLOG)
        )
        self._tick()
        self._thread.start()

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
        """Answer 408 to callers whose requests have been incomplete for so long (to be called now and then, from any thread)."""
        before = time.perf_counter_ns() - int(after_seconds * 1e9)
        self.in_loop(lambda: [connection.give_up(before) for connection in tuple(self.connections)])

    def in_loop(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Have `call` called in the loop's thread, soon; after the end of the loop, never."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(call, *arguments)

    def lost(self, connection: _Connection) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        if self.stopping and not self.connections:
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
        self.stopping = True
        self._listener.close()
        for connection in tuple(self.connections):
            connection.close_if_idle()
        if not self.connections:
            self._ended.set()

    def _cut(self) -> None:
        for connection in tuple(self.connections):
            connection.cut()
        self.loop.call_soon(self.loop.stop)


def _path(url: bytes) -> str:
    """The path of a request's target, without query, decoded; what is no URL is a path that nothing is served at."""
    if b"?" not in url and b"%" not in url and url[:1] == b"/":
        return url.decode("latin-1")
    try:
        return unquote((httptools.parse_url(url).path or b"/").decode("latin-1"))
    except httptools.HttpParserInvalidURLError:
        return url.decode("latin-1")
