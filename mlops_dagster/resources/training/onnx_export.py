"""From a fitted estimator to ONNX bytes as in the model artifact's contract, and the proof that both answer alike."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.errors import ArtifactError, DeclarationError
from mlops_dagster.serving.artifact import Feature, Signature

if TYPE_CHECKING:
    import pandas

# Fixed, so that the same estimator gives the same graph on every machine; skl2onnx 1.20 knows opsets up to 22.
OPSET = {"": 18, "ai.onnx.ml": 3}
_NUMERIC = {"float64", "int64", "bool"}
TENSOR_INPUT = "features"


@dataclass(frozen=True)
class Difference:
    """How far ONNX answers are from the estimator's own, over `rows` rows.

    A row's difference is the largest absolute one of a probability (classification), or that of the value relative to the larger of 1
    and the value (regression). `largest` is the worst row's, `beyond` counts rows over the tolerance, `labels` those of another class.
    """

    rows: int
    largest: float
    beyond: int
    labels: int

    def within(self, share: float = 0.001) -> bool:
        """Whether ONNX may stand for the estimator: in float32 a row that lies on a tree's threshold may go to its other side."""
        return max(self.beyond, self.labels) <= share * self.rows


def onnx_input(features: Iterable[Feature]) -> str:
    """`tensor` (one float32 [N, features]) when all features are numeric, else `columns` (one input [N, 1] each)."""
    return "tensor" if all(feature.dtype in _NUMERIC for feature in features) else "columns"


def export(estimator: Any, signature: Signature, custom: Callable[[Any, Signature], Any] | None = None) -> bytes:
    """Convert a fitted scikit-learn compatible estimator (Pipelines and LightGBM too) to serialized ONNX.

    Inputs: one float32 tensor `features`, or one [N, 1] input per feature (strings stay
    strings, all else is float32). Outputs: `label` and `probabilities` [N, classes], or `variable` [N, 1]. `custom` is the author's
    own `to_onnx(estimator, signature) -> ModelProto`. DeclarationError when there is no converter for the estimator.
    """
    proto = custom(estimator, signature) if custom else _converted(estimator, signature)
    _name_outputs(proto, signature.task)
    _check_graph(proto, signature)
    return proto.SerializeToString(deterministic=True)


def max_difference(onnx_bytes: bytes, estimator: Any, features: "pandas.DataFrame", tolerance: float = 1e-4) -> Difference:
    """Answer every row of `features` (input columns in signature order) with both and compare."""
    answers = run(onnx_bytes, features)
    task = "regression" if len(answers) == 1 else "classification"
    return difference(task, answers[0], answers[1] if len(answers) > 1 else None, estimator, features, tolerance)


def difference(
    task: str, prediction: Any, probabilities: Any, estimator: Any, features: "pandas.DataFrame", tolerance: float = 1e-4
) -> Difference:
    """How far answers (`prediction` [rows], `probabilities` [rows, classes] or None) are from the estimator's to the same rows."""
    import numpy

    native = numpy.asarray(estimator.predict(features)).reshape(-1)
    away, labels = numpy.zeros(len(features)), 0
    if task == "regression":
        value = native.astype("float64")
        away = numpy.abs(numpy.asarray(prediction).reshape(-1) - value) / numpy.maximum(1.0, numpy.abs(value))
    else:
        labels = int((prediction != native).sum())
    if probabilities is not None:
        away = numpy.abs(probabilities - estimator.predict_proba(features)).max(axis=1, initial=0.0)
    # Written so that a NaN on one side counts as beyond.
    return Difference(len(features), float(away.max(initial=0.0)), int((~(away <= tolerance)).sum()), labels)


def run(onnx_bytes: bytes, features: "pandas.DataFrame", threads: int = 1) -> list[Any]:
    """The graph's outputs for these rows, fed by the names and types of its inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    if len(inputs) == 1 and inputs[0].name == TENSOR_INPUT:
        return list(session.run(None, {TENSOR_INPUT: features.to_numpy(dtype="float32")}))
    feed = {
        one.name: features[[one.name]].to_numpy(dtype=object if one.type == "tensor(string)" else "float32") for one in inputs
    }
    return list(session.run(None, feed))


def _converted(estimator: Any, signature: Signature) -> Any:
    if hasattr(estimator, "predict_proba") != (signature.task == "classification"):
        raise DeclarationError(
            f"task: {signature.task} does not fit {type(estimator).__name__}; correct the task or the estimator"
            + ("; a classifier without predict_proba needs training.format mlflow" if signature.task == "classification" else "")
        )
    _register_converters()
    names = [feature.name for feature in signature.features]
    if signature.onnx_input == "columns":
        return _convert(estimator, [(feature.name, _column_type(feature)) for feature in signature.features])
    if not _selects_by_name(estimator):
        from skl2onnx.common.data_types import FloatTensorType

        return _convert(estimator, [(TENSOR_INPUT, FloatTensorType([None, len(names)]))])
    # A ColumnTransformer that names columns needs them apart: convert so, then split the one tensor in front.
    return _behind_split(_convert(estimator, [(feature.name, _column_type(feature)) for feature in signature.features]), names)


def _convert(estimator: Any, inputs: list[tuple[str, Any]]) -> Any:
    from skl2onnx import convert_sklearn

    options = {id(estimator): {"zipmap": False}} if hasattr(estimator, "predict_proba") else None
    try:
        return convert_sklearn(estimator, "model", initial_types=inputs, options=options, target_opset=OPSET)
    except Exception as error:
        raise DeclarationError(
            f"training.export: {type(estimator).__name__} cannot be converted to ONNX ({error}); "
            "declare a function of your own in training.export, or set training.format to mlflow (MLflow's own server answers, slower)"
        ) from error


def _column_type(feature: Feature) -> Any:
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType

    return FloatTensorType([None, 1]) if feature.dtype in _NUMERIC else StringTensorType([None, 1])


def _selects_by_name(estimator: Any) -> bool:
    from sklearn.compose import ColumnTransformer

    steps = [step for _, step in estimator.steps] if hasattr(estimator, "steps") else [estimator]
    return any(isinstance(step, ColumnTransformer) or (hasattr(step, "steps") and _selects_by_name(step)) for step in steps)


def _behind_split(proto: Any, names: list[str]) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    sizes = numpy_helper.from_array(_ones(len(names)), "one_column_each")
    proto.graph.initializer.append(sizes)
    proto.graph.node.insert(0, helper.make_node("Split", [TENSOR_INPUT, sizes.name], names, axis=1, name="columns_of_features"))
    del proto.graph.input[:]
    proto.graph.input.append(helper.make_tensor_value_info(TENSOR_INPUT, TensorProto.FLOAT, [None, len(names)]))
    return proto


def _ones(count: int) -> Any:
    import numpy

    return numpy.ones(count, dtype="int64")


def _register_converters() -> None:
    """Teach skl2onnx LightGBM's estimators; the second time it is a no-op."""
    try:
        from lightgbm import LGBMClassifier, LGBMRegressor
    except ImportError:
        return
    from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm
    from skl2onnx import update_registered_converter
    from skl2onnx.common.shape_calculator import (
        calculate_linear_classifier_output_shapes,
        calculate_linear_regressor_output_shapes,
    )

    flags = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
    update_registered_converter(
        LGBMClassifier, "LightGbmLGBMClassifier", calculate_linear_classifier_output_shapes, convert_lightgbm, options=flags
    )
    update_registered_converter(
        LGBMRegressor,
        "LightGbmLGBMRegressor",
        calculate_linear_regressor_output_shapes,
        convert_lightgbm,
        options={"split": None},
    )


def _name_outputs(proto: Any, task: str) -> None:
    wanted = ["label", "probabilities"] if task == "classification" else ["variable"]
    outputs = [output.name for output in proto.graph.output]
    if len(outputs) != len(wanted):
        raise ArtifactError(f"training.export: the graph has outputs {outputs}; {task} needs {' and '.join(wanted)}")
    if other := [output.name for output in proto.graph.output if not output.type.HasField("tensor_type")]:
        raise ArtifactError(f"training.export: output {', '.join(other)} is no tensor; convert with the option zipmap=False")
    # A name that is wanted for an output may be in use inside the graph.
    renamed = {name: f"inner_{name}" for name in wanted} | dict(zip(outputs, wanted, strict=True))
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for output in proto.graph.output:
        output.name = renamed[output.name]


def _check_graph(proto: Any, signature: Signature) -> None:
    import onnx

    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ArtifactError(f"training.export: the graph is not valid ONNX ({error})") from error
    inputs = [one.name for one in proto.graph.input]
    names = [feature.name for feature in signature.features]
    if inputs != [TENSOR_INPUT] and not set(inputs) <= set(names):
        raise ArtifactError(
            f"training.export: inputs {inputs} must be [{TENSOR_INPUT!r}] or features of the signature: {', '.join(names)}"
        )
