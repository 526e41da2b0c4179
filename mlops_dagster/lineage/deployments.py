"""When which version was served, and which ledger entry began it."""

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass

from mlops_dagster.core.ledger import Entry
from mlops_dagster.core.routes import Routes, version_of


@dataclass(frozen=True)
class Spell:
    """A version was among a model's arms from `since` until `until` (None: it still is), begun and ended by ledger entries."""

    version: str
    since: dt.datetime
    until: dt.datetime | None
    began: Entry
    ended: Entry | None = None

    def covers(self, moment: dt.datetime) -> bool:
        """Whether the version was served at a moment."""
        return self.since <= moment and (self.until is None or moment < self.until)


def spells(entries: Iterable[Entry], model: str) -> list[Spell]:
    """Every stretch of time in which a version was served, in the order in which they began."""
    ended: list[Spell] = []
    running: dict[str, Spell] = {}
    for entry in entries:
        if entry.model != model or "routes" not in entry.evidence:
            continue
        raw = entry.evidence["routes"]  # null: nothing serves
        served = {version_of(arm) for arm in Routes.from_json(raw).arms} if raw is not None else set()
        for version in [v for v in running if v not in served]:
            spell = running.pop(version)
            ended.append(Spell(version, spell.since, entry.time, spell.began, entry))
        for version in sorted(served - running.keys()):
            running[version] = Spell(version, entry.time, None, entry)
    return sorted([*ended, *running.values()], key=lambda s: (s.since, s.version))
