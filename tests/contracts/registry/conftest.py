"""The backends that must keep the registry contract, and a small real artifact to register."""

from pathlib import Path

import numpy
import onnx
import pytest
from onnx import TensorProto, helper

from mlops_dagster.resources.registry.mlflow_registry import MlflowRegistry
from mlops_dagster.serving.artifact import Feature, Signature, write_signature
from tests.contracts.tracking.mlflow_server import shared_server


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture(params=["sqlite", "server"])
def registry(request: pytest.FixtureRequest) -> MlflowRegistry:
    if request.param == "sqlite":
        return MlflowRegistry(tracking_uri=f"sqlite:///{request.getfixturevalue('database')}")
    return MlflowRegistry(tracking_uri=shared_server())


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A model name of the test's own, because the stores are shared by the session."""
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """y = 2 x over two float features, with its signature and a file in a folder below."""
    folder = tmp_path / "artifact"
    (folder / "profiles").mkdir(parents=True)
    two = helper.make_tensor("two", TensorProto.FLOAT, [2, 1], numpy.array([2.0, 0.0], dtype="float32"))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["features", "two"], ["variable"])],
        "double",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("variable", TensorProto.FLOAT, [None, 1])],
        [two],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(folder / "model.onnx"))
    write_signature(folder, Signature("double", "regression", (Feature("distance", "float64"), Feature("delay", "float64"))))
    (folder / "profiles" / "reference_profile.json").write_text("{}")
    return folder
