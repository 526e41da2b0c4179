"""Where the parts of a gateway's unit log lie, and until when what is gone of it was written (see `units`)."""

from contextlib import suppress
from pathlib import Path


def before(path: Path) -> Path:
    """Where the part of the log before the newest one lies."""
    return path.with_suffix(".1.jsonl")


def dropped(path: Path) -> Path:
    """The file that says, in seconds since 1970, until when the part that was removed last was written."""
    return path.with_suffix(".dropped")


def dropping(part: Path, path: Path) -> None:
    """Note that `part` of the log at `path` is about to be removed, so that a reader that comes too late knows. Raises OSError."""
    with suppress(FileNotFoundError):
        until = part.stat().st_mtime
        aside = dropped(path).with_suffix(".part")
        aside.write_text(f"{until:.6f}")
        aside.replace(dropped(path))
