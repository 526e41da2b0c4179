"""Backfilling features over a range of days in one run: the engines of the declaration store the same."""

from pathlib import Path

import pytest

from tests.lifecycle import foreign


def ingested(folder: Path, engine: str) -> dict:
    environment = foreign.make(folder)
    declared = folder / "project/parcels/defs/late_parcel/defs.yaml"
    declared.write_text(declared.read_text().replace("lookback_days: 7}", f"lookback_days: 7, engine: {engine}}}"))
    (seen,) = foreign.told("engines_life.py", environment)
    return seen


@pytest.fixture(scope="module")
def by_duckdb(tmp_path_factory) -> dict:
    return ingested(tmp_path_factory.mktemp("duckdb"), "duckdb")


@pytest.mark.parametrize("engine", ["spark", "ray"])
def test_a_range_in_one_run_is_what_duckdb_makes_of_it(by_duckdb: dict, tmp_path: Path, engine: str) -> None:
    found = ingested(tmp_path, engine)
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
