"""HTTP/1.1 as callers, proxies and attackers speak it, to a server whose handler answers at once, later, or from another thread."""

import json
import socket
import threading
import time

import httpx
import pytest
from http_callers import LIMIT, Echo, answers, closed, connect, paths, post

from mlops_dagster.serving.http_server import Server


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


def test_codings_other_than_chunked_are_not_taken_as_plain(caller: socket.socket) -> None:
    caller.sendall(b"POST /g HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    assert answers(caller, 1)[0][0] == 501


def test_a_caller_of_http_1_0_is_not_asked_for_its_body(caller: socket.socket) -> None:
    caller.sendall(b"POST /e HTTP/1.0\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
    time.sleep(0.1)
    caller.sendall(b"ab")
    assert answers(caller, 1)[0][0] == 200
