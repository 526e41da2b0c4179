"""One ONNX Runtime session and the ways into it: one row with preallocated memory, or columns of any length."""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from mlops_dagster.core.errors import ArtifactError
from mlops_dagster.serving.artifact import Artifact, Feature, Signature
from mlops_dagster.serving.rows import InputError, Row

# ONNX element type -> numpy type, struct code, Open Inference Protocol datatype.
ELEMENT: dict[str, tuple[Any, str, str]] = {
    "tensor(float)": (np.float32, "f", "FP32"),
    "tensor(double)": (np.float64, "d", "FP64"),
    "tensor(int64)": (np.int64, "q", "INT64"),
    "tensor(int32)": (np.int32, "i", "INT32"),
    "tensor(bool)": (np.bool_, "?", "BOOL"),
    "tensor(string)": (np.object_, "", "BYTES"),
}
FLOATS = ("tensor(float)", "tensor(double)")
FITS = {
    "float64": FLOATS,
    "int64": (*FLOATS, "tensor(int64)", "tensor(int32)"),
    "bool": (*FLOATS, "tensor(bool)", "tensor(int64)"),
    "string": ("tensor(string)",),
}
ZERO = {"float64": 0.0, "int64": 0, "bool": False, "string": ""}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the Open Inference Protocol's metadata names it; -1 stands for the number of rows."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def open_session(model: bytes, threads: int = 1) -> ort.InferenceSession:
    """A CPU session; one thread a request measures best, because requests are many and rows few. Raises ArtifactError."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own errors share no base class but Exception
        raise ArtifactError(
            f"model.onnx cannot be loaded by ONNX Runtime {ort.__version__}: {error}. Export the model again."
        ) from error


class Scorer:
    """Rows in signature order in, label (or value) and probabilities out.

    `many` may be called from two threads at once; `one`, which reuses its memory, only where `concurrent` says so. `platform` is its
    name in V2's metadata.
    """

    platform = "onnxruntime_onnx"
    concurrent = False

    def __init__(self, artifact: Artifact, threads: int = 1) -> None:
        self.signature = artifact.signature
        self.session = open_session(artifact.model, threads)
        self._features = self.signature.features
        self._tensor = self.signature.onnx_input == "tensor"
        self._types = self._input_types()
        self.inputs = self._input_specs()
        self._label, self._probability = _find_outputs(self.session, self.signature)
        self._output_names = [self._label] if self._probability is None else [self._label, self._probability]
        self.outputs: tuple[TensorSpec, ...] = ()
        self._classes = None
        self.one = self._prepare()

    def _input_types(self) -> dict[str, str]:
        found = {i.name: i.type for i in self.session.get_inputs()}
        if self._tensor:
            if len(found) != 1 or next(iter(found.values())) not in FLOATS:
                raise ArtifactError(
                    f"signature.onnx_input is 'tensor', but model.onnx takes {found}; it must take one float tensor."
                )
            width = self.session.get_inputs()[0].shape[-1]
            if isinstance(width, int) and width != len(self._features):
                raise ArtifactError(f"model.onnx takes {width} features, but signature.json lists {len(self._features)}.")
            return found
        for feature in self._features:
            if found.get(feature.name) not in FITS[feature.dtype]:
                raise ArtifactError(
                    f"Feature {feature.name} is {feature.dtype}, but model.onnx takes {found.get(feature.name)} for it."
                )
            if feature.nullable and feature.dtype in ("int64", "bool") and found[feature.name] not in FLOATS:
                raise ArtifactError(
                    f"Feature {feature.name} is nullable, but model.onnx takes {found[feature.name]}, which has no NaN."
                )
        if extra := found.keys() - {f.name for f in self._features}:
            raise ArtifactError(f"model.onnx takes inputs that signature.json does not list: {sorted(extra)}.")
        return found

    def _input_specs(self) -> tuple[TensorSpec, ...]:
        if self._tensor:
            name, kind = next(iter(self._types.items()))
            return (TensorSpec(name, ELEMENT[kind][2], (-1, len(self._features))),)
        return tuple(TensorSpec(f.name, ELEMENT[self._types[f.name]][2], (-1, 1)) for f in self._features)

    def _prepare(self) -> "Callable[[Row], tuple[Any, list[list[float]] | None]]":
        """Score a row of zeros: fails early if the model cannot run, and shows the shapes of its outputs."""
        zero = [np.array([ZERO[f.dtype]], dtype=object) for f in self._features]
        found = self.session.run(self._output_names, self._feed(zero, 1))
        kinds = {o.name: ELEMENT[o.type][2] for o in self.session.get_outputs() if o.type in ELEMENT}
        self.outputs = tuple(
            TensorSpec(n, kinds[n], (-1, *a.shape[1:])) for n, a in zip(self._output_names, map(np.asarray, found), strict=True)
        )
        arrays = [np.asarray(a) for a in found]
        if arrays[0].size != 1:
            raise ArtifactError(
                f"model.onnx gives {arrays[0].size} values a row as {self._label}; models of one label or value are served."
            )
        self._classes = _class_names(self.signature, arrays[0])
        if self._classes is not None:
            self.outputs = (TensorSpec(self._label, "BYTES", (-1,)), *self.outputs[1:])
        if not self._tensor:
            return _Fed(self)
        return _Bound(self, arrays) if all(a.dtype.kind in "fiub" for a in arrays) else _Block(self)

    def many(self, columns: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Labels [count] (or values [count, …]) and probabilities [count, n_classes] of `columns` in signature order."""
        found = self.session.run(self._output_names, self._feed(columns, count))
        label = np.asarray(found[0])
        if self._classes is not None:
            label = np.array([self._classes[i] for i in label.tolist()], dtype=object)
        return label, (np.asarray(found[1]) if self._probability is not None else None)

    def _feed(self, columns: Sequence[np.ndarray], count: int) -> dict[str, np.ndarray]:
        if self._tensor:
            name, kind = next(iter(self._types.items()))
            block = np.empty((count, len(self._features)), dtype=ELEMENT[kind][0])
            for i, (column, feature) in enumerate(zip(columns, self._features, strict=True)):
                block[:, i] = _fit(column, kind, feature)
            return {name: block}
        return {
            f.name: _fit(column, self._types[f.name], f).reshape(count, 1)
            for f, column in zip(self._features, columns, strict=True)
        }


class _Bound:
    """One row through memory that is bound to the session once: a float tensor in, numbers out."""

    def __init__(self, scorer: Scorer, outputs: list[np.ndarray]) -> None:
        name, kind = next(iter(scorer._types.items()))
        width = len(scorer._features)
        element, code, _ = ELEMENT[kind]
        self._block = np.zeros((1, width), dtype=element)
        self._memory = memoryview(self._block).cast("B")  # type: ignore[arg-type]
        self._pack = struct.Struct(f"={width}{code}").pack_into
        self._results = [np.empty_like(a) for a in outputs]
        binding = scorer.session.io_binding()
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(self._block))
        for output, array in zip(scorer._output_names, self._results, strict=True):
            binding.bind_ortvalue_output(output, ort.OrtValue.ortvalue_from_numpy(array))
        self._binding = binding
        self._run = scorer.session.run_with_iobinding
        self._classes = scorer._classes
        self._label = self._results[0].reshape(-1)
        self._probabilities = self._results[1] if len(self._results) > 1 else None
        self._scorer = scorer

    def __call__(self, row: Row) -> tuple[Any, list[list[float]] | None]:
        try:
            self._pack(self._memory, 0, *row)
        except (struct.error, OverflowError):
            self._pack(self._memory, 0, *self._with_nan(row))
        self._run(self._binding)
        label = self._label.tolist()
        if self._classes is not None:
            label = [self._classes[label[0]]]
        return label, (None if self._probabilities is None else self._probabilities.tolist())

    def _with_nan(self, row: Row) -> Row:
        values = tuple(math.nan if v is None else v for v in row)
        for value, feature in zip(values, self._scorer._features, strict=True):
            if abs(value) > np.finfo(self._block.dtype).max:
                raise _out_of_range(feature, 0, value)
        return values


class _Fed:
    """One row through arrays that are kept and filled anew: an input for each feature, of any type, and outputs of any type."""

    def __init__(self, scorer: Scorer) -> None:
        self._features = scorer._features
        self._kinds = [scorer._types[f.name] for f in self._features]
        self._feed = {f.name: np.zeros((1, 1), dtype=ELEMENT[k][0]) for f, k in zip(self._features, self._kinds, strict=True)}
        self._cells = [
            (a, _limit(k), "" if k == "tensor(string)" else math.nan)
            for a, k in zip(self._feed.values(), self._kinds, strict=True)
        ]
        self._names = scorer._output_names
        self._run = scorer.session.run
        self._classes = scorer._classes

    def __call__(self, row: Row) -> tuple[Any, list[list[float]] | None]:
        for (array, limit, null), value, feature in zip(self._cells, row, self._features, strict=True):
            if value is None:
                array[0, 0] = null
            elif limit is None or -limit <= value <= limit:
                array[0, 0] = value
            else:
                raise _out_of_range(feature, 0, value)
        found = self._run(self._names, self._feed)
        label = np.asarray(found[0]).reshape(-1).tolist()
        if self._classes is not None:
            label = [self._classes[label[0]]]
        return label, (None if len(found) == 1 else np.asarray(found[1]).tolist())


class _Block:
    """One row as a block of a row: a tensor in, strings out."""

    def __init__(self, scorer: Scorer) -> None:
        self._many = scorer.many

    def __call__(self, row: Row) -> tuple[Any, list[list[float]] | None]:
        label, probability = self._many([np.array([v], dtype=object) for v in row], 1)
        return label.reshape(-1).tolist(), (None if probability is None else probability.tolist())


def _limit(kind: str) -> float | None:
    """The largest magnitude that an input takes, where a row's values can be larger."""
    return {"tensor(float)": float(np.finfo(np.float32).max), "tensor(int32)": 2**31 - 1}.get(kind)


def _fit(column: np.ndarray, kind: str, feature: Feature) -> np.ndarray:
    """`column` as ONNX wants it: None becomes NaN, or the empty string."""
    element = ELEMENT[kind][0]
    if element is np.object_:
        return np.array(["" if v is None else v for v in column], dtype=object)
    wide = column.astype(np.float64 if element in (np.float32, np.float64) else element if element is np.bool_ else np.int64)
    limit = _limit(kind)
    # Not by np.abs: the smallest 64-bit integer is its own absolute value.
    if limit is not None and (too_big := (wide > limit) | (wide < -limit)).any():
        where = int(np.argmax(too_big))
        raise _out_of_range(feature, where, wide[where])
    return wide.astype(element)


def _out_of_range(feature: Feature, number: int, value: float) -> InputError:
    return InputError(
        f"instances[{number}].{feature.name} is {value:g}, outside the range of the 32-bit number that the model takes."
    )


def _find_outputs(session: ort.InferenceSession, signature: Signature) -> tuple[str, str | None]:
    """Names of the label (or value) output and of the probabilities, by kind and position, whatever the converter called them."""
    outputs = session.get_outputs()
    if odd := [f"{o.name}: {o.type}" for o in outputs if o.type not in ELEMENT]:
        raise ArtifactError(f"model.onnx gives {odd[0]}, which is no tensor; export it with the converter's option zipmap=False.")
    if signature.task == "regression":
        return outputs[0].name, None
    labels = [o.name for o in outputs if o.type in ("tensor(int64)", "tensor(string)", "tensor(bool)", "tensor(int32)")]
    probabilities = [o.name for o in outputs if o.type in FLOATS]
    if not labels or not probabilities:
        raise ArtifactError(
            f"model.onnx gives {[o.name for o in outputs]}; a classifier must give a label and its probabilities."
        )
    return labels[0], probabilities[0]


def _class_names(signature: Signature, label: np.ndarray) -> tuple[Any, ...] | None:
    """The class names, where the model answers with their positions (string classes, integer labels); else None."""
    classes = signature.classes
    if classes is None or label.dtype.kind not in "iu" or not all(isinstance(c, str) for c in classes):
        return None
    return tuple(classes)
