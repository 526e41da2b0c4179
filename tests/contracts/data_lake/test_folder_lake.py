import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from mlops_dagster.core.errors import StorageError
from mlops_dagster.resources.data_lake.folder import FolderLake
from tests.contracts.data_lake.lake_contract import KEY, LakeContract, flights

ROOT = Path(__file__).parents[3]


PRELUDE = """
import os, sys
import pyarrow as pa
from mlops_dagster.core.errors import StorageError
from mlops_dagster.resources.data_lake.folder import FolderLake
lake, key = FolderLake(root=sys.argv[1]), sys.argv[2]
"""


def other_process(code: str, lake: FolderLake, before: Callable[[], None] | None = None) -> subprocess.Popen:
    """Code that runs in a process of its own, with `lake` and `key` at hand."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), lake.root, KEY],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )


class TestFolderLake(LakeContract):
    @pytest.fixture
    def lake(self, tmp_path: Path) -> FolderLake:
        return FolderLake(root=str(tmp_path / "lake"))

    def test_the_same_content_again_leaves_the_file_untouched(self, lake: FolderLake) -> None:
        lake.write(KEY, flights())
        os.utime(lake.locate(KEY), (1, 1))
        assert lake.write(KEY, flights()).rows == 3
        assert Path(lake.locate(KEY)).stat().st_mtime == 1
        lake.write(KEY, flights(first=9))
        assert Path(lake.locate(KEY)).stat().st_mtime > 1

    def test_dvc_and_hidden_files_are_not_listed(self, lake: FolderLake) -> None:
        lake.write(KEY, flights())
        Path(lake.locate(KEY) + ".dvc").write_text("outs: []\n")
        Path(lake.root, ".gitignore").write_text("*\n")
        assert lake.list() == [KEY]

    def test_a_full_disk_leaves_the_old_content_and_nothing_else(self, lake: FolderLake) -> None:
        lake.write(KEY, flights())

        def small_files_only() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

        code = """
            try:
                lake.write_bytes(key, os.urandom(100_000))
            except StorageError as error:
                print(error)
        """
        out, error = other_process(code, lake, small_files_only).communicate(timeout=60)
        assert "Nothing was changed; free disk space" in out, error
        assert lake.read(KEY).equals(flights())
        assert [*Path(lake.root, ".incoming").iterdir()] == []

    def test_a_read_only_folder_is_said_with_the_remedy(self) -> None:
        code = """
            lake.write("m/warm_up.parquet", pa.table({"a": [0]}))  # every import is done while this process may read them
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                lake.write(key, pa.table({"a": [1]}))
            except StorageError as error:
                print(error)
        """
        with tempfile.TemporaryDirectory() as parent:  # pytest's own folders are closed to other users
            lake = FolderLake(root=f"{parent}/lake")
            lake.write(KEY, flights())
            lake.write("m/warm_up.parquet", pa.table({"a": [0]}))
            Path(parent).chmod(0o755)
            for folder in (Path(lake.locate(KEY)).parent, Path(lake.root, ".incoming")):
                folder.chmod(0o555)
            out, error = other_process(code, lake).communicate(timeout=60)
            assert "make the folder writable" in out, error
            assert lake.read(KEY).equals(flights())

    def test_a_file_in_the_folders_place_is_a_storage_error(self, tmp_path: Path) -> None:
        (tmp_path / "lake").write_text("not a folder")
        with pytest.raises(StorageError, match="cannot write"):
            FolderLake(root=str(tmp_path / "lake")).write(KEY, flights())

    def test_a_reader_beside_a_writer_and_after_its_death_sees_whole_files_only(self, lake: FolderLake) -> None:
        size = 8_000_000
        lake.write_bytes(KEY, b"0" * size)
        code = """
            print("ready", flush=True)
            for n in range(10_000):
                lake.write_bytes(key, b"%d" % (n % 10) * 8_000_000)
        """
        for reads in (1, 40, 7):
            child = other_process(code, lake)
            assert child.stdout is not None
            child.stdout.readline()
            for _ in range(reads):
                content = lake.read_bytes(KEY)
                assert len(content) == size == content.count(content[:1])
            child.kill()
            child.communicate()
            assert lake.read_bytes(KEY).count(lake.read_bytes(KEY)[:1]) == size
        assert lake.list() == [KEY]

    def test_what_a_killed_writer_left_is_swept_after_an_hour(self, lake: FolderLake) -> None:
        lake.write(KEY, flights())
        old, young = (Path(lake.root, ".incoming", name) for name in ("old", "young"))
        old.write_text("half")
        young.write_text("half")
        os.utime(old, (time.time() - 4000, time.time() - 4000))
        lake.write(KEY, flights(first=3))
        assert not old.exists()
        assert young.exists()
