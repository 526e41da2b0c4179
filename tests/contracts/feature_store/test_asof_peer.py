"""Row by row the same as Feast's own stores on random rows, in what each of them does right.

The dask store drops entity rows (duplicates; those whose every candidate is too old) and sorts by time with a sort that is not stable, so it
breaks ties at random: it is compared without duplicates and ties. The DuckDB store breaks ties by the created timestamp: with ties.
"""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from feast import FeatureView, Field
from feast.types import Float64, Int64

from tests.contracts.feature_store.asof_repo import applied, entity, file_source, open_store, with_engine, write

SECONDS = 1_000_000
KEYS = 40


def random_source(random: np.random.Generator, rows: int, ties: bool) -> dict[str, pa.Array]:
    moments = (random.integers(0, 500, rows) * 10 if ties else random.choice(5000, rows, replace=False)) * SECONDS
    return {
        "driver": pa.array(random.integers(0, KEYS, rows)),
        "event_timestamp": pa.array(moments, pa.timestamp("us", "UTC")),
        "created": pa.array(moments + random.permutation(rows) * SECONDS, pa.timestamp("us", "UTC")),
        "rate": pa.array(random.random(rows)),
        "trips": pa.array(np.arange(rows)),
    }


def random_entities(random: np.random.Generator, rows: int) -> pd.DataFrame:
    pairs = random.choice(KEYS * 6000, rows, replace=False)
    moments = pd.to_datetime(pairs // KEYS, unit="s", utc=True)
    return pd.DataFrame({"driver": pairs % KEYS, "event_timestamp": moments, "row": np.arange(rows)})


@pytest.mark.parametrize("as_known", [False, True], ids=["feast", "as known"])
@pytest.mark.parametrize("ttl", [timedelta(0), timedelta(seconds=120)], ids=["endless", "two minutes"])
@pytest.mark.parametrize("peer_type", ["dask", "duckdb"])
def test_same_as_feasts_own_store(tmp_path: Path, peer_type: str, ttl: timedelta, as_known: bool) -> None:
    random = np.random.default_rng(7)
    driver = entity("driver")
    names = ("first", "second")
    views = [
        FeatureView(
            name=name,
            entities=[driver],
            ttl=ttl,
            schema=[Field(name="rate", dtype=Float64), Field(name="trips", dtype=Int64)],
            source=file_source(write(tmp_path / f"{name}.parquet", **random_source(random, 4000, ties=peer_type == "duckdb"))),
        )
        for name in names
    ]
    store = applied(open_store(tmp_path, peer_type), [driver], views)
    entities = random_entities(random, 1500)
    features = [f"{name}:{feature}" for name in names for feature in ("rate", "trips")]
    asked = {"features": features, "full_feature_names": True, "filter_by_created_timestamp": as_known}
    peer = store.get_historical_features(entity_df=entities, **asked).to_df()
    for engine in ("memory", "disk"):
        ours = with_engine(store, engine=engine).get_historical_features(entity_df=entities, **asked).to_df()
        assert ours["row"].tolist() == entities["row"].tolist()
        assert ours["first__trips"].notna().sum() > (500 if not ttl else 20)
        same_rows = ours.set_index("row").loc[peer["row"], [f.replace(":", "__") for f in features]]
        pd.testing.assert_frame_equal(same_rows, peer.set_index("row")[same_rows.columns], check_dtype=False)
        assert len(peer) == len(ours) or peer_type == "dask"
