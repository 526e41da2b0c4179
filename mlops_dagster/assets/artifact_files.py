"""Model artifacts in the lake, and the answers that their models give to a table of rows."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from mlops_dagster.core.errors import ArtifactError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.serving import artifact

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Answers:
    """What a model says of some rows: `prediction` [rows]; `score` [rows], the probability of class 1, for two classes;
    `probabilities` [rows, classes], where the model gives them.
    """

    prediction: "np.ndarray"
    score: "np.ndarray | None"
    probabilities: "np.ndarray | None" = None


def folder_key(spec: ModelSpec, digest: str) -> str:
    """Where an artifact lies in the lake."""
    return f"{spec.name}/trained_model/{digest}"


def upload(lake: Lake, spec: ModelSpec, folder: Path) -> str:
    """Store an artifact folder under its digest; returns the digest."""
    digest = artifact.digest(folder)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            lake.write_bytes(f"{folder_key(spec, digest)}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return digest


@contextmanager
def local_copy(lake: Lake, spec: ModelSpec, digest: str) -> Iterator[Path]:
    """The artifact in a temporary folder, its bytes compared with the digest. Raises ArtifactError."""
    prefix = folder_key(spec, digest) + "/"
    with tempfile.TemporaryDirectory(prefix="mlops-artifact-") as temporary:
        for key in lake.list(prefix):
            file = Path(temporary) / key.removeprefix(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(lake.read_bytes(key))
        found = artifact.digest(temporary)
        if found != digest:
            raise ArtifactError(
                f"the artifact at {prefix} in the lake has digest {found}; its bytes changed. Materialize {spec.name}/trained_model again"
            )
        yield Path(temporary)


def answers(folder: Path, digest: str, rows: pa.Table) -> Answers:
    """What the artifact answers to rows that have its features as columns; the very code that serves it."""
    import numpy as np

    from mlops_dagster.serving.mlflow_scoring import opened

    with opened(artifact.load(folder, digest), threads=2) as scorer:
        columns = [_column(rows[f.name], f.dtype) for f in scorer.signature.features]
        prediction, probabilities = scorer.many(columns, rows.num_rows)
    values = np.asarray(prediction).reshape(-1).astype(float)
    score = None if probabilities is None or probabilities.shape[1] != 2 else probabilities[:, 1].astype(float)
    return Answers(values, score, probabilities)


def _column(column: pa.ChunkedArray, dtype: str) -> "np.ndarray":
    import numpy as np

    if dtype == "string":
        return np.array(column.to_pylist(), dtype=object)
    return column.cast(pa.float64()).to_numpy()
