"""Commits on one branch of a Git repository, at a cost that follows the change and not the number of files.

Trees are built from the branch's own tip: only the folders that changed are written. The index is then brought up to date
for the person who runs `git status`; nothing here depends on it. libgit2 does the work, so no `git` command is needed.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.errors import TransientError

if TYPE_CHECKING:
    import pygit2

BRANCH = "main"
REF = f"refs/heads/{BRANCH}"
FILE, FOLDER = 0o100644, 0o040000
AUTHOR = ("mlops", "mlops@localhost")
INDEX_LOCK_PATIENCE_SECONDS = 2.0


def opened(root: Path) -> "pygit2.Repository":
    """The repository of exactly this folder, made if it is not there; safe to repeat after a crash."""
    import pygit2

    try:
        if not (root / ".git" / "HEAD").exists():
            pygit2.init_repository(str(root), initial_head=BRANCH)
        return pygit2.Repository(str(root / ".git"))
    except pygit2.GitError as error:
        raise TransientError(f"Git repository {root}: cannot be opened ({error}). Check who owns that folder.") from error


def tip(repo: "pygit2.Repository") -> "pygit2.Commit | None":
    import pygit2

    reference = repo.references.get(REF)
    return None if reference is None else reference.peel(pygit2.Commit)


def entry(tree: "pygit2.Tree | None", path: str) -> "pygit2.Object | None":
    """The object at a path ('' is the tree itself), or None."""
    if tree is None or not path:
        return tree
    try:
        return tree[path]
    except KeyError:
        return None


def with_files(repo: "pygit2.Repository", tree: "pygit2.Tree | None", files: Mapping[str, Any]) -> Any:
    """The id of a tree like `tree` with these paths set to a blob, or removed where it is None; only changed folders are written."""
    import pygit2

    builder = repo.TreeBuilder() if tree is None else repo.TreeBuilder(tree)
    folders: dict[str, dict[str, Any]] = {}
    for path, blob in files.items():
        name, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(name, {})[rest] = blob
        elif blob is not None:
            builder.insert(name, blob, FILE)
        elif builder.get(name) is not None:
            builder.remove(name)
    for name, inside in folders.items():
        old = entry(tree, name)
        new = with_files(repo, old if isinstance(old, pygit2.Tree) else None, inside)
        if len(repo[new].peel(pygit2.Tree)):
            builder.insert(name, new, FOLDER)
        elif builder.get(name) is not None:
            builder.remove(name)
    return builder.write()


def commit(repo: "pygit2.Repository", tree: Any, message: str, seconds: int) -> "pygit2.Commit":
    """A commit on top of the branch, by an author of our own: the user may have no Git identity."""
    import pygit2

    signature = pygit2.Signature(*AUTHOR, seconds, 0)
    parent = tip(repo)
    made = repo.create_commit(REF, signature, signature, message, tree, [] if parent is None else [parent.id])
    return repo[made]  # pyright: ignore[reportReturnType]


def commits(repo: "pygit2.Repository") -> "Iterator[tuple[pygit2.Commit, pygit2.Commit | None]]":
    """Every commit of the branch with its first parent, newest first."""
    here = tip(repo)
    while here is not None:
        parent = here.parents[0] if here.parent_ids else None
        yield here, parent
        here = parent


def refresh_index(
    repo: "pygit2.Repository",
    files: Mapping[str, Any],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Enter the files into the index, if this branch is the one checked out. A lock that a killed process left is removed."""
    import pygit2

    if repo.head_is_detached or repo.lookup_reference("HEAD").target != REF:
        return
    _clear_index_lock(Path(repo.path) / "index.lock", sleep, clock)
    index = repo.index
    index.read()
    stale = False
    for path, blob in files.items():
        present = index[path].id if path in index else None
        if present == blob:
            continue
        stale = True
        if blob is None:
            index.remove(path)
        else:
            index.add(pygit2.IndexEntry(path, blob, pygit2.enums.FileMode.BLOB))
    if stale:
        with suppress(pygit2.GitError):  # a person's own git command won the race: the next record repairs the index
            index.write()


def _clear_index_lock(lock: Path, sleep: Callable[[float], None], clock: Callable[[], float]) -> None:
    """Wait for a running `git`; an unchanged lock that outlives every quick command belongs to a dead one."""
    deadline = clock() + INDEX_LOCK_PATIENCE_SECONDS
    while lock.exists():
        if clock() >= deadline:
            with suppress(FileNotFoundError):
                os.unlink(lock)
            return
        sleep(0.05)
