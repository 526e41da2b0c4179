"""Loading the code location beside an empty Dagster project: both in processes of their own, in turn."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Measurement

RUNS = 5
LOAD = "from {module} import defs; defs.get_repository_def()"
EMPTY = """\
from pathlib import Path

import dagster as dg

defs = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
"""
PROJECT = (
    '[project]\nname = "empty"\nversion = "0"\n[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "empty"\n'
)


def run() -> Iterator[Measurement]:
    """One row: seconds to load our definitions and those of a project without any."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "empty"
        (package / "defs").mkdir(parents=True)
        for file, text in (
            (package / "__init__.py", ""),
            (package / "defs/__init__.py", ""),
            (package / "definitions.py", EMPTY),
        ):
            file.write_text(text)
        (Path(folder) / "pyproject.toml").write_text(PROJECT)
        pairs = [(_load("mlops_dagster.definitions", None), _load("empty.definitions", folder)) for _ in range(RUNS + 1)][1:]
    ours, empty = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = ours / empty
    yield Measurement(
        "load the code location", "s", ours, empty, "an empty Dagster project", ratio, "<= 1.5 x its time", ratio <= 1.5,
        "make benchmark ONLY=code_location",
    )  # fmt: skip


def _load(module: str, folder: str | None) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", LOAD.format(module=module)], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - begin
