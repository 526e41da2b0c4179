"""A scorer whose model lives in MLflow's own server: the same rows in and the same answers out as with ONNX Runtime."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import orjson

from mlops_dagster.serving.artifact import Artifact, Signature
from mlops_dagster.serving.mlflow_server import MlflowServer, ModelFailure
from mlops_dagster.serving.rows import Row
from mlops_dagster.serving.scoring import Scorer, TensorSpec

DATATYPES = {"float64": "FP64", "int64": "INT64", "bool": "BOOL", "string": "BYTES"}
ROWS_A_REQUEST = 5_000


@contextmanager
def opened(artifact: Artifact, threads: int = 1) -> Iterator[Scorer]:
    """The scorer of an artifact: of ONNX Runtime, or of MLflow's own server, which ends with the block.

    The model's bytes are not held on to. Raises ArtifactError when the model cannot be loaded, ServingError when the server does not
    start.
    """
    if not artifact.native:
        scorer = Scorer(artifact, threads)
        del artifact
        yield scorer
        return
    server, signature = MlflowServer(artifact.native, threads), artifact.signature
    del artifact
    server.start()
    try:
        yield MlflowScorer(signature, server)
    finally:
        server.stop()


class MlflowScorer(Scorer):
    """See Scorer; `one` and `many` may both be called from any thread, and wait for the server."""

    platform = "mlflow_pyfunc"
    concurrent = True

    def __init__(self, signature: Signature, server: MlflowServer) -> None:
        self.signature = signature
        self.server = server
        self._names = [f.name for f in signature.features]
        self.inputs = tuple(TensorSpec(f.name, DATATYPES[f.dtype], (-1, 1)) for f in signature.features)
        self._label_type = _label_type(signature)
        self._width = len(signature.classes or ()) if signature.task == "classification" and signature.probabilities else 0
        label = TensorSpec("label" if signature.task == "classification" else "variable", DATATYPES[self._label_type], (-1,))
        self.outputs = (label, TensorSpec("probabilities", "FP64", (-1, self._width))) if self._width else (label,)

    def one(self, row: Row) -> tuple[Any, list[list[float]] | None]:
        """The label (or value) of a row in a list, and its probabilities."""
        label, probabilities = self._ask([row])
        return label.tolist(), (None if probabilities is None else probabilities.tolist())

    def many(self, columns: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See Scorer.many."""
        rows = list(zip(*(c.tolist() for c in columns), strict=True))
        parts = [self._ask(rows[at : at + ROWS_A_REQUEST]) for at in range(0, count, ROWS_A_REQUEST)] or [self._empty()]
        labels, probabilities = zip(*parts, strict=True)
        return np.concatenate(labels), (np.concatenate(probabilities) if self._width else None)

    def _empty(self) -> tuple[np.ndarray, np.ndarray | None]:
        return self._labels([]), (np.empty((0, self._width)) if self._width else None)

    def _ask(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray | None]:
        body = orjson.dumps({"dataframe_split": {"columns": self._names, "data": rows}})
        # Not orjson: MLflow writes NaN as NaN.
        answers = json.loads(self.server.ask("/invocations", body))["predictions"]
        if len(answers) != len(rows):
            raise ModelFailure(f"it answered {len(answers)} rows of {len(rows)}")
        label = self._labels([answer["prediction"] for answer in answers])
        return label, (self._probabilities(answers) if self._width else None)

    def _labels(self, values: list[Any]) -> np.ndarray:
        """Values as the type that the signature promises."""
        if self._label_type == "string":
            made = np.empty(len(values), dtype=object)
            made[:] = [str(value) for value in values]
            return made
        numbers = np.array(values, dtype=np.float64)
        if self._label_type == "float64":
            return numbers
        whole = numbers.astype(np.int64) if np.isfinite(numbers).all() else None
        if whole is None or (whole != numbers).any():
            raise ModelFailure(f"it answered a label that is none of its classes {list(self.signature.classes or ())}")
        return whole.astype(self._label_type)

    def _probabilities(self, answers: list[dict[str, Any]]) -> np.ndarray:
        names = [f"probability_{number}" for number in range(self._width)]
        try:
            return np.array([[answer[name] for name in names] for answer in answers], dtype=np.float64)
        except KeyError as absent:
            raise ModelFailure(f"it answered no {absent.args[0]}; it has {self._width} classes") from None


def _label_type(signature: Signature) -> str:
    """The type of an answer: that of the classes, float64 for a value."""
    classes = signature.classes or ()
    if signature.task == "regression" or any(type(c) is float and not c.is_integer() for c in classes):
        return "float64"
    if any(type(c) is str for c in classes):
        return "string"
    return "bool" if classes and all(type(c) is bool for c in classes) else "int64"
