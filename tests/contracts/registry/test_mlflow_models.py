"""Artifacts whose model is an MLflow model: registered and fetched by their digest, and loaded by MLflow itself."""

from pathlib import Path

import pandas
import pytest
from sklearn.dummy import DummyClassifier

from mlops_dagster.resources.registry.mlflow_registry import MlflowRegistry
from mlops_dagster.resources.tracking.mlflow_connection import connect
from mlops_dagster.resources.training import mlflow_export
from mlops_dagster.serving.artifact import Feature, Signature, digest, load, write_signature

FEATURES = (Feature("distance", "float64", nullable=True), Feature("hour", "int64", nullable=True), Feature("carrier", "string"))
SIGNATURE = Signature("m", "classification", FEATURES, classes=(0, 1), onnx_input="columns")
ROWS = pandas.DataFrame({"distance": [1.0, None], "hour": [1.0, None], "carrier": ["AA", "B6"]})


class Prior(DummyClassifier):
    """An estimator of this module, which MLflow's server does not have."""


def folder_of(tmp_path: Path, name: str = "artifact") -> Path:
    folder = tmp_path / name
    mlflow_export.write(folder, Prior(strategy="prior").fit(ROWS, [0, 1]), SIGNATURE, __name__)
    write_signature(folder, SIGNATURE)
    return folder


def test_it_is_fetched_with_the_registered_bytes(registry: MlflowRegistry, model: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    native = tmp_path / "estimator.pkl"
    native.write_bytes(b"the artifact holds the estimator, so this one is not kept")
    made = registry.register(model, folder, digest(folder), {"accuracy": 0.5}, {}, native=native)
    to = registry.fetch(model, 1, tmp_path / "served")
    assert digest(to) == made.digest
    assert set(load(to, made.digest).native) == {"MLmodel", "estimator.pkl", "code/estimator_pyfunc.py", "requirements.txt"}
    client = connect(registry.tracking_uri)
    assert made.run_id is not None
    place = client.list_artifacts(made.run_id)[0].path
    assert f"{place}/native" not in [entry.path for entry in client.list_artifacts(made.run_id, place)]


def test_mlflow_itself_can_load_a_pickled_estimator(registry: MlflowRegistry, model: str, tmp_path: Path) -> None:
    import mlflow

    folder = folder_of(tmp_path)
    registry.register(model, folder, digest(folder), {"accuracy": 0.5}, {})
    uri = connect(registry.tracking_uri).get_model_version_download_uri(model, "1")
    loaded = mlflow.pyfunc.load_model(mlflow.artifacts.download_artifacts(artifact_uri=uri, tracking_uri=registry.tracking_uri))
    answer = loaded.predict(ROWS)
    assert answer.to_dict("list") == {"prediction": [0, 0], "probability_0": [0.5, 0.5], "probability_1": [0.5, 0.5]}
    assert "carrier" in str(loaded.metadata.signature)


def test_an_estimator_of_a_package_has_the_same_digest_every_time(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name
        mlflow_export.write(folder, DummyClassifier(strategy="prior").fit(ROWS, [0, 1]), SIGNATURE, __name__)
        found.append(digest(folder))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["mlflow", "cloudpickle", "pandas", "scikit-learn"])
def test_what_it_needs_is_written_down(name: str) -> None:
    assert any(line.startswith(f"{name}==") for line in mlflow_export.requirements(DummyClassifier()))
