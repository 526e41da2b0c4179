"""Values straight from Feast's online store: one read for all views and rows of a request, in Feast's own encoding."""

import os
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

SOCKET_SECONDS = 1.0  # where the store's connection_string does not say
KEYS_PER_STATEMENT = 30_000  # SQLite allows 32,766 parameters


@dataclass(frozen=True)
class StoredView:
    """A view as the online store keeps it: `table` is Feast's own object, `keys` its join keys in the view's order."""

    name: str
    keys: tuple[str, ...]
    features: tuple[str, ...]
    ttl_seconds: float
    table: Any


Found = tuple[float, dict[str, Any]]  # (event time in seconds since 1970, {feature: value})
Wanted = Mapping[str, Sequence[bytes]]  # {view: serialized entity keys}


class Reader(Protocol):
    """One backend's way to read."""

    def read(self, wanted: Wanted) -> dict[str, dict[bytes, Found]]:
        """{view: {entity key: what is stored}}; an entity that is not stored is left out."""
        ...

    def stamp(self) -> object:
        """Changes when the store must be opened anew."""
        ...


def reader_for(store: Any, views: Sequence[StoredView]) -> Reader:
    """The fastest reader that knows this store; any other store is read through Feast's `online_read`."""
    kind = type(store._get_provider().online_store).__name__
    if kind == "SqliteOnlineStore":
        return SqliteReader(store, views)
    if kind == "RedisOnlineStore":
        return RedisReader(store, views)
    return FeastReader(store, views)


class SqliteReader:
    """One statement over the tables of all views, on a read-only connection per thread; a view whose table was dropped has no rows."""

    def __init__(self, store: Any, views: Sequence[StoredView]) -> None:
        from feast.infra.online_stores.sqlite import _quote_id, _table_id
        from feast.protos.feast.types.Value_pb2 import Value

        online = store._get_provider().online_store
        versioned = store.config.registry.enable_online_feature_view_versioning
        self._path = Path(online._get_db_path(store.config)).absolute()
        self._tables = {view.name: _quote_id(_table_id(store.project, view.table, versioned)) for view in views}
        self._features = {view.name: frozenset(view.features) for view in views}
        self._parse = Value.FromString
        self._threads = threading.local()

    def stamp(self) -> object:
        status = os.stat(self._path)
        return status.st_ino, status.st_dev

    def read(self, wanted: Wanted) -> dict[str, dict[bytes, Found]]:
        if sum(map(len, wanted.values())) > KEYS_PER_STATEMENT:
            return self._in_parts(wanted)
        names = [name for name, keys in wanted.items() if keys]
        statement = " UNION ALL ".join(
            f"SELECT {position}, entity_key, feature_name, value, event_ts FROM {self._tables[name]} "
            f"WHERE entity_key IN ({','.join('?' * len(wanted[name]))})"
            for position, name in enumerate(names)
        )
        found: dict[str, dict[bytes, Found]] = {name: {} for name in wanted}
        if not names:
            return found
        by_position = [(found[name], self._features[name]) for name in names]
        try:
            rows = self._connection().execute(statement, [key for name in names for key in wanted[name]])
        except sqlite3.OperationalError:
            tables = {f'"{row[0]}"' for row in self._connection().execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            there = [name for name in names if self._tables[name] in tables]
            if not tables or there == names:
                raise
            return found | self.read({name: wanted[name] for name in there})
        for position, key, feature, value, moment in rows:
            entities, features = by_position[position]
            if feature in features:
                if key not in entities:
                    entities[key] = (_sqlite_seconds(moment), {})
                entities[key][1][feature] = plain(self._parse(value))
        return found

    def _in_parts(self, wanted: Wanted) -> dict[str, dict[bytes, Found]]:
        found: dict[str, dict[bytes, Found]] = {name: {} for name in wanted}
        for name, keys in wanted.items():
            for begin in range(0, len(keys), KEYS_PER_STATEMENT):
                found[name].update(self.read({name: keys[begin : begin + KEYS_PER_STATEMENT]})[name])
        return found

    def _connection(self) -> sqlite3.Connection:
        connection = getattr(self._threads, "connection", None)
        if connection is None:
            connection = sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True, isolation_level=None)
            self._threads.connection = connection
        return connection


def _sqlite_seconds(moment: int | str) -> float:
    """Feast stores a naive UTC time as if it were local, and reads it back so (`adapt_datetime_epoch`, `convert_timestamp`)."""
    naive = datetime.fromtimestamp(int(moment)) if isinstance(moment, int) else datetime.fromisoformat(moment)
    return naive.replace(tzinfo=UTC).timestamp()


class RedisReader:
    """One pipeline of HMGETs; views with the same entity share a hash and so a command."""

    def __init__(self, store: Any, views: Sequence[StoredView]) -> None:
        from feast.infra.online_stores.helpers import _mmh3
        from feast.infra.online_stores.redis import _versioned_fv_name
        from feast.protos.feast.types.Value_pb2 import Value
        from google.protobuf.timestamp_pb2 import Timestamp
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._client = store._get_provider().online_store._get_client(store.config.online_store)
        self._client.set_retry(Retry(NoBackoff(), 1))  # a request cannot wait: one new connection, then a clear error
        settings = self._client.get_connection_kwargs()
        settings.update({name: settings.get(name) or SOCKET_SECONDS for name in ("socket_timeout", "socket_connect_timeout")})
        self._project = store.project.encode()
        self._fields: dict[str, list[bytes]] = {}
        for view in views:
            stored = _versioned_fv_name(view.table, store.config)
            self._fields[view.name] = [_mmh3(f"{stored}:{feature}") for feature in view.features] + [f"_ts:{stored}".encode()]
        self._names = {view.name: view.features for view in views}
        self._parse, self._parse_time = Value.FromString, Timestamp.FromString

    def stamp(self) -> object:
        return None

    def read(self, wanted: Wanted) -> dict[str, dict[bytes, Found]]:
        views_of: dict[bytes, list[str]] = {}
        for name, keys in wanted.items():
            for key in keys:
                views_of.setdefault(key, []).append(name)
        with self._client.pipeline(transaction=False) as pipe:
            for key, names in views_of.items():
                pipe.hmget(key + self._project, [field for name in names for field in self._fields[name]])
            answers = pipe.execute()
        found: dict[str, dict[bytes, Found]] = {name: {} for name in wanted}
        for (key, names), answer in zip(views_of.items(), answers, strict=True):
            begin = 0
            for name in names:
                values = answer[begin : begin + len(self._fields[name])]
                begin += len(values)
                if values[-1] is not None:
                    found[name][key] = self._found(name, values)
        return found

    def _found(self, name: str, values: list[bytes | None]) -> Found:
        moment = self._parse_time(values[-1] or b"")
        pairs = zip(self._names[name], values, strict=False)
        return moment.seconds + moment.nanos / 1e9, {
            feature: None if raw is None else plain(self._parse(raw)) for feature, raw in pairs
        }


class FeastReader:
    """Any store, through Feast's interface: one read per view."""

    def __init__(self, store: Any, views: Sequence[StoredView]) -> None:
        from feast.infra.key_encoding_utils import deserialize_entity_key

        self._online, self._config = store._get_provider().online_store, store.config
        self._views = {view.name: view for view in views}
        self._entity = deserialize_entity_key
        self._lock = threading.Lock()  # a Feast store has one connection

    def stamp(self) -> object:
        return None

    def read(self, wanted: Wanted) -> dict[str, dict[bytes, Found]]:
        found: dict[str, dict[bytes, Found]] = {}
        for name, keys in wanted.items():
            view, distinct = self._views[name], [*dict.fromkeys(keys)]
            with self._lock:
                answers = self._online.online_read(
                    self._config, view.table, [self._entity(key) for key in distinct], [*view.features]
                )
            found[name] = {
                key: (_utc_seconds(moment), {feature: plain(value) for feature, value in values.items()})
                for key, (moment, values) in zip(distinct, answers, strict=True)
                if moment is not None and values is not None
            }
        return found


def _utc_seconds(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def plain(value: Any) -> Any:
    """A Feast value as Python has it, None where it is null."""
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return None
    content = getattr(value, kind)
    if kind == "unix_timestamp_val":
        return datetime.fromtimestamp(content, UTC)
    return [*content.val] if kind.endswith("_list_val") else content
