"""Each kind of estimator that a model may hold answers the same as ONNX, in ONNX Runtime."""

import warnings
from typing import Any

import numpy
import pandas
import pytest
from lightgbm import LGBMClassifier, LGBMRegressor
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.svm import OneClassSVM

from mlops_dagster.core.errors import ArtifactError, DeclarationError
from mlops_dagster.resources.training.onnx_export import export, max_difference, onnx_input, run
from mlops_dagster.serving.artifact import Feature, Signature

warnings.filterwarnings("ignore")
ROWS = 1500
NUMBERS = ["delay", "distance", "hour"]
TREES: dict[str, Any] = {"n_estimators": 20, "num_leaves": 15, "verbose": -1, "n_jobs": 1}


@pytest.fixture(scope="module")
def rows() -> pandas.DataFrame:
    random = numpy.random.default_rng(7)
    frame = pandas.DataFrame(
        {
            "delay": random.normal(10, 30, ROWS).round(),
            "distance": random.integers(80, 4900, ROWS).astype("float64"),
            "hour": random.integers(0, 24, ROWS),
            "carrier": random.choice(["UA", "AA", "B6", "DL"], ROWS),
        }
    )
    frame["carrier"] = frame["carrier"].astype(object)
    return frame


@pytest.fixture(scope="module")
def late(rows: pandas.DataFrame) -> pandas.Series:
    noise = numpy.random.default_rng(8).normal(0, 10, ROWS)
    return (rows["delay"] + 3 * (rows["carrier"] == "B6") + noise > 15).astype("int64")


@pytest.fixture(scope="module")
def minutes(rows: pandas.DataFrame) -> pandas.Series:
    return rows["delay"] + rows["distance"] / 300 + 4 * (rows["carrier"] == "B6")


def signature(frame: pandas.DataFrame, task: str) -> Signature:
    kinds = {"f": "float64", "i": "int64", "O": "string", "b": "bool"}
    features = tuple(Feature(str(name), kinds[kind.kind]) for name, kind in frame.dtypes.items())
    return Signature("m", task, features, onnx_input=onnx_input(features))


def mixed(last: Any, encoder: Any) -> Any:
    parts = [("text", encoder, ["carrier"]), ("numbers", "passthrough", NUMBERS)]
    return make_pipeline(ColumnTransformer(parts), last)


NUMERIC_CLASSIFIERS = {
    "lightgbm": LGBMClassifier(**TREES),
    "lightgbm behind a scaler": make_pipeline(StandardScaler(), LGBMClassifier(**TREES)),
    "histogram boosting": HistGradientBoostingClassifier(max_iter=20, random_state=0),
    "logistic": make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression()),
    "forest": RandomForestClassifier(10, random_state=0),
    "columns by name": make_pipeline(
        ColumnTransformer([("scaled", StandardScaler(), ["distance"]), ("rest", "passthrough", ["hour", "delay"])]),
        LGBMClassifier(**TREES),
    ),
    "a dropped column": make_pipeline(ColumnTransformer([("kept", "passthrough", ["delay", "hour"])]), LGBMClassifier(**TREES)),
}
REGRESSORS = {
    "lightgbm": LGBMRegressor(**TREES),
    "histogram boosting": HistGradientBoostingRegressor(max_iter=20, random_state=0),
    "linear": make_pipeline(StandardScaler(), LinearRegression()),
}


@pytest.mark.parametrize("name", NUMERIC_CLASSIFIERS)
def test_numeric_classifiers_take_one_tensor(name: str, rows: pandas.DataFrame, late: pandas.Series) -> None:
    features = rows[NUMBERS]
    estimator = NUMERIC_CLASSIFIERS[name].fit(features, late)
    graph = export(estimator, signature(features, "classification"))
    label, probabilities = run(graph, features)
    assert label.shape == (ROWS,)
    assert probabilities.shape == (ROWS, 2)
    difference = max_difference(graph, estimator, features)
    assert difference.rows == ROWS
    assert difference.largest < 1e-5
    assert difference.labels == 0


@pytest.mark.parametrize("name", REGRESSORS)
def test_regressors_give_one_column(name: str, rows: pandas.DataFrame, minutes: pandas.Series) -> None:
    features = rows[NUMBERS]
    estimator = REGRESSORS[name].fit(features, minutes)
    graph = export(estimator, signature(features, "regression"))
    assert [answer.shape for answer in run(graph, features)] == [(ROWS, 1)]
    assert max_difference(graph, estimator, features).largest < 1e-5


@pytest.mark.parametrize(
    "encoder", [OneHotEncoder(handle_unknown="ignore"), OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)]
)
@pytest.mark.parametrize(
    "last", [LGBMClassifier(**TREES), LogisticRegression(max_iter=2000), HistGradientBoostingClassifier(max_iter=9)]
)
def test_text_columns_stay_text(last: Any, encoder: Any, rows: pandas.DataFrame, late: pandas.Series) -> None:
    estimator = mixed(last, encoder).fit(rows, late)
    graph = export(estimator, signature(rows, "classification"))
    unseen = rows.assign(carrier="??")
    assert max_difference(graph, estimator, rows).largest < 1e-4
    assert max_difference(graph, estimator, unseen).largest < 1e-4


def test_text_columns_of_a_regression(rows: pandas.DataFrame, minutes: pandas.Series) -> None:
    estimator = mixed(Ridge(), OneHotEncoder()).fit(rows, minutes)
    graph = export(estimator, signature(rows, "regression"))
    assert max_difference(graph, estimator, rows).largest < 1e-4


@pytest.mark.parametrize("estimator", [LGBMClassifier(**TREES), HistGradientBoostingClassifier(max_iter=20)])
def test_missing_values_go_the_same_way(estimator: Any, rows: pandas.DataFrame, late: pandas.Series) -> None:
    features = rows[NUMBERS].astype("float64")
    features.loc[::7, "delay"] = numpy.nan
    estimator.fit(features, late)
    graph = export(estimator, signature(features, "classification"))
    assert max_difference(graph, estimator, features).largest < 1e-5
    features.loc[::3, "distance"] = numpy.nan
    assert max_difference(graph, estimator, features).largest < 1e-5


def test_text_classes_and_three_of_them(rows: pandas.DataFrame) -> None:
    features = rows[NUMBERS]
    bands = pandas.cut(rows["delay"], [-999, 0, 15, 999], labels=["early", "fine", "late"]).astype(str)
    estimator = LGBMClassifier(**TREES).fit(features, bands)
    graph = export(estimator, signature(features, "classification"))
    label, probabilities = run(graph, features)
    assert set(label) == {"early", "fine", "late"}
    assert probabilities.shape == (ROWS, 3)
    assert max_difference(graph, estimator, features).labels == 0


def test_the_same_estimator_gives_the_same_bytes(rows: pandas.DataFrame, late: pandas.Series) -> None:
    estimator = LGBMClassifier(**TREES).fit(rows[NUMBERS], late)
    described = signature(rows[NUMBERS], "classification")
    assert export(estimator, described) == export(estimator, described)


def test_another_models_answers_are_told_apart(rows: pandas.DataFrame, late: pandas.Series) -> None:
    features = rows[NUMBERS]
    graph = export(LGBMClassifier(**TREES).fit(features, late), signature(features, "classification"))
    other = LGBMClassifier(**TREES).fit(features, 1 - late)
    difference = max_difference(graph, other, features)
    assert difference.labels > ROWS / 2
    assert not difference.within()


def test_an_estimator_without_a_converter_is_named(rows: pandas.DataFrame) -> None:
    class Unknown(Ridge):
        pass

    features = rows[NUMBERS]
    with pytest.raises(DeclarationError, match=r"(?s)Unknown cannot be converted to ONNX .*set training\.format to mlflow"):
        export(Unknown().fit(features, rows["delay"]), signature(features, "regression"))
    with pytest.raises(DeclarationError, match="task: classification does not fit OneClassSVM"):
        export(OneClassSVM().fit(features), signature(features, "classification"))


def test_the_authors_own_export_is_checked(rows: pandas.DataFrame, late: pandas.Series) -> None:
    from skl2onnx import convert_sklearn, to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    features = rows[NUMBERS]
    estimator = LogisticRegression(max_iter=2000).fit(features, late)
    described = signature(features, "classification")

    def with_zipmap(fitted: Any, _: Any) -> Any:
        return to_onnx(fitted, features.to_numpy("float32"), target_opset=18)

    def with_other_input(fitted: Any, _: Any) -> Any:
        return to_onnx(fitted, features.to_numpy("float32"), target_opset=18, options={"zipmap": False})

    def own(fitted: Any, described: Any) -> Any:
        names = [("features", FloatTensorType([None, len(described.features)]))]
        return convert_sklearn(fitted, initial_types=names, target_opset=18, options={"zipmap": False})

    with pytest.raises(ArtifactError, match=r"output output_probability is no tensor; convert with the option zipmap=False"):
        export(estimator, described, custom=with_zipmap)
    with pytest.raises(ArtifactError, match=r"inputs \['X'\] must be \['features'\]"):
        export(estimator, described, custom=with_other_input)
    assert max_difference(export(estimator, described, custom=own), estimator, features).within()


def test_rows_on_a_threshold_are_counted(rows: pandas.DataFrame) -> None:
    """In float32 these two values are one, so a tree that parts them must answer one of them wrongly."""
    features = pandas.DataFrame({"x": [16777216.0, 16777217.0] * 50})
    target = pandas.Series([0.0, 1.0] * 50)
    estimator = HistGradientBoostingRegressor(min_samples_leaf=1, max_iter=30).fit(features, target)
    difference = max_difference(export(estimator, signature(features, "regression")), estimator, features)
    assert difference.beyond == 50
    assert not difference.within()
