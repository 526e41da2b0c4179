"""Which code and which packages made a model."""

import hashlib
import importlib.util
from importlib.metadata import distributions
from pathlib import Path

from mlops_dagster.assets.references import declared, locate
from mlops_dagster.core.spec import ModelSpec


def code_digest(spec: ModelSpec) -> str:
    """SHA-256 over the Python files of the packages that the declaration names, and of the declaration itself."""
    folders = {locate(field, path).file.parent for field, path in declared(spec)}
    found = importlib.util.find_spec(spec.package)
    folders |= {Path(p) for p in (found.submodule_search_locations or [])} if found else set()
    files = sorted(
        {f for folder in folders for pattern in ("*.py", "*.yaml") for f in folder.glob(pattern)},
        key=lambda f: (f.parent.name, f.name),
    )
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.parent.name}/{f.name}" for f in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def environment_digest() -> str:
    """SHA-256 over the installed distributions and their versions."""
    listed = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]})
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()
