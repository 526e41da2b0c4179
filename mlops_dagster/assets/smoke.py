"""Smoke predictions: the served version must answer what its own artifact answers, before it gets a caller's request."""

from typing import TYPE_CHECKING

from mlops_dagster.core.errors import MlopsError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.requests import Client

if TYPE_CHECKING:
    from mlops_dagster.assets.rollout import Parts

ROWS = 5
REQUEST_ID_PREFIX = "smoke-"
"""Requests with such an id are ours; the inference log leaves them out."""


def failures(parts: "Parts", spec: ModelSpec, version: str) -> list[str]:
    """Ask the version for the first rows of its reference sample through the gateway; what is wrong, or nothing."""
    import io

    import pyarrow.parquet as pq

    digest = next(v.digest for v in parts.registry.versions(spec.name) if str(v.number) == version)
    sample = pq.read_table(
        io.BytesIO(parts.lake.read_bytes(f"{spec.name}/trained_model/{digest}/reference_sample.parquet"))
    ).slice(0, ROWS)
    features = sample.drop_columns([c for c in ("prediction", "score") if c in sample.column_names])
    headers = {"x-mlops-version": version, "x-request-id": f"{REQUEST_ID_PREFIX}{spec.name}-{version}"}
    try:
        answer = Client(parts.serving.endpoint(spec.name)).predict(spec.name, features.to_pylist(), headers)["predictions"]
    except MlopsError as error:
        return [str(error)]
    expected = sample["prediction"].to_pylist()
    return [
        f"row {i}: answered {a}, expected {e}"
        for i, (a, e) in enumerate(zip(answer, expected, strict=True))
        if abs(float(a) - e) > 1e-3
    ]
