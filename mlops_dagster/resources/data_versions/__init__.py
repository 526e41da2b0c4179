"""Versions of the lake's files: which bytes a key held at which moment, and those bytes again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

__all__ = ["DataVersions", "Revision"]


@dataclass(frozen=True)
class Revision:
    """One commit of the lake's repository: `files` maps each key it concerns to its MD5, or to None where the key was removed."""

    commit: str
    at: datetime
    message: str
    files: Mapping[str, str | None]


class DataVersions(Protocol):
    """A history over lake keys. Where a revision is asked for, give a commit (or its beginning) or a moment with time zone.

    `root`: the folder of its repository on this machine, which every recorder shares.
    """

    @property
    def root(self) -> str: ...

    def record(self, keys: Sequence[str], message: str) -> Revision:
        """Make the present content of the keys a revision; a tracked key that left the lake is recorded as removed.

        If nothing changed since they were last recorded, that revision comes back and no new one is made. Raises NotFoundError
        for a key that is neither in the lake nor tracked, TransientError when another recorder holds the lake for too long.
        """
        ...

    def history(
        self, prefix: str | Sequence[str] = "", limit: int | None = None, only: Callable[[str], bool] | None = None
    ) -> list[Revision]:
        """The revisions that changed a key beginning with `prefix` (or with one of several), newest first; `files` holds only those keys.

        `only`: says which of these keys are asked for; the others are not read.
        """
        ...

    def contents(
        self, prefix: str = "", revision: str | datetime | None = None, only: Callable[[str], bool] | None = None
    ) -> dict[str, str]:
        """Every tracked key that begins with `prefix` and its MD5, as of a revision (None: the newest); `only` as for `history`."""
        ...

    def restore(self, key: str, revision: str | datetime | None = None) -> Path:
        """A read-only file with the bytes that the key held then; the lake itself is not touched.

        Raises NotFoundError if the key was not tracked then, StorageError if the bytes are neither here nor at the remote.
        """
        ...

    def push(self) -> int:
        """Send every recorded file that the remote lacks; how many were sent. Raises TransientError if the remote is away."""
        ...
