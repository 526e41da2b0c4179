"""The join against its definition, on random rows: every unit, zone, tie, TTL, duplicate and null, in memory and on disk."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feast import FeatureStore, FeatureView, Field, ValueType
from feast.types import Int64, String
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contracts.feature_store.asof_reference import reference_join
from tests.contracts.feature_store.asof_repo import applied, entity, file_source, open_store, stamps, write

TTL_SECONDS = {"endless": None, "zero": None, "short": 3}
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@pytest.fixture(scope="module", params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp(f"join-{request.param}")
    blank = {
        "a": pa.array([1]),
        "b": pa.array(["x"]),
        "event_timestamp": stamps([0]),
        "created": stamps([0]),
        "value": pa.array([1]),
    }
    source = file_source(write(folder / "rows.parquet", **blank))
    plain = file_source(folder / "rows.parquet", created=False, name="plain")
    a, b = entity("a"), entity("b", ValueType.STRING)
    fields = [Field(name="value", dtype=Int64), Field(name="a", dtype=Int64)]
    two = [*fields, Field(name="b", dtype=String)]
    views = [FeatureView(name=n, entities=[a], schema=fields, source=source, ttl=ttl(n)) for n in TTL_SECONDS]
    views += [
        FeatureView(name="pair", entities=[a, b], schema=two, source=source, ttl=timedelta(seconds=3)),
        FeatureView(name="common", entities=[], schema=fields[:1], source=source, ttl=timedelta(0)),
        FeatureView(name="uncreated", entities=[a], schema=fields, source=plain, ttl=timedelta(seconds=3)),
    ]
    return applied(open_store(folder, engine=request.param, threads=2), [a, b], views)


def ttl(name: str) -> timedelta | None:
    seconds = TTL_SECONDS[name]
    return timedelta(seconds=seconds) if seconds else timedelta(0) if name == "zero" else None


moments = st.integers(0, 8)
keys = st.one_of(st.none(), st.integers(0, 2))
words = st.one_of(st.none(), st.sampled_from(["x", "yy", ""]))
entity_row = st.fixed_dictionaries({"a": keys, "b": words, "t": moments})
source_row = st.fixed_dictionaries(
    {"a": keys, "b": words, "t": st.one_of(st.none(), moments), "created": st.one_of(st.none(), moments)}
)
units = st.sampled_from(list(PER_SECOND))
zones = st.sampled_from([None, "UTC", "America/New_York"])
VIEWS: list[tuple[str, list[str], int | None, bool]] = [
    ("endless", ["a"], None, True),
    ("zero", ["a"], None, True),
    ("short", ["a"], 3, True),
    ("pair", ["a", "b"], 3, True),
    ("common", [], None, True),
    ("uncreated", ["a"], 3, False),
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entities=st.lists(entity_row, min_size=1, max_size=8),
    source=st.lists(source_row, max_size=14),
    how=st.tuples(units, units, zones, zones),
    as_known=st.booleans(),
)
def test_every_row_gets_the_value_that_the_definition_gives(
    store: FeatureStore, entities: Any, source: Any, how: Any, as_known: bool
) -> None:
    check(store, entities, source, how, as_known)


@pytest.mark.parametrize("as_known", [False, True], ids=["feast", "as known"])
def test_many_rows_of_few_keys(store: FeatureStore, as_known: bool) -> None:
    random = np.random.default_rng(3)

    def rows(count: int, *names: str) -> list[dict[str, Any]]:
        return [
            {"a": int(random.integers(3)), "b": "xy"[random.integers(2)], **{n: int(random.integers(60)) for n in names}}
            for _ in range(count)
        ]

    check(store, rows(400, "t"), rows(300, "t", "created"), ("us", "ns", "UTC", None), as_known)


def check(store: FeatureStore, entities: Any, source: Any, how: Any, as_known: bool) -> None:
    unit, entity_unit, zone, entity_zone = how
    source = [{**row, "value": position} for position, row in enumerate(source)]
    folder = Path(str(store.config.repo_path))
    write(folder / "rows.parquet", **source_columns(source, unit, zone))
    frame = entity_frame(entities, entity_unit, entity_zone)
    job = store.get_historical_features(
        entity_df=frame,
        features=[f"{name}:value" for name, *_ in VIEWS],
        full_feature_names=True,
        filter_by_created_timestamp=as_known,
    )
    answer = job.to_arrow()
    assert answer["label"].to_pylist() == list(range(len(entities)))
    for name, join_keys, seconds, created in VIEWS:
        expected = reference_join(entities, source, join_keys, seconds, as_known, created)
        assert answer[f"{name}__value"].to_pylist() == expected, name


def source_columns(rows: list[dict[str, Any]], unit: str, zone: str | None) -> dict[str, pa.Array]:
    return {
        "a": pa.array([r["a"] for r in rows], pa.int64()),
        "b": pa.array([r["b"] for r in rows], pa.string()),
        "event_timestamp": stamps([scaled(r["t"], unit) for r in rows], unit, zone),
        "created": stamps([scaled(r["created"], unit) for r in rows], unit, zone),
        "value": pa.array([r["value"] for r in rows], pa.int64()),
    }


def entity_frame(rows: list[dict[str, Any]], unit: str, zone: str | None) -> Any:
    table = pa.table(
        {
            "label": pa.array(range(len(rows))),
            "a": pa.array([r["a"] for r in rows], pa.int64()),
            "b": pa.array([r["b"] for r in rows], pa.string()),
            "event_timestamp": stamps([scaled(r["t"], unit) for r in rows], unit, zone),
        }
    )
    return table.to_pandas()


def scaled(seconds: int | None, unit: str) -> int | None:
    return None if seconds is None else seconds * PER_SECOND[unit]
