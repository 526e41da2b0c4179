"""What a model's author defined, as Feast objects: collected, registered, and read back as a signature."""

import functools
import hashlib
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.resources.feature_store import FeatureSignature
from mlops_dagster.serving.feast_import import import_feast

if TYPE_CHECKING:
    import feast

DTYPES = {
    "DOUBLE": "float64",
    "FLOAT": "float64",
    "INT64": "int64",
    "INT32": "int64",
    "STRING": "string",
    "BOOL": "bool",
    "UNIX_TIMESTAMP": "timestamp",
}


def defined(model: str, define: Callable[[Callable[[str], Any]], Sequence[Any]], source: Callable[[str], Any]) -> list[Any]:
    """The author's objects and the feature service of all their views. Raises DeclarationError for anything else."""
    from feast import Entity, FeatureService, FeatureView, OnDemandFeatureView

    _at_home(define)
    made = define(source)
    if not isinstance(made, (list, tuple)) or not made:
        raise DeclarationError(
            f"features.define of model {model!r}: returned {made!r}. Return a list of entities and feature views."
        )
    wrong = [item for item in made if not isinstance(item, (Entity, FeatureView, OnDemandFeatureView))]
    if wrong:
        raise DeclarationError(
            f"features.define of model {model!r}: {wrong[0]!r} is no Entity, FeatureView or OnDemandFeatureView. The platform adds "
            f"the rest."
        )
    views = [item for item in made if not isinstance(item, Entity)]
    _check_names(model, views)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        service = FeatureService(name=model, features=views)
    return [*made, service]


def _at_home(define: Callable[..., Any]) -> None:
    """Feast's decorator tells an on-demand function that it lives in `__main__`; told so, its source is not found the next time."""
    module = sys.modules.get(getattr(define, "__module__", ""))
    if module is None:
        return
    for value in list(vars(module).values()):
        if isinstance(value, FunctionType) and value.__globals__ is vars(module):
            value.__module__ = module.__name__


def _check_names(model: str, views: list[Any]) -> None:
    from feast import FeatureView

    for view in views:
        if isinstance(view, FeatureView) and not view.schema:
            raise DeclarationError(
                f"feature view {view.name!r} of model {model!r}: has no schema. State its fields, so that it can be registered before "
                f"its first file exists."
            )
    names = [field.name for view in views for field in view.features]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DeclarationError(f"features of model {model!r}: {', '.join(twice)} defined by two views. Rename one of each.")


def fingerprint(objects: list[Any]) -> bytes:
    """Changes whenever Feast, or anything about an object that Feast would register, changes."""
    import feast

    protos = sorted(_undated(item.to_proto()).SerializeToString(deterministic=True) for item in objects)
    return hashlib.sha256(feast.__version__.encode() + b"\0".join(protos)).digest()


def _undated(proto: Any) -> Any:
    """Without the moments at which Feast made the objects."""
    for field, value in proto.ListFields():
        if field.name in ("created_timestamp", "last_updated_timestamp"):
            proto.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            parts = (
                [value[key] for key in value]
                if field.message_type.GetOptions().map_entry
                else value
                if field.is_repeated
                else [value]
            )
            for part in parts:
                if hasattr(part, "ListFields"):
                    _undated(part)
    return proto


def is_registry(content: bytes) -> bool:
    from feast.protos.feast.core.Registry_pb2 import Registry
    from google.protobuf.message import DecodeError

    try:
        Registry.FromString(content)
    except DecodeError:
        return False
    return True


def register(repo: Path, registry: str, objects: list[Any]) -> None:
    """Apply the objects to a registry file and the online store; views and entities that are gone are removed from both."""
    from feast import FeatureStore

    store = FeatureStore(repo_path=str(repo))
    store.config.registry.path = registry  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    names = {(type(item).__name__, item.name) for item in objects}
    before = [
        *store.list_feature_services(),
        *store.list_on_demand_feature_views(),
        *store.list_feature_views(),
        *(entity for entity in store.list_entities() if entity.name != "__dummy"),
    ]
    gone = [item for item in before if (type(item).__name__, item.name) not in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store.apply(objects, objects_to_delete=gone, partial=False)


@functools.lru_cache(maxsize=16)
def opened(repo: Path, registry_mtime_ns: int) -> "feast.FeatureStore":
    """Feast's own store for a model; opened anew whenever its registry was replaced."""
    import_feast()
    from feast import FeatureStore

    return FeatureStore(repo_path=str(repo))


def signature(store: "feast.FeatureStore", model: str) -> FeatureSignature:
    """Read what was registered under the model's name."""
    service = store.get_feature_service(model)
    views = {view.name: view for view in store.list_feature_views()}
    on_demand = {view.name: view for view in store.list_on_demand_feature_views()}
    features, entities, request = [], {}, {}
    for projection in service.feature_view_projections:
        features += [(field.name, dtype(field)) for field in projection.features]
        if projection.name in views:
            columns = views[projection.name].entity_columns
            entities.update(dict.fromkeys(column.name for column in columns if column.name != "__dummy_id"))
        else:
            for wanted in on_demand[projection.name].source_request_sources.values():
                request.update({field.name: dtype(field) for field in wanted.schema})
    stored = tuple(projection.name for projection in service.feature_view_projections if projection.name in views)
    return FeatureSignature(tuple(features), tuple(entities), tuple(request.items()), stored)


def columns(objects: list[Any]) -> dict[str, list[str]]:
    """Of each feature view among the author's objects, the columns that its source must have: join keys, then features."""
    from feast import Entity, FeatureView

    keys = {item.name: item.join_key for item in objects if isinstance(item, Entity)}
    found = {}
    for view in (item for item in objects if isinstance(item, FeatureView)):
        named = [*(keys[name] for name in view.entities if name in keys), *(field.name for field in view.features)]
        back = {new: old for old, new in view.batch_source.field_mapping.items()} if view.batch_source else {}
        found[view.name] = list(dict.fromkeys(back.get(name, name) for name in named))
    return found


def lifetime(view: "feast.FeatureView") -> tuple[list[str], float | None]:
    """A view's join keys, and the seconds for which a value is used that nothing replaces; None where it has no TTL."""
    keys = [column.name for column in view.entity_columns if column.name != "__dummy_id"]
    return keys, view.ttl.total_seconds() if view.ttl else None


def dtype(field: Any) -> str:
    name = str(field.dtype.to_value_type().name)
    return DTYPES.get(name, name.lower())
