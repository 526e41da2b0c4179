"""The cost of tracking: a record of three new partitions in a lake of 10,000, beside `dvc add` and `git commit`."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.measure import Measurement, faster, paired, seconds
from mlops_dagster.resources.data_versions.dvc import DvcVersions

PARTITIONS, CHANGED = 10_000, 3


def run() -> Iterator[Measurement]:
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        keys = [f"model/table_{n // 365:02}/{n % 365:03}.parquet" for n in range(PARTITIONS)]
        for n, key in enumerate(keys):
            (ours / key).parent.mkdir(parents=True, exist_ok=True)
            (ours / key).write_bytes(b"%d" % n * 500)
        versions = DvcVersions(root=str(ours))
        first = seconds(lambda: versions.record(keys, "all"))
        yield _limit("data_versions first 10,000", first, 60)
        shutil.copytree(ours, theirs)
        record, add = paired(
            _changing(ours, keys, lambda: versions.record(keys[:CHANGED], "three")),
            _changing(theirs, keys, lambda: _dvc_add(theirs, keys)),
        )
        yield faster("data_versions 3 of 10,000", record, add, "dvc add, git commit", at_least=20)
        yield _limit("data_versions 3 of 10,000", record, 0.3)
        month = keys[:200]
        times = sorted(seconds(_changing(ours, keys, lambda: versions.record(month, "month"), len(month))) for _ in range(5))
        yield _limit("data_versions 200 of 10,000", times[2], 3)


def _changing(lake: Path, keys: list[str], work: Callable[[], object], count: int = CHANGED) -> Callable[[], object]:
    """Work on partitions that hold something new each time."""
    rounds = iter(range(1_000_000))

    def changed() -> object:
        number = next(rounds)
        for key in keys[:count]:
            path = lake / key
            path.unlink(missing_ok=True)
            path.write_bytes(b"%d %s" % (number, key.encode()) * 100)
        return work()

    return changed


def _dvc_add(lake: Path, keys: list[str]) -> None:
    names = keys[:CHANGED]
    author = ["-c", "user.name=b", "-c", "user.email=b@localhost"]
    for command in (
        [sys.executable, "-m", "dvc", "add", "-q", *names],
        ["git", "add", *(f"{name}.dvc" for name in names)],
        ["git", *author, "commit", "-qm", "three"],
    ):
        subprocess.run(command, cwd=lake, check=True)


def _limit(name: str, value: float, limit: float) -> Measurement:
    return Measurement(name, "s", value, None, None, None, f"<= {limit:g} s", value <= limit, "make benchmark ONLY=data_versions")
