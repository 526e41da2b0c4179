"""One caller of a predictor: bytes in, whole requests out, answers in their order."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import unquote

import httptools
import orjson

MAXIMUM_HEAD_BYTES = 64 * 1024
LINGER_SECONDS = 2.0
CLOSE_SECONDS = 10.0
TURN = 16
UPGRADE_HEADERS = (b"connection", b"upgrade", b"http2-settings")
STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n" for s in HTTPStatus}
ERROR_HEADERS = (("content-type", "application/json"),)

Header = tuple[str, str]
Handler = Callable[["Request"], None]


class Owner(Protocol):
    """What a connection needs of its server."""

    handle: Handler
    maximum_body_bytes: int
    maximum_connections: int
    maximum_unfinished_bytes: int
    unfinished_bytes: int
    connections: "set[Connection]"
    draining: bool
    date: str
    loop: asyncio.AbstractEventLoop
    thread_id: int

    def make_room(self, newest: "Connection") -> bool: ...

    def lost(self, connection: "Connection") -> None: ...

    def in_loop(self, call: Callable[..., Any], *arguments: Any) -> None: ...


class Request:
    """A whole request, and the way to answer it, once.

    `headers`: lower-case names and values as they came; `body` is None where it was larger than the server takes; `arrived` is the
    perf_counter time (ns) of its first byte; `path` is without query, percent signs decoded; `keep` and `old`: whether the caller wants
    the connection kept, and speaks HTTP/1.0.
    """

    __slots__ = ("_connection", "arrived", "body", "headers", "keep", "method", "old", "path")

    def __init__(
        self, connection: "Connection", method: str, path: str, headers: dict[bytes, bytes], body: bytes | None, arrived: int
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
        """Send the answer; from any thread. What the caller no longer waits for, or was answered already, is dropped."""
        connection = self._connection
        if threading.get_ident() == connection.server.thread_id:
            connection.answered(self, status, headers, content)
        else:
            connection.server.in_loop(connection.answered, self, status, headers, content)


@dataclass(frozen=True)
class Refusal:
    """What answers bytes that are no request; the connection ends with it."""

    status: int
    message: str


class Connection(asyncio.Protocol):
    """One caller: requests are answered one after the other, in their order; what comes too early waits, and then nothing is read."""

    def __init__(self, server: Owner) -> None:
        self.server = server
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Request | Refusal] = deque()  # what came before it could be handed over
        self._current: Request | None = None  # what the handler has
        self._handing_over = False
        self._had_turn = False  # a request of this read was handed over: the others wait until every caller had its turn
        self._ignoring = False  # nothing that comes any more matters
        self._ended = self._half_closed = False
        self._stuck_since: int | None = None  # since when the caller does not read its answers
        self._unsent = self._unfinished = 0
        self._begun: int | None = None  # when the request that is not yet whole began
        self._messages = 0
        self.quiet_since = time.perf_counter_ns()
        self._reset()

    def _reset(self) -> None:
        self.server.unfinished_bytes -= self._unfinished
        self._unfinished = 0
        self._url, self._headers = b"", {}
        self._body: bytes | bytearray = b""
        self._room, self._overhead = self.server.maximum_body_bytes, 0
        self._in_head = self._expects = False

    # What asyncio calls ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._write = transport.write
        self.server.connections.add(self)
        if len(self.server.connections) > self.server.maximum_connections and not self.server.make_room(self):
            self._stop_reading(503, f"This server has {self.server.maximum_connections} connections already; try again.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._ignoring, self._begun, self._current = True, None, None
        self._waiting.clear()
        self._reset()
        del self._parser  # it refers to this object: a circle that no collector sees for long
        self.server.lost(self)

    def pause_writing(self) -> None:
        self._stuck_since, self._unsent = time.perf_counter_ns(), self._transport.get_write_buffer_size()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._stuck_since = None
        self._go_on()

    def eof_received(self) -> bool:
        """The caller has said all; it still gets the answers that are due."""
        self._ignoring, self._half_closed, self._begun = True, True, None
        return bool(self._current or self._waiting)

    def data_received(self, data: bytes) -> None:
        self._had_turn = False
        while data and not self._ignoring:
            data = self._parsed(data)

    def _parsed(self, data: bytes) -> bytes:
        """Parse `data`; returns what is to be parsed next."""
        message, room, between = self._messages, self._room, self._begun is None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._stop_reading(400, f"This is not an HTTP/1.1 request: {error}.")
        if self._begun is not None and self._messages - message <= between:  # else it began somewhere within this (bounded) read
            body = room - self._room
            self._overhead += len(data) - body
            if self._overhead > MAXIMUM_HEAD_BYTES + len(self._body):
                what = "line and headers are" if self._in_head else "chunks and trailers are"
                self._stop_reading(431, f"The request's {what} longer than {MAXIMUM_HEAD_BYTES} bytes.")
        return b""

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Another protocol is offered (h2c by Java's client, a web socket) and not taken up: the same request without the offer."""
        parser, headers = self._parser, self._headers
        if parser.get_method() == b"CONNECT":
            self._stop_reading(400, "This server is no proxy.")
            return b""
        line = b"%s %s HTTP/%s\r\n" % (parser.get_method(), self._url, parser.get_http_version().encode())
        kept = b"".join(b"%s: %s\r\n" % field for field in headers.items() if field[0] not in UPGRADE_HEADERS)
        end = b"connection: close\r\n" if b"close" in headers.get(b"connection", b"").lower() else b""
        self._reset()
        self._parser = httptools.HttpRequestParser(self)
        return line + kept + end + b"\r\n" + rest

    # What the parser calls -------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begun = time.perf_counter_ns()
        self._messages += 1
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are not headers: a proxy may not have looked at them
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        headers = self._headers
        if self._parser.should_upgrade():
            return
        if b"transfer-encoding" in headers and headers[b"transfer-encoding"].lower() != b"chunked":
            self._stop_reading(501, "This server knows no Transfer-Encoding but chunked.")
        elif int(headers.get(b"content-length") or 0) > self._room:  # the parser lets digits through only
            self._too_large()
        elif b"expect" in headers and headers[b"expect"].lower() == b"100-continue" and self._parser.get_http_version() != "1.0":
            self._expects = True
            self._ask_for_body()

    def on_body(self, part: bytes) -> None:
        self._expects = False
        self._room -= len(part)
        if self._room < 0:
            self._too_large()
        elif not self._body:
            self._body = part
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += part
            self._unfinished += len(part)
            self.server.unfinished_bytes += len(part)
            if self.server.unfinished_bytes > self.server.maximum_unfinished_bytes:
                self._stop_reading(503, "This server holds too many large requests that are not whole yet; try again.")
                self._reset()

    def on_message_complete(self) -> None:
        if not (self._ignoring or self._parser.should_upgrade()):
            self._take(bytes(self._body), self._parser.should_keep_alive())

    # Requests and answers --------------------------------------------------------------------------------------------------

    def _too_large(self) -> None:
        if not self._ignoring:
            self._take(None, keep=False)
            self._ignoring = True

    def _ask_for_body(self) -> None:
        if self._expects and not (self._current or self._waiting or self._ignoring):
            self._expects = False
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _take(self, body: bytes | None, keep: bool) -> None:
        """Hand over what was read, or keep it until the answers before it are sent."""
        arrived, self._begun = self._begun or time.perf_counter_ns(), None
        parser = self._parser
        request = Request(self, parser.get_method().decode(), _path(self._url), self._headers, body, arrived)
        request.keep, request.old = keep, parser.get_http_version() == "1.0"
        self._reset()
        if self._current or self._waiting or self._stuck_since is not None:
            self._waiting.append(request)
            self._transport.pause_reading()
        elif self._had_turn:
            self._waiting.append(request)
            self._transport.pause_reading()
            self.server.loop.call_soon(self._go_on)
        else:
            self._had_turn = True
            self._current = request
            self.server.handle(request)

    def answered(self, request: Request, status: int, headers: Sequence[Header], content: bytes) -> None:
        """Send the answer if it is due, and go on with what waits; in the loop's thread."""
        if request is not self._current:
            return
        self._current, self.quiet_since = None, time.perf_counter_ns()
        if self._transport.is_closing():
            return
        body = b"" if request.method == "HEAD" else content
        if not request.keep or self.server.draining or (self._half_closed and not self._waiting):
            self._send(status, [*headers, ("connection", "close")], len(content), body)
            self._end()
            return
        self._send(status, [*headers, ("connection", "keep-alive")] if request.old else headers, len(content), body)
        if self._waiting or self._expects:
            self._go_on()

    def _go_on(self) -> None:
        """Hand over what waits, one after the other (an answer may come at once: no recursion), and read again when nothing does."""
        if self._handing_over or self._transport.is_closing():
            return
        self._handing_over, left = True, TURN
        while self._waiting and left and not self._current and self._stuck_since is None and not self._ended:
            found, left = self._waiting.popleft(), left - 1
            if isinstance(found, Refusal):
                self._refuse(found)
            else:
                self._current = found
                self.server.handle(found)
        self._handing_over = False
        if self._waiting and not left:
            self.server.loop.call_soon(self._go_on)
        if not self._waiting and self._stuck_since is None:
            if self._begun is not None:  # its time begins anew: nothing was read of it meanwhile
                self._begun = time.perf_counter_ns()
            self._transport.resume_reading()
            self._ask_for_body()

    def _send(self, status: int, headers: Sequence[Header], length: int, body: bytes) -> None:
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers])
        head = f"{STATUS_LINES[status]}{fields}content-length: {length}\r\ndate: {self.server.date}\r\n\r\n"
        self._write(head.encode("latin-1") + body)

    def _stop_reading(self, status: int, message: str) -> None:
        """Refuse what came, after the answers before it."""
        if self._ignoring:
            return
        self._ignoring, self._begun = True, None
        self._waiting.append(Refusal(status, message))
        if not self._current:
            self._go_on()

    def _refuse(self, refusal: Refusal) -> None:
        content = orjson.dumps({"error": refusal.message})
        self._send(refusal.status, [*ERROR_HEADERS, ("connection", "close")], len(content), content)
        self._end()

    def _end(self) -> None:
        """Close, but not before the caller could read the answer: closing with bytes unread would take it back."""
        self._ended = self._ignoring = True
        self._waiting.clear()
        self._reset()
        self._transport.write_eof()
        self._transport.resume_reading()
        self.server.loop.call_later(LINGER_SECONDS, self.close)

    # What the server asks for ----------------------------------------------------------------------------------------------

    def give_up(self, before: int, idle_before: int) -> None:
        """End what has not gone on since `before`, and an unused connection since `idle_before` (perf_counter, ns)."""
        if self._stuck_since is not None:
            unsent, self._unsent = self._unsent, self._transport.get_write_buffer_size()
            if self._unsent < unsent:  # slow, but it reads
                self._stuck_since = time.perf_counter_ns()
            elif self._stuck_since < before:
                self._transport.abort()
        elif self._begun is not None and not self._waiting:
            if self._begun < before:
                seconds = (time.perf_counter_ns() - self._begun) / 1e9
                self._stop_reading(408, f"The request was not whole after {seconds:.1f} seconds.")
        elif self.idle and self.quiet_since < idle_before:
            self.close()

    @property
    def idle(self) -> bool:
        """Whether nothing was asked that is not answered."""
        return not self._current and not self._waiting and self._begun is None

    def close(self) -> None:
        """End it, when what was answered is sent; a caller that does not read that in time is cut."""
        if not self._transport.is_closing():
            self._transport.close()
            self.server.loop.call_later(CLOSE_SECONDS, self._transport.abort)

    def give_way(self) -> None:
        """End it now, for another caller."""
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._transport.close()

    def cut(self) -> None:
        self._transport.abort()


def _path(url: bytes) -> str:
    """The path of a request's target, without query, decoded; what is no URL is a path that nothing is served at."""
    if b"?" not in url and b"%" not in url and url[:1] == b"/":
        return url.decode("latin-1")
    try:
        return unquote((httptools.parse_url(url).path or b"/").decode("latin-1"))
    except httptools.HttpParserInvalidURLError:
        return url.decode("latin-1")
