import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlops_dagster.core.errors import StorageError
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.feature_store.feast_store import FeastStore
from tests.contracts.feature_store.online_servers import postgres_server, redis_server
from tests.contracts.feature_store.store_contract import (
    DAYS,
    FEATURES,
    MODEL,
    PLANES,
    StoreContract,
    asked,
    day,
    feature_views,
    write_days,
)

SQLITE = {"type": "sqlite", "path": "online.db"}


@pytest.fixture
def lake(tmp_path: Path) -> FolderLake:
    return FolderLake(root=str(tmp_path / "lake"))


def store_in(folder: Path, online: dict[str, Any]) -> FeastStore:
    return FeastStore(root=str(folder / "feature_store"), lake_root=str(folder / "lake"), online_store=online)


class TestOnSqlite(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> FeastStore:
        return store_in(tmp_path, SQLITE)


class TestOnRedis(StoreContract):
    @pytest.fixture(scope="class")
    def server(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
        with redis_server(tmp_path_factory.mktemp("redis")) as online:
            yield online

    @pytest.fixture
    def store(self, tmp_path: Path, server: dict[str, Any]) -> FeastStore:
        import redis

        port = int(server["connection_string"].rpartition(":")[2])
        with redis.Redis(port=port) as client:
            client.flushall()
        return store_in(tmp_path, server)


class TestOnPostgres(StoreContract):
    @pytest.fixture(scope="class")
    def server(self) -> Iterator[dict[str, Any]]:
        with postgres_server() as online:
            yield online

    @pytest.fixture
    def store(self, tmp_path: Path, server: dict[str, Any]) -> FeastStore:
        return store_in(tmp_path, server | {"db_schema": f"s{time.time_ns()}"})


@pytest.fixture
def store(tmp_path: Path) -> FeastStore:
    return store_in(tmp_path, SQLITE)


def test_nothing_is_written_when_nothing_changed(store: FeastStore) -> None:
    store.apply(MODEL, feature_views)
    files = [path for path in Path(store.root).rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    store.apply(MODEL, feature_views)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_changed_definition_or_setting_is_applied(store: FeastStore, tmp_path: Path) -> None:
    def changed(source: Any) -> list[Any]:
        made = feature_views(source)
        made[3].tags = {"owner": "weather"}
        return made

    registry = Path(store.root, MODEL, "registry.db")
    store.apply(MODEL, feature_views)
    first = registry.read_bytes()
    store.apply(MODEL, changed)
    second = registry.read_bytes()
    assert first != second
    FeastStore(root=store.root, lake_root=str(tmp_path / "another lake")).apply(MODEL, changed)
    assert second != registry.read_bytes()


def test_an_apply_that_fails_leaves_the_old_registry(store: FeastStore, tmp_path: Path) -> None:
    made = store.apply(MODEL, feature_views)
    before = Path(store.root, MODEL, "registry.db").read_bytes()
    (tmp_path / "not a database").write_text("something else" * 100)
    broken = store_in(tmp_path, {"type": "sqlite", "path": str(tmp_path / "not a database")})
    with pytest.raises(StorageError, match="online store of model 'delay'"):
        broken.apply(MODEL, lambda source: feature_views(source)[:4])
    assert Path(store.root, MODEL, "registry.db").read_bytes() == before
    assert store.apply(MODEL, feature_views) == made


def test_a_spoiled_registry_is_made_anew(store: FeastStore) -> None:
    made = store.apply(MODEL, feature_views)
    Path(store.root, MODEL, "registry.db").write_bytes(b"\xff half a registry")
    Path(store.root, MODEL, "applied.json").unlink()
    assert store.apply(MODEL, feature_views) == made


def test_feast_by_hand_knows_the_repository(store: FeastStore, lake: FolderLake) -> None:
    write_days(lake)
    store.apply(MODEL, feature_views)
    done = subprocess.run(
        [sys.executable, "-m", "feast.cli.cli", "feature-views", "list"],
        cwd=Path(store.root, MODEL),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert "plane_day" in done.stdout, done.stderr


def test_feasts_own_answer_is_the_same(store: FeastStore, lake: FolderLake) -> None:
    from feast import FeatureStore

    write_days(lake)
    store.apply(MODEL, feature_views)
    store.materialize(MODEL, day(0), day(DAYS))
    feast = FeatureStore(repo_path=str(Path(store.root, MODEL)))
    rows = asked(at=day(DAYS)).head(30)
    stock = feast.get_online_features(
        features=feast.get_feature_service(MODEL), entity_rows=rows.select("plane_id", "origin", "dest", "dep_delay").to_dicts()
    ).to_dict()
    ours = store.online(MODEL, rows.to_dicts())
    assert {name: [row[name] for row in ours] for name in FEATURES} == {name: stock[name] for name in FEATURES}


def test_models_share_nothing(store: FeastStore, lake: FolderLake) -> None:
    write_days(lake)
    store.apply(MODEL, feature_views)
    store.apply("other", lambda source: [*feature_views(source)[:1], feature_views(source)[3]])
    assert store.materialize(MODEL, day(0), day(DAYS))["plane_day"] == PLANES
    assert store.online("other", [{"plane_id": "N1", "event_timestamp": day(DAYS)}])[0]["plane_delay"] is None


def test_an_online_store_that_is_away_is_a_clear_error(tmp_path: Path, lake: FolderLake) -> None:
    write_days(lake)
    store = store_in(tmp_path, {"type": "redis", "connection_string": "127.0.0.1:1"})
    store.apply(MODEL, feature_views)
    with pytest.raises(StorageError, match=r"online store of model 'delay'.*Check that it is up"):
        store.materialize(MODEL, day(0), day(DAYS))
    with pytest.raises(StorageError, match=r"online store of model 'delay'.*Check that it is up"):
        store.online(MODEL, asked().head(1).to_dicts())


def test_a_secret_stays_in_the_environment(tmp_path: Path, lake: FolderLake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLINE_FILE", "elsewhere.db")
    store = store_in(tmp_path, {"type": "sqlite", "path": "${ONLINE_FILE}"})
    store.apply(MODEL, feature_views)
    assert "${ONLINE_FILE}" in Path(store.root, MODEL, "feature_store.yaml").read_text()
    assert Path(store.root, MODEL, "elsewhere.db").exists()


def test_a_range_of_days_and_one_day_take_less_than_a_second(store: FeastStore, lake: FolderLake) -> None:
    write_days(lake, 60)
    store.apply(MODEL, feature_views)
    store.materialize(MODEL, day(0), day(1))
    for begin, end in ((0, 60), (59, 60)):
        before = time.perf_counter()
        store.materialize(MODEL, day(begin), day(end))
        assert time.perf_counter() - before < 1
