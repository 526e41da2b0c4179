"""The counters of every arm over time, in SQLite: one row an arm and second at first, one a minute when they are older.

Servers, and Envoy, begin at zero when they restart, and a cluster's counters vanish with it. So what is kept are sums of
increases: each raw series (one Envoy cluster) is compared with its own last reading.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from mlops_dagster.core.errors import StorageError
from mlops_dagster.core.measurements import Counters

FINE_SECONDS = 2 * 3600
KEPT_SECONDS = 60 * 86_400
THIN_EVERY_SECONDS = 600

_SCHEMA = """
CREATE TABLE IF NOT EXISTS series (name TEXT PRIMARY KEY, counts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS total (model TEXT, arm TEXT, at REAL, counts TEXT NOT NULL, PRIMARY KEY (model, arm, at)) WITHOUT
ROWID;
CREATE INDEX IF NOT EXISTS total_at ON total (at);
"""


@dataclass(frozen=True)
class Raw:
    """One series as it stands: `name` is what it is compared with later."""

    name: str
    model: str
    arm: str
    counts: Counters


class Samples:
    """The samples in one file; one process adds, any number read. Methods raise StorageError when the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thinned = 0.0

    def add(self, now: float, readings: Iterable[Raw]) -> None:
        """Count what each series grew by since it was last read, and keep each arm's new total under `now` (seconds since
        1970).
        """
        try:
            with closing(self._open()) as db, db:
                grown = _grown(db, list(readings))
                for (model, arm), increase in grown.items():
                    _add_total(db, model, arm, now, increase)
                if now - self._thinned > THIN_EVERY_SECONDS:
                    _thin(db, now)
                    self._thinned = now
        except sqlite3.Error as error:
            raise StorageError(
                f"the metrics file {self.path.name} cannot be written ({error}). Check the disk's space."
            ) from error

    def latest(self, model: str) -> dict[str, tuple[datetime, Counters]]:
        """Each arm's last total, and when it was taken."""
        return self._one_per_arm("SELECT arm, MAX(at), counts FROM total WHERE model = ? GROUP BY arm", (model,))

    def first_since(self, model: str, since: datetime) -> dict[str, tuple[datetime, Counters]]:
        """Each arm's first total at or after `since`."""
        query = "SELECT arm, MIN(at), counts FROM total WHERE model = ? AND at >= ? GROUP BY arm"
        return self._one_per_arm(query, (model, since.timestamp()))

    def _one_per_arm(self, query: str, values: tuple[object, ...]) -> dict[str, tuple[datetime, Counters]]:
        if not self.path.exists():
            return {}
        try:
            with closing(self._open()) as db:
                rows = db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"the metrics file {self.path.name} cannot be read ({error}).") from error
        return {arm: (datetime.fromtimestamp(at, UTC), _load(counts)) for arm, at, counts in rows}

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=5)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(_SCHEMA)
        return db


def _grown(db: sqlite3.Connection, readings: list[Raw]) -> dict[tuple[str, str], Counters]:
    """What each arm's series grew by together; also forgets series that are gone, for they begin at zero when they come back."""
    before = {name: _load(counts) for name, counts in db.execute("SELECT name, counts FROM series")}
    grown: dict[tuple[str, str], Counters] = {}
    for raw in readings:
        increase = raw.counts.since(before.pop(raw.name, Counters()))
        grown[raw.model, raw.arm] = _plus(grown.get((raw.model, raw.arm), Counters()), increase)
        db.execute("INSERT OR REPLACE INTO series VALUES (?, ?)", (raw.name, _dump(raw.counts)))
    db.executemany("DELETE FROM series WHERE name = ?", [(name,) for name in before])
    return grown


def _add_total(db: sqlite3.Connection, model: str, arm: str, now: float, increase: Counters) -> None:
    """A new sample; while nothing happens the last one only gets a later time, so that an idle arm takes no room."""
    query = "SELECT at, counts FROM total WHERE model = ? AND arm = ? ORDER BY at DESC LIMIT 2"
    rows = db.execute(query, (model, arm)).fetchall()
    total = _dump(_plus(_load(rows[0][1]) if rows else Counters(), increase))
    if len(rows) == 2 and rows[0][1] == rows[1][1] == total:
        db.execute("UPDATE OR REPLACE total SET at = ? WHERE model = ? AND arm = ? AND at = ?", (now, model, arm, rows[0][0]))
    else:
        db.execute("INSERT OR REPLACE INTO total VALUES (?, ?, ?, ?)", (model, arm, now, total))


def _thin(db: sqlite3.Connection, now: float) -> None:
    """Of what is older than FINE_SECONDS keep each minute's last sample; of what is older than KEPT_SECONDS nothing."""
    db.execute("DELETE FROM total WHERE at < ?", (now - KEPT_SECONDS,))
    db.execute(
        "DELETE FROM total WHERE at < ? AND EXISTS (SELECT 1 FROM total AS later WHERE later.model = total.model AND later.arm = total.arm"
        " AND later.at > total.at AND CAST(later.at / 60 AS INTEGER) = CAST(total.at / 60 AS INTEGER))",
        (now - FINE_SECONDS,),
    )


def _plus(one: Counters, other: Counters) -> Counters:
    names = [item.name for item in fields(Counters) if item.name != "latency"]
    counts = {name: getattr(one, name) + getattr(other, name) for name in names}
    if not one.latency or not other.latency:
        return Counters(latency=one.latency or other.latency, **counts)
    return Counters(latency=tuple(a + b for a, b in zip(one.latency, other.latency, strict=True)), **counts)


def _dump(counts: Counters) -> str:
    return json.dumps(counts.to_json(), separators=(",", ":"))


def _load(text: str) -> Counters:
    return Counters.from_json(json.loads(text))


def difference(
    now: Mapping[str, tuple[datetime, Counters]], then: Mapping[str, tuple[datetime, Counters]]
) -> dict[str, Counters]:
    """What each arm counted between two sets of totals."""
    return {arm: counts.since(then[arm][1]) for arm, (_, counts) in now.items() if arm in then}
