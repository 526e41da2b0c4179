"""Real models as artifacts, and predictors that serve them."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from http_callers import LIMIT, Echo, connect
from predictor_processes import Model, Process, Starter, command, launch

from mlops_dagster.serving.artifact import Feature, Signature, digest, write_signature
from mlops_dagster.serving.http_server import Server
from mlops_dagster.serving.server import bind

NUMBERS = tuple(f"n{i}" for i in range(5))


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def server(echo: Echo) -> Iterator[Server]:
    found = Server(bind("127.0.0.1", 0), echo, LIMIT)
    found.port = found._socket.getsockname()[1]  # type: ignore[attr-defined]
    found.start()
    yield found
    found.stop()
    found.wait(2)


@pytest.fixture
def caller(server: Server) -> Iterator[socket.socket]:
    with connect(server) as found:
        yield found


@pytest.fixture
def start() -> Iterator[Starter]:
    """Start predictors that end with the test."""
    running: list[Process] = []

    def begin(model: Model, *options: str, **names: str) -> Process:
        running.append(launch(command(model, *options, **names)))
        return running[-1]

    yield begin
    for process in running:
        if process.popen.poll() is None:
            process.kill()


def _number_rows() -> tuple[pd.DataFrame, np.ndarray]:
    random = np.random.default_rng(7)
    rows = pd.DataFrame(random.normal(size=(600, len(NUMBERS))).astype(np.float32).astype(np.float64), columns=list(NUMBERS))
    return rows, (rows["n0"] + rows["n1"] * rows["n2"] + random.normal(size=600) / 4 > 0.3).to_numpy().astype(int)


def _store(folder: Path, onnx_model: Any, signature: Signature, estimator: Any, rows: pd.DataFrame) -> Model:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(onnx_model.SerializeToString())
    write_signature(folder, signature)
    return Model(folder, digest(folder), signature, estimator, rows)


@pytest.fixture(scope="session")
def number_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A scikit-learn classifier of five numbers, one tensor in."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, label = _number_rows()
    estimator = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows.to_numpy(), label)
    exported = to_onnx(estimator, initial_types=[("features", FloatTensorType([None, len(NUMBERS)]))], options={"zipmap": False})
    features = tuple(Feature(n, "float64") for n in NUMBERS)
    signature = Signature("m", "classification", features, entities=("plane",), classes=(0, 1))
    return _store(tmp_path_factory.mktemp("number") / "artifact", exported, signature, estimator, rows)


@pytest.fixture(scope="session")
def boosted_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """LightGBM with a nullable number, a whole number and a boolean among its features."""
    import lightgbm
    from onnxmltools import convert_lightgbm
    from onnxmltools.convert.common.data_types import FloatTensorType

    rows, label = _number_rows()
    rows = rows.assign(n3=rows["n3"].where(rows["n3"] < 0.8), n1=(rows["n1"] * 3).round(), n4=rows["n4"] > 0)
    estimator = lightgbm.LGBMClassifier(n_estimators=20, verbose=-1, n_jobs=1).fit(rows.astype(float).to_numpy(), label)
    exported = convert_lightgbm(
        estimator, initial_types=[("features", FloatTensorType([None, 5]))], zipmap=False, target_opset=15
    )
    kinds = {"n1": "int64", "n4": "bool"}
    features = tuple(Feature(n, kinds.get(n, "float64"), nullable=n == "n3") for n in NUMBERS)
    rows = rows.astype({"n1": int})
    return _store(
        tmp_path_factory.mktemp("boosted") / "artifact",
        exported,
        Signature("m", "classification", features, classes=(0, 1)),
        estimator,
        rows,
    )


@pytest.fixture(scope="session")
def mixed_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Numbers and strings, a column each, and string classes."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType, Int64TensorType, StringTensorType
    from sklearn.compose import ColumnTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers, label = _number_rows()
    rows = pd.DataFrame({"distance": numbers["n0"], "hour": (numbers["n1"] * 4).round().astype(int)})
    rows["carrier"] = np.array(["AA", "B6", "Ünï", "UA"], dtype=object)[np.arange(len(rows)) % 4]
    shape = ColumnTransformer(
        [("number", StandardScaler(), ["distance", "hour"]), ("word", OneHotEncoder(handle_unknown="ignore"), ["carrier"])]
    )
    estimator = make_pipeline(shape, LogisticRegression()).fit(rows, np.where(label == 1, "late", "on time"))
    types = [
        ("distance", FloatTensorType([None, 1])),
        ("hour", Int64TensorType([None, 1])),
        ("carrier", StringTensorType([None, 1])),
    ]
    exported = to_onnx(estimator, initial_types=types, options={"zipmap": False})
    features = (Feature("distance", "float64"), Feature("hour", "int64"), Feature("carrier", "string"))
    signature = Signature("m", "classification", features, classes=("late", "on time"), onnx_input="columns")
    return _store(tmp_path_factory.mktemp("mixed") / "artifact", exported, signature, estimator, rows)


@pytest.fixture(scope="session")
def regression_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A regression of five numbers."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.ensemble import GradientBoostingRegressor

    rows, _ = _number_rows()
    target = 10 * rows["n0"] + rows["n1"] * rows["n2"]
    estimator = GradientBoostingRegressor(n_estimators=20, random_state=0).fit(rows.to_numpy(), target)
    exported = to_onnx(estimator, initial_types=[("features", FloatTensorType([None, len(NUMBERS)]))])
    features = tuple(Feature(n, "float64") for n in NUMBERS)
    return _store(
        tmp_path_factory.mktemp("regression") / "artifact", exported, Signature("m", "regression", features), estimator, rows
    )


@pytest.fixture(scope="session")
def served_numbers(number_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One predictor of `number_model` for all tests that do not end it."""
    process = launch(command(number_model, "--log-root", str(tmp_path_factory.mktemp("log")), "--maximum-body-bytes", "200000"))
    yield process
    process.kill()


@pytest.fixture(scope="session")
def served_mixed(mixed_model: Model) -> Iterator[Process]:
    """One predictor of `mixed_model`."""
    process = launch(command(mixed_model))
    yield process
    process.kill()


@pytest.fixture(scope="session")
def served_boosted(boosted_model: Model) -> Iterator[Process]:
    """One predictor of `boosted_model`."""
    process = launch(command(boosted_model))
    yield process
    process.kill()
