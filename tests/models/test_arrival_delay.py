"""arrival_delay, the regression on the data and features of flight_delay: it beats its rule of thumb and answers alike in ONNX."""

import datetime as dt

import numpy as np
import pytest

from mlops_dagster.defs.arrival_delay import training
from mlops_dagster.defs.flight_delay import study
from mlops_dagster.resources.training import onnx_export
from mlops_dagster.serving.artifact import Feature, Signature


@pytest.fixture(scope="module")
def first_version(january_february):
    train = study.between(january_february, study.FIRST, dt.date(2013, 2, 28) - dt.timedelta(days=study.TEST_DAYS))
    return training.train(study.model_input(train), train["arr_delay"].to_pandas())


def test_it_passes_its_gate(first_version, january_february):
    held_out = study.between(january_february, dt.date(2013, 2, 15), dt.date(2013, 2, 28))
    given = study.model_input(held_out)
    ours, naive = (study.absolute_error(held_out, answers) for answers in (first_version.predict(given), training.naive(given)))
    assert ours <= naive - 2.0
    assert ours <= 11.0


def test_onnx_answers_what_the_estimator_does(first_version, january_february):
    given = study.model_input(january_february)
    given.iloc[:200, :20] = np.nan
    signature = Signature(
        "arrival_delay", "regression", tuple(Feature(n, "float64", nullable=True) for n in study.feature_names())
    )
    (values,) = onnx_export.run(onnx_export.export(first_version, signature), given)
    np.testing.assert_allclose(values.reshape(-1), first_version.predict(given), rtol=1e-5, atol=1e-3)


def test_the_rule_of_thumb_is_the_departure_delay(january_february):
    rows = january_february.head(100)
    assert (training.naive(study.model_input(rows)) == rows["dep_delay"].to_numpy()).all()


def test_the_same_rows_give_the_same_model(january_february):
    rows = january_february.head(5_000)
    given, label = study.model_input(rows), rows["arr_delay"].to_pandas()
    first, second = (training.train(given, label, n_estimators=20).predict(given) for _ in range(2))
    assert (first == second).all()
