"""The definitions that go into a version's artifact: the same bytes for the same definitions, and what answers by them later."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlops_dagster.core.errors import ArtifactError, NotFoundError
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.feature_store.feast_store import FeastStore
from mlops_dagster.serving.transformer import OnlineFeatures
from tests.contracts.feature_store.store_contract import DAYS, MODEL, day, feature_views, write_days

ROW = {"plane_id": "N1", "origin": "JFK", "dest": "D2", "dep_delay": 3.5}
LIMIT, SCALE, SHIFT = 9.0, 2.0, 0.5  # globals of an on-demand function: pickled in the order of a set


def scaled(source: Any) -> list[Any]:
    """The usual views with an on-demand function that Feast can only pickle: for its default, its text does not run by itself."""
    from feast import Field, RequestSource
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Float64

    request = RequestSource(name="request", schema=[Field(name="dep_delay", dtype=Float64)])

    @on_demand_feature_view(sources=[request], schema=[Field(name="scaled", dtype=Float64)], mode="python")
    def at_scale(inputs: dict[str, Any], shift: float = SHIFT) -> dict[str, Any]:
        return {"scaled": [None if v is None else min(v * SCALE + shift, LIMIT) for v in inputs["dep_delay"]]}

    return [*feature_views(source), at_scale]


def thousandfold(source: Any) -> list[Any]:
    """As `scaled`, computed otherwise."""
    from feast import Field, RequestSource
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Float64

    request = RequestSource(name="request", schema=[Field(name="dep_delay", dtype=Float64)])

    @on_demand_feature_view(sources=[request], schema=[Field(name="scaled", dtype=Float64)], mode="python")
    def at_scale(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"scaled": [None if v is None else v * 1000 for v in inputs["dep_delay"]]}

    return [*feature_views(source), at_scale]


def with_wind(source: Any) -> list[Any]:
    """As `feature_views`, with one more thing to send and to answer."""
    from feast import Field, RequestSource
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Float64

    wind = RequestSource(name="wind_now", schema=[Field(name="wind", dtype=Float64)])

    @on_demand_feature_view(sources=[wind], schema=[Field(name="double_wind", dtype=Float64)], mode="python")
    def by_wind(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"double_wind": [2 * value for value in inputs["wind"]]}

    return [*scaled(source), by_wind]


def planes_only(source: Any) -> list[Any]:
    return [item for item in feature_views(source) if item.name in ("plane", "plane_day")]


def stored(folder: Path, define: Callable[[Any], list[Any]]) -> FeastStore:
    store = FeastStore(root=str(folder / "feature_store"), lake_root=str(folder / "lake"))
    write_days(FolderLake(root=store.lake_root))
    store.apply(MODEL, define)
    store.materialize(MODEL, day(0), day(DAYS))
    return store


def answering(store: FeastStore, definitions: bytes | None) -> OnlineFeatures:
    return OnlineFeatures(Path(store.root, MODEL), MODEL, clock=day(DAYS).timestamp, definitions=definitions)


@pytest.mark.parametrize("define", ["scaled", "with_wind"])
def test_equal_definitions_give_equal_bytes_in_any_process_and_place(tmp_path: Path, define: str) -> None:
    code = (
        "import sys; from tests.contracts.feature_store import test_feast_snapshot as made; from pathlib import Path;"
        f"store = made.FeastStore(root=sys.argv[1], lake_root=sys.argv[1]); store.apply(made.MODEL, made.{define});"
        "print(store.definitions(made.MODEL).hex())"
    )
    root = str(Path(__file__).parents[3])
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            env=os.environ | {"PYTHONPATH": root, "PYTHONHASHSEED": seed},
            cwd=root, check=True, capture_output=True, text=True,
        ).stdout.strip()
        for seed in ("1", "2", "3")
    }  # fmt: skip
    store = FeastStore(root=str(tmp_path / "here"), lake_root=str(tmp_path / "lake"))
    store.apply(MODEL, with_wind if define == "scaled" else scaled)
    store.apply(MODEL, with_wind if define == "with_wind" else scaled)
    assert found == {store.definitions(MODEL).hex()}
    assert str(tmp_path).encode() not in store.definitions(MODEL)


def test_a_version_answers_by_its_definitions_whatever_is_applied_later(tmp_path: Path) -> None:
    store = stored(tmp_path, scaled)
    kept = store.definitions(MODEL)
    version, inputs = answering(store, kept), ("plane_id", "origin", "dest", "dep_delay")
    before = version.complete([ROW])
    assert before[0]["scaled"] == 7.5
    for later in (thousandfold, with_wind):
        store.apply(MODEL, later)
        assert store.definitions(MODEL) != kept
        for one in (version, answering(store, kept)):  # the running one, and one that is started again
            assert (one.complete([ROW]), one.inputs) == (before, inputs)
    assert answering(store, None).inputs == (*inputs, "wind")
    (now,) = answering(store, store.definitions(MODEL)).complete([ROW | {"wind": 2.0}])
    assert now["double_wind"] == 4.0
    Path(store.root, MODEL, "registry.db").unlink()
    assert answering(store, kept).complete([ROW]) == before


def test_a_view_that_was_dropped_since_knows_no_entity(tmp_path: Path) -> None:
    store = stored(tmp_path, feature_views)
    version = answering(store, store.definitions(MODEL))
    (before,) = version.complete([ROW])
    assert before["weather"] is not None
    store.apply(MODEL, planes_only)
    assert version.complete([ROW]) == [before | {"route_delay": None, "busy": None, "weather": None, "excess": None}]


def test_definitions_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    store = FeastStore(root=str(tmp_path / "feature_store"), lake_root=str(tmp_path / "lake"))
    with pytest.raises(NotFoundError, match="never applied"):
        store.definitions(MODEL)
    store.apply(MODEL, feature_views)
    with pytest.raises(ArtifactError, match="definitions of the artifact cannot be read"):
        answering(store, b"no registry")
