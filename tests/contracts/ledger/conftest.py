"""A ledger on each database: SQLite in a temporary folder, and a PostgreSQL server of this test run's own."""

import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mlops_dagster.resources.ledger.sql import SqlLedger

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


def _as_postgres(command: list[str]) -> None:
    # PostgreSQL refuses to run as root.
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    subprocess.run(prefix + command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.URL]:
    """The URL of a fresh server on a free loopback port, stopped at the end."""
    if not BINARIES:
        pytest.skip("PostgreSQL is not installed: apt install postgresql")
    folder = Path("/tmp") / f"ledger-postgres-{uuid.uuid4().hex[:8]}"  # a short path that user postgres may enter
    folder.mkdir()
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    control = [str(BINARIES[-1] / "pg_ctl"), "-D", str(folder / "data"), "-w"]
    try:
        initdb = [str(BINARIES[-1] / "initdb"), "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale", "C.UTF-8"]
        _as_postgres([*initdb, "-D", str(folder / "data")])
        options = (
            f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off -c max_connections=40"
        )
        _as_postgres([*control, "-o", options, "-l", str(folder / "log"), "start"])
        yield sa.URL.create("postgresql+psycopg", "postgres", host="127.0.0.1", port=port, database="postgres")
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            _as_postgres([*control, "-m", "immediate", "stop"])
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'ledger.db'}"
        return
    server: sa.URL = request.getfixturevalue("postgres_server")
    name = f"ledger_{uuid.uuid4().hex[:12]}"
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    admin.dispose()
    yield server.set(database=name).render_as_string()


@pytest.fixture
def ledger(url: str) -> Iterator[SqlLedger]:
    made = SqlLedger(url)
    yield made
    made.close()
