"""One way to reach MLflow for tracking and registry: its errors become ours, and a new database is made by one process alone."""

from __future__ import annotations

import os
import sqlite3
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.addresses import masked, masked_in
from mlops_dagster.core.errors import DeclarationError, MlopsError, NotFoundError, StorageError, TerminalError, TransientError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
LOCK_TIMEOUT_SECONDS = 120.0
# MLflow's own default is seven retries with doubling waits: minutes until a wrong address is reported.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_AWAY = {
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "INTERNAL_ERROR",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "ABORTED",
}
_MISSING = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "ENDPOINT_NOT_FOUND"}
_opened: set[tuple[int, str]] = set()


def database_file(tracking_uri: str) -> Path | None:
    """The SQLite file of a `sqlite:///` address; None for every other address."""
    return Path(tracking_uri[len(SQLITE) :]).expanduser().absolute() if tracking_uri.startswith(SQLITE) else None


def checked_uri(tracking_uri: str) -> str:
    """The address with its SQLite path made absolute; DeclarationError for a scheme that has no contract test."""
    file = database_file(tracking_uri)
    if file is not None:
        return f"{SQLITE}{file}"
    if tracking_uri.startswith(("http://", "https://", "postgresql://", "postgresql+")):
        return tracking_uri
    raise DeclarationError(
        f"tracking_uri: {masked(tracking_uri)!r} is not an address this backend knows; use sqlite:///FILE, http(s)://HOST:PORT or postgresql://…"
    )


@contextmanager
def exclusive(tracking_uri: str, timeout_seconds: float = LOCK_TIMEOUT_SECONDS) -> Iterator[None]:
    """Hold the embedded store's lock file, so that find-then-create is one step; servers order their own writes."""
    file = database_file(tracking_uri)
    if file is None:
        with nullcontext():
            yield
        return
    from filelock import FileLock, Timeout

    with translated(tracking_uri):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_suffix(".lock"), timeout=timeout_seconds)
        try:
            lock.acquire()
        except Timeout:
            raise TransientError(f"{lock.lock_file}: another process has held it for {timeout_seconds:g} s; try again") from None
    try:
        yield
    finally:
        lock.release()


def connect(tracking_uri: str) -> MlflowClient:
    """A client for the address; makes the tables of a new SQLite file first (seconds, once, under the lock)."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    uri = checked_uri(tracking_uri)
    with translated(uri):
        from mlflow import MlflowClient

        if database_file(uri) is None or (os.getpid(), uri) in _opened:
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
        with exclusive(uri):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
            client.search_registered_models(max_results=1)
        _opened.add((os.getpid(), uri))
        return client


def require_answer(tracking_uri: str) -> None:
    """Raises TransientError or TerminalError where the address does not answer as an MLflow server or database."""
    client = connect(tracking_uri)
    with translated(tracking_uri):
        client.search_experiments(max_results=1)


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn MLflow's, SQLite's and the disk's exceptions into this package's, with the address, less its password, in the message."""
    try:
        yield
    except MlopsError:
        raise
    except Exception as error:
        ours = _ours(error, where)
        if ours is None:
            raise
        raise ours from cause(error, where)


def cause(error: Exception, *addresses: str) -> Exception | None:
    """The error as the cause of another; None where an address has a password, or one is shown by it or what it came from."""
    shown = "".join(traceback.format_exception(error))
    secret = any(masked(address) != address for address in addresses) or masked_in(shown) != shown
    return None if secret else error


def _ours(raised: Exception, address: str) -> MlopsError | None:
    kind, where, error = type(raised).__module__.partition(".")[0], masked(address), masked_in(str(raised), address)
    if isinstance(raised, (OSError, sqlite3.Error)):  # the HTTP client's errors are of OSError's kind
        return StorageError(
            f"{where}: {error}; check that its server answers, or that its disk is mounted, writable and not full"
        )
    if kind == "sqlalchemy":
        return StorageError(f"{where}: {error}; check that the database is reachable, writable and its disk not full")
    if kind != "mlflow":
        return None
    code: Any = getattr(raised, "error_code", "INTERNAL_ERROR")
    if code in _MISSING:
        return NotFoundError(f"{where}: {error}")
    if code in _AWAY:
        return TransientError(f"{where}: MLflow could not do it now ({error}); try again, or start the server")
    return TerminalError(f"{where}: MLflow refused ({code}): {error}")
