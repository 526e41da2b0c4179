"""Profiles of Parquet files: the same numbers as in memory, in bounded memory, and errors that name the file."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from mlops_dagster.core.drift import Profile, psi
from mlops_dagster.core.errors import DataError, NotFoundError
from mlops_dagster.resources.drift_reports.profiles import profile_parquet, slice_parquet


@pytest.fixture
def table():
    rng = np.random.default_rng(5)
    n = 40_000
    return pa.table(
        {
            "x": pa.array(rng.normal(size=n), mask=rng.random(n) < 0.1),
            "k": rng.integers(0, 5, n),
            "carrier": rng.choice(["AA", "UA"], n),
            "time": pa.array(np.arange(n) * 10**9, pa.timestamp("ns")),
            "raw": pa.array([b"x"] * n),
        }
    )


@pytest.fixture
def folder(tmp_path, table):
    for day in range(4):
        path = tmp_path / "lake" / f"day={day}"
        path.mkdir(parents=True)
        pq.write_table(table.slice(day * 10_000, 10_000), path / "part.parquet", row_group_size=3_000)
    (tmp_path / "lake" / "_SUCCESS").touch()
    return str(tmp_path / "lake")


NAMES = ("x", "k", "carrier", "time")


def test_files_and_memory_agree(folder, table):
    reference = Profile.of(table, columns=NAMES)
    found = profile_parquet(folder, like=reference)
    assert found.rows == 40_000
    assert {n: c.bins().tolist() for n, c in found.columns.items()} == {
        n: c.bins().tolist() for n, c in reference.columns.items()
    }
    days = [profile_parquet(f"{folder}/day={day}/part.parquet", like=reference) for day in range(4)]
    assert psi(reference, Profile.merge(days)) == dict.fromkeys(NAMES, 0.0)


def test_cells_are_learned_over_all_files(folder):
    found = profile_parquet(folder, columns=NAMES)
    assert found.columns["time"].bins().tolist()[:-1] == pytest.approx([4_000] * 10, abs=600)
    assert found.columns["carrier"].rows == found.rows == 40_000


def test_slices_of_files(folder, table):
    reference = Profile.of(table, columns=["x", "k"])
    parts = slice_parquet(folder, "carrier", like=reference)
    assert list(parts) == ["AA", "UA"]
    assert psi(reference, Profile.merge(parts.values())) == {"x": 0.0, "k": 0.0}


def test_another_filesystem(folder, table):
    reference = Profile.of(table, columns=["x"])
    assert profile_parquet("day=1", like=reference, filesystem=SubTreeFileSystem(folder, LocalFileSystem())).rows == 10_000


def test_a_file_without_rows(tmp_path, table):
    path = str(tmp_path / "none.parquet")
    pq.write_table(table.slice(0, 0), path)
    assert profile_parquet(path, like=Profile.of(table, columns=["x"])).rows == 0
    assert profile_parquet(path, columns=["x"]).columns["x"].rows == 0


SMALL_BLOCKS = """
import resource, sys
from mlops_dagster.core import profile_arrow, profile_building
from mlops_dagster.resources.drift_reports import profiles
profile_arrow.STREAM_VALUES = profiles.MOST_BATCH_VALUES = profile_building.SAMPLE_VALUES = 2**18
profiles.profile_parquet(sys.argv[1], columns=["f0"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
assert profiles.profile_parquet(sys.argv[1]).rows == 1_200_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 - before)
"""


@pytest.mark.parametrize("group", [100_000, 1_200_000])
def test_memory_is_that_of_the_blocks_not_of_the_file(tmp_path, group):
    """A file of 192 MB, in one row group as well as in many, with blocks of 2 to 3 MB, costs less than 80 MB."""
    path = str(tmp_path / "large.parquet")
    values = np.random.default_rng(6).random(1_200_000)
    pq.write_table(
        pa.table({f"f{k}": values for k in range(20)}), path, row_group_size=group, compression="none", use_dictionary=False
    )
    done = subprocess.run([sys.executable, "-c", SMALL_BLOCKS, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 80


def test_bad_files(folder, table, tmp_path):
    reference = Profile.of(table, columns=["x"])
    with pytest.raises(NotFoundError, match=r"no Parquet file at '.*/missing'"):
        profile_parquet(f"{folder}/missing", like=reference)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="no Parquet file at"):
        profile_parquet(str(tmp_path / "empty"), like=reference)
    with pytest.raises(NotFoundError, match="names no file"):
        profile_parquet([], like=reference)
    whole = (tmp_path / "lake" / "day=0" / "part.parquet").read_bytes()
    for name, content in (
        ("short", whole[:-100]),
        ("text", b"hello, world"),
        ("nothing", b""),
        ("head", whole[:4] + bytes(300) + whole[304:]),
    ):
        bad = tmp_path / f"{name}.parquet"
        bad.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.parquet"):
            profile_parquet(str(bad), like=reference)
    other = str(tmp_path / "other.parquet")
    pq.write_table(table.drop_columns(["x"]), other)
    with pytest.raises(DataError, match=r"other\.parquet: column 'x' is not there; there are k, carrier"):
        profile_parquet([f"{folder}/day=0", other], like=reference)
    pq.write_table(pa.table({"x": ["1"]}), other)
    with pytest.raises(DataError, match=r"'x' is of kind text"):
        profile_parquet([f"{folder}/day=0", other], like=reference)
    with pytest.raises(DataError, match=r"'raw' has the type binary"):
        profile_parquet(folder)
