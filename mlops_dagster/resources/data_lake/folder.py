"""The lake as a folder on a local or mounted file system."""

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import StorageError
from mlops_dagster.resources.data_lake import StoredFile, checked_key
from mlops_dagster.resources.data_lake.parquet import as_table, from_parquet, joined, stored, to_parquet, unknown
from mlops_dagster.resources.data_lake.stamps import folder_stamps

if TYPE_CHECKING:
    import pyarrow as pa

INCOMING = ".incoming"  # half-written files: one folder, so that what a killed writer left is found in one look
STALE_SECONDS = 3600.0


class FolderLake(ConfigurableResource):
    """A DataLake in a folder: files are written aside, flushed to disk, then renamed into place.

    Of two writers of one key the last to finish wins, whole. Raises StorageError when the disk is full or read-only.
    """

    root: str = Field(description="The lake's folder; made when it is first written to.")

    def write(self, key: str, table: Any) -> StoredFile:
        content = as_table(f"lake key {checked_key(key)!r}", table)
        return self._store(key, to_parquet(content), content.num_rows)

    def write_bytes(self, key: str, content: bytes) -> StoredFile:
        return self._store(checked_key(key), content, 0)

    def read(self, keys: str | Sequence[str], columns: Sequence[str] | None = None) -> "pa.Table":
        wanted = [keys] if isinstance(keys, str) else [*keys]
        if not wanted:
            raise unknown("", self.list()[-3:])
        return joined([self._read(key, columns) for key in wanted])

    def read_bytes(self, key: str) -> bytes:
        with self._reading(key) as path:
            return path.read_bytes()

    def locate(self, key: str) -> str:
        return str(self._path(key))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _storage_errors(path, "delete"), suppress(FileNotFoundError):
            path.unlink()
            _flush_folder(path.parent)

    def _read(self, key: str, columns: Sequence[str] | None) -> "pa.Table":
        with self._reading(key) as path:
            return from_parquet(key, str(path), columns)

    @contextmanager
    def _reading(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        try:
            yield path
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            folder = key.rpartition("/")[0]
            raise unknown(key, self.list(folder + "/" if folder else "")) from None
        except OSError as error:
            raise StorageError(f"lake file {path}: cannot be read ({error}). Check disk and permissions.") from error

    def _path(self, key: str) -> Path:
        return Path(self.root, checked_key(key)).absolute()

    def _store(self, key: str, content: Any, rows: int) -> StoredFile:
        path = self._path(key)
        with _storage_errors(path, "write"):
            if not _holds(path, content):
                self._replace(path, content)
        return stored(key, content, rows)

    def _replace(self, path: Path, content: Any) -> None:
        incoming = Path(self.root, INCOMING)
        incoming.mkdir(parents=True, exist_ok=True)
        _sweep(incoming)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = incoming / uuid.uuid4().hex
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            _flush_folder(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def stamps(self, prefix: str) -> dict[str, str]:
        return folder_stamps(Path(self.root).absolute(), prefix)

    def list(self, prefix: str = "") -> list[str]:  # last in the class: it hides the built-in list from annotations below it
        base, found = Path(self.root).absolute(), []
        start = base / prefix.rpartition("/")[0]
        for folder, folders, files in os.walk(start):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = os.path.relpath(folder, base)
            found += [name if inside == "." else f"{inside}/{name}" for name in files if _is_data(name)]
        return sorted(key for key in found if key.startswith(prefix))


def _is_data(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(".dvc")


def _holds(path: Path, content: Any) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == bytes(content)
    except FileNotFoundError:
        return False


def _sweep(incoming: Path) -> None:
    """Remove what killed writers left; an hour is longer than any write of one partition takes."""
    for entry in os.scandir(incoming):
        with suppress(FileNotFoundError):
            if _newest(incoming) - entry.stat().st_mtime > STALE_SECONDS:
                os.unlink(entry.path)


def _newest(incoming: Path) -> float:
    """The file system's own idea of now, so that a skewed clock of this machine cannot remove a living writer's file."""
    os.utime(incoming)
    return incoming.stat().st_mtime


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _storage_errors(path: Path, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"lake file {path}: cannot {action} it ({error.strerror or error}). Nothing was changed; free disk space or make the "
            f"folder writable, then run it again."
        ) from error
