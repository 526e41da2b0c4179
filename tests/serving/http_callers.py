"""Callers that speak HTTP/1.1 byte by byte, and a handler whose answers tell what it was asked."""

import json
import socket
import time
from typing import Any

from mlops_dagster.serving.http_connection import Request
from mlops_dagster.serving.http_server import Server

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
