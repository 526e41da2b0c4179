"""What a predictor holds and waits for is bounded, and no caller keeps the others out."""

import json
import socket
import threading
import time

import pytest
from http_callers import LIMIT, Echo, answers, closed, connect, post

from mlops_dagster.serving import http_connection, http_server
from mlops_dagster.serving.http_server import Server


def test_callers_beyond_the_limit_take_the_place_of_unused_ones_or_are_told(server: Server, echo: Echo) -> None:
    server.maximum_connections = 2
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


def test_a_caller_that_sends_far_ahead_takes_turns_with_the_others(server: Server) -> None:
    """Each of its reads holds thousands of requests."""
    ended = threading.Event()

    def flood() -> None:
        with connect(server) as greedy:
            reader = threading.Thread(target=lambda: all(greedy.recv(1 << 20) for _ in iter(ended.is_set, True)))
            reader.start()
            while not ended.is_set():
                greedy.sendall(post("/x", b"") * 2000)
            greedy.shutdown(socket.SHUT_WR)
            reader.join()

    server.handle = slowly(server.handle, 0.001)
    flooding = threading.Thread(target=flood)
    flooding.start()
    time.sleep(0.5)
    waits = []
    try:
        with connect(server) as other:
            for _ in range(5):
                begun = time.monotonic()
                other.sendall(post("/o", b""))
                assert answers(other, 1)[0][0] == 200
                waits.append(time.monotonic() - begun)
    finally:
        server.handle = lambda request: request.answer(200, [], b"")
        ended.set()
        flooding.join()
    assert sorted(waits)[2] < 0.5, "16 requests of a millisecond come between, not 2,000"


def slowly(handle: http_connection.Handler, seconds: float) -> http_connection.Handler:
    def handler(request: http_connection.Request) -> None:
        time.sleep(seconds)
        handle(request)

    return handler


def test_a_caller_that_never_reads_is_cut_when_its_place_is_needed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "LINGER_SECONDS", 0.05)
    server.maximum_connections = 2
    server.handle = lambda request: request.answer(200, [], b"z" * 4_000_000 if request.path == "/big" else b"")
    unread = [connect(server) for _ in range(2)]
    for caller in unread:
        caller.sendall(post("/big", b"", "connection: close"))
    deadline = time.monotonic() + 5
    while not all(c.idle and c._ended for c in server.connections) and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(5):
        with connect(server) as newer:
            newer.sendall(post("/n", b""))
            assert answers(newer, 1)[0][0] == 200
        assert len(server.connections) <= 3
    for caller in unread:
        caller.close()


def test_what_is_closed_but_not_read_ends_all_the_same(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "LINGER_SECONDS", 0.05)
    monkeypatch.setattr(http_connection, "CLOSE_SECONDS", 0.2)
    server.handle = lambda request: request.answer(200, [], b"z" * 4_000_000)
    with connect(server) as caller:
        caller.sendall(post("/big", b"", "connection: close"))
        deadline = time.monotonic() + 5
        time.sleep(0.05)
        while server.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not server.connections


def test_a_slow_reader_that_goes_on_reading_is_not_cut(server: Server) -> None:
    content = b"z" * 16_000_000
    server.handle = lambda request: request.answer(200, [], content)
    with connect(server) as caller:
        caller.sendall(post("/big", b""))
        got = 0
        while got < len(content):
            time.sleep(0.03)
            for _ in range(4):
                part = caller.recv(65536) if got < len(content) else b""
                assert part or got >= len(content), f"cut after {got} bytes"
                got += len(part)
            server.give_up_bodies(0.5)


def test_unfinished_bodies_are_bounded_together(server: Server) -> None:
    server.maximum_unfinished_bytes = 600
    part = b"z" * 300
    with connect(server) as first, connect(server) as second, connect(server) as third:
        for caller in (first, second):
            caller.sendall(post("/b", b"z" * LIMIT)[: -LIMIT + 300])
            time.sleep(0.05)
            caller.sendall(part)
            time.sleep(0.05)
        assert server.unfinished_bytes == 600
        third.sendall(post("/b", b"z" * LIMIT)[: -LIMIT + 300])
        time.sleep(0.05)
        third.sendall(part)
        [(status, _, body)] = answers(third, 1)
        assert (status, "too many large requests" in json.loads(body)["error"]) == (503, True)
        assert server.unfinished_bytes == 600
        server.maximum_unfinished_bytes = 10 * LIMIT
        for caller in (first, second):
            caller.sendall(b"z" * (LIMIT - 600))
            assert answers(caller, 1)[0][0] == 200
    assert server.unfinished_bytes == 0


def test_while_it_drains_each_answer_ends_its_connection(server: Server) -> None:
    with connect(server) as caller:
        caller.sendall(post("/1", b""))
        assert answers(caller, 1)[0][1].get("connection") is None
        server.drain()
        caller.sendall(post("/2", b""))
        assert answers(caller, 1)[0][1]["connection"] == "close"
        assert closed(caller)
    with connect(server) as late:
        late.sendall(post("/3", b""))
        assert answers(late, 1)[0][0] == 200


def test_as_many_connections_as_the_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(100, 500)]
    monkeypatch.setattr(http_server.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(http_server.resource, "setrlimit", lambda _, wanted: limits.append(wanted))
    assert http_server.most_connections() == 500 - http_server.OTHER_FILES
    assert limits[-1] == (500, 500)
    limits.append((100, 4096))
    assert http_server.most_connections() == http_server.MAXIMUM_CONNECTIONS
    assert limits[-1] == (http_server.MAXIMUM_CONNECTIONS + http_server.OTHER_FILES, 4096)
