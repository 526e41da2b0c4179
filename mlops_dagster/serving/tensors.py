"""Open Inference Protocol tensors as rows of the model: one 2-D tensor of all features, or one tensor for each column."""

import numpy as np

from mlops_dagster.serving.artifact import RESERVED, Feature, Signature
from mlops_dagster.serving.open_inference import Tensor
from mlops_dagster.serving.protocol import Batch
from mlops_dagster.serving.rows import INT64_MAX, InputError, check_distinct, event_times, short_id

KINDS = {"float64": "fiu", "int64": "iu", "bool": "b", "string": "O"}
DATATYPE_NAMES = {
    "float64": "FP16, FP32, FP64 or an INT or UINT type",
    "int64": "an INT or UINT type",
    "bool": "BOOL",
    "string": "BYTES",
}


def to_rows(tensors: list[Tensor], signature: Signature, may_lack_features: bool) -> list[dict[str, object]] | None:
    """Rows as dicts, where the tensors leave out features that an online store can complete; else None."""
    given = {t.name for t in tensors}
    if not may_lack_features or not given & set(signature.entities) or all(f.name in given for f in signature.features):
        return None
    known = {*RESERVED, *signature.entities, *(r.name for r in signature.request), *(f.name for f in signature.features)}
    if unknown := given - known:
        raise _unknown(sorted(unknown)[0], known)
    count = _count(tensors)
    features = {f.name: f for f in signature.features}
    columns = {t.name: _values(t, _single(t, count), features.get(t.name)) for t in tensors}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _values(tensor: Tensor, values: np.ndarray, feature: Feature | None) -> list[object]:
    """A column as plain values, NaN as None; that of a feature checked as in a whole row."""
    column = values if feature is None else _column(values, tensor.datatype, feature, tensor.name)
    listed = column.tolist()
    return [None if v != v else v for v in listed] if column.dtype.kind == "f" else listed


def to_batch(tensors: list[Tensor], signature: Signature) -> Batch:
    """Columns in signature order; raises InputError naming the tensor."""
    reserved = {t.name: t for t in tensors if t.name in RESERVED}
    extra = {*signature.entities, *(r.name for r in signature.request)}
    given = [t for t in tensors if t.name not in reserved]
    count = _count(tensors)
    named = {t.name: t for t in given}
    if len(given) == 1 and given[0].name not in {f.name for f in signature.features} and given[0].data.ndim == 2:
        columns = _from_block(given[0], signature)
    else:
        features = {f.name for f in signature.features}
        if unknown := named.keys() - features - extra:
            raise _unknown(sorted(unknown)[0], features | extra | set(RESERVED))
        if absent := [f.name for f in signature.features if f.name not in named]:
            raise InputError(f"The input tensor {absent[0]} is missing. Missing in all: {', '.join(absent)}.")
        columns = [_column(_single(named[f.name], count), named[f.name].datatype, f, f.name) for f in signature.features]
    ids, times = _reserved(reserved, count)
    return Batch(columns, ids, times)


def _from_block(tensor: Tensor, signature: Signature) -> list[np.ndarray]:
    width = len(signature.features)
    if tensor.data.shape[1] != width:
        names = ", ".join(f.name for f in signature.features)
        raise InputError(
            f"The input tensor {tensor.name} has shape {list(tensor.data.shape)}; the model has {width} features: {names}."
        )
    return [
        _column(_whole_floats(tensor.data[:, i], f), tensor.datatype, f, f"{tensor.name}[:, {i}] ({f.name})")
        for i, f in enumerate(signature.features)
    ]


def _whole_floats(values: np.ndarray, feature: Feature) -> np.ndarray:
    """In one float tensor of all features a whole number and a boolean are floats too: taken back to what they stand for."""
    if values.dtype.kind == "f" and feature.dtype == "int64":
        wide = values.astype(np.float64)
        if feature.nullable and np.isnan(wide).any():
            return wide
        if np.isfinite(wide).all() and (wide == np.trunc(wide)).all() and (np.abs(wide) < 2.0**63).all():
            return wide.astype(np.int64)
    if values.dtype.kind in "fiu" and feature.dtype == "bool" and np.isin(values, (0, 1)).all():
        return values.astype(np.bool_)
    return values


def _column(values: np.ndarray, datatype: str, feature: Feature, where: str) -> np.ndarray:
    if values.dtype.kind not in KINDS[feature.dtype] and not (
        feature.nullable and values.dtype.kind == "f" and feature.dtype == "int64"
    ):
        raise InputError(
            f"The input tensor {where} is {datatype}; the feature is {feature.dtype} and needs {DATATYPE_NAMES[feature.dtype]}."
        )
    if values.dtype.kind == "O":
        absent = np.array([v is None for v in values], dtype=np.bool_)
        made = values
    elif values.dtype.kind == "f":
        made = values.astype(np.float64)
        absent = np.isnan(made)
        if (endless := np.isinf(made)).any():
            raise InputError(
                f"The input tensor {where} is infinite in row {int(np.argmax(endless))}; it must be a finite number."
            )
    else:
        if values.dtype == np.uint64 and (values > INT64_MAX).any():
            raise InputError(f"The input tensor {where} holds a value outside the range of a 64-bit integer.")
        made = values.astype({"float64": np.float64, "int64": np.int64, "bool": np.bool_}[feature.dtype])
        absent = np.zeros(len(values), dtype=np.bool_)
    if absent.any() and not feature.nullable:
        raise InputError(f"The input tensor {where} is null (NaN) in row {int(np.argmax(absent))}; the feature is not nullable.")
    return made


def _count(tensors: list[Tensor]) -> int:
    count = tensors[0].data.shape[0]
    if count == 0:
        raise InputError(f"The input tensor {tensors[0].name} has no rows; give at least one.")
    for tensor in tensors:
        if tensor.data.shape[0] != count:
            raise InputError(
                f"The input tensor {tensor.name} has {tensor.data.shape[0]} rows, {tensors[0].name} has {count}; they must agree."
            )
    return count


def _single(tensor: Tensor, count: int) -> np.ndarray:
    if tensor.data.size != count:
        raise InputError(
            f"The input tensor {tensor.name} has shape {list(tensor.data.shape)}; one column needs [{count}] or [{count}, 1]."
        )
    return tensor.data.reshape(count)


def _reserved(found: dict[str, Tensor], count: int) -> tuple[list[str], list]:
    ids = [f"#{i}" for i in range(count)]
    if tensor := found.get("id"):
        given = enumerate(_single(tensor, count).tolist())
        ids = [ids[i] if v is None else short_id(str(v), i) for i, v in given]
        check_distinct(ids)
    times = [None] * count
    if tensor := found.get("event_timestamp"):
        times = event_times(_single(tensor, count).tolist())
    return ids, times


def _unknown(name: str, known: set[str]) -> InputError:
    return InputError(f"The input tensor {name[:200]} is not a feature of this model. Known: {', '.join(sorted(known))}.")
