"""What tells, without reading it, that a file of a folder lake was replaced."""

import os
from pathlib import Path


def folder_stamps(root: Path, prefix: str) -> dict[str, str]:
    """Of every file directly in the prefix's folder whose key begins with it: its size and the moment it was replaced, in nanoseconds."""
    folder, _, beginning = prefix.rpartition("/")
    try:
        found = [
            e for e in os.scandir(root / folder) if e.name.startswith(beginning) and not e.name.startswith(".") and e.is_file()
        ]
        return {f"{folder}/{e.name}".lstrip("/"): f"{e.stat().st_size}-{e.stat().st_mtime_ns}" for e in found}
    except (FileNotFoundError, NotADirectoryError):
        return {}
