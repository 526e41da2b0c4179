"""Late rows of a source: found by the sensor, told by a check, shown as unsynced by Dagster, and without effect on old training sets."""

import datetime as dt
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlops_dagster.assets import late_data
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.data_versions.dvc import DvcVersions
from mlops_dagster.sensors import new_data
from tests.lifecycle import foreign


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, dict]:
    """What each step of `late_life.py` saw, on a source whose last day is 2024-02-14."""
    folder = tmp_path_factory.mktemp("late")
    environment = foreign.make(folder)
    declared = folder / "project/parcels/defs/late_parcel/defs.yaml"
    declared.write_text(declared.read_text().replace("end: 2024-02-29", "end: 2024-02-14"))
    return foreign.steps("late_life.py", environment)


def test_before_a_training_set_and_a_version_the_checks_pass_and_say_so(seen):
    checks = seen["ingest"]["checks"]
    assert checks["training_set.late_data"] == [True, "there is no training set yet", "WARN"]
    passed, because, severity = checks["features.learned_expectations"]
    assert (passed, because, severity) == (True, "no version has been registered yet, so there is no reference", "WARN")


def test_usual_days_are_as_the_version_was_trained_and_not_late(seen):
    checks = seen["more days"]["checks"]
    assert checks["features.learned_expectations"][:2] == [True, "3 features are as version 1 was trained on"]
    assert checks["training_set.late_data"][0]
    assert seen["train on all"]["checks"]["training_set.late_data"][0]


def test_recorded_days_are_as_fresh_as_they_were(seen):
    for step in ("ingest", "more days", "the rest of that day"):
        passed, because, _ = seen[step]["checks"]["features.online_freshness"]
        assert passed, because
    assert "1 views at most 0.0 h old, limit 30.0 h" in seen["more days"]["checks"]["features.online_freshness"][1]
    assert "the end of 2024-02-14" in seen["more days"]["checks"]["features.online_freshness"][1]


def test_the_sensor_reads_the_newest_days_again_once_and_ingests_only_what_changed(seen):
    assert seen["same rows"]["asked"] == []
    assert seen["same rows"]["skipped"] == "2024-02-14 was read again; its rows are the stored ones"
    ((day, run_key, reason),) = seen["late rows"]["asked"]
    assert day == "2024-02-13"
    assert run_key.startswith("late_parcel:ingest:2024-02-13:")
    assert reason == "late data: the source has other rows of 2024-02-13 than the lake"
    assert seen["nothing left"]["asked"] == []
    assert seen["nothing left"]["skipped"].startswith("every ended day is in the lake")


def test_the_check_names_the_day_both_hashes_and_what_was_made_of_the_old_content(seen):
    passed, because, severity = seen["late rows"]["checks"]["training_set.late_data"]
    assert (passed, severity) == (False, "WARN")
    assert "2024-02-13 rows: " in because
    assert " was used, it is " in because
    made = "late_parcel/training_set, late_parcel/best_parameters, late_parcel/trained_model, late_parcel/evaluation, version 2"
    assert f"Made of the old content: {made}" in because
    assert "version 1" not in because  # trained on the days before


def test_dagster_shows_what_lies_downstream_as_unsynced(seen):
    assert set(seen["before"].values()) == {"FRESH"}
    late = seen["after late rows"]
    assert late["training_set"] == "STALE"
    assert late["features 2024-02-13"] == "FRESH"  # made again with its day
    assert late["features 2024-02-14"] == "STALE"  # its look-back has other rows now
    assert late["features 2024-02-11"] == "FRESH"
    alone = seen["after raw data alone"]
    assert alone["validated_data 2024-02-02"] == "STALE"
    assert seen["after training again"]["training_set"] == "FRESH"


def test_features_of_the_old_content_beside_rows_of_the_new_one_are_told(seen):
    passed, because, severity = seen["trained with features of both contents"]["checks"]["training_set.late_data"]
    assert (passed, severity) == (False, "WARN")
    assert "2024-02-02 rows: " in because
    assert "2024-02-13 rows: " in because
    assert because.count(" was used by features, it is ") == 2
    assert "materialize late_parcel/features of 2024-02-02 … 2024-02-14 and late_parcel/training_set again" in because


def test_training_again_takes_the_late_rows_and_keeps_what_was_known_before(seen):
    passed, because, _ = seen["trained again"]["checks"]["training_set.late_data"]
    assert passed
    assert because.endswith("versions that were made of other content: version 1, version 2 (candidate)"), because
    assert seen["rows"]["second"] == seen["rows"]["first"] + 120
    assert seen["rows"]["same"]


def test_a_day_unlike_the_reference_is_a_warning_with_column_share_and_examples(seen):
    passed, because, severity = seen["a day unlike the others"]["checks"]["features.learned_expectations"]
    assert (passed, severity) == (False, "WARN")
    assert "2024-02-14 depot_record: depot_parcels: 100.0% of the rows are not in [" in because
    assert "(such as " in because


DAY = dt.date(2024, 1, 3)
RAW = "m/raw_data/rows/2024-01-03.parquet"


@pytest.fixture
def spec():
    return ModelSpec.model_validate(
        {
            "name": "m",
            "package": "tests.lifecycle",
            "source": {"read": ".x.x", "schema": ".x.x", "partitions": {"start": "2024-01-01"}},
            "features": {"define": ".x.x", "compute": ".x.x", "lookback_days": 2},
            "label": {"column": "late"},
            "training": {"train": ".x.x", "test_days": 1},
        }
    )


@pytest.fixture
def lake(tmp_path):
    return FolderLake(root=str(tmp_path / "lake"))


@pytest.fixture
def source(monkeypatch):
    """Gives the source's rows of every day."""

    def gives(*values):
        monkeypatch.setattr(new_data, "load_callable", lambda *_: lambda day: pa.table({"n": pa.array(values, pa.float64())}))

    return gives


def test_the_same_rows_packed_otherwise_are_no_correction(spec, lake, source):
    rows = pa.table({"n": [1.0, float("nan"), None]})
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="gzip", use_dictionary=False)
    lake.write_bytes(RAW, sink.getvalue().to_pybytes())
    source(1.0, float("nan"), None)
    assert new_data.changed_content(spec, lake, DAY) is None
    source(1.0, None, float("nan"))
    assert new_data.changed_content(spec, lake, DAY)


def test_a_correction_that_failed_or_whose_content_comes_back_is_asked_for_again(spec, lake, source):
    def key(today):
        found = new_data.changed_content(spec, lake, DAY)
        return found and new_data.correction(spec, DAY, found, dt.date(2024, 1, today)).run_key

    a, b, c = ([pa.table({"n": [float(n)]}), (float(n),)] for n in range(3))
    asked = []
    for held, given in ((a, b), (c, b), (b, a)):
        lake.write(RAW, held[0])
        source(*given[1])
        asked += [key(4), key(5)]
        assert key(4) == asked[-2], "one run for one look"
    assert None not in asked
    assert len(set(asked)) == 6


def test_a_training_set_whose_record_is_gone_holds_up_no_ingestion_and_is_told(spec, lake):
    versions = DvcVersions(root=lake.root)
    lake.write(RAW, pa.table({"n": [1]}))
    manifest = {"training_set": "t", "inputs": {"key": "m/training_set/inputs/0.json", "sha256": "0" * 64}}
    assert late_data.check(spec, lake, versions, None).passed
    lake.write_bytes("m/training_set/current.json", json.dumps(manifest).encode())
    assert late_data.correction(spec, lake, versions, [RAW]) is None
    told = late_data.check(spec, lake, versions, None)
    assert not told.passed
    assert "no record of what the training set was made of; materialize m/training_set again" in (told.description or "")
