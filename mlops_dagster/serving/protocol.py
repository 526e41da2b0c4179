"""The KServe V1 protocol: `{"instances": [...]}` in, `{"predictions": [...], "probabilities": [...]}` out.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import orjson

from mlops_dagster.serving.artifact import Feature
from mlops_dagster.serving.rows import InputError

GZIP_MAGIC, ZLIB_MAGIC = b"\x1f\x8b", b"\x78"
EMPTY: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "int64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
    "string": np.dtype(object),
}


@dataclass(frozen=True)
class Batch:
    """A request whose rows are in order: values by column (signature order) with what the log wants to know of each row."""

    columns: list[np.ndarray]
    ids: list[str]
    times: list[datetime | None]

    @property
    def count(self) -> int:
        return len(self.ids)


def parse_json(body: bytes) -> Any:
    """The JSON of a request body; raises InputError."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        check_plain(body)
        said = "it is empty" if not body else str(error)
        raise InputError(f"The body is not JSON: {said}.") from None


def check_plain(body: bytes) -> None:
    """Raises InputError (415) for a body that is compressed, as its first bytes tell: no JSON begins like that."""
    if body.startswith((GZIP_MAGIC, ZLIB_MAGIC)):
        raise InputError("The body is compressed; send it without Content-Encoding.", 415)


def instances(body: bytes) -> list[Any]:
    """The non-empty list `instances` of a V1 body; raises InputError."""
    document = parse_json(body)
    if type(document) is not dict:
        raise InputError('The body must be an object such as {"instances": [{...}]}.')
    found = document.get("instances")
    if type(found) is not list:
        if "instances" not in document:
            hint = " (this is a V2 body; post it to /v2/models/<model>/infer)" if "inputs" in document else ""
            raise InputError(f'The field "instances" is missing{hint}.')
        raise InputError('The field "instances" must be a list.')
    if not found:
        raise InputError('The field "instances" is empty; give at least one row.')
    return found


def column(values: list[Any], feature: Feature) -> np.ndarray:
    """Checked values as an array of the feature's type; a nullable number becomes a float with NaN for null."""
    if feature.dtype == "string":
        made = np.empty(len(values), dtype=object)
        made[:] = values
        return made
    if feature.nullable and feature.dtype != "float64" and None in values:
        return np.array(values, dtype=np.float64)
    return np.array(values, dtype=EMPTY[feature.dtype])


def answer(labels: list[Any], probabilities: list[list[float]] | None) -> bytes:
    """The V1 answer."""
    if probabilities is None:
        return orjson.dumps({"predictions": labels})
    return orjson.dumps({"predictions": labels, "probabilities": probabilities})


def error(message: str) -> bytes:
    """The error object that both protocols use."""
    return orjson.dumps({"error": message})
