"""Partitions whose content is not what it was when a training set used it."""

import datetime as dt
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One partition: the hash that was used (None: it was not there yet) and the present one (None: it is gone). `features`: it was used
    by features only; the rows are of the present content."""

    key: str
    used: str | None
    now: str | None
    features: bool = False

    @property
    def day(self) -> dt.date:
        """The partition's day, from the end of its key."""
        return day_of(self.key)

    @property
    def wording(self) -> str:
        """The change in words, with abbreviated hashes."""
        used, now = (hash_ and hash_[:8] for hash_ in (self.used, self.now))
        table, by = self.key.split("/")[-2], " by features" if self.features else ""
        if used is None:
            return f"{self.day} {table}: came later ({now})" + (" than features that look back on it" if self.features else "")
        return f"{self.day} {table}: {used} was used{by}, " + ("it is gone now" if now is None else f"it is {now} now")


def day_of(key: str) -> dt.date:
    """The day of a partition's key, such as `m/raw_data/rows/2024-01-01.parquet`. Raises ValueError for any other key."""
    return dt.date.fromisoformat(key.rpartition("/")[2].partition(".")[0])


def changes(
    used: Mapping[str, str], now: Mapping[str, str], first: dt.date, last: dt.date, without: Collection[dt.date] = ()
) -> list[Change]:
    """Compare the partitions of `first` … `last` as used (key -> hash) with the present ones; the days `without` were left out on purpose.

    `now` may hold other days too. In the order of days, then keys.
    """
    present = {key: hash_ for key, hash_ in now.items() if _is_day(key) and first <= day_of(key) <= last}
    found = [Change(key, used.get(key), present.get(key)) for key in used.keys() | present.keys()]
    return sorted((c for c in found if c.used != c.now and c.day not in without), key=lambda change: (change.day, change.key))


def _is_day(key: str) -> bool:
    try:
        day_of(key)
    except ValueError:
        return False
    return True
