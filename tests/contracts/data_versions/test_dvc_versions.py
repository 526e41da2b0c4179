import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mlops_dagster.core.errors import StorageError, TransientError
from mlops_dagster.resources import file_lock
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.data_versions import dvc_files
from mlops_dagster.resources.data_versions.dvc import DvcVersions
from tests.contracts.data_versions.versions_contract import DAYS, OTHER, VersionsContract, table

ROOT = Path(__file__).parents[3]


def command(folder: Path, *words: str) -> str:
    """The output of a command as a person would run it in the folder."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(folder: Path, *words: str) -> str:
    return command(folder, sys.executable, "-m", "dvc", *words)


def tree(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Every file that Git or DVC keeps, with its bytes and mode."""
    kept = [path for path in folder.rglob("*") if path.is_file() and not {".git", "tmp"} & set(path.relative_to(folder).parts)]
    return {str(path.relative_to(folder)): (path.read_bytes(), oct(path.stat().st_mode)) for path in kept}


@pytest.fixture
def lake(tmp_path: Path) -> FolderLake:
    return FolderLake(root=str(tmp_path / "lake"))


@pytest.fixture
def versions(lake: FolderLake) -> DvcVersions:
    return DvcVersions(root=lake.root)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    return lambda seconds: monkeypatch.setattr(DvcVersions.record, "__defaults__", (lambda: seconds,))


class TestDvcVersions(VersionsContract):
    pass


def recorded(lake: FolderLake, versions: DvcVersions) -> Path:
    for n, key in enumerate([*DAYS, OTHER]):
        lake.write(key, table(n))
    versions.record([*DAYS, OTHER], "in")
    return Path(lake.root)


def test_files_are_byte_for_byte_what_dvc_add_makes(lake: FolderLake, versions: DvcVersions, tmp_path: Path) -> None:
    odd = ["m/reports/a b: #1.json", "m/reports/ümlaut.json", "m/reports/2013.json", "m/reports/no_suffix", "m/reports/-x.json"]
    for n, key in enumerate(odd):
        lake.write_bytes(key, b"\r\n line %d" % n)
    ours = recorded(lake, versions)
    versions.record(odd, "odd names")
    theirs = tmp_path / "theirs"
    shutil.copytree(
        ours, theirs, ignore=lambda folder, names: [name for name in names if name == ".dvc" or name.endswith(".dvc")]
    )
    (theirs / ".dvcignore").unlink()
    (theirs / ".gitignore").unlink()
    dvc(theirs, "init", "-q")
    shutil.copy(ours / ".dvc" / "config", theirs / ".dvc" / "config")
    shutil.copy(ours / ".gitignore", theirs / ".gitignore")
    dvc(theirs, "add", "-q", "--", *DAYS, OTHER, *odd)
    assert tree(ours) == tree(theirs)


def test_a_hash_that_looks_like_a_number_is_written_as_dvc_writes_it() -> None:
    from dvc.utils.serialize import dumps_yaml, loads_yaml

    for md5 in ("1" * 32, "0" * 32, "123e4567890123456789012345678901", "e" * 32, "0" * 31 + "a", "1e5" + "e7" * 14 + "1"):
        theirs = dumps_yaml({"outs": [{"md5": md5, "size": 5, "hash": "md5", "path": "a.parquet"}]})
        assert dvc_files.dvc_text("a.parquet", md5, 5) == theirs
        assert dvc_files.md5_in(theirs) == md5
        assert loads_yaml(theirs)["outs"][0]["md5"] == md5


def test_dvc_and_git_by_hand_find_everything_in_order(lake: FolderLake, versions: DvcVersions) -> None:
    root = recorded(lake, versions)
    assert "up to date" in dvc(root, "status")
    assert command(root, "git", "status", "--porcelain") == ""
    lake.write(DAYS[0], table(99))
    assert "modified" in dvc(root, "status")
    versions.record([DAYS[0]], "changed")
    assert "up to date" in dvc(root, "status")
    assert versions.push() > 0
    assert "in sync" in dvc(root, "status", "--cloud")


def test_dvc_pull_and_checkout_bring_an_old_version_back(lake: FolderLake, versions: DvcVersions) -> None:
    root = recorded(lake, versions)
    first = lake.read_bytes(DAYS[0])
    commit = versions.history(DAYS[0])[0].commit
    lake.write(DAYS[0], table(99))
    versions.record([DAYS[0]], "changed")
    versions.push()
    shutil.rmtree(root / ".dvc" / "cache")
    for key in DAYS:
        lake.delete(key)
    command(root, "git", "checkout", "-q", commit, "--", f"{DAYS[0]}.dvc")
    dvc(root, "pull", "-q")
    assert lake.read_bytes(DAYS[0]) == first
    assert all(lake.read(key).num_rows == 10 for key in DAYS)


def test_a_clone_without_the_cache_is_whole_after_dvc_pull(lake: FolderLake, versions: DvcVersions, tmp_path: Path) -> None:
    root = recorded(lake, versions)
    versions.push()
    command(tmp_path, "git", "clone", "-q", str(root), "clone")
    dvc(tmp_path / "clone", "pull", "-q")
    assert FolderLake(root=str(tmp_path / "clone")).list("m/") == DAYS


def test_what_a_person_added_to_a_dvc_file_is_kept(lake: FolderLake, versions: DvcVersions) -> None:
    root = recorded(lake, versions)
    beside = root / f"{DAYS[0]}.dvc"
    beside.write_text(beside.read_text() + "  desc: checked by hand\n")
    lake.write(DAYS[0], table(50))
    made = versions.record([DAYS[0]], "changed")
    assert "desc: checked by hand" in beside.read_text()
    assert str(made.files[DAYS[0]]) in beside.read_text()
    assert "up to date" in dvc(root, "status", DAYS[0])


def test_a_restored_version_comes_from_the_remote_if_the_cache_lost_or_spoiled_it(
    lake: FolderLake, versions: DvcVersions
) -> None:
    recorded(lake, versions)
    content = lake.read_bytes(DAYS[0])
    versions.push()
    place = versions.restore(DAYS[0])
    place.chmod(0o644)
    place.write_bytes(b"spoiled")
    assert versions.restore(DAYS[0]).read_bytes() == content
    versions.restore(DAYS[0]).unlink()
    assert versions.restore(DAYS[0]).read_bytes() == content
    versions.restore(DAYS[0]).unlink()
    shutil.rmtree(Path(lake.root, "../dvc_remote"))
    with pytest.raises(StorageError, match="neither in the cache nor at the remote"):
        versions.restore(DAYS[0])


def test_a_remote_that_was_replaced_gets_everything_again(lake: FolderLake, versions: DvcVersions) -> None:
    recorded(lake, versions)
    sent = versions.push()
    shutil.rmtree(Path(lake.root, "../dvc_remote"))
    assert versions.push() == sent


def test_a_remote_that_was_moved_is_used_from_then_on_and_hand_written_settings_stay(
    lake: FolderLake, versions: DvcVersions
) -> None:
    root = recorded(lake, versions)
    config = root / ".dvc" / "config"
    config.write_text(config.read_text() + "['remote \"mine\"']\n    url = /elsewhere\n")
    moved = DvcVersions(root=lake.root, remote="../another_remote")
    lake.write(DAYS[0], table(41))
    moved.record([DAYS[0]], "changed")
    assert moved.push() > 0
    assert "mine" in dvc(root, "remote", "list")
    assert "in sync" in dvc(root, "status", "--cloud")
    assert command(root, "git", "status", "--porcelain") == ""


def test_with_hardlinks_cache_and_lake_share_one_file(lake: FolderLake) -> None:
    versions = DvcVersions(root=lake.root, links="hardlink")
    root = recorded(lake, versions)
    assert versions.restore(DAYS[0]).samefile(lake.locate(DAYS[0]))
    assert "up to date" in dvc(root, "status")
    lake.write(DAYS[0], table(70))
    made = versions.record([DAYS[0]], "changed")
    assert versions.restore(DAYS[0], versions.history(DAYS[0])[1].commit).read_bytes() != lake.read_bytes(DAYS[0])
    assert versions.restore(DAYS[0], made.commit).read_bytes() == lake.read_bytes(DAYS[0])


def in_another_process(code: str, lake: FolderLake, **environment: str) -> subprocess.Popen:
    prelude = """
        import sys, pyarrow as pa
        from mlops_dagster.resources.data_lake.folder import FolderLake
        from mlops_dagster.resources.data_versions.dvc import DvcVersions
        lake, versions = FolderLake(root=sys.argv[1]), DvcVersions(root=sys.argv[1])
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code), lake.root],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={"PATH": "", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def test_neither_a_git_command_nor_an_identity_nor_a_home_is_needed(lake: FolderLake, tmp_path: Path) -> None:
    code = f"lake.write({DAYS[0]!r}, pa.table({{'n': [1]}})); print(versions.record([{DAYS[0]!r}], 'in').commit, versions.push())"
    child = in_another_process(code, lake, HOME=str(tmp_path / "no such home"))
    out, error = child.communicate(timeout=60)
    assert len(out.split()[0]) == 40, error
    assert out.split()[1] == "1"


def forked(work: Callable[[], None]) -> int:
    """Run work in a child of this process and give the child's id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_recorders_in_several_processes_take_turns(lake: FolderLake, versions: DvcVersions) -> None:
    def record_eight(name: int) -> None:
        for n in range(8):
            key = f"m/t{name}/{n}.json"
            lake.write_bytes(key, b"%d" % n)
            versions.record([key], key)

    children = [forked(lambda name=name: record_eight(name)) for name in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert len(versions.history()) == 24
    assert len(versions.contents()) == 24
    assert command(Path(lake.root), "git", "status", "--porcelain") == ""


def killed_after(lines: int, work: Callable[[], object]) -> int:
    """Run work in a child that dies at that line of the package's code: 9 if it died, 0 if the work was done before."""

    def traced() -> None:
        seen = 0

        def count(frame: Any, event: str, argument: Any) -> Any:
            nonlocal seen
            if "data_versions" not in frame.f_code.co_filename:
                return None
            seen += 1
            if seen >= lines:
                os._exit(9)
            return count

        sys.settrace(count)
        work()

    return ended(forked(traced))


def test_a_recorder_killed_at_any_line_leaves_what_the_next_one_completes(lake: FolderLake, versions: DvcVersions) -> None:
    keys, lines, stop = [f"m/t/{n}.json" for n in range(2)], 0, 9
    while stop == 9:
        lines += 1 if lines < 20 else 7
        for key in keys:
            lake.write_bytes(key, b"%s %d" % (key.encode(), lines))
        stop = killed_after(lines, lambda: versions.record(keys, "in"))
        made = versions.record(keys, "again")
        assert made.files == {key: hashlib.md5(lake.read_bytes(key)).hexdigest() for key in keys}
        assert command(Path(lake.root), "git", "status", "--porcelain") == ""
    assert lines > 150
    assert "up to date" in dvc(Path(lake.root), "status")
    command(Path(lake.root), "git", "fsck", "--strict")


def test_an_index_lock_that_a_killed_git_left_is_no_obstacle(lake: FolderLake, versions: DvcVersions) -> None:
    root = recorded(lake, versions)
    (root / ".git" / "index.lock").write_bytes(b"half")
    lake.write(DAYS[0], table(31))
    versions.record([DAYS[0]], "changed")
    assert command(root, "git", "status", "--porcelain") == ""


def test_a_lock_that_is_held_too_long_is_a_clear_error(lake: FolderLake) -> None:
    versions = DvcVersions(root=lake.root, lock_seconds=0.2)
    recorded(lake, versions)
    with (
        file_lock.held(Path(lake.root, ".dvc", "tmp", "lock"), 1),
        pytest.raises(TransientError, match="held by another process"),
    ):
        versions.record([DAYS[0]], "waits")


def test_dvc_by_hand_and_a_recorder_exclude_each_other(lake: FolderLake, versions: DvcVersions) -> None:
    root = recorded(lake, versions)
    with file_lock.held(root / ".dvc" / "tmp" / "lock", 1):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "add", DAYS[0]], cwd=root, capture_output=True, text=True, check=False
        )
    assert "Unable to acquire lock" in done.stdout + done.stderr


def test_a_lake_checked_out_at_an_old_commit_still_records_on_its_branch(lake: FolderLake, versions: DvcVersions) -> None:
    root = recorded(lake, versions)
    command(root, "git", "checkout", "-q", "--detach", "HEAD")
    lake.write(DAYS[0], table(12))
    made = versions.record([DAYS[0]], "changed")
    assert versions.history(DAYS[0])[0].commit == made.commit
    assert command(root, "git", "rev-parse", "main").strip() == made.commit


def test_a_record_costs_the_change_and_not_the_lake(lake: FolderLake, versions: DvcVersions) -> None:
    keys = [f"m/t{n // 365}/{n % 365:03}.parquet" for n in range(3000)]
    content = pa.BufferOutputStream()
    pa.ipc.new_stream(content, table(0).schema).close()
    root = Path(lake.root)
    for n, key in enumerate(keys):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(b"%d" % n)
    versions.record(keys, "in")
    best = 1e9
    for n in range(5):
        for key in keys[:3]:
            (root / key).write_bytes(b"changed %d" % n)
        begin = time.perf_counter()
        versions.record(keys[:3], "three")
        best = min(best, time.perf_counter() - begin)
    assert best < 0.3


def test_a_read_only_repository_is_said_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "lake").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot be written"):
        DvcVersions(root=str(tmp_path / "lake")).record(["m/a.parquet"], "in")


def test_the_environment_is_left_alone(lake: FolderLake, versions: DvcVersions) -> None:
    before = dict(os.environ)
    recorded(lake, versions)
    assert dict(os.environ) == before
