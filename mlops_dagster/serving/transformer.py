"""Requests that name entities only, completed with the features that Feast's online store has for them now."""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mlops_dagster.core.errors import ArtifactError, DataError, DeclarationError, NotFoundError, StorageError
from mlops_dagster.serving.feast_import import import_feast
from mlops_dagster.serving.online_store import Found, Reader, StoredView, reader_for

Row = dict[str, Any]
WHOLE = {"INT32": 2**31, "INT64": 2**63, "UNIX_TIMESTAMP": 2**63}  # each with the number that is too large for it
CONFIGURATION = "feature_store.yaml"


@dataclass(frozen=True)
class OnDemand:
    """An on-demand view: `inputs` are the columns that it may see, `compute` takes and gives {column: list}."""

    name: str
    inputs: tuple[str, ...]
    features: tuple[str, ...]
    compute: Callable[[dict[str, list[Any]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """Everything about a model's feature service that does not change between two requests."""

    features: tuple[str, ...]
    entities: Mapping[str, str]  # join key: Feast's value type
    request: Mapping[str, str]  # request-time value: Feast's value type
    views: tuple[StoredView, ...]
    on_demand: tuple[OnDemand, ...]
    reader: Reader
    encode: Mapping[str, Callable[[Row], bytes]]  # view: entity key of a row


class OnlineFeatures:
    """Completes requests of one model: entity keys and request-time values in, its features in the service's order out.

    The views, the key encoding and the on-demand functions are resolved once and again when the registry changes. `missing` says what
    an entity that the store does not know gives: None for its features (`null`), or a DataError (`error`); `defaults` maps a feature to
    the value to use in place of None. A value older than its view's time to live, at the row's `event_timestamp` or now, counts as missing,
    as it does when a training set is made. With `definitions` (the bytes of `HasSignature.definitions`) those hold, whatever is applied
    later, and a view that the store has dropped since knows no entity. A stored feature that a row brings itself is used in place of the
    store's. Raises NotFoundError if the model's features were never applied, StorageError if the store is away.
    """

    def __init__(
        self,
        repo: Path,
        model: str,
        missing: Literal["null", "error"] = "null",
        defaults: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
        definitions: bytes | None = None,
    ) -> None:
        if missing not in ("null", "error"):
            raise DeclarationError(f"missing is {missing!r}. Use 'null' or 'error'.")
        self._repo, self._model, self._missing, self._clock = Path(repo).absolute(), model, missing, clock
        self._defaults = dict(defaults or {})
        self._lock = threading.Lock()
        self._definitions = definitions
        self._followed = self._repo / ("registry.db" if definitions is None else CONFIGURATION)
        self._plan, self._stamp = self._resolved()
        if unknown := sorted(set(self._defaults) - set(self._plan.features)):
            raise DeclarationError(
                f"defaults of model {model!r}: no feature {', '.join(unknown)}. There are: {', '.join(self.features)}."
            )

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the features, in the service's order."""
        return self._plan.features

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a row must hold: the join keys, then the request-time values."""
        return (*self._plan.entities, *self._plan.request)

    def complete(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        """The features of each row, in one read of the store. Raises DataError naming the row and the field that is wrong."""
        if not rows:
            return []
        plan = self._current()
        given = [_checked(plan, position, row) for position, row in enumerate(rows)]
        keys = {view.name: [plan.encode[view.name](row) for row in given] for view in plan.views}
        found = self._read(plan, {name: [*dict.fromkeys(column)] for name, column in keys.items()})
        now = self._clock()
        moments = [_moment(position, row, now) for position, row in enumerate(rows)]
        columns: dict[str, list[Any]] = {name: [row[name] for row in given] for name in (*plan.entities, *plan.request)}
        for view in plan.views:
            self._fill(view, columns, keys[view.name], found[view.name], moments, given)
        for view in plan.on_demand:
            _compute(view, columns, len(rows))
        return self._answer(plan, columns, len(rows))

    def stored_at(self, view: str, rows: Sequence[Mapping[str, Any]]) -> list[datetime | None]:
        """The event time of what the store holds of a view for each row's entity (its join keys are enough); None where nothing.

        Raises NotFoundError for a view that is not among the model's, DataError for a key of the wrong type.
        """
        plan = self._current()
        keys = next((known.keys for known in plan.views if known.name == view), None)
        if keys is None:
            raise NotFoundError(
                f"feature view {view!r} of model {self._model!r}: there are {', '.join(v.name for v in plan.views)}."
            )
        typed = [{name: _typed(n, name, plan.entities[name], row[name]) for name in keys} for n, row in enumerate(rows)]
        wanted = [plan.encode[view](row) for row in typed]
        found = self._read(plan, {view: [*dict.fromkeys(wanted)]})[view]
        return [datetime.fromtimestamp(found[key][0], UTC) if key in found else None for key in wanted]

    def _fill(
        self,
        view: StoredView,
        columns: dict[str, list[Any]],
        keys: list[bytes],
        found: Mapping[bytes, Found],
        moments: list[float],
        rows: list[Row],
    ) -> None:
        stored = []
        for key, moment, row in zip(keys, moments, rows, strict=True):
            value = found.get(key)
            if value is None or (view.ttl_seconds and value[0] < moment - view.ttl_seconds):
                self._refuse(view, row)
                value = (0.0, {})
            stored.append({**value[1], **row})
        for feature in view.features:
            columns[feature] = [values.get(feature) for values in stored]

    def _refuse(self, view: StoredView, row: Row) -> None:
        if self._missing == "error" and not set(view.features) <= {*self._defaults, *row}:
            entity = ", ".join(f"{name}={row[name]!r}" for name in view.keys)
            raise DataError(
                f"entity {entity}: the online store has no current values of feature view {view.name!r} for it. Materialize or push them, "
                f"send the features themselves, or give their defaults."
            )

    def _answer(self, plan: Plan, columns: Mapping[str, list[Any]], count: int) -> list[Row]:
        ordered = [columns[name] for name in plan.features]
        rows = (
            [dict(zip(plan.features, values, strict=True)) for values in zip(*ordered, strict=True)] if ordered else [{}] * count
        )
        for name, value in self._defaults.items():
            for row in rows:
                if row[name] is None:
                    row[name] = value
        return rows

    def _read(self, plan: Plan, wanted: dict[str, list[bytes]]) -> dict[str, dict[bytes, Found]]:
        try:
            return plan.reader.read(wanted)
        except Exception as error:  # whatever the store's own client raises
            self._stamp = None  # connect anew for the next request
            raise StorageError(
                f"online store of model {self._model!r}: {type(error).__name__}: {error}. Check that it is up, reachable and materialized."
            ) from error

    def _current(self) -> Plan:
        """The plan, made anew if the registry or the store's file was replaced; a registry that is just being written waits its turn."""
        try:
            stamp = self._stamp_now(self._plan)
            if stamp != self._stamp:
                with self._lock:
                    if stamp != self._stamp:
                        self._plan, self._stamp = self._resolved()
        except Exception:  # half a registry, or none for a moment: the plan in hand still answers
            pass
        return self._plan

    def _stamp_now(self, plan: Plan) -> object:
        status = os.stat(self._followed)
        return status.st_mtime_ns, status.st_ino, status.st_size, plan.reader.stamp()

    def _resolved(self) -> tuple[Plan, object]:
        if not (self._repo / CONFIGURATION).exists():
            raise NotFoundError(
                f"features of model {self._model!r}: no {CONFIGURATION} in {self._repo}. Apply its features first."
            )
        before = os.stat(self._followed) if self._followed.exists() else None
        plan = resolve(self._repo, self._model, self._definitions)
        if before is None:
            raise NotFoundError(f"features of model {self._model!r}: no registry in {self._repo}. Apply its features first.")
        return plan, (before.st_mtime_ns, before.st_ino, before.st_size, plan.reader.stamp())


def resolve(repo: Path, model: str, definitions: bytes | None = None) -> Plan:
    """Read the model's feature service from `definitions`, else from Feast's registry."""
    import_feast()
    from feast import FeatureStore

    store = FeatureStore(repo_path=str(repo))
    service, stored, on_demand = _registered(store, repo, model) if definitions is None else _kept(definitions)
    features, views, computed = [], {}, []
    request: dict[str, str] = {}
    for projection in service.feature_view_projections:
        features += [field.name for field in projection.features]
        if projection.name in stored:
            views.setdefault(projection.name, stored[projection.name])
            continue
        made = on_demand[projection.name]
        views.update({name: stored[name] for name in _sources(made) if name not in views})
        request.update({field.name: _type(field) for source in made.source_request_sources.values() for field in source.schema})
        computed.append(made)
    entities = {
        column.name: _type(column) for view in views.values() for column in view.entity_columns if column.name != "__dummy_id"
    }
    plain_views = tuple(_stored_view(view) for view in views.values())
    return Plan(
        tuple(features),
        entities,
        request,
        plain_views,
        tuple(_on_demand(view, entities, request, stored) for view in computed),
        reader_for(store, plain_views),
        {view.name: _encoder(view, entities) for view in plain_views},
    )


def _registered(store: Any, repo: Path, model: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The service, the stored views and the on-demand views of a registry."""
    from feast.errors import FeatureServiceNotFoundException

    try:
        service = store.get_feature_service(model)
    except FeatureServiceNotFoundException as error:
        raise NotFoundError(
            f"features of model {model!r}: no feature service of that name in {repo}. Apply its features first."
        ) from error
    stored = {view.name: view for view in store.list_feature_views()}
    return service, stored, {view.name: view for view in store.list_on_demand_feature_views()}


def _kept(definitions: bytes) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The same of the definitions that a version brings."""
    from feast import FeatureService, FeatureView, OnDemandFeatureView
    from feast.protos.feast.core.Registry_pb2 import Registry

    try:
        found = Registry.FromString(definitions)
        (service,) = map(FeatureService.from_proto, found.feature_services)
        stored = {proto.spec.name: FeatureView.from_proto(proto) for proto in found.feature_views}
        return service, stored, {p.spec.name: OnDemandFeatureView.from_proto(p) for p in found.on_demand_feature_views}
    except Exception as error:  # whatever Feast, or an on-demand function of a package that is gone, raises
        raise ArtifactError(
            f"the feature definitions of the artifact cannot be read: {type(error).__name__}: {error}. Train the version again."
        ) from error


def _sources(view: Any) -> list[str]:
    return [projection.name for projection in view.source_feature_view_projections.values()]


def _type(field: Any) -> str:
    return field.dtype.to_value_type().name


def _stored_view(view: Any) -> StoredView:
    keys = tuple(column.name for column in view.entity_columns if column.name != "__dummy_id")
    return StoredView(
        view.name, keys, tuple(field.name for field in view.features), view.ttl.total_seconds() if view.ttl else 0.0, view
    )


def _on_demand(view: Any, entities: Mapping[str, str], request: Mapping[str, str], stored: Mapping[str, Any]) -> OnDemand:
    if view.write_to_online_store or view.aggregations or view.mode not in ("python", "pandas"):
        raise DeclarationError(
            f"on-demand feature view {view.name!r}: mode {view.mode!r}, written to the online store or with aggregations is not served. "
            f"Use mode='python' (fastest) or 'pandas' that computes at request time."
        )
    own = [field.name for name in _sources(view) for field in stored[name].features]
    asked = [field.name for source in view.source_request_sources.values() for field in source.schema]
    inputs = tuple(dict.fromkeys([*entities, *own, *asked]))
    return OnDemand(view.name, inputs, tuple(field.name for field in view.features), _function(view))


def _function(view: Any) -> Callable[[dict[str, list[Any]]], Mapping[str, Any]]:
    udf = view.feature_transformation.udf
    if view.mode == "pandas":
        import pandas as pd

        return lambda columns: {name: [*series] for name, series in udf(pd.DataFrame(columns)).items()}
    if not view.singleton:
        return udf

    def row_by_row(columns: dict[str, list[Any]]) -> Mapping[str, Any]:
        rows = [udf(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    return row_by_row


def _compute(view: OnDemand, columns: dict[str, list[Any]], count: int) -> None:
    try:
        made = view.compute({name: [*columns[name]] for name in view.inputs})
        for name in view.features:
            values = [_without_nan(value) for value in made[name]]
            if len(values) != count:
                raise DataError(f"{name} has {len(values)} values for {count} rows")
            columns[name] = values
    except Exception as error:  # the model author's own function
        raise DataError(
            f"on-demand feature view {view.name!r}: {type(error).__name__}: {error}. Its function must take null inputs and give one value "
            f"per row for each of {', '.join(view.features)}."
        ) from error


def _without_nan(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _encoder(view: StoredView, entities: Mapping[str, str]) -> Callable[[Row], bytes]:
    """Feast's own entity key of a row (`serialize_entity_key`, version 3)."""
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    if not view.keys:
        nobody = serialize_entity_key(EntityKey(join_keys=["__dummy_id"], entity_values=[Value(string_val="")]), 3)
        return lambda row: nobody
    fields = [(name, f"{entities[name].lower()}_val") for name in view.keys]
    names = [*view.keys]

    def encode(row: Row) -> bytes:
        values = [Value(**{field: row[name]}) for name, field in fields]
        return serialize_entity_key(EntityKey(join_keys=names, entity_values=values), 3)

    return encode


def _checked(plan: Plan, position: int, row: Mapping[str, Any]) -> Row:
    """The row's join keys and request-time values, of the types that the definitions state, and the stored features that it brings."""
    given: Row = {}
    for name, kind in plan.entities.items():
        if (value := _without_nan(row.get(name))) is None:
            raise DataError(
                f"instance {position}: no value for entity key {name!r}. Give {', '.join((*plan.entities, *plan.request))}."
            )
        given[name] = _typed(position, name, kind, value)
    for name, kind in plan.request.items():
        if name not in row:
            raise DataError(
                f"instance {position}: no value for {name!r}. Give {', '.join((*plan.entities, *plan.request))}; null is allowed."
            )
        value = _without_nan(row[name])
        given[name] = None if value is None else _typed(position, name, kind, value)
    given.update({name: row[name] for view in plan.views for name in view.features if name in row})
    return given


def _typed(position: int, name: str, kind: str, value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"instance {position}: {name} is {value!r}. Send a finite number.")
    if kind in WHOLE and number and value == int(value):
        if -WHOLE[kind] <= value < WHOLE[kind]:
            return int(value)
        raise DataError(f"instance {position}: {name} is {value!r}, outside the range of its type {kind}. Send a smaller number.")
    if kind in ("DOUBLE", "FLOAT") and number:
        return float(value)
    if (kind == "STRING" and isinstance(value, str)) or (kind == "BOOL" and isinstance(value, bool)):
        return value
    if kind in ("BYTES",) and isinstance(value, bytes):
        return value
    if kind not in (*WHOLE, "DOUBLE", "FLOAT", "STRING", "BOOL", "BYTES"):
        return value
    raise DataError(f"instance {position}: {name} is {value!r}, but its type is {kind}. Send a value of that type.")


def _moment(position: int, row: Mapping[str, Any], now: float) -> float:
    """The row's own time in seconds since 1970, else now."""
    moment = row.get("event_timestamp")
    try:
        moment = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
        return now if moment is None else (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"instance {position}: event_timestamp is {moment!r}. Send ISO 8601, such as 2013-01-01T09:00:00Z."
        ) from error
