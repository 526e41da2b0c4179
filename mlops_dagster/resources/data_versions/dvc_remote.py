"""Objects between DVC's cache and its remote: a folder on this machine directly, any other URL through DVC's own transfer."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import StorageError, TransientError
from mlops_dagster.resources.data_versions import dvc_files

ATTEMPTS = 3


def pushed_commit(marker: Path, remote: str, options: Mapping[str, str]) -> str | None:
    """The commit up to which everything was sent to this very remote, or None."""
    lines = marker.read_text().splitlines() if marker.exists() else []
    here = len(lines) == 2 and lines[0] == _identity(remote, options) and ("://" in remote or Path(remote).exists())
    return lines[1] if here else None


def note_pushed(marker: Path, remote: str, options: Mapping[str, str], commit: str) -> None:
    """Say that everything up to a commit was sent to this remote."""
    dvc_files.write_text(marker, f"{_identity(remote, options)}\n{commit}\n")


def _identity(remote: str, options: Mapping[str, str]) -> str:
    """A bucket has the same URL at every endpoint, so the settings tell remotes apart too."""
    return " ".join((remote, *(f"{name}={value}" for name, value in sorted(options.items()))))


def send(root: Path, remote: str, options: Mapping[str, str], cache: Path, md5s: Iterable[str]) -> int:
    """Copy the objects that the remote lacks; how many. Raises TransientError if it cannot be reached."""
    if "://" not in remote:
        try:
            places = ((dvc_files.object_path(cache, md5), dvc_files.object_path(Path(remote), md5)) for md5 in md5s)
            return sum(dvc_files.copy_object(source, place) for source, place in places)
        except OSError as error:
            raise StorageError(f"DVC remote {remote}: cannot be written ({error}). Free disk space, then push again.") from error
    return _attempted(root, remote, options, lambda repo, there: _transfer(repo, repo.cache.local, there, md5s))


def fetch(root: Path, remote: str, options: Mapping[str, str], md5: str, place: Path) -> None:
    """Bring one object into the cache. Raises StorageError if the remote does not hold it."""
    if "://" not in remote:
        source = dvc_files.object_path(Path(remote), md5)
        if source.exists():
            dvc_files.copy_object(source, place)
    else:
        _attempted(root, remote, options, lambda repo, there: _transfer(repo, there, repo.cache.local, [md5]))
    if not place.exists():
        raise StorageError(f"DVC object {md5}: neither in the cache nor at the remote {remote}. Push it where it was recorded.")


def _attempted(root: Path, remote: str, options: Mapping[str, str], work: Callable[[Any, Any], int]) -> int:
    from dvc.repo import Repo

    last: Exception | None = None
    for _ in range(ATTEMPTS):
        try:
            with Repo(str(root)) as repo:
                _set(repo, remote, options)
                return work(repo, repo.cloud.get_remote_odb(dvc_files.REMOTE))
        except Exception as error:  # DVC passes on whatever the remote's own SDK raises
            last = error
            logging.getLogger(__name__).info("DVC remote %s: %s", remote, error)
    raise TransientError(
        f"DVC remote {remote}: cannot be reached after {ATTEMPTS} attempts ({last}). The local lake is whole; check the "
        f"address, the network and the credentials, then push again."
    ) from last


def _set(repo: Any, remote: str, options: Mapping[str, str]) -> None:
    """Ours as it is set now: `.dvc/config` says how it was when something was last recorded. What a person keeps outside of that file,
    such as the secrets of `.dvc/config.local`, counts as well."""
    kept: dict[str, Any] = {}
    for level in ("system", "global", "local"):
        kept |= repo.config.read(level)["remote"].get(dvc_files.REMOTE, {})
    read = repo.config.read()
    own = {"remote": {dvc_files.REMOTE: {**kept, **options, "url": remote}}}
    read["remote"] |= repo.config._load_paths(own, repo.config.files["repo"])["remote"]
    repo.config.update(repo.config.validate(read))


def _transfer(repo: Any, source: Any, target: Any, md5s: Iterable[str]) -> int:
    from dvc_data.hashfile.hash_info import HashInfo

    result = repo.cloud.transfer(source, target, {HashInfo("md5", md5) for md5 in md5s})
    if result.failed:
        raise OSError(f"{len(result.failed)} objects were not transferred, for example {next(iter(result.failed)).value}")
    return len(result.transferred)
