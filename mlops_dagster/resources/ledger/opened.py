"""The ledger as a Dagster resource: opened on first use, once in a process."""

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.ledger import Break, Entry, NewEntry, Receipt

if TYPE_CHECKING:
    from mlops_dagster.resources.ledger.sql import SqlLedger


class LedgerResource(ConfigurableResource):
    """Ledger (see the Protocol) at a URL."""

    url: str = Field(description="`sqlite:////path/ledger.db` or `postgresql+psycopg://user@host/database`.")

    def append(self, new: NewEntry) -> Entry:
        """See Ledger.append."""
        return self._ledger().append(new)

    def entries(self, model: str | None = None, kind: str | None = None, after: int = 0) -> list[Entry]:
        """See Ledger.entries."""
        return self._ledger().entries(model, kind, after)

    def find(self, key: str) -> Entry | None:
        """See Ledger.find."""
        return self._ledger().find(key)

    def head(self) -> Receipt | None:
        """See Ledger.head."""
        return self._ledger().head()

    def verify(self, receipts: Iterable[Receipt] = ()) -> Break | None:
        """See Ledger.verify."""
        return self._ledger().verify(receipts)

    def _ledger(self) -> "SqlLedger":
        if self.url.startswith("sqlite:///"):
            Path(self.url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return _opened(self.url, os.getpid())


@lru_cache
def _opened(url: str, process: int) -> "SqlLedger":
    from mlops_dagster.resources.ledger.sql import SqlLedger

    # A database connection must not cross a fork, so each process has its own.
    return SqlLedger(url)
