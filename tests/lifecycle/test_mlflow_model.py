"""A model that cannot become ONNX, through its whole life: MLflow's own server answers on the same routes."""

import pytest

from tests.lifecycle import foreign

TRAINING = '''"""An estimator of the project's own, for which nobody wrote a converter."""

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


class Wary(ClassifierMixin, BaseEstimator):
    """Says `late` only when it is rather sure."""

    def fit(self, features, label):
        self.inner_ = make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression()).fit(features, label)
        self.classes_ = self.inner_.classes_
        return self

    def predict_proba(self, features):
        return self.inner_.predict_proba(features)

    def predict(self, features):
        return (self.predict_proba(features)[:, 1] > surely()).astype(int)


def surely():
    return 0.52


def train(features, label, **parameters):
    return Wary().fit(features, label.astype(int))
'''


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What each step of `mlflow_life.py` saw."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = foreign.make(folder)
    model = folder / "project/parcels/defs/late_parcel"
    (model / "training.py").write_text(TRAINING)
    declared = (model / "defs.yaml").read_text()
    (model / "defs.yaml").write_text(declared.replace("{train: .training.train,", "{train: .training.train, format: mlflow,"))
    return foreign.steps("mlflow_life.py", environment)


def test_the_missing_converter_is_told_with_its_remedy(seen):
    assert "Wary cannot be converted to ONNX" in seen["without format"]["error"]
    assert "set training.format to mlflow" in seen["without format"]["error"]


def test_the_server_answers_as_the_estimator_and_the_version_is_registered(seen):
    checks = seen["train"]["checks"]
    assert all(passed for passed, _ in checks.values()), checks
    assert checks["trained_model.mlflow_equals_native"][1].startswith(
        "420 rows: largest difference 0.00e+00, 0 beyond the tolerance, 0 other labels"
    )
    assert "model_version" in seen["train"]["made"]


def test_the_approved_version_is_live_and_its_smoke_predictions_pass(seen):
    assert seen["deploy"]["checks"]["deployment.smoke_prediction"][0], seen["deploy"]["checks"]
    assert seen["deploy"]["checks"]["deployment.server_ready"][0], seen["deploy"]["checks"]


def test_both_protocols_answer_and_complete_the_row(seen):
    told = seen["answers"]
    label, chances = told["v2"]["outputs"]
    assert told["v1"]["predictions"] == label["data"]
    assert told["v1"]["probabilities"][0] == chances["data"]
    assert told["platform"] == "mlflow_pyfunc"
    assert told["wrong"][0] in (400, 422)
    assert "weight_kg" in told["wrong"][1]["error"]


def test_replayed_requests_are_logged_and_monitored(seen):
    assert seen["monitored"]["sent"] == 60
    assert (seen["logged"]["rows"], seen["logged"]["scored"]) == (60, 60)
    checks = seen["monitor 2024-01-31"]["checks"]
    assert checks["inference_log.volume"][0], checks
    assert "drift_report.psi" in checks
