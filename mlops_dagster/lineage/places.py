"""What a trace reads, opened without the libraries that write it: a trace is to answer within a second, imports included.

An embedded state folder is read as plain files and by Python's own sqlite3; any other profile through its resources.
"""

import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlops_dagster.core.errors import NotFoundError, StorageError
from mlops_dagster.core.ledger import Entry
from mlops_dagster.resources.data_lake import Lake, checked_key
from mlops_dagster.resources.data_lake.stamps import folder_stamps

_COLUMNS = "sequence, kind, model, subject, actor, time, reason, evidence, key, previous, hash"
_SQLITE = "sqlite:///"


class ReadableLake(Protocol):
    """What tracing asks of a lake; every Lake has it."""

    def locate(self, key: str) -> str: ...

    def read_bytes(self, key: str) -> bytes: ...

    def stamps(self, prefix: str) -> dict[str, str]: ...


@dataclass(frozen=True)
class Places:
    """Where the answers to a trace lie. `entries(model)`: its ledger entries in order; `models()`: every model that has data;
    `writable()`: the lake with its writing methods, opened when an index has to be made."""

    lake: ReadableLake
    writable: Callable[[], Lake]
    segments: Path
    entries: Callable[[str], Sequence[Entry]]
    models: Callable[[], list[str]]

    @classmethod
    def embedded(cls, root: Path, ledger_url: str | None, writable: Callable[[], Lake]) -> "Places":
        """Of a state folder of the embedded profile. Raises NotFoundError where there is no such folder."""
        if not root.is_dir():
            raise NotFoundError(f"there is no state folder {root}; set MLOPS_HOME to the one that the models were run with")
        url = ledger_url or f"{_SQLITE}{root / 'ledger.db'}"
        return cls(FolderFiles(root / "lake"), writable, root / "serving" / "inference_log", _reader(url), _names(root / "lake"))

    @classmethod
    def of(cls, resources: Mapping[str, Any]) -> "Places":
        """Of any profile's resources."""
        lake: Lake = resources["data_lake"]

        def models() -> list[str]:
            return sorted({key.split("/")[0] for key in lake.list() if "/" in key})

        return cls(lake, lambda: lake, Path(resources["inference_segments"].root), resources["ledger"].entries, models)


@dataclass(frozen=True)
class FolderFiles:
    """A ReadableLake of a FolderLake's files."""

    root: Path

    def locate(self, key: str) -> str:
        return str(self.root / checked_key(key))

    def read_bytes(self, key: str) -> bytes:
        try:
            return Path(self.locate(key)).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"lake key {key!r}: does not exist. Materialize that partition first.") from None

    def stamps(self, prefix: str) -> dict[str, str]:
        return folder_stamps(self.root, prefix)


def _names(lake: Path) -> Callable[[], list[str]]:
    return lambda: sorted(e.name for e in os.scandir(lake) if e.is_dir() and not e.name.startswith(".")) if lake.is_dir() else []


def _reader(url: str) -> Callable[[str], Sequence[Entry]]:
    """Reads a model's entries: from SQLite by Python itself (SQLAlchemy takes 0.4 s to import), from anything else by the ledger."""

    def entries(model: str) -> Sequence[Entry]:
        if not url.startswith(_SQLITE):
            from mlops_dagster.resources.ledger.sql import SqlLedger

            return SqlLedger(url).entries(model)
        file = Path(url.removeprefix(_SQLITE))
        if not file.is_file():
            return []
        try:
            with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30)) as connection:
                query = f"SELECT {_COLUMNS} FROM ledger_entries WHERE model = ? ORDER BY sequence"
                return [Entry(*row) for row in connection.execute(query, (model,))]
        except sqlite3.Error as error:
            raise StorageError(f"the ledger {file} cannot be read ({error}); see that it is whole and readable") from error

    return entries
