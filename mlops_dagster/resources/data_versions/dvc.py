"""DVC in a Git repository at the lake's root: `dvc status`, `dvc pull` and `dvc checkout` work there by hand."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import DataError, NotFoundError, StorageError
from mlops_dagster.resources import file_lock
from mlops_dagster.resources.data_lake import checked_key
from mlops_dagster.resources.data_versions import Revision, dvc_files, dvc_remote, git_trees

if TYPE_CHECKING:
    import pygit2

SUFFIX = ".dvc"


class DvcVersions(ConfigurableResource):
    """DataVersions by DVC: one `.dvc` file per lake file, one Git commit per record, objects in DVC's cache and remote.

    A record costs what it changes, not what the lake holds. It may be killed anywhere: run again, it completes.
    """

    root: str = Field(description="The lake's folder, which is also the Git and DVC repository.")
    remote: str = Field(
        default="../dvc_remote",
        description="DVC remote: a folder (relative to the lake's folder, or absolute) or a URL such as s3://bucket/prefix.",
    )
    remote_options: dict[str, str] = Field(
        default_factory=dict,
        description="Further settings of the remote, for example endpointurl or profile; no secrets: they are committed.",
    )
    links: Literal["copy", "hardlink"] = Field(
        default="copy",
        description="How the cache holds a file: copy (reflink where the disk can) or hardlink (half the disk; lake files read-only).",
    )
    lock_seconds: float = Field(default=60.0, description="How long to wait for another recorder or `dvc` command, in seconds.")
    push_each: bool = Field(default=False, description="Send what is recorded to the remote at once, not only when asked to.")

    def record(self, keys: Sequence[str], message: str, clock: Callable[[], float] = time.time) -> Revision:
        revision = self._recorded(keys, message, clock)
        if self.push_each:
            self.push()  # one that fails loses nothing: the next record sends what is missing
        return revision

    def _recorded(self, keys: Sequence[str], message: str, clock: Callable[[], float]) -> Revision:
        wanted = sorted({checked_key(key) for key in keys})
        if not wanted:
            raise DataError("keys: none given to record. Name at least one lake key.")
        with self._locked() as repo:
            here = git_trees.tip(repo)
            described = {key: self._described(key, here and here.tree) for key in wanted}
            blobs = {key + SUFFIX: None if text is None else repo.create_blob(text.encode()) for key, text in described.items()}
            tree = git_trees.with_files(repo, here.tree if here else None, blobs)
            git_trees.refresh_index(repo, blobs)
            unchanged = here is not None and here.tree.id == tree
            made = _last_change(repo, blobs) if unchanged else git_trees.commit(repo, tree, message, int(clock()))
            return _revision(made, {key: text and dvc_files.md5_in(text) for key, text in described.items()})

    def history(
        self, prefix: str | Sequence[str] = "", limit: int | None = None, only: Callable[[str], bool] | None = None
    ) -> list[Revision]:
        if not self._exists():
            return []
        found: list[Revision] = []
        asked = _Asked((prefix,) if isinstance(prefix, str) else (*prefix,), only)
        folder = prefix.rpartition("/")[0] if isinstance(prefix, str) else ""
        for here, parent in git_trees.commits(git_trees.opened(self._root())):
            if limit is not None and len(found) >= limit:
                break
            new, old = git_trees.entry(here.tree, folder), git_trees.entry(parent.tree if parent else None, folder)
            if (new and new.id) != (old and old.id):
                files = dict(_changes(old, new, folder, asked))
                found += [_revision(here, files)] if files else []
        return found

    def contents(
        self, prefix: str = "", revision: str | datetime | None = None, only: Callable[[str], bool] | None = None
    ) -> dict[str, str]:
        if not self._exists():
            return {}
        folder = prefix.rpartition("/")[0]
        tree = git_trees.entry(self._commit(revision).tree, folder)
        return {key: md5 for key, md5 in _changes(None, tree, folder, _Asked((prefix,), only)) if md5}

    def restore(self, key: str, revision: str | datetime | None = None) -> Path:
        if not self._exists():
            raise NotFoundError(f"lake key {key!r}: nothing has been recorded in {self._root()} yet.")
        here = self._commit(revision)
        blob = git_trees.entry(here.tree, checked_key(key) + SUFFIX)
        md5 = dvc_files.md5_in(getattr(blob, "data", b"").decode())
        if md5 is None:
            raise NotFoundError(f"lake key {key!r}: not tracked at revision {str(here.id)[:10]}. See `mlops data log`.")
        place = dvc_files.object_path(self._cache(), md5)
        with place.open("rb") if place.exists() else _nothing() as file:
            if file is not None and dvc_files.md5_of(file) == md5:
                return place
        place.unlink(missing_ok=True)
        dvc_remote.fetch(self._root(), self._remote(), self.remote_options, md5, place)
        return place

    def push(self) -> int:
        if not self._exists():
            return 0
        marker = self._dvc_dir() / "tmp" / "pushed"
        done = dvc_remote.pushed_commit(marker, self._remote(), self.remote_options)
        newest, wanted = None, set[str]()
        for here, parent in git_trees.commits(git_trees.opened(self._root())):
            newest = newest or str(here.id)
            if str(here.id) == done:
                break
            wanted.update(md5 for _, md5 in _changes(parent.tree if parent else None, here.tree, "", _Asked()) if md5)
        if newest in (None, done):
            return 0
        sent = dvc_remote.send(self._root(), self._remote(), self.remote_options, self._cache(), wanted)
        dvc_remote.note_pushed(marker, self._remote(), self.remote_options, str(newest))
        return sent

    def _described(self, key: str, committed: Any) -> str | None:
        """The text of the key's `.dvc` file, written with its object in the cache; None if the key left the lake. `committed`: the newest
        tree, which still tracks a key whose recorder was killed after it had removed the `.dvc` file."""
        beside = self._root() / (key + SUFFIX)
        before = beside.read_text() if beside.exists() else None
        try:
            with self._content(key) as data:
                md5, size = dvc_files.keep(data, self._cache(), hardlink=self.links == "hardlink")
        except FileNotFoundError:
            if before is None and git_trees.entry(committed, key + SUFFIX) is None:
                raise NotFoundError(
                    f"lake key {key!r}: not in the lake and not tracked in {self._root()}. Write it first."
                ) from None
            beside.unlink(missing_ok=True)
            return None
        text = dvc_files.dvc_text(beside.name.removesuffix(SUFFIX), md5, size, before)
        dvc_files.write_text(beside, text)
        return text

    @contextmanager
    def _content(self, key: str) -> Iterator[Path]:
        """The file that holds the key's bytes now. Opening it raises FileNotFoundError if the key left the lake."""
        yield self._root() / key

    @contextmanager
    def _locked(self) -> "Iterator[pygit2.Repository]":
        try:
            self._dvc_dir().mkdir(parents=True, exist_ok=True)
            # DVC's own repository lock, so that recorders and `dvc` commands by hand take turns
            with file_lock.held(self._dvc_dir() / "tmp" / "lock", self.lock_seconds):
                yield self._prepared()
        except OSError as error:
            raise StorageError(
                f"lake repository {self._root()}: cannot be written ({error}). Free disk space or make the folder writable; what "
                f"was recorded before is whole, and running it again completes the rest."
            ) from error

    def _prepared(self) -> "pygit2.Repository":
        """The repository with every file that `dvc init` makes, and these settings; committed, so that a clone is complete."""
        root, repo = self._root(), git_trees.opened(self._root())
        present = {path: (root / path).read_text() if (root / path).exists() else None for path in dvc_files.INITIAL}
        wanted = {path: text or dvc_files.INITIAL[path] for path, text in present.items()}
        wanted[".dvc/config"] = dvc_files.config_text(present[".dvc/config"], self._url(), self.remote_options, self.links)
        here = git_trees.tip(repo)
        changed = {path: text for path, text in wanted.items() if here is None or text != present[path]}
        for path, text in changed.items():
            dvc_files.write_text(root / path, text)
        if changed:
            blobs = {path: repo.create_blob(text.encode()) for path, text in changed.items()}
            tree = git_trees.with_files(repo, here.tree if here else None, blobs)
            git_trees.refresh_index(repo, blobs)
            if here is None or here.tree.id != tree:
                git_trees.commit(repo, tree, "Track the lake with DVC", 0 if here is None else here.commit_time)
        return repo

    def _url(self) -> str:
        """The remote as `.dvc/config` has it: relative to `.dvc`, so that lake and remote can be moved together."""
        return self.remote if "://" in self.remote or os.path.isabs(self.remote) else os.path.join("..", self.remote)

    def _commit(self, revision: str | datetime | None) -> "pygit2.Commit":
        import pygit2

        repo = git_trees.opened(self._root())
        if isinstance(revision, datetime):
            moment = revision.timestamp()
            for here, _ in git_trees.commits(repo):
                if here.commit_time <= moment:
                    return here
            raise NotFoundError(f"revision {revision.isoformat()}: the lake's history begins later. See `mlops data log`.")
        try:
            return repo.revparse_single(revision or git_trees.REF).peel(pygit2.Commit)
        except (KeyError, ValueError, pygit2.GitError) as error:
            raise NotFoundError(f"revision {revision!r}: no such commit in {self._root()}. See `mlops data log`.") from error

    def _exists(self) -> bool:
        git = self._root() / ".git"
        return (git / git_trees.REF).exists() or (git / "packed-refs").exists()

    def _root(self) -> Path:
        return Path(self.root).absolute()

    def _dvc_dir(self) -> Path:
        return self._root() / ".dvc"

    def _cache(self) -> Path:
        return self._dvc_dir() / "cache"

    def _remote(self) -> str:
        return self.remote if "://" in self.remote else str((self._root() / self.remote).resolve())


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _revision(made: "pygit2.Commit", files: dict[str, str | None]) -> Revision:
    return Revision(str(made.id), datetime.fromtimestamp(made.commit_time, UTC), made.message.strip(), files)


def _last_change(repo: "pygit2.Repository", blobs: dict[str, Any]) -> "pygit2.Commit":
    """The newest commit that changed one of the paths."""
    last = None
    for here, parent in git_trees.commits(repo):
        last = here
        before = parent.tree if parent else None
        if any(_id(git_trees.entry(here.tree, path)) != _id(git_trees.entry(before, path)) for path in blobs):
            break
    assert last is not None
    return last


def _id(found: "pygit2.Object | None") -> Any:
    return found and found.id


@dataclass(frozen=True)
class _Asked:
    """Which keys are asked for: with one of the prefixes and, if given, `only` those."""

    prefixes: tuple[str, ...] = ("",)
    only: Callable[[str], bool] | None = None

    def key(self, key: str) -> bool:
        return key.startswith(self.prefixes) and (self.only is None or self.only(key))

    def folder(self, path: str) -> bool:
        return any(prefix.startswith(f"{path}/") or f"{path}/".startswith(prefix) for prefix in self.prefixes)


def _changes(old: Any, new: Any, folder: str, asked: _Asked) -> Iterator[tuple[str, str | None]]:
    """(key, MD5 now or None) for each `.dvc` file asked for that differs between two trees; equal folders are not entered."""
    before = {item.name: item for item in old} if old is not None else {}
    after = {item.name: item for item in new} if new is not None else {}
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if _id(was) == _id(now):
            continue
        path = f"{folder}/{name}" if folder else name
        if git_trees.FOLDER in (getattr(was, "filemode", 0), getattr(now, "filemode", 0)):
            yield from _changes(_folder(was), _folder(now), path, asked) if asked.folder(path) else ()
        elif name.endswith(SUFFIX) and asked.key(path.removesuffix(SUFFIX)):
            yield path.removesuffix(SUFFIX), None if now is None else dvc_files.md5_in(now.data.decode())


def _folder(item: Any) -> Any:
    return item if item is not None and item.filemode == git_trees.FOLDER else None
