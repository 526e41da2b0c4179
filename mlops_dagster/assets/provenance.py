"""Which code and which packages made a model: their listings, kept in the lake under their own hashes, and the Git revision."""

import hashlib
import importlib.util
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from mlops_dagster.assets.references import declared, locate
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake


def code_files(spec: ModelSpec) -> list[Path]:
    """The Python files of the packages that the declaration names, and the declaration itself, in a fixed order."""
    folders = {locate(field, path).file.parent for field, path in declared(spec)}
    found = importlib.util.find_spec(spec.package)
    folders |= {Path(p) for p in (found.submodule_search_locations or [])} if found else set()
    files = {f for folder in folders for pattern in ("*.py", "*.yaml") for f in folder.glob(pattern)}
    return sorted(files, key=lambda f: (f.parent.name, f.name))


def code_listing(spec: ModelSpec) -> str:
    """SHA-256 and name of each of these files, one to a line."""
    return "\n".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.parent.name}/{f.name}" for f in code_files(spec))


def code_digest(spec: ModelSpec) -> str:
    """SHA-256 of the code's listing."""
    return digest(code_listing(spec))


def environment_listing() -> str:
    """The installed distributions with their versions, `name==version`, one to a line.

    Those of the environment itself: some packages put copies of others on the module path when they are imported (Ray: psutil).
    """
    places = list(dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")))
    return "\n".join(sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions(path=places) if d.metadata["Name"]}))


def environment_digest() -> str:
    """SHA-256 of the environment's listing."""
    return digest(environment_listing())


def digest(listing: str) -> str:
    """SHA-256 (hex) of a listing."""
    return hashlib.sha256(listing.encode()).hexdigest()


def keep(lake: Lake, spec: ModelSpec, listing: str) -> str:
    """Store a listing under its digest, so that a later one can be compared line by line; returns the digest."""
    found = digest(listing)
    lake.write_bytes(listing_key(spec.name, found), listing.encode())
    return found


def listing_key(model: str, found: str) -> str:
    """Where a listing lies in the lake."""
    return f"{model}/provenance/{found}.txt"


def code_revision(spec: ModelSpec) -> str | None:
    """The Git commit that the model's code is at, with `+changes` where a file of it differs; None outside a repository."""
    import pygit2

    files = code_files(spec)
    place = pygit2.discover_repository(str(files[0].parent)) if files else None
    if place is None:
        return None
    repo = pygit2.Repository(place)
    if repo.head_is_unborn or repo.workdir is None:
        return None
    root = Path(repo.workdir).resolve()
    inside = [f.resolve().relative_to(root).as_posix() for f in files if f.resolve().is_relative_to(root)]
    changed = any(_changed(repo, name) for name in inside)
    return f"{repo.head.target}{'+changes' if changed else ''}"


def _changed(repo: "object", name: str) -> bool:
    """Whether a file of the work tree is not the one of the commit."""
    import pygit2

    return repo.status_file(name) not in (pygit2.enums.FileStatus.CURRENT, pygit2.enums.FileStatus.IGNORED)  # type: ignore[attr-defined]
