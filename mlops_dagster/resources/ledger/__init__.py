"""The append-only record of every decision: what it promises, whatever database it is on."""

from collections.abc import Iterable
from typing import Protocol

from mlops_dagster.core.ledger import Break, Entry, NewEntry, Receipt


class Ledger(Protocol):
    """One chain of entries shared by all models and all processes; safe for concurrent appends."""

    def append(self, new: NewEntry) -> Entry:
        """Adds an entry at the end and returns it durably stored; for a key that is there already, returns that entry unchanged.

        Raises StorageError when the database is away, locked, full or read-only (nothing is written then).
        """
        ...

    def entries(self, model: str | None = None, kind: str | None = None, after: int = 0) -> list[Entry]:
        """The entries in order with a sequence number above `after`, of one model and one kind if given."""
        ...

    def find(self, key: str) -> Entry | None:
        """The entry with this idempotency key, or None."""
        ...

    def head(self) -> Receipt | None:
        """The place and hash of the last entry, as kept apart from the entries; None when the ledger is empty."""
        ...

    def verify(self, receipts: Iterable[Receipt] = ()) -> Break | None:
        """The first broken entry of the whole chain, or None; `receipts` are heads that were noted elsewhere."""
        ...
