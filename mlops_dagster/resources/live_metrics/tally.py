"""What was counted of one rollout's answers, in SQLite: each request once, whoever looks, however often, wherever one was killed.

Answers are counted by windows of time that follow each other. A window is counted in one transaction that also moves the end of
what was counted (`until`), and only by who still finds it where the window begins; of two processes at once, one does nothing.

Labels land by the thousand. A test that looks at each tick learns the champion's rate from the ticks before, so a batch in one
tick would teach it nothing: what a batch says is shown over SPREAD looks, in an order (a hash) that knows nothing of outcomes.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlops_dagster.core.answers import Agreement
from mlops_dagster.core.errors import StorageError

SPREAD = 16
LOCK_SECONDS = 2.0  # a tick asks some four times, and what the gateway counted is judged only after that

_SCHEMA = """
CREATE TABLE IF NOT EXISTS note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unit (key BLOB PRIMARY KEY, arm TEXT NOT NULL, request_id TEXT NOT NULL, strayed INTEGER NOT NULL,
outcome INTEGER, due INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Unit:
    """The first request of a sticky key: the arm that it reached, whether that was the wrong one, and its outcome (None: open)."""

    key: str
    arm: str
    request_id: str
    strayed: bool
    outcome: int | None = None


class Tally:
    """The counts of one rollout in one file. Methods raise StorageError when it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def until(self) -> datetime | None:
        """The end of what was counted; None before the first window."""
        at = self._note("until")
        return None if at is None else datetime.fromisoformat(at)

    def agreement(self) -> Agreement:
        """The rows of the shadow compared so far."""
        return Agreement(**(self._note("agreement") or {}))

    def units(self) -> dict[str, dict[str, int]]:
        """`units`, `misassigned`, `trials` and `successes` by arm."""
        shown = "FILTER (WHERE outcome IS NOT NULL AND due <= :look)"
        query = f"SELECT arm, COUNT(*), SUM(strayed), COUNT(*) {shown}, COALESCE(SUM(outcome) {shown}, 0) FROM unit GROUP BY arm"
        with self._open() as db:
            rows = db.execute(query, {"look": _read(db, "look") or 0}).fetchall()
        return {arm: dict(zip(("units", "misassigned", "trials", "successes"), counts, strict=True)) for arm, *counts in rows}

    def open_requests(self) -> list[str]:
        """The ids of the requests whose outcome is not known yet."""
        with self._open() as db:
            return [identity for (identity,) in db.execute("SELECT request_id FROM unit WHERE outcome IS NULL")]

    def labels(self, everything: bool = False) -> dict[str, tuple[int, int]]:
        """(labelled, wrong) by `<day>/<version>/<part of SPREAD>`, as far as they are shown yet."""
        look = self._note("look") or 0
        kept = (self._note("labels") or {}).items()
        return {name: (labelled, wrong) for name, (labelled, wrong, due) in kept if everything or due <= look}

    def look(self) -> None:
        """Show one more part of what landed together."""
        if self.path.exists():
            with self._open() as db, db:
                db.execute("BEGIN IMMEDIATE")
                look = _read(db, "look") or 0
                if look < (_read(db, "last_due") or 0):
                    _write(db, "look", look + 1)

    def seen(self) -> dict[str, str]:
        """Which labels were counted, as a digest by day."""
        return self._note("seen") or {}

    def count_agreement(self, after: datetime | None, until: datetime, more: Agreement) -> bool:
        """Add a window's rows; False when somebody else has counted it."""
        with self._window(after, until) as db:
            if db is not None:
                raw = _read(db, "agreement") or {}
                _write(db, "agreement", asdict(Agreement(**raw) + more))
            return db is not None

    def count_units(self, after: datetime | None, until: datetime, units: Iterable[Unit]) -> bool:
        """Add the keys of a window that are new; False when somebody else has counted it. Of a key only a hash is kept."""
        rows = [(_hashed(unit.key), unit.arm, unit.request_id, int(unit.strayed), unit.outcome) for unit in units]
        with self._window(after, until) as db:
            if db is not None:
                columns = "(key, arm, request_id, strayed, outcome)"
                db.executemany(f"INSERT OR IGNORE INTO unit {columns} VALUES (?, ?, ?, ?, ?)", rows)
            return db is not None

    def labels_looked_at(self) -> datetime | None:
        """When labels were looked for last."""
        at = self._note("labels_at")
        return None if at is None else datetime.fromisoformat(at)

    def labels_looked(self, now: datetime) -> None:
        """Note that labels are looked for at `now`."""
        with self._open() as db:
            _write(db, "labels_at", now.isoformat())

    def labels_problem(self) -> str | None:
        """What was wrong with labels when they were looked for last."""
        return self._note("labels_problem")

    def count_labels(
        self,
        now: datetime,
        seen: Mapping[str, str],
        labels: Mapping[str, tuple[int, int]],
        outcomes: Mapping[str, int | None],
        problem: str | None = None,
    ) -> None:
        """Keep what labels say at `now`: the new state of `labels`, the outcomes of requests that were open, and what is wrong."""
        known = [(outcome, identity) for identity, outcome in outcomes.items() if outcome is not None]
        with self._open() as db, db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("CREATE TEMP TABLE IF NOT EXISTS landed (request_id TEXT PRIMARY KEY, outcome INTEGER) WITHOUT ROWID")
            db.executemany("INSERT OR REPLACE INTO landed (outcome, request_id) VALUES (?, ?)", known)
            look = _read(db, "look") or 0
            db.create_function("part", 1, lambda key: key[0] % SPREAD, deterministic=True)
            db.execute(
                "UPDATE unit SET outcome = landed.outcome, due = ? + part(key) FROM landed"
                " WHERE unit.outcome IS NULL AND unit.request_id = landed.request_id",
                (look,),
            )
            before = _read(db, "labels") or {}
            due = {name: before[name][2] if name in before else look + int(name.rpartition("/")[2]) for name in labels}
            _write(db, "labels", {name: [*counts, due[name]] for name, counts in labels.items()})
            if seen:
                _write(db, "last_due", look + SPREAD)
            _write(db, "labels_at", now.isoformat())
            _write(db, "labels_problem", problem)
            _write(db, "seen", {**(_read(db, "seen") or {}), **seen})

    def first(self, name: str, value: Any) -> Any:
        """What was said under this name when it was first said, which may be now."""
        with self._open() as db:
            if _read(db, name) is None:
                db.execute("INSERT OR IGNORE INTO note VALUES (?, ?)", (name, json.dumps(value)))
            return _read(db, name)

    @contextmanager
    def _window(self, after: datetime | None, until: datetime) -> Iterator[sqlite3.Connection | None]:
        """A transaction that counts what lies between, or None when what was counted does not end at `after`."""
        with self._open() as db, db:
            db.execute("BEGIN IMMEDIATE")
            if _read(db, "until") != (after and after.astimezone(UTC).isoformat()):
                yield None
                return
            _write(db, "until", until.astimezone(UTC).isoformat())
            yield db

    def _note(self, name: str) -> Any:
        if not self.path.exists():
            return None
        with self._open() as db:
            return _read(db, name)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=LOCK_SECONDS, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(_SCHEMA)
                yield db
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"the tally {self.path.name} cannot be used ({error}). Check the disk's space.") from error


def _read(db: sqlite3.Connection, name: str) -> Any:
    row = db.execute("SELECT value FROM note WHERE name = ?", (name,)).fetchone()
    return None if row is None else json.loads(row[0])


def _write(db: sqlite3.Connection, name: str, value: Any) -> None:
    db.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (name, json.dumps(value)))


def _hashed(key: str) -> bytes:
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest()
