"""HTTP/1.1 as callers, proxies and attackers speak it, to a server whose handler answers at once, later, or from another thread."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mlops_dagster.serving import http_connection, http_server
from mlops_dagster.serving.http_connection import Request
from mlops_dagster.serving.http_server import Server
from mlops_dagster.serving.server import bind

LIMIT = 1000


class Echo:
    """Answers with what it was asked; `/later` when `release` is called, from that thread."""

    def __init__(self) -> None:
        self.later: list[Request] = []

    def __call__(self, request: Request) -> None:
        if request.path.startswith("/later"):
            self.later.append(request)
        else:
            self.answer(request)

    def answer(self, request: Request) -> None:
        body = None if request.body is None else request.body.decode("latin-1")
        said = {"method": request.method, "path": request.path, "body": body, "told": request.header(b"x-told")}
        request.answer(413 if body is None else 200, [("content-type", "application/json")], json.dumps(said).encode())

    def release(self, count: int = 1) -> None:
        deadline = time.monotonic() + 5
        while len(self.later) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        for _ in range(count):
            self.answer(self.later.pop(0))


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def server(echo: Echo) -> Iterator[Server]:
    found = Server(bind("127.0.0.1", 0), echo, LIMIT)
    found.port = found._socket.getsockname()[1]  # type: ignore[attr-defined]
    found.start()
    yield found
    found.stop()
    found.wait(2)


@pytest.fixture
def caller(server: Server) -> Iterator[socket.socket]:
    with connect(server) as found:
        yield found


def connect(server: Server) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", server.port))  # type: ignore[attr-defined]
    found.settimeout(5)
    return found


def post(path: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: x", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def answers(caller: socket.socket, count: int) -> list[tuple[int, dict[str, str], bytes]]:
    """The next answers on the connection: status, headers, body."""
    stream, found = caller.makefile("rb", 0), []
    for _ in range(count):
        status = int(stream.readline().split()[1])
        headers = {}
        while (line := stream.readline().strip()) != b"":
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        found.append((status, headers, read(stream, int(headers["content-length"]))))
    return found


def read(stream: Any, count: int) -> bytes:
    content = b""
    while len(content) < count:
        content += stream.read(count - len(content))
    return content


def paths(found: list[tuple[int, dict[str, str], bytes]]) -> list[str]:
    return [json.loads(body)["path"] for _, _, body in found]


def closed(caller: socket.socket) -> bool:
    try:
        return caller.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_request_in_single_bytes_is_the_same_request(caller: socket.socket) -> None:
    for byte in post("/a%20b?c=d", b"hello", "X-Told: so"):
        caller.send(bytes([byte]))
    [(status, headers, body)] = answers(caller, 1)
    assert status == 200
    assert json.loads(body) == {"method": "POST", "path": "/a b", "body": "hello", "told": "so"}
    assert headers["date"].endswith("GMT")


def test_requests_sent_ahead_are_answered_in_their_order(caller: socket.socket, echo: Echo) -> None:
    caller.sendall(b"".join(post(p, b"x") for p in ("/1", "/later2", "/3", "/later4", "/5")))
    assert paths(answers(caller, 1)) == ["/1"]
    echo.release()
    assert paths(answers(caller, 2)) == ["/later2", "/3"]
    caller.sendall(post("/6", b""))
    echo.release()
    assert paths(answers(caller, 3)) == ["/later4", "/5", "/6"]


def test_what_is_sent_ahead_without_end_is_not_read_without_end(caller: socket.socket, echo: Echo, server: Server) -> None:
    caller.sendall(post("/later", b""))
    caller.settimeout(0.5)
    with pytest.raises(TimeoutError):
        caller.sendall(post("/x", b"y" * LIMIT) * 200_000)
    [connection] = server.connections
    assert len(connection._waiting) < 1000
    echo.release()


def test_answers_that_nobody_reads_stop_the_reading(caller: socket.socket) -> None:
    caller.settimeout(0.5)
    with pytest.raises(TimeoutError):
        caller.sendall(post("/x", b"y" * LIMIT) * 200_000)
    caller.settimeout(5)
    assert paths(answers(caller, 50)) == ["/x"] * 50


def test_a_chunked_body_is_put_together_and_limited(caller: socket.socket) -> None:
    head = b"POST /c HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    caller.sendall(head + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    assert json.loads(answers(caller, 1)[0][2])["body"] == "abcde"
    caller.sendall(head + (b"%x\r\n" % 600 + b"z" * 600 + b"\r\n") * 3)
    [(status, headers, body)] = answers(caller, 1)
    assert (status, json.loads(body)["body"], headers["connection"]) == (413, None, "close")
    assert closed(caller)


def test_a_body_that_is_announced_too_large_is_refused_at_once_and_the_answer_can_be_read(server: Server) -> None:
    body = b"z" * 5_000_000
    answer = httpx.post(f"http://127.0.0.1:{server.port}/big", content=body)  # type: ignore[attr-defined]
    assert answer.status_code == 413
    with connect(server) as caller:
        caller.sendall(post("/big", b"")[:-4].replace(b"content-length: 0", b"content-length: 1001") + b"\r\n\r\n")
        assert answers(caller, 1)[0][0] == 413


def test_a_caller_that_waits_to_be_asked_for_its_body_is(caller: socket.socket) -> None:
    caller.sendall(b"POST /e HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
    assert caller.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    caller.sendall(b"ok")
    assert json.loads(answers(caller, 1)[0][2])["body"] == "ok"


@pytest.mark.parametrize(
    ("version", "headers", "kept"),
    [("1.0", [], None), ("1.0", ["connection: keep-alive"], "keep-alive"), ("1.1", [], ""), ("1.1", ["connection: close"], None)],
)
def test_connections_are_kept_as_asked(caller: socket.socket, version: str, headers: list[str], kept: str | None) -> None:
    caller.sendall(post("/k", b"", *headers, version=version))
    [(status, said, _)] = answers(caller, 1)
    assert (status, said.get("connection", "")) == (200, "close" if kept is None else kept)
    if kept is None:
        assert closed(caller)
    else:
        caller.sendall(post("/again", b"", *headers, version=version))
        assert paths(answers(caller, 1)) == ["/again"]


def test_head_gets_no_body(caller: socket.socket) -> None:
    caller.sendall(b"HEAD /h HTTP/1.1\r\nhost: x\r\n\r\n" + post("/next", b""))
    said = caller.recv(4096)
    while b"/next" not in said:
        said += caller.recv(4096)
    assert said.count(b"HTTP/1.1 200 OK") == 2
    assert b"HEAD" not in said


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_another_protocol_that_is_offered_is_not_taken_up(caller: socket.socket, protocol: str) -> None:
    offer = (f"upgrade: {protocol}", "connection: upgrade, http2-settings", "http2-settings: AAMAAABkAAQ")
    for path in ("/u1", "/u2"):
        caller.sendall(post(path, b"body", *offer))
        [(status, _, body)] = answers(caller, 1)
        assert (status, json.loads(body)["path"], json.loads(body)["body"]) == (200, path, "body")
    caller.sendall(post("/u3", b"", *offer) + post("/plain", b"x"))
    assert paths(answers(caller, 2)) == ["/u3", "/plain"]


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nhost : x\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_or_could_be_read_two_ways_is_refused(caller: socket.socket, echo: Echo, nonsense: bytes) -> None:
    caller.sendall(post("/later", b"") + nonsense)
    echo.release()
    (_, (status, _, body)) = answers(caller, 2)
    assert (status, "not an HTTP/1.1 request" in json.loads(body)["error"]) == (400, True)
    assert closed(caller)


@pytest.mark.parametrize(
    "head", [b"GET /" + b"a" * 200_000, b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 30_000]
)
def test_a_head_without_end_is_refused(caller: socket.socket, head: bytes) -> None:
    try:
        caller.sendall(head)
        caller.sendall(head)
    except OSError:
        pass  # it has hung up
    assert answers(caller, 1)[0][0] == 431


def test_a_request_that_does_not_end_is_given_up_and_one_that_is_whole_is_not(server: Server, echo: Echo) -> None:
    with connect(server) as slow, connect(server) as patient, connect(server) as idle:
        slow.sendall(b"POST /s HTTP/1.1\r\nhos")
        patient.sendall(post("/later", b""))
        time.sleep(0.2)
        server.give_up_bodies(0.1)
        assert answers(slow, 1)[0][0] == 408
        assert closed(slow)
        echo.release()
        assert answers(patient, 1)[0][0] == 200
        idle.sendall(post("/i", b""))
        assert answers(idle, 1)[0][0] == 200


def test_callers_beyond_the_limit_take_the_place_of_unused_ones_or_are_told(
    server: Server, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "MAXIMUM_CONNECTIONS", 2)
    with connect(server) as oldest, connect(server) as newer:
        for caller in (oldest, newer):
            caller.sendall(post("/1", b""))
            assert answers(caller, 1)[0][0] == 200
        with connect(server) as third:
            third.sendall(post("/later", b""))
            assert closed(oldest)
            newer.sendall(post("/later", b""))
            while len(echo.later) < 2:
                time.sleep(0.005)
            with connect(server) as fourth:
                [(status, _, body)] = answers(fourth, 1)
                assert (status, "2 connections already" in json.loads(body)["error"]) == (503, True)
            echo.release(2)
            assert [answers(c, 1)[0][0] for c in (third, newer)] == [200, 200]


def test_unused_connections_are_closed_in_time(server: Server, echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "IDLE_SECONDS", 0.1)
    with connect(server) as unused, connect(server) as waiting:
        waiting.sendall(post("/later", b""))
        time.sleep(0.2)
        server.give_up_bodies(30)
        assert closed(unused)
        echo.release()
        assert answers(waiting, 1)[0][0] == 200


def test_many_requests_behind_a_slow_one_are_all_answered(caller: socket.socket, echo: Echo) -> None:
    caller.sendall(post("/later", b"") + post("/x", b"") * 3000)
    echo.release()
    assert paths(answers(caller, 3001))[1:] == ["/x"] * 3000
    caller.sendall(post("/after", b""))
    assert paths(answers(caller, 1)) == ["/after"]


def test_a_second_answer_to_a_request_is_dropped(caller: socket.socket, echo: Echo) -> None:
    caller.sendall(post("/later1", b"") + post("/later2", b"") + post("/3", b""))
    while not echo.later:
        time.sleep(0.005)
    first = echo.later[0]
    echo.release()
    echo.answer(first)
    echo.release()
    assert paths(answers(caller, 3)) == ["/later1", "/later2", "/3"]


def test_answers_of_other_threads_that_nobody_reads_do_not_pile_up(caller: socket.socket, server: Server, echo: Echo) -> None:
    content = b"z" * 200_000
    caller.sendall(post("/later", b"") * 200)
    for _ in range(200):
        deadline = time.monotonic() + 0.3
        while not echo.later and time.monotonic() < deadline:
            time.sleep(0.002)
        if not echo.later:
            break
        echo.later.pop(0).answer(200, [], content)
    [connection] = server.connections
    assert connection._transport.get_write_buffer_size() < 2_000_000
    server.give_up_bodies(0)
    deadline = time.monotonic() + 5
    while server.connections and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.connections, "who does not read is cut"


def test_a_body_that_was_broken_off_is_freed_at_once(server: Server) -> None:
    held = []
    for _ in range(3):
        with connect(server) as caller:
            caller.sendall(post("/b", b"z" * LIMIT)[:-1])
            while not (found := list(server.connections)) or not found[0]._body:
                time.sleep(0.005)
            held += found
        while server.connections:
            time.sleep(0.005)
    assert not any(c._body for c in held)
    assert not any(hasattr(c, "_parser") for c in held)


def test_what_follows_a_closing_request_is_not_looked_at(caller: socket.socket) -> None:
    caller.sendall(post("/last", b"", "connection: close") + b"\x00 no request at all \r\n\r\n")
    assert paths(answers(caller, 1)) == ["/last"]
    assert closed(caller)


def test_trailers_change_no_header_and_have_an_end(caller: socket.socket) -> None:
    head = b"POST /c HTTP/1.1\r\nhost: x\r\nx-told: head\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n"
    caller.sendall(head + b"x-told: trailer\r\n\r\n")
    assert json.loads(answers(caller, 1)[0][2])["told"] == "head"
    caller.sendall(head)
    time.sleep(0.1)
    caller.sendall(b"x: " + b"a" * 100_000)
    assert answers(caller, 1)[0][0] == 431


def test_many_requests_in_one_read_are_not_taken_for_a_long_head(caller: socket.socket) -> None:
    whole = post("/p", b"y" * 900) * 90
    caller.sendall(whole + post("/last", b"")[:20])
    assert paths(answers(caller, 90)) == ["/p"] * 90
    caller.sendall(post("/last", b"")[20:])
    assert paths(answers(caller, 1)) == ["/last"]


def test_who_has_said_all_still_gets_answers(caller: socket.socket, echo: Echo) -> None:
    caller.sendall(post("/later", b"") + post("/2", b""))
    caller.shutdown(socket.SHUT_WR)
    time.sleep(0.1)
    echo.release()
    assert paths(answers(caller, 2)) == ["/later", "/2"]
    assert closed(caller)


def test_a_body_waits_to_be_asked_for_until_the_answers_before_it_are_sent(caller: socket.socket, echo: Echo) -> None:
    caller.sendall(post("/later", b"") + b"POST /e HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
    echo.release()
    assert paths(answers(caller, 1)) == ["/later"]
    assert caller.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    caller.sendall(b"ok")
    assert paths(answers(caller, 1)) == ["/e"]


def test_an_offer_that_is_not_taken_up_keeps_what_else_was_asked(caller: socket.socket) -> None:
    offer = ("upgrade: h2c", "connection: close, upgrade")
    caller.sendall(post("/u", b"body", *offer))
    assert answers(caller, 1)[0][1]["connection"] == "close"
    assert closed(caller)


def test_a_caller_that_went_away_is_forgotten(server: Server, echo: Echo) -> None:
    with connect(server) as caller:
        caller.sendall(post("/later", b""))
        while not echo.later:
            time.sleep(0.005)
    echo.release()
    assert httpx.get(f"http://127.0.0.1:{server.port}/").status_code == 200  # type: ignore[attr-defined]
    assert all(c.idle for c in server.connections)


def test_stopping_answers_what_is_in_flight_and_cuts_what_never_ends(server: Server, echo: Echo) -> None:
    with connect(server) as idle, connect(server) as due, connect(server) as half:
        due.sendall(post("/later", b"") + post("/lost", b""))
        half.sendall(post("/half", b"abc")[:-1])
        time.sleep(0.1)
        server.stop()
        assert closed(idle)
        half.sendall(b"c")
        threading.Timer(0.1, echo.release).start()
        for caller in (due, half):
            [(status, headers, _)] = answers(caller, 1)
            assert (status, headers["connection"]) == (200, "close")
        with pytest.raises(ConnectionRefusedError):
            connect(server)
    assert server.wait(5)


def test_a_caller_that_never_ends_is_cut_after_the_grace_time(server: Server) -> None:
    with connect(server) as caller:
        caller.sendall(post("/half", b"abc")[:-1])
        time.sleep(0.1)
        server.stop()
        assert not server.wait(0.2)
        assert closed(caller)
