"""From a fitted estimator to an MLflow model (flavor python_function) inside the artifact, for what cannot become ONNX."""

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.serving.artifact import NATIVE_FOLDER, Signature

ESTIMATOR_FILE = f"{NATIVE_FOLDER}/estimator.pkl"
LOADER = "estimator_pyfunc"
_NEEDED = ("cloudpickle", "mlflow", "numpy", "pandas")
# The digest is over every byte of the artifact, so nothing in it may tell the time of its making.
_TIME = "1970-01-01 00:00:00"


def write(folder: Path, estimator: Any, signature: Signature, package: str) -> None:
    """Write the MLflow model of an estimator to `mlflow/` in an artifact folder.

    What the project of `package` (the model's own) defines is stored in the pickle by value, so that the artifact goes on answering
    the same when the code changes; every other package must be installed where the model is served. DeclarationError when it cannot
    be pickled or does not fit the task.
    """
    if signature.task == "regression" and hasattr(estimator, "predict_proba"):
        raise DeclarationError(
            f"task: regression does not fit {type(estimator).__name__}, which has predict_proba; correct the task or the estimator"
        )
    native = folder / NATIVE_FOLDER
    (native / "code").mkdir(parents=True)
    (folder / ESTIMATOR_FILE).write_bytes(pickled(estimator, package))
    shutil.copyfile(Path(__file__).with_name(f"{LOADER}.py"), native / "code" / f"{LOADER}.py")
    (native / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements(estimator)))
    from mlflow.models import Model

    model = Model(utc_time_created=_TIME, model_uuid=None)
    describe(model, signature, "")
    model.save(str(native / "MLmodel"))


def describe(model: Any, signature: Signature, prefix: str, **environment: str) -> None:
    """Add the flavor python_function to an `mlflow.models.Model` whose folder has the files of `write` below `prefix`.

    `environment`: `conda_env` and `python_env`, where there are such files.
    """
    from mlflow import pyfunc

    config = {"columns": [[feature.name, feature.dtype] for feature in signature.features]}  # MLmodel would sort a mapping
    pyfunc.add_to_model(
        model,
        loader_module=LOADER,
        data=f"{prefix}estimator.pkl",
        code=f"{prefix}code",
        model_config=config,
        **environment,  # type: ignore[arg-type]
    )


def pickled(estimator: Any, package: str) -> bytes:
    """The estimator as bytes that `pickle` reads; DeclarationError when something in it cannot be pickled."""
    import cloudpickle

    with _by_value(_project(package)):
        try:
            return cloudpickle.dumps(estimator)
        except Exception as error:
            raise DeclarationError(
                f"training.format: {type(estimator).__name__} cannot be pickled ({type(error).__name__}: {error}); "
                "keep open files, connections, locks and functools.cache out of it, or define its class in an installed package"
            ) from error


def requirements(estimator: Any) -> list[str]:
    """The distributions (`name==version`) that MLflow's server needs to load this estimator, but for those that its parts import."""
    root = type(estimator).__module__.partition(".")[0]
    names = {*_NEEDED, *packages_distributions().get(root, ())}
    return sorted(f"{name}=={installed(name)}" for name in names)


def _project(package: str) -> str:
    """The project that a model belongs to: dg has models below `<project>.defs`. Of the models in this very package, themselves."""
    project = package.partition(".defs.")[0]
    return package if project == __name__.partition(".")[0] else project


@contextmanager
def _by_value(package: str) -> Iterator[None]:
    """Have cloudpickle store the classes and functions of a package themselves, instead of their names."""
    import cloudpickle

    module = importlib.import_module(package)
    if package in cloudpickle.list_registry_pickle_by_value():
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)
