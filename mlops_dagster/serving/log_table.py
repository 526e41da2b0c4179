"""Answered requests as tables of the inference log."""

from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import pyarrow as pa

from mlops_dagster.serving.artifact import Signature
from mlops_dagster.serving.log_rows import Event
from mlops_dagster.serving.segments import ARROW, TIME, schema

VARYING = (
    "request_id",
    "row_id",
    "logged_at",
    "event_timestamp",
    "shadow",
    "prediction",
    "prediction_label",
    "score",
    "latency_ms",
)
ARROW_TYPES = {"int64": int, "bool": bool}


class EventTable:
    """Turns events into tables of the log's schema, in two steps: chunks of a few hundred rows, and one table of many chunks.

    A chunk holds Arrow arrays and no Python objects: whoever frees thousands of those later keeps answers waiting.
    """

    def __init__(self, signature: Signature, model: str, version: str, arm: str) -> None:
        self._features = signature.features
        self._schema = schema(signature)
        self._constants = {"model": model, "version": version, "arm": arm}
        self._positions = {str(c): float(i) for i, c in enumerate(signature.classes or ())}

    def chunks(self, events: Sequence[tuple[Any, ...]], times: np.ndarray) -> list[list[pa.Array]]:
        """One row for each answered row (`times` [events, 5]), in order of the events but for those of several rows, which come last."""
        single = [i for i, e in enumerate(events) if type(e[8]) is tuple]
        made = []
        if single:
            whole = len(single) == len(events)
            by = Event(*zip(*(events if whole else [events[i] for i in single]), strict=True))  # type: ignore[arg-type]
            columns = zip(*by.values, strict=True)
            made.append(self._chunk(by, times if whole else times[single], 1, by.row_ids, by.moments, columns))
        for i, event in enumerate(events):
            if type(event[8]) is not tuple:
                by = Event(*zip(event))  # type: ignore[arg-type]
                made.append(self._chunk(by, times[i : i + 1], event[5], event[6], event[7], event[8]))
        return made

    def _chunk(
        self,
        by: Any,
        times: np.ndarray,
        each: int,
        row_ids: Sequence[str],
        moments: Sequence[int | None],
        columns: Iterable[Any],
    ) -> list[pa.Array]:
        """The rows of events (given by field) that have `each` rows: an array for each varying column, the features last."""
        logged = np.repeat(np.array(by.wall_ns, dtype=np.int64) // 1000, each)
        labels = list(chain.from_iterable(by.labels))
        count, texts = len(labels), type(labels[0]) is str
        return [
            pa.array(_repeated(by.request_id, each), pa.string()),
            pa.array(row_ids, pa.string()),
            pa.array(logged).cast(TIME),
            _moments(moments, logged),
            pa.array(_repeated(by.shadow, each), pa.bool_()),
            pa.array(list(map(self._positions.get, labels)) if texts else np.array(labels, dtype=np.float64), pa.float64()),
            pa.array(labels, pa.string()) if texts else pa.nulls(count, pa.string()),
            _scores(by.probabilities, count),
            pa.array(np.repeat((times[:, 4] - times[:, 0]) / 1e6, each)),
            *(_feature(c, f.dtype) for c, f in zip(columns, self._features, strict=True)),
        ]

    def table(self, chunks: Sequence[Sequence[pa.Array]]) -> pa.Table:
        """The rows of all chunks, in their order, in one piece: Parquet then takes a quarter of the time."""
        arrays = [pa.concat_arrays(parts) for parts in zip(*chunks, strict=True)]
        found = dict(zip(VARYING, arrays, strict=False))
        features = pa.StructArray.from_arrays(arrays[len(VARYING) :], fields=list(self._schema.field("features").type))
        constants = {name: pa.repeat(pa.scalar(value, pa.string()), len(features)) for name, value in self._constants.items()}
        columns = {**found, **constants, "features": features}
        return pa.table([columns[f.name] for f in self._schema], schema=self._schema)

    def empty(self) -> pa.Table:
        """No rows."""
        return self._schema.empty_table()


def _repeated(values: Sequence[Any], each: int) -> Sequence[Any]:
    return values if each == 1 else list(chain.from_iterable(repeat(v, each) for v in values))


def _feature(column: Any, dtype: str) -> pa.Array:
    if dtype == "float64":
        return pa.array(np.asarray(column, dtype=np.float64), pa.float64(), from_pandas=True)
    if isinstance(column, np.ndarray) and column.dtype.kind == "f":  # NaN stands for a missing value
        return pa.array([None if v != v else ARROW_TYPES[dtype](v) for v in column.tolist()], ARROW[dtype])
    return pa.array(column, ARROW[dtype])


def _moments(moments: Sequence[int | None], logged: np.ndarray) -> pa.Array:
    """The event times; the time of logging where a row brought none."""
    if any(m is not None for m in moments):
        logged = np.array([w if m is None else m for m, w in zip(moments, logged.tolist(), strict=True)], dtype=np.int64)
    return pa.array(logged).cast(TIME)


def _scores(probabilities: Sequence[list[list[float]] | None], count: int) -> pa.Array:
    """The probability of the positive class of two; of more classes, or of a value, there is none."""
    first = probabilities[0]
    if first is None or len(first[0]) != 2:
        return pa.nulls(count, pa.float64())
    return pa.array([pair[1] for pairs in probabilities for pair in pairs or ()], pa.float64())
