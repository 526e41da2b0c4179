"""Answered requests as rows of the inference log."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mlops_dagster.serving.artifact import Signature
from mlops_dagster.serving.segments import ARROW, TIME, schema


class Event(NamedTuple):
    """One answered request; the answer's path makes a plain tuple of the same order, which costs a tenth.

    A request of one row that came as V1 has that row (a tuple) in `values` and single values in `row_ids` and `moments`; any other has
    columns in signature order and lists. `times_ns` are perf_counter times: arrived, body read, row checked, scored, answered.
    """

    request_id: str
    protocol: str
    shadow: bool
    wall_ns: int
    times_ns: tuple[int, int, int, int, int]
    count: int
    row_ids: Any
    moments: Any
    values: Any
    labels: list[Any]
    probabilities: list[list[float]] | None


class EventTable:
    """Turns events into a table of the log's schema."""

    def __init__(self, signature: Signature, model: str, version: str, arm: str) -> None:
        self._signature = signature
        self._schema = schema(signature)
        self._constants = {"model": model, "version": version, "arm": arm}
        self._positions = {str(c): float(i) for i, c in enumerate(signature.classes or ())}

    def build(self, events: Sequence[Event]) -> pa.Table:
        """One row for each answered row, in order of the events but for those of several rows, which come last."""
        single = [e for e in events if type(e[8]) is tuple]
        parts = []
        if single:
            by = Event(*zip(*single, strict=True))  # type: ignore[arg-type]
            parts.append(self._part(by, 1, by.row_ids, by.moments, zip(*by.values, strict=True)))
        for event in events:
            if type(event[8]) is not tuple:
                by = Event(*zip(event))  # type: ignore[arg-type]
                parts.append(self._part(by, event[5], event[6], event[7], event[8]))
        return pa.concat_tables(parts)

    def _part(
        self, by: Any, each: int, row_ids: Sequence[str], moments: Sequence[datetime | None], columns: Iterable[Any]
    ) -> pa.Table:
        """A table of events (given by field) that have `each` rows."""
        count = each * len(by.request_id)
        logged = np.repeat(np.array(by.wall_ns, dtype=np.int64) // 1000, each)
        times = np.array(by.times_ns, dtype=np.int64)
        labels = list(chain.from_iterable(by.labels))
        texts = type(labels[0]) is str
        arrays: dict[str, pa.Array] = {
            "request_id": pa.array(_repeated(by.request_id, each), pa.string()),
            "row_id": pa.array(row_ids, pa.string()),
            "logged_at": pa.array(logged).cast(TIME),
            "event_timestamp": _moments(moments, logged),
            "shadow": pa.array(_repeated(by.shadow, each), pa.bool_()),
            "features": self._features(columns),
            "prediction": pa.array(
                list(map(self._positions.get, labels)) if texts else np.array(labels, dtype=np.float64), pa.float64()
            ),
            "prediction_label": pa.array(labels, pa.string()) if texts else pa.nulls(count, pa.string()),
            "score": _scores(by.probabilities, count),
            "latency_ms": pa.array(np.repeat((times[:, 4] - times[:, 0]) / 1e6, each)),
        }
        for name, value in self._constants.items():
            arrays[name] = pa.repeat(pa.scalar(value, pa.string()), count)
        return pa.table([arrays[f.name] for f in self._schema], schema=self._schema)

    def _features(self, columns: Iterable[Any]) -> pa.StructArray:
        made = [_feature(c, f.dtype) for c, f in zip(columns, self._signature.features, strict=True)]
        return pa.StructArray.from_arrays(made, fields=list(self._schema.field("features").type))


def _repeated(values: Sequence[Any], each: int) -> Sequence[Any]:
    return values if each == 1 else list(chain.from_iterable(repeat(v, each) for v in values))


def _feature(column: Any, dtype: str) -> pa.Array:
    if dtype == "float64":
        return pa.array(np.asarray(column, dtype=np.float64), pa.float64(), from_pandas=True)
    if isinstance(column, np.ndarray) and column.dtype.kind == "f":
        return pa.array([None if v != v else int(v) for v in column.tolist()], pa.int64()).cast(ARROW[dtype])
    return pa.array(column, ARROW[dtype])


def _moments(moments: Sequence[datetime | None], logged: np.ndarray) -> pa.Array:
    """The event times; the time of logging where a row brought none."""
    if not any(moments):
        return pa.array(logged).cast(TIME)
    return pa.array([pa.scalar(int(w), TIME) if m is None else m for m, w in zip(moments, logged, strict=True)], TIME)


def _scores(probabilities: Sequence[list[list[float]] | None], count: int) -> pa.Array:
    """The probability of the positive class of two; of more classes, or of a value, there is none."""
    first = probabilities[0]
    if first is None or len(first[0]) != 2:
        return pa.nulls(count, pa.float64())
    return pa.array([pair[1] for pairs in probabilities for pair in pairs or ()], pa.float64())
