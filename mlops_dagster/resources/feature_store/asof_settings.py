"""How much memory and how many threads a retrieval may use."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mlops_dagster.core.errors import DeclarationError

SHARE_OF_MACHINE = 0.6
UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Settings:
    """Resolved settings of the store: bytes, numbers of threads, folders."""

    memory_limit_bytes: int
    threads: int
    temp_directory: str | None
    staging_location: str | None
    staging_endpoint: str | None
    repo_path: str | None
    engine: str = "auto"


def parse_bytes(text: str) -> int:
    """`4GB`, `512MiB` or a bare number of bytes as a number of bytes. Raises `DeclarationError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS or float(match[1]) <= 0:
        raise DeclarationError(f"offline_store.memory_limit is {text!r}. Write a size such as '4GB' or '512MiB'.")
    return int(float(match[1]) * UNITS[match[2].lower()])


def machine_bytes() -> int:
    """The memory of the machine or, if it is less, the limit of the container."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUP_LIMITS:
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            sizes.append(int(text))
    return min(sizes)
