"""Small real artifacts: a two-feature ONNX classifier whose answers tell which version gave them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mlops_dagster.core.routes import BASELINE
from mlops_dagster.resources.serving import Arm
from mlops_dagster.serving.artifact import Feature, Signature, digest, write_signature


def make_artifact(
    folder: Path, answer: int = 1, extra: dict[str, str] | None = None, slope: float = 0.0, bias: float | None = None
) -> str:
    """Write a classifier that always answers `answer` (0 or 1) and return its digest; `extra` are further files, name to text.

    With `bias` its score is the logistic function of `slope` times the first feature plus `bias` instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight = numpy_helper.from_array(np.array([[slope], [0.0]], np.float32), "weight")
    offset = (4.0 if answer else -4.0) if bias is None else bias
    constant = numpy_helper.from_array(np.array([offset], np.float32), "bias")
    one = numpy_helper.from_array(np.array(1.0, np.float32), "one")
    nodes = [
        helper.make_node("Gemm", ["features", "weight", "bias"], ["raw"]),
        helper.make_node("Sigmoid", ["raw"], ["positive"]),
        helper.make_node("Sub", ["one", "positive"], ["negative"]),
        helper.make_node("Concat", ["negative", "positive"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, 2])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, [None]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 2]),
        ],
        [weight, constant, one],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    features = (Feature("a", "float64"), Feature("b", "float64"))
    write_signature(folder, Signature("any", "classification", features, classes=(0, 1)))
    for name, text in (extra or {}).items():
        (folder / name).write_text(text)
    return digest(folder)


def make_arm(root: Path, version: str, name: str = "champion", answer: int = 1, extra: dict[str, str] | None = None) -> Arm:
    """An arm with an artifact of its own; a baseline serves the artifact of its version."""
    folder = root / f"version-{version.removesuffix(BASELINE)}"
    sha256 = digest(folder) if folder.exists() else make_artifact(folder, answer, extra)
    return Arm(version, str(folder), sha256, name)


ROW = {"instances": [{"a": 1.0, "b": 2.0}]}
