"""What a tracked run is given, as files and as a digest."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path


def files_of(name: str, source: Path | bytes) -> Iterator[tuple[str, bytes]]:
    """The relative path and bytes of every file that an artifact (a file, a folder or bytes) holds."""
    if isinstance(source, bytes):
        yield name, source
    elif source.is_file():
        yield name, source.read_bytes()
    else:
        for path in sorted(source.rglob("*")):
            if path.is_file():
                yield f"{name}/{path.relative_to(source).as_posix()}", path.read_bytes()


def content_digest(
    texts: Mapping[str, str], metrics: Mapping[str, float], tags: Mapping[str, str], artifacts: Mapping[str, Path | bytes]
) -> str:
    """SHA-256 (hex) of everything that a run was given, so that a repeated call can be told from a changed one."""
    files = {
        path: hashlib.sha256(data).hexdigest() for name, source in artifacts.items() for path, data in files_of(name, source)
    }
    numbers = {name: repr(float(value)) for name, value in metrics.items()}
    return hashlib.sha256(json.dumps([dict(texts), numbers, dict(tags), files], sort_keys=True).encode()).hexdigest()
