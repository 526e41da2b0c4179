"""Backfilling features over a range of days in one run: the engines of the declaration store the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lifecycle import parcels_csv

HERE = Path(__file__).parent


def ingested(folder: Path, engine: str) -> dict:
    shutil.copytree(HERE / "own_project", folder / engine)
    declared = folder / engine / "parcels/defs/late_parcel/defs.yaml"
    declared.write_text(declared.read_text().replace("lookback_days: 7}", f"lookback_days: 7, engine: {engine}}}"))
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / engine),
        "PARCELS_CSV": str(folder / "parcels.csv"),
        "MLOPS_HOME": str(folder / f"{engine}-state"),
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "engines_life.py")], env=environment, capture_output=True, text=True, timeout=600, cwd=HERE
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("SEEN ")).removeprefix("SEEN "))


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("engines")
    parcels_csv.write(folder / "parcels.csv")
    return folder, ingested(folder, "duckdb")


@pytest.mark.parametrize("engine", ["spark", "ray"])
def test_a_range_in_one_run_is_what_duckdb_makes_of_it(expected: tuple[Path, dict], engine: str) -> None:
    folder, by_duckdb = expected
    found = ingested(folder, engine)
    assert found["failed"] == by_duckdb["failed"] == []
    assert len(by_duckdb["rows"]) == 12
    assert found["rows"].keys() == by_duckdb["rows"].keys()
    for key, table in by_duckdb["rows"].items():
        other = found["rows"][key]
        assert other.keys() == table.keys()
        for column, values in table.items():
            assert other[column] == pytest.approx(values) if isinstance(values[0], float) else other[column] == values, (
                key,
                column,
            )
