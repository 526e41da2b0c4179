"""What ONNX Runtime is given and what it gives back."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from predictor_processes import Model

from mlops_dagster.core.errors import ArtifactError
from mlops_dagster.serving.artifact import Artifact, Feature, Signature, load
from mlops_dagster.serving.rows import InputError
from mlops_dagster.serving.scoring import Scorer


def artifact(model: Model, **changes: Any) -> Artifact:
    found = load(model.folder, model.sha256)
    return replace(found, signature=replace(found.signature, **changes))


def test_one_row_and_many_rows_score_alike(
    number_model: Model, boosted_model: Model, mixed_model: Model, regression_model: Model
) -> None:
    for model in (number_model, boosted_model, mixed_model, regression_model):
        scorer = Scorer(artifact(model))
        rows = [tuple(i.values()) for i in model.instances(40)]
        columns = [np.array(c, dtype=object) for c in zip(*rows, strict=True)]
        labels, probabilities = scorer.many(columns, 40)
        for number, row in enumerate(rows):
            label, probability = scorer.one(row)
            assert label == [labels.reshape(-1).tolist()[number]]
            if probabilities is not None:
                np.testing.assert_allclose(probability, probabilities[number : number + 1], atol=1e-6)


def test_nulls_reach_a_model_of_columns_in_one_row_as_in_many(mixed_model: Model) -> None:
    nullable = tuple(replace(f, nullable=f.name != "hour") for f in mixed_model.signature.features)
    scorer = Scorer(artifact(mixed_model, features=nullable))
    for row in [(0.5, 3, "AA"), (None, 3, "AA"), (0.5, 3, None), (0.5, 3, "AA")]:
        _, expected = scorer.many([np.array([v], dtype=object) for v in row], 1)
        assert expected is not None
        np.testing.assert_allclose(scorer.one(row)[1], expected, atol=1e-6)  # type: ignore[arg-type]
        assert bool(np.isnan(expected).any()) == (row[0] is None)


def test_outputs_are_described_as_they_are(mixed_model: Model, regression_model: Model) -> None:
    label, probabilities = Scorer(artifact(mixed_model)).outputs
    assert (label.datatype, label.shape, probabilities.datatype, probabilities.shape) == ("BYTES", (-1,), "FP32", (-1, 2))
    (value,) = Scorer(artifact(regression_model)).outputs
    assert (value.datatype, value.shape) == ("FP32", (-1, 1))


def test_positions_become_class_names_where_classes_are_strings(number_model: Model) -> None:
    scorer = Scorer(artifact(number_model, classes=("on time", "late")))
    plain = Scorer(artifact(number_model))
    row = tuple(number_model.instances(1)[0].values())
    (position,), _ = plain.one(row)
    assert scorer.one(row)[0] == [("on time", "late")[position]]
    assert scorer.outputs[0].datatype == "BYTES"


def test_a_model_that_does_not_fit_its_signature_is_refused(
    number_model: Model, mixed_model: Model, regression_model: Model
) -> None:
    for model, changes, message in [
        (number_model, {"features": (Feature("n0", "float64"),)}, "takes 5 features, but signature.json lists 1"),
        (number_model, {"onnx_input": "columns"}, "Feature n0 is float64, but model.onnx takes None"),
        (mixed_model, {"onnx_input": "columns", "features": mixed_model.signature.features[:2]}, r"does not list: \['carrier'\]"),
        (regression_model, {"task": "classification"}, "a classifier must give a label and its probabilities"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            Scorer(artifact(model, **changes))
    nullable = tuple(replace(f, nullable=True) for f in mixed_model.signature.features)
    with pytest.raises(ArtifactError, match=r"Feature hour is nullable, but model\.onnx takes tensor\(int64\), which has no NaN"):
        Scorer(artifact(mixed_model, features=nullable))


def test_bytes_that_are_no_model_are_refused() -> None:
    from pathlib import Path

    broken = Artifact(Path(), "", Signature("m", "regression", (Feature("a", "float64"),)), b"not onnx")
    with pytest.raises(ArtifactError, match="cannot be loaded by ONNX Runtime"):
        Scorer(broken)


def test_a_zipmap_is_refused_with_the_remedy(number_model: Model) -> None:
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    exported = to_onnx(number_model.estimator, initial_types=[("features", FloatTensorType([None, 5]))])
    with pytest.raises(ArtifactError, match="zipmap=False"):
        Scorer(replace(artifact(number_model), model=exported.SerializeToString()))


@pytest.mark.parametrize("value", [-(2**63), -(2**32), 2**31, 2**63 - 1])
def test_a_number_that_a_32_bit_integer_cannot_hold_is_refused_in_one_row_as_in_many(value: int) -> None:
    from pathlib import Path

    from onnx import TensorProto, helper

    given = helper.make_tensor_value_info("a", TensorProto.INT32, [None, 1])
    made = helper.make_tensor_value_info("variable", TensorProto.FLOAT, [None, 1])
    graph = helper.make_graph([helper.make_node("Cast", ["a"], ["variable"], to=TensorProto.FLOAT)], "g", [given], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    signature = Signature("m", "regression", (Feature("a", "int64"),), onnx_input="columns")
    scorer = Scorer(Artifact(Path(), "", signature, model.SerializeToString()))
    assert scorer.one((-5,))[0] == [-5.0]
    for ask in (lambda: scorer.one((value,)), lambda: scorer.many([np.array([1, value])], 2)):
        with pytest.raises(InputError, match="outside the range of the 32-bit number"):
            ask()
