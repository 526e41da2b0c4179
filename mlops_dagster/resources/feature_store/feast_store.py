"""Feast behind the FeatureStore Protocol: one project, registry and `feature_store.yaml` per model."""

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import DataError, DeclarationError, MlopsError, NotFoundError, StorageError
from mlops_dagster.resources import file_lock
from mlops_dagster.resources.feature_store import FeatureSignature, feast_definitions, feast_online, feast_snapshot
from mlops_dagster.serving.transformer import OnlineFeatures

if TYPE_CHECKING:
    import feast
    import pyarrow as pa

ASOF = "mlops_dagster.resources.feature_store.asof.AsofOfflineStore"
REGISTRY = "registry.db"
APPLIED = "applied.json"


class FeastStore(ConfigurableResource):
    """A FeatureStore on Feast. `feast` commands work by hand in `<root>/<model>`."""

    root: str = Field(description="Folder that holds one Feast repository per model.")
    lake_root: str = Field(description="Folder or s3:// address of the data lake, which holds <model>/features/<view>/.")
    offline_store: dict[str, Any] = Field(
        default_factory=lambda: {"type": ASOF},
        description="Feast's offline_store section; ${NAME} stands for an environment variable.",
    )
    online_store: dict[str, Any] = Field(
        default_factory=lambda: {"type": "sqlite", "path": "online.db"},
        description="Feast's online_store section: sqlite (path within the model's folder), redis or postgres; ${NAME} as above.",
    )
    s3_endpoint: str | None = Field(default=None, description="Address of the S3 server, if not AWS, of an s3:// lake_root.")
    lock_seconds: float = Field(default=60.0, description="How long to wait for another process's apply, in seconds.")

    def apply(self, model: str, define: Callable[[Callable[[str], Any]], Sequence[Any]]) -> FeatureSignature:
        with _feast_errors(model, DeclarationError), file_lock.held(self._repo(model) / ".lock", self.lock_seconds):
            objects = feast_definitions.defined(model, define, lambda view: self._source(model, view))
            text = self._yaml(model)
            mark = hashlib.sha256(text.encode() + feast_definitions.fingerprint(objects)).hexdigest()
            if _applied(self._repo(model)).get("mark") != mark:
                self._register(model, objects, text)
                signature = feast_definitions.signature(self._store(model), model)
                self._note(model, mark, signature)
        return self.signature(model)

    def signature(self, model: str) -> FeatureSignature:
        found = _applied(self._repo(model)).get("signature")
        if found is None:
            raise self._never_applied(model)
        pairs = {name: tuple((item[0], item[1]) for item in found[name]) for name in ("features", "request")}
        return FeatureSignature(pairs["features"], tuple(found["entities"]), pairs["request"], tuple(found["views"]))

    def definitions(self, model: str) -> bytes:
        registry = self._repo(model) / REGISTRY
        if not registry.exists():
            raise self._never_applied(model)
        with _feast_errors(model, DeclarationError):
            return feast_snapshot.snapshot(registry, model)

    def columns(self, model: str, define: Callable[[Callable[[str], Any]], Sequence[Any]]) -> dict[str, list[str]]:
        with _feast_errors(model, DeclarationError):
            return feast_definitions.columns(feast_definitions.defined(model, define, lambda view: self._source(model, view)))

    def lifetimes(self, model: str) -> dict[str, tuple[list[str], float | None]]:
        with _feast_errors(model, DataError):
            return {view.name: feast_definitions.lifetime(view) for view in self._store(model).list_feature_views()}

    def materialize(self, model: str, start: datetime, end: datetime) -> dict[str, int]:
        for name, moment in (("start", start), ("end", end)):
            if moment.tzinfo is None:
                raise DataError(f"{name} {moment.isoformat()}: has no time zone. Give one such as 2013-01-01T00:00:00Z.")
        store, written = self._store(model), {}
        with _feast_errors(model, DataError):
            for view in feast_online.stored_views(store):
                table = feast_online.latest(store, view, start, end)
                written[view.name] = feast_online.write(store, view, table)
        return written

    def push(self, model: str, view: str, table: "pa.Table") -> int:
        store = self._store(model)
        views = {item.name: item for item in feast_online.stored_views(store)}
        if view not in views:
            raise NotFoundError(
                f"feature view {view!r} of model {model!r}: not stored online. Those are: {', '.join(sorted(views))}."
            )
        with _feast_errors(model, DataError):
            return feast_online.write(store, views[view], feast_online.newest(views[view], table))

    def historical(self, model: str, entity_rows: "pa.Table") -> "pa.Table":
        signature = self.signature(model)
        _check_entity_rows(model, entity_rows, [*signature.entities, "event_timestamp", *(name for name, _ in signature.request)])
        store = self._store(model)
        with _feast_errors(model, DataError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = store.get_historical_features(
                entity_df=feast_online.entity_frame(store, entity_rows), features=store.get_feature_service(model)
            ).to_arrow()
        if answer.num_rows != entity_rows.num_rows:
            raise DataError(
                f"historical features of model {model!r}: {answer.num_rows} rows came back for {entity_rows.num_rows}. The offline "
                f"store {self.offline_store.get('type')!r} loses rows; use {ASOF}."
            )
        order = [*entity_rows.column_names, *(name for name, _ in signature.features if name not in entity_rows.column_names)]
        return answer.select([name for name in order if name in answer.column_names])

    def online(self, model: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return _online_features(self._repo(model), model).complete(rows)

    def stored_at(self, model: str, view: str, rows: Sequence[Mapping[str, Any]]) -> list[datetime | None]:
        return _online_features(self._repo(model), model).stored_at(view, rows)

    def _never_applied(self, model: str) -> NotFoundError:
        return NotFoundError(
            f"features of model {model!r}: never applied in {self._repo(model)}. Materialize its `features` first."
        )

    def _repo(self, model: str) -> Path:
        return Path(self.root, model).absolute()

    def _source(self, model: str, view: str) -> "feast.FileSource":
        from feast import FileSource

        base = self.lake_root if "://" in self.lake_root else str(Path(self.lake_root).absolute())
        return FileSource(
            name=f"{view}_source",
            path=f"{base.rstrip('/')}/{model}/features/{view}",
            timestamp_field="event_timestamp",
            created_timestamp_column="created_timestamp",
            s3_endpoint_override=self.s3_endpoint,
        )

    def _yaml(self, model: str) -> str:
        # a corrected row has the time of the row it corrects: Redis would drop it; feast_online compares the times itself
        extra = {"skip_dedup": True} if self.online_store.get("type") == "redis" else {}
        return _dumped(
            {
                "project": model,
                "provider": "local",
                "registry": {"registry_type": "file", "path": REGISTRY, "cache_ttl_seconds": 1},
                "offline_store": self.offline_store,
                "online_store": extra | self.online_store,
                "entity_key_serialization_version": 3,
            }
        )

    def _register(self, model: str, objects: list[Any], text: str) -> None:
        """Apply to a copy of the registry and swap it in, so that a reader never meets half a registry."""
        repo = self._repo(model)
        _replace(repo / "feature_store.yaml", text.encode())
        aside = repo / ".registry.new"
        aside.unlink(missing_ok=True)
        before = (repo / REGISTRY).read_bytes() if (repo / REGISTRY).exists() else b""
        if before and feast_definitions.is_registry(before):
            aside.write_bytes(before)
        feast_definitions.register(repo, aside.name, objects)
        if self.online_store.get("type") == "sqlite":
            feast_online.allow_readers_beside_a_writer(repo / self.online_store["path"])
        os.replace(aside, repo / REGISTRY)

    def _note(self, model: str, mark: str, signature: FeatureSignature) -> None:
        content = {
            "mark": mark,
            "signature": {
                "features": signature.features,
                "entities": signature.entities,
                "request": signature.request,
                "views": signature.views,
            },
        }
        _replace(self._repo(model) / APPLIED, json.dumps(content, indent=1).encode())

    def _store(self, model: str) -> "feast.FeatureStore":
        registry = self._repo(model) / REGISTRY
        if not registry.exists():
            raise self._never_applied(model)
        return feast_definitions.opened(self._repo(model), registry.stat().st_mtime_ns)


def _dumped(config: dict[str, Any]) -> str:
    """YAML in which text with `${NAME}` is quoted: Feast puts the value there before it reads the YAML."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "${" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump(config, Dumper=Dumper, sort_keys=True, width=10_000)


@functools.lru_cache(maxsize=16)
def _online_features(repo: Path, model: str) -> OnlineFeatures:
    """The same code as in the model server; it notices by itself when the registry changes."""
    return OnlineFeatures(repo, model)


def _applied(repo: Path) -> dict[str, Any]:
    try:
        return json.loads((repo / APPLIED).read_text())
    except FileNotFoundError:
        return {}


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.new")
    aside.write_bytes(content)
    os.replace(aside, path)


def _check_entity_rows(model: str, rows: "pa.Table", needed: list[str]) -> None:
    missing = [name for name in needed if name not in rows.column_names]
    if missing:
        raise DataError(
            f"entity rows of model {model!r}: no column {', '.join(missing)}. Its features need {', '.join(needed)}; there are: "
            f"{', '.join(rows.column_names)}."
        )
    nulls = rows["event_timestamp"].null_count
    if nulls:
        raise DataError(
            f"entity rows of model {model!r}: event_timestamp is null in {nulls} of {rows.num_rows} rows. Give each one."
        )


@contextmanager
def _feast_errors(model: str, kind: type[MlopsError]) -> Iterator[None]:
    """Feast raises what its parts raise; ours name the model and what to do."""
    try:
        yield
    except MlopsError:
        raise
    except OSError as error:
        raise StorageError(f"feature store of model {model!r}: {error}. Check the disk and the online store's server.") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("redis", "psycopg", "psycopg_pool", "sqlite3"):
            raise StorageError(f"online store of model {model!r}: {error}. Check that it is up and reachable.") from error
        raise kind(
            f"features of model {model!r}: {type(error).__name__}: {error}. Correct the feature views or the rows given to them."
        ) from error
