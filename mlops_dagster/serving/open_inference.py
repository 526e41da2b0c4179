"""The Open Inference Protocol V2 (REST) with the binary tensor extension.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from mlops_dagster.serving.protocol import check_plain, parse_json
from mlops_dagster.serving.rows import MAXIMUM_ID, InputError, short
from mlops_dagster.serving.scoring import TensorSpec

DATATYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
KIND = {"b": "a boolean", "u": "an unsigned integer", "i": "an integer", "f": "a number", "O": "a string"}
MAXIMUM_NAME = 200
MAXIMUM_LENGTH_DIGITS = 18
MAXIMUM_DIMENSIONS = 2
"""Rows, and the features of a row: nothing that a model here takes has more."""


@dataclass(frozen=True)
class Tensor:
    """One input tensor: `data` has `shape`; BYTES are strings."""

    name: str
    datatype: str
    data: np.ndarray


@dataclass(frozen=True)
class InferRequest:
    """A parsed V2 request; `wanted` are the requested outputs by name with whether they go out as binary data."""

    id: str | None
    tensors: list[Tensor]
    wanted: list[tuple[str, bool]]


def parse(body: bytes, header_length: str | None, outputs: tuple[TensorSpec, ...]) -> InferRequest:
    """A V2 request body; `header_length` is the header Inference-Header-Content-Length where binary data follows the JSON.

    Raises InputError that names the tensor.
    """
    document, tail = _split(body, header_length)
    if type(document) is not dict:
        raise InputError('The body must be an object such as {"inputs": [{...}]}.')
    inputs = document.get("inputs")
    if type(inputs) is not list or not inputs:
        raise InputError('The field "inputs" must be a non-empty list of tensors.')
    identity = document.get("id")
    if identity is not None and type(identity) is not str:
        raise InputError(f'The field "id" must be a string, not {short(identity)}.')
    if identity is not None and len(identity) > MAXIMUM_ID:
        raise InputError(f'The field "id" has {len(identity)} characters; at most {MAXIMUM_ID} are taken.')
    tensors = []
    for number, one in enumerate(inputs):
        tensor, tail = _tensor(one, number, tail)
        tensors.append(tensor)
    if tail:
        raise InputError(f"{len(tail)} bytes of binary data belong to no input tensor.")
    names = [t.name for t in tensors]
    if len(set(names)) != len(names):
        raise InputError(f"An input tensor is given twice: {sorted(n for n in set(names) if names.count(n) > 1)}.")
    return InferRequest(identity, tensors, _wanted(document, outputs))


def _split(body: bytes, header_length: str | None) -> tuple[Any, memoryview]:
    if header_length is None:
        return parse_json(body), memoryview(b"")
    check_plain(body)
    whole = header_length.isascii() and header_length.isdigit() and len(header_length) <= MAXIMUM_LENGTH_DIGITS
    if not whole or int(header_length) > len(body):
        raise InputError(f"The header Inference-Header-Content-Length is {header_length!r:.40}; the body has {len(body)} bytes.")
    length = int(header_length)
    return parse_json(body[:length]), memoryview(body)[length:]


def _tensor(raw: Any, number: int, tail: memoryview) -> tuple[Tensor, memoryview]:
    if type(raw) is not dict:
        raise InputError(f"inputs[{number}] must be an object with name, shape, datatype and data.")
    name, datatype = raw.get("name"), raw.get("datatype")
    if type(name) is not str or not name:
        raise InputError(f"inputs[{number}].name must be a string.")
    where = f"inputs[{number}] ({name[:MAXIMUM_NAME]})"
    if type(datatype) is not str or datatype not in DATATYPES:
        raise InputError(f"{where}: datatype {short(datatype)} is not one of {', '.join(DATATYPES)}.")
    shape = _shape(raw.get("shape"), where)
    size = (_parameters(raw, where)).get("binary_data_size")
    if size is None:
        return Tensor(name, datatype, _from_json(raw.get("data"), datatype, shape, where)), tail
    if type(size) is not int or not 0 <= size <= len(tail):
        raise InputError(f"{where}: binary_data_size {short(size)} does not fit the {len(tail)} bytes that follow the JSON.")
    return Tensor(name, datatype, _from_binary(tail[:size], datatype, shape, where)), tail[size:]


def _shape(raw: Any, where: str) -> list[int]:
    """A shape whose sizes are all positive, so that its product, once it equals the number of values, bounds each of them."""
    if type(raw) is not list or not raw:
        raise InputError(f"{where}: shape {short(raw)} must be a list of whole numbers, the number of rows first.")
    if len(raw) > MAXIMUM_DIMENSIONS:
        raise InputError(
            f"{where}: shape {short(raw)} has {len(raw)} dimensions; give [rows] or [rows, 1] for one column, [rows, features] for all."
        )
    if not all(type(size) is int and size >= 0 for size in raw):
        raise InputError(f"{where}: shape {short(raw)} must be a list of whole numbers, the number of rows first.")
    if 0 in raw:
        raise InputError(f"{where}: shape {raw} has no rows or no columns; give at least one value.")
    return raw


def _parameters(raw: dict[str, Any], where: str) -> dict[str, Any]:
    found = raw.get("parameters")
    if found is None:
        return {}
    if type(found) is not dict:
        raise InputError(f"{where}: parameters must be an object.")
    return found


def _from_json(data: Any, datatype: str, shape: list[int], where: str) -> np.ndarray:
    if type(data) is not list:
        raise InputError(f'{where}: the field "data" must be a list.')
    flat = _flatten(data, where)
    if len(flat) != math.prod(shape):
        raise InputError(f"{where}: shape {shape} needs {math.prod(shape)} values, data has {len(flat)}.")
    element = DATATYPES[datatype]
    for number, value in enumerate(flat):
        if not _accepts(element, value):
            raise InputError(f"{where}: data[{number}] is {short(value)}; {datatype} needs {KIND[element.kind]}.")
    made = np.empty(len(flat), dtype=object)
    made[:] = flat
    if element.kind == "O":
        return made.reshape(shape)
    try:
        with np.errstate(over="raise"):
            return (made.astype(np.float64).astype(element) if element.kind == "f" else _whole(made, element)).reshape(shape)
    except (OverflowError, FloatingPointError):
        raise InputError(f"{where}: a value is outside the range of {datatype}.") from None


def _whole(values: np.ndarray, element: np.dtype) -> np.ndarray:
    if element.kind == "b":
        return values.astype(np.bool_)
    limits = np.iinfo(element)
    if len(values) and not (limits.min <= min(values) and max(values) <= limits.max):
        raise OverflowError
    return values.astype(element)


def _flatten(data: list[Any], where: str) -> list[Any]:
    while data and type(data[0]) is list:
        if not all(type(part) is list for part in data):
            raise InputError(f'{where}: the field "data" mixes lists and single values at one depth.')
        data = [value for part in data for value in part]
    return data


def _accepts(element: np.dtype, value: Any) -> bool:
    if element.kind == "f":
        return value is None or type(value) in (int, float)
    if element.kind == "b":
        return type(value) is bool
    if element.kind == "O":
        return value is None or type(value) is str
    return type(value) is int


def _from_binary(data: memoryview, datatype: str, shape: list[int], where: str) -> np.ndarray:
    count, element = math.prod(shape), DATATYPES[datatype]
    if element.kind == "O":
        return _strings(data, count, where).reshape(shape)
    if len(data) != count * element.itemsize:
        raise InputError(
            f"{where}: shape {shape} of {datatype} needs {count * element.itemsize} bytes, binary_data_size is {len(data)}."
        )
    if element.kind == "b" and (np.frombuffer(data, dtype=np.uint8) > 1).any():
        raise InputError(f"{where}: a BOOL byte is neither 0 nor 1.")
    return np.frombuffer(data, dtype=element).reshape(shape)


def _strings(data: memoryview, count: int, where: str) -> np.ndarray:
    """BYTES in binary form: each element is its length as a little-endian uint32, then the bytes."""
    found, at = [], 0
    while at + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, at)
        at += 4 + length
        if at > len(data):
            break
        try:
            found.append(str(data[at - length : at], "utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"{where}: element {len(found)} is not UTF-8 text.") from None
    if at != len(data) or len(found) != count:
        raise InputError(f"{where}: {count} strings are announced, the binary data holds {len(found)} whole ones.")
    made = np.empty(count, dtype=object)
    made[:] = found
    return made


def _wanted(document: dict[str, Any], outputs: tuple[TensorSpec, ...]) -> list[tuple[str, bool]]:
    binary = _parameters(document, "The request").get("binary_data_output") is True
    listed = document.get("outputs")
    if listed is None or listed == []:
        return [(o.name, binary) for o in outputs]
    if type(listed) is not list:
        raise InputError('The field "outputs" must be a list.')
    names, wanted = [o.name for o in outputs], []
    for number, one in enumerate(listed):
        name = one.get("name") if type(one) is dict else None
        if name not in names:
            raise InputError(f"outputs[{number}].name is {short(name)}; the model has the outputs {', '.join(names)}.")
        if any(name == known for known, _ in wanted):  # each one is a whole copy: a small body must not make an endless answer
            raise InputError(f"outputs[{number}].name is {name!r}, which is asked for twice.")
        wanted.append((name, bool(_parameters(one, f"outputs[{number}]").get("binary_data", binary))))
    return wanted


def encode(
    head: dict[str, Any], results: dict[str, tuple[TensorSpec, np.ndarray]], wanted: list[tuple[str, bool]]
) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON part where binary tensors follow it."""
    listed, tails = [], []
    for name, binary in wanted:
        spec, data = results[name]
        one: dict[str, Any] = {"name": name, "datatype": spec.datatype, "shape": list(data.shape)}
        if binary:
            tails.append(_binary(data, spec.datatype))
            one["parameters"] = {"binary_data_size": len(tails[-1])}
        else:
            one["data"] = data.reshape(-1).tolist()
        listed.append(one)
    text = orjson.dumps({**head, "outputs": listed})
    return (text, None) if not tails else (b"".join((text, *tails)), len(text))


def _binary(data: np.ndarray, datatype: str) -> bytes:
    if datatype != "BYTES":
        return np.ascontiguousarray(data, dtype=DATATYPES[datatype]).tobytes()
    encoded = [str(v).encode() for v in data.reshape(-1)]
    return b"".join(part for e in encoded for part in (struct.pack("<I", len(e)), e))


def metadata(
    model: str,
    version: str,
    platform: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    properties: dict[str, str],
) -> bytes:
    """The model metadata answer."""

    def listed(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]

    return orjson.dumps(
        {
            "name": model,
            "versions": [version],
            "platform": platform,
            "inputs": listed(inputs),
            "outputs": listed(outputs),
            "properties": properties,
        }
    )
