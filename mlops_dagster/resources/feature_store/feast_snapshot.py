"""The definitions that a version was trained with, as bytes that go into its artifact."""

import sys
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from mlops_dagster.core.errors import NotFoundError
from mlops_dagster.serving.feast_import import import_feast


def snapshot(registry: Path, model: str) -> bytes:
    """The model's feature service, with the views and entities that it needs, as a Feast registry (`Registry.proto`).

    Equal definitions give equal bytes: nothing of it says when, where or how often they were applied, nor where the rows lie. Raises
    NotFoundError if the registry has no such service.
    """
    import_feast()
    from feast.protos.feast.core.Registry_pb2 import Registry

    found, kept = Registry.FromString(registry.read_bytes()), Registry()
    services = [service for service in found.feature_services if service.spec.name == model]
    if not services:
        raise NotFoundError(
            f"features of model {model!r}: no feature service of that name in {registry}. Apply its features first."
        )
    wanted = {projection.feature_view_name for projection in services[0].spec.features}
    made = [view for view in found.on_demand_feature_views if view.spec.name in wanted]
    wanted |= {source.feature_view_projection.feature_view_name for view in made for source in view.spec.sources.values()}
    views = [view for view in found.feature_views if view.spec.name in wanted]
    joined = {name for view in views for name in view.spec.entities}
    kept.feature_services.append(services[0])
    kept.on_demand_feature_views.extend(sorted(made, key=_name))
    kept.feature_views.extend(sorted(views, key=_name))
    kept.entities.extend(sorted((entity for entity in found.entities if entity.spec.name in joined), key=_name))
    for item in (*kept.feature_services, *kept.on_demand_feature_views, *kept.feature_views, *kept.entities):
        _strip(item)
    for view in kept.on_demand_feature_views:
        _settle(view.spec.feature_transformation.user_defined_function)
    return kept.SerializeToString(deterministic=True)


def _name(item: Any) -> str:
    return item.spec.name


def _strip(proto: Any) -> None:
    """Without the moments at which things were applied, and without where the offline rows lie: serving reads the online store."""
    for field, value in proto.ListFields():
        if field.name in ("meta", "batch_source", "stream_source"):
            proto.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            keyed = field.message_type.GetOptions().map_entry
            for part in [value[key] for key in value] if keyed else value if field.is_repeated else [value]:
                if hasattr(part, "ListFields"):
                    _strip(part)


def _settle(function: Any) -> None:
    """Of an on-demand function keep what Feast will use: its text where that runs by itself, else the pickled one in a settled form."""
    from feast.transformation.udf_rehydrate import rehydrate_udf_from_source

    if rehydrate_udf_from_source(function.body_text, preferred_name=function.name) is not None:
        function.ClearField("body")
    elif function.body:
        function.body = _settled(function.body)


def _settled(body: bytes) -> bytes:
    """The pickled function without its place in a file, its globals in order (`dill` writes them in the order of a set)."""
    import dill

    loaded = dill.loads(body)
    if not isinstance(loaded, FunctionType):
        return body
    names = sorted(name for name in loaded.__globals__ if name != "__builtins__")
    made = FunctionType(
        _unplaced(loaded.__code__),
        {name: loaded.__globals__[name] for name in names},
        loaded.__name__,
        loaded.__defaults__,
        loaded.__closure__,
    )
    made.__kwdefaults__, made.__module__ = loaded.__kwdefaults__, "__main__"
    return dill.dumps(made)


def _unplaced(code: CodeType) -> CodeType:
    constants = tuple(_unplaced(item) if isinstance(item, CodeType) else item for item in code.co_consts)
    # Interned, as a pickle writes a text that it met before as a reference.
    return code.replace(co_filename=sys.intern(f"<{code.co_name}>"), co_firstlineno=1, co_consts=constants)
