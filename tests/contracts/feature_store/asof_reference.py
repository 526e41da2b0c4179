"""The point-in-time join by its definition: for each entity row, look at every source row. Slow, and plain enough to be believed."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def reference_join(
    entities: Sequence[Row], source: Sequence[Row], keys: Sequence[str], ttl: int | None, as_known: bool, created: bool = True
) -> list[Any]:
    """The `value` valid for each entity row, None where there is none. Times (`t`, `created`) are integers, None where missing."""
    return [reference_value(entity, source, keys, ttl, as_known, created) for entity in entities]


def reference_value(
    entity: Row, source: Sequence[Row], keys: Sequence[str], ttl: int | None, as_known: bool, created: bool
) -> Any:
    best: tuple[Any, ...] | None = None
    value = None
    for position, row in enumerate(source):
        if row["t"] is None or any(entity[k] is None or row[k] is None or entity[k] != row[k] for k in keys):
            continue
        if row["t"] > entity["t"] or (ttl is not None and row["t"] < entity["t"] - ttl):
            continue
        if as_known and created and (row["created"] is None or row["created"] > entity["t"]):
            continue
        rank = (row["t"], row["created"] is not None and created, (row["created"] or 0) if created else 0, position)
        if best is None or rank > best:
            best, value = rank, row["value"]
    return value
