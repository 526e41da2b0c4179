"""Real Redis and PostgreSQL servers on free loopback ports, as Feast's `online_store` section."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def eventually(ready: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not become ready in {seconds} s"
        time.sleep(0.05)


def answers(port: int) -> bool:
    with suppress(OSError), closing(socket.create_connection(("127.0.0.1", port), timeout=1)):
        return True
    return False


@contextmanager
def redis_server(folder: Path, port: int | None = None) -> Iterator[dict[str, Any]]:
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (Debian: redis-server)")
    port = port or free_port()
    command = [
        "redis-server",
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(folder),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: answers(port), "redis-server")
        yield {"type": "redis", "connection_string": f"127.0.0.1:{port}"}
    finally:
        server.terminate()
        server.wait(10)


@contextmanager
def postgres_server() -> Iterator[dict[str, Any]]:
    if not POSTGRES:
        pytest.skip("needs PostgreSQL (Debian: postgresql-15)")
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:  # pytest's own folders are closed to other users
        user = "postgres" if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
        if user:
            shutil.chown(folder, user)
        yield from _postgres(Path(folder), user)


def _postgres(folder: Path, user: str | None) -> Iterator[dict[str, Any]]:
    programs, data, port = POSTGRES[-1], folder / "data", free_port()
    subprocess.run(
        [programs / "initdb", "-A", "trust", "-U", "feast", "--no-sync", "-D", data],
        check=True,
        stdout=subprocess.DEVNULL,
        user=user,
        cwd=folder,
    )
    options = [
        "-c",
        f"port={port}",
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        f"unix_socket_directories={folder}",
        "-c",
        "fsync=off",
    ]
    log = (folder / "log").open("wb")
    server = subprocess.Popen([programs / "postgres", "-D", data, *options], stdout=log, stderr=log, user=user, cwd=folder)
    try:
        eventually(lambda: answers(port) and "ready to accept" in (folder / "log").read_text(), "postgres")
        yield {
            "type": "postgres",
            "host": "127.0.0.1",
            "port": port,
            "database": "postgres",
            "user": "feast",
            "password": "",
            "sslmode": "disable",
        }
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(10)
        log.close()
