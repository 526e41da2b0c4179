"""Wrong input is told in words that name the field, the value and the remedy, and nothing is half written."""

import datetime as dt
import socket

import pandas as pd
import pandera.pandas as pa
import polars as pl
import pyarrow
import pytest

from mlops_dagster import instance, processes
from mlops_dagster.assets import artifact_files, features, raw_data, references, training_set, validated_data
from mlops_dagster.assets.lake_paths import read_manifest, require_same
from mlops_dagster.core.errors import (
    ArtifactError,
    DataError,
    DeclarationError,
    NotFoundError,
    ServingError,
    StorageError,
    TerminalError,
)
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.sensors.new_data import ended_days
from mlops_dagster.serving import artifact

DAY = dt.date(2024, 1, 1)
MOMENT = dt.datetime(2024, 1, 1, 6, tzinfo=dt.UTC)


class Rows(pa.DataFrameModel):
    id: str
    weight: float = pa.Field(ge=0)


@pytest.fixture
def lake(tmp_path):
    return FolderLake(root=str(tmp_path / "lake"))


@pytest.fixture
def spec():
    return ModelSpec.model_validate(
        {
            "name": "m",
            "package": "tests.lifecycle",
            "source": {
                "read": ".x.x",
                "schema": ".x.x",
                "partitions": {"start": "2024-01-01"},
                "known_after": {"late": "delivered_at"},
            },
            "features": {"define": ".x.x", "compute": ".x.x"},
            "label": {"column": "late"},
            "training": {"train": ".x.x", "test_days": 7},
        }
    )


def table(**columns):
    return pyarrow.table(columns)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("tests.lifecycle.nowhere.read", "there is no module 'tests.lifecycle.nowhere'"),
        ("nobody.source.read", "there is no module 'nobody'"),
        ("tests.lifecycle.parcels_csv.rite", "does not define 'rite'; it defines: A_DAY"),
    ],
)
def test_a_reference_that_leads_nowhere(path, words):
    with pytest.raises(DeclarationError, match=f"source.read: .*{words}"):
        references.locate("source.read", path)


def test_a_reference_is_found_without_importing_its_module():
    place = references.locate("source.read", "tests.lifecycle.parcels_csv.write")
    assert (place.file.name, place.line) == ("parcels_csv.py", 12)


def test_a_source_that_returns_no_table(spec):
    with pytest.raises(DataError, match=r"source.read returned NoneType for 2024-01-01 \(table 'rows'\); return a pyarrow"):
        raw_data.read_day(spec, lambda day: None, DAY)


def test_timestamps_and_text_are_brought_to_the_types_that_every_engine_shares(spec):
    frame = pd.DataFrame({"event_timestamp": pd.to_datetime(["2024-01-01T00:00:00.000000001Z"])})
    read = raw_data.read_day(spec, lambda day: {"a": frame, "b": pl.DataFrame({"text": ["x"]})}, DAY)
    assert read["a"].schema.field("event_timestamp").type == pyarrow.timestamp("us", "UTC")
    assert read["b"].schema.field("text").type == pyarrow.string()


def test_a_main_table_without_label_or_time(spec):
    with pytest.raises(
        DataError,
        match=r"lacks 'late' \(source.known_after\), 'delivered_at' \(source.known_after\); source.read returns: id, event_timestamp",
    ):
        validated_data.require_columns(spec, "rows", table(id=["a"], event_timestamp=[MOMENT]))
    naive = table(id=["a"], event_timestamp=[MOMENT.replace(tzinfo=None)], late=[1.0], delivered_at=[MOMENT])
    with pytest.raises(DataError, match="'event_timestamp' of table 'rows' is timestamp.*make it a timestamp with a time zone"):
        validated_data.require_columns(spec, "rows", naive)


def test_bad_rows_are_kept_apart_with_their_reasons():
    rows = table(id=["a", "b", "c"], weight=[1.0, -1.0, 2.0])
    found = validated_data.validate("rows", Rows.to_schema(), rows)
    assert found.accepted["id"].to_pylist() == ["a", "c"]
    assert found.rejected.to_pylist() == [{"id": "b", "weight": -1.0, "reason": "weight: greater_than_or_equal_to(0)"}]
    assert found.rejected_share == pytest.approx(1 / 3)


def test_a_day_with_too_many_bad_rows_names_day_limit_reason_and_file(spec):
    rows = table(id=[str(i) for i in range(10)], weight=[-1.0] * 3 + [1.0] * 7)
    result = validated_data._share_check(spec, {DAY: [validated_data.validate("rows", Rows.to_schema(), rows)]})
    assert not result.passed
    for words in (
        "2024-01-01: 30.0%",
        "source.max_rejected_share 5.0%",
        "greater_than_or_equal_to(0) (3 rows)",
        "m/rejected_rows/rows/2024-01-01",
    ):
        assert words in str(result.description)


def test_a_table_that_lacks_a_column_of_its_schema():
    with pytest.raises(DataError, match="source.schema: .*column_in_dataframe.*'weight'"):
        validated_data.validate("rows", Rows.to_schema(), table(id=["a"]))


def test_too_few_days_for_a_training_set(spec, lake):
    lake.write_bytes("m/raw_data/tables.json", b'["rows"]')
    with pytest.raises(NotFoundError, match="materialize m/validated_data first"):
        training_set.covered_days(spec, lake, "")
    for i in range(7):
        lake.write(f"m/validated_data/rows/2024-01-0{i + 1}.parquet", table(id=["a"]))
    with pytest.raises(DataError, match="has 7 stored days, training.test_days are 7"):
        training_set.covered_days(spec, lake, "")


def test_a_stage_that_has_not_run_and_stages_of_different_inputs(spec, lake):
    with pytest.raises(NotFoundError, match="m/evaluation has not been made yet"):
        read_manifest(lake, spec, "evaluation")
    with pytest.raises(TerminalError, match="materialize m/trained_model again"):
        require_same("training_set", "m/trained_model", {"training_set": "a"}, "m/training_set", {"training_set": "b"})


def test_an_artifact_whose_bytes_changed_is_not_used(spec, lake, tmp_path):
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"model")
    (folder / "signature.json").write_bytes(b"{}")
    digest = artifact_files.upload(lake, spec, folder)
    with artifact_files.local_copy(lake, spec, digest) as copy:
        assert artifact.digest(copy) == digest
    lake.write_bytes(f"m/trained_model/{digest}/model.onnx", b"other")
    with (
        pytest.raises(ArtifactError, match="its bytes changed. Materialize m/trained_model again"),
        artifact_files.local_copy(lake, spec, digest),
    ):
        pass


def test_a_correction_of_a_day_keeps_what_was_known_before(lake):
    first = table(depot=["a", "b"], event_timestamp=[MOMENT, MOMENT], share=[0.1, 0.2])
    stored = features.write_versions(lake, "m/features/v/2024-01-01.parquet", first)
    assert features.write_versions(lake, "m/features/v/2024-01-01.parquet", first).sha256 == stored.sha256
    later = MOMENT + dt.timedelta(days=3)
    features.write_versions(lake, "m/features/v/2024-01-01.parquet", first.set_column(2, "share", [[0.1, 0.9]]), now=later)
    rows = (
        lake.read("m/features/v/2024-01-01.parquet")
        .sort_by([("depot", "ascending"), ("created_timestamp", "ascending")])
        .to_pylist()
    )
    assert [(r["depot"], r["share"], r["created_timestamp"] == later) for r in rows] == [
        ("a", 0.1, False),
        ("b", 0.2, False),
        ("b", 0.9, True),
    ]


def test_a_taken_port_is_named_with_its_option():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"port {port} for mlflow is not free .*; choose another with --mlflow-port"):
            processes.require_free("mlflow", "127.0.0.1", port)


def test_a_state_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "state").write_text("a file, not a folder")
    with pytest.raises(StorageError, match="set MLOPS_HOME"):
        instance.prepare(tmp_path / "state")


def test_only_days_that_are_over_and_that_the_source_has_are_ingested(spec):
    partitions = spec.source.partitions
    assert ended_days(partitions, None, MOMENT) == []
    assert ended_days(partitions, None, MOMENT + dt.timedelta(days=2)) == [DAY, DAY + dt.timedelta(days=1)]
    assert ended_days(partitions, DAY, MOMENT + dt.timedelta(days=100))[0] == DAY + dt.timedelta(days=1)
    closed = partitions.model_copy(update={"end": DAY})
    assert ended_days(closed, DAY, MOMENT + dt.timedelta(days=100)) == []
