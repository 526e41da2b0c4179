"""Smoke predictions: the served version must answer what its own artifact answers, before it gets a caller's request."""

import io
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from mlops_dagster.core.errors import MlopsError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.requests import client_of

if TYPE_CHECKING:
    from mlops_dagster.assets.rollout import Parts

ROWS = 5
TOLERANCE = 1e-3
"""Of a value; classes are whole numbers."""
REQUEST_ID_PREFIX = "smoke-"
"""Requests with such an id are ours; the inference log leaves them out."""


def failures(parts: "Parts", spec: ModelSpec, version: str, requests: int = 1) -> list[str]:
    """Ask the version, `requests` times, for the first rows of its reference sample through the gateway; what is wrong, or nothing."""
    digest = parts.version(spec.name, version).digest
    sample = pq.read_table(
        io.BytesIO(parts.lake.read_bytes(f"{spec.name}/trained_model/{digest}/reference_sample.parquet"))
    ).slice(0, ROWS)
    features = sample.drop_columns([c for c in ("prediction", "score") if c in sample.column_names]).to_pylist()
    expected = sample["prediction"].to_pylist()
    client = client_of(parts.serving, spec.name)
    for number in range(requests):
        headers = {"x-mlops-version": version, "x-request-id": f"{REQUEST_ID_PREFIX}{spec.name}-{version}-{number}"}
        try:
            answer = client.predict(spec.name, features, headers)["predictions"]
        except MlopsError as error:
            return [str(error)]
        pairs = enumerate(zip(answer, expected, strict=True))
        if wrong := [f"row {i}: answered {a}, expected {e}" for i, (a, e) in pairs if abs(float(a) - e) > TOLERANCE]:
            return wrong
    return []
