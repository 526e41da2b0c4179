"""MLflow's own description of an artifact, so that its UI shows the schema and `mlflow.pyfunc.load_model` works."""

import shutil
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import ArtifactError
from mlops_dagster.resources.training import mlflow_export
from mlops_dagster.serving.artifact import MODEL_FILE, NATIVE_FILE, NATIVE_FOLDER, SIGNATURE_FILE, Signature, load_signature

# Files that lie beside the artifact's own in the registry and are no part of its digest.
MLFLOW_NAMES = frozenset({"MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml", "native"})
_ENVIRONMENT_FILES = {"conda_env": "conda.yaml", "python_env": "python_env.yaml"}
_KINDS = {"float64": "double", "int64": "long", "string": "string", "bool": "boolean"}


def write_flavors(folder: Path, native: Path | None, run_id: str) -> None:
    """Write MLmodel (flavors onnx and python_function, sklearn when `native` is given) and its environment files into `folder`.

    `folder` holds an artifact as in docs: `signature.json` and `model.onnx`, or an MLflow model in `mlflow/`, whose only flavor is
    python_function and which has the estimator itself. ArtifactError when a name is taken or one is missing.
    """
    from mlflow.models import Model

    if taken := sorted(MLFLOW_NAMES & {entry.name for entry in folder.iterdir()}):
        raise ArtifactError(
            f"{folder.name}: {', '.join(taken)} in an artifact would collide with MLflow's own files; rename them"
        )
    is_native = (folder / NATIVE_FILE).is_file()
    for name in (MODEL_FILE if not is_native else NATIVE_FILE, SIGNATURE_FILE):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder.name}: {name} is missing from the artifact")
    described = load_signature(folder)
    model = Model(run_id=run_id, signature=_signature(described, is_native))
    if is_native:
        mlflow_export.describe(model, described, f"{NATIVE_FOLDER}/", **_ENVIRONMENT_FILES)
        requirements = (folder / NATIVE_FOLDER / "requirements.txt").read_text().split()
    else:
        _add_onnx(model)
        if native is not None:
            _add_native(model, folder, native)
        requirements = [f"{name}=={installed(name)}" for name in ("mlflow", "numpy", "onnx", "onnxruntime")]
    model.save(str(folder / "MLmodel"))
    _write_environment(folder, requirements)


def _add_onnx(model: Any) -> None:
    from mlflow import onnx as onnx_flavor
    from mlflow import pyfunc

    pyfunc.add_to_model(model, loader_module="mlflow.onnx", data=MODEL_FILE, **_ENVIRONMENT_FILES)
    model.add_flavor(
        onnx_flavor.FLAVOR_NAME, onnx_version=installed("onnx"), data=MODEL_FILE, providers=["CPUExecutionProvider"], code=None
    )


def _add_native(model: Any, folder: Path, native: Path) -> None:
    target = folder / "native" / "model.pkl"
    target.parent.mkdir()
    shutil.copyfile(native, target)
    model.add_flavor(
        "sklearn",
        pickled_model="native/model.pkl",
        sklearn_version=installed("scikit-learn"),
        serialization_format="cloudpickle",
        code=None,
    )


def _signature(signature: Signature, is_native: bool) -> Any:
    """signature.json as MLflow's. One `tensor` input of ONNX becomes a float tensor, all else named columns.

    Of an MLflow model a column that may lack values is of the type `double` where its own has no missing value.
    """
    import numpy
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    if is_native:
        kinds = [
            (f.name, "double" if f.nullable and f.dtype in ("int64", "bool") else _KINDS[f.dtype]) for f in signature.features
        ]
        inputs = Schema([ColSpec(kind, name) for name, kind in kinds])
    elif signature.onnx_input == "tensor":
        inputs = Schema([TensorSpec(numpy.dtype("float32"), (-1, len(signature.features)), "features")])
    else:
        inputs = Schema([ColSpec(_KINDS[feature.dtype], feature.name) for feature in signature.features])
    return ModelSignature(inputs=inputs)


def _write_environment(folder: Path, requirements: list[str]) -> None:
    from mlflow.utils.environment import _mlflow_conda_env, _PythonEnv

    _mlflow_conda_env(
        path=str(folder / "conda.yaml"), additional_pip_deps=[line for line in requirements if not line.startswith("mlflow==")]
    )
    _PythonEnv.current().to_yaml(str(folder / "python_env.yaml"))
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
