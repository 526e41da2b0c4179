"""The model artifact: a folder that is served only if its bytes are the ones that were registered.

`signature.json`, the model, the definitions of its features (`feature_definitions.pb`, a Feast registry), and whatever else was stored
beside them (`reference_profile.json`, `reference_sample.parquet`). The model is `model.onnx` or, where an estimator has no ONNX form, an
MLflow model in the folder `mlflow/`. Nothing of it is unpickled here: MLflow's own server and Feast load what is theirs, after the bytes
were compared with the digest.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import ArtifactError

MODEL_FILE = "model.onnx"
SIGNATURE_FILE = "signature.json"
FEATURES_FILE = "feature_definitions.pb"
NATIVE_FOLDER = "mlflow"
NATIVE_FILE = f"{NATIVE_FOLDER}/MLmodel"
DTYPES = ("float64", "int64", "string", "bool")
TASKS = ("classification", "regression")
ONNX_INPUTS = ("tensor", "columns")
RESERVED = ("id", "event_timestamp")

Stamps = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Feature:
    """One input column of the model; `dtype` is one of `DTYPES`."""

    name: str
    dtype: str
    nullable: bool = False


@dataclass(frozen=True)
class RequestInput:
    """A value that only the caller knows and that an on-demand feature view needs."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives: `signature.json`.

    `onnx_input` is `tensor` (one float tensor [N, n_features]) or `columns` (one input [N, 1] for each feature, named as the feature).
    `entities` are the join keys, `request` the request-time values, from which an online feature store can complete a row.
    `probabilities` says whether a classifier gives them (an ONNX one always does).
    """

    model: str
    task: str
    features: tuple[Feature, ...]
    entities: tuple[str, ...] = ()
    request: tuple[RequestInput, ...] = ()
    classes: tuple[Any, ...] | None = None
    onnx_input: str = "tensor"
    probabilities: bool = True

    def __post_init__(self) -> None:
        _check_signature(self)

    def to_json(self) -> str:
        """The text of `signature.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Signature":
        """Read `signature.json`; raises ArtifactError that names the field that is wrong."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{SIGNATURE_FILE} is not JSON: {error}. Write it with write_signature().") from error
        if not isinstance(raw, Mapping):
            raise ArtifactError(f"{SIGNATURE_FILE} holds a {type(raw).__name__}, not an object.")
        try:
            return cls(
                model=raw["model"],
                task=raw["task"],
                features=tuple(Feature(**f) for f in raw["features"]),
                entities=tuple(raw.get("entities") or ()),
                request=tuple(RequestInput(**r) for r in raw.get("request") or ()),
                classes=None if raw.get("classes") is None else tuple(raw["classes"]),
                onnx_input=raw.get("onnx_input", "tensor"),
                probabilities=raw.get("probabilities", True),
            )
        except KeyError as error:
            raise ArtifactError(f"{SIGNATURE_FILE} has no field {error}. Fields needed: model, task, features.") from error
        except TypeError as error:
            raise ArtifactError(f"{SIGNATURE_FILE} has a field of the wrong form: {error}.") from error


@dataclass(frozen=True)
class Artifact:
    """A model folder whose digest was compared with the registered one, with the very bytes that were hashed.

    `model` is the ONNX model; empty where `native` has the files of an MLflow model, by their paths below `mlflow/`. `definitions` are
    those of the features that it was trained with, as a Feast registry; None in artifacts made before they were kept.
    """

    folder: Path
    sha256: str
    signature: Signature
    model: bytes
    native: Mapping[str, bytes] = field(default_factory=dict)
    definitions: bytes | None = None


def digest(folder: Path | str) -> str:
    """SHA-256 (hex) over the sorted lines `<sha256>  <relative path>` of all files in `folder`, each line ended by a newline.

    Raises ArtifactError when the folder is missing or holds no file.
    """
    return _digest(Path(folder), lambda _: False)[0]


def stamps(folder: Path | str) -> Stamps:
    """(relative path, size, time of modification, time of change in ns) of every file, in order: equal where no byte was written.

    Raises ArtifactError when a file vanishes meanwhile.
    """
    found = []
    try:
        for path in Path(folder).rglob("*"):
            if path.is_file():
                said = path.stat()
                found.append((path.relative_to(folder).as_posix(), said.st_size, said.st_mtime_ns, said.st_ctime_ns))
    except OSError as error:
        raise ArtifactError(f"Cannot read the artifact: {error}.") from error
    return tuple(sorted(found))


def load_signature(folder: Path | str) -> Signature:
    """The signature stored in an artifact folder; raises ArtifactError when it is missing or wrong."""
    path = Path(folder) / SIGNATURE_FILE
    try:
        return Signature.from_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(
            f"Cannot read {path}: {error.strerror}. A model folder needs {SIGNATURE_FILE} and {MODEL_FILE} or {NATIVE_FILE}."
        ) from error


def write_signature(folder: Path | str, signature: Signature) -> Path:
    """Write `signature.json` into `folder` (made if missing) and return its path; writing twice gives the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SIGNATURE_FILE
    temporary = folder / f".{SIGNATURE_FILE}.tmp"
    temporary.write_text(signature.to_json())
    temporary.replace(path)
    return path


def load(folder: Path | str, sha256: str) -> Artifact:
    """Read an artifact whose digest equals `sha256`; anything else raises ArtifactError.

    The model is handed on from memory, so that a file swapped after the comparison is not the one that is served.
    """
    folder = Path(folder)
    found, kept = _digest(
        folder, lambda name: name in (MODEL_FILE, SIGNATURE_FILE, FEATURES_FILE) or name.startswith(f"{NATIVE_FOLDER}/")
    )
    if found != sha256.strip().lower():
        raise ArtifactError(
            f"The artifact in {folder} has SHA-256 {found}, but the registered one is {sha256}: its bytes changed. "
            "Restore the folder from the registry, or register and approve this one as a new version."
        )
    model, signature = kept.pop(MODEL_FILE, b""), kept.pop(SIGNATURE_FILE, b"")
    definitions = kept.pop(FEATURES_FILE, None)
    native = {name.removeprefix(f"{NATIVE_FOLDER}/"): content for name, content in kept.items()}
    if not signature or not (model or NATIVE_FILE in kept):
        absent = MODEL_FILE if signature else SIGNATURE_FILE
        raise ArtifactError(
            f"The artifact in {folder} has no {absent} (or an empty one); it needs {SIGNATURE_FILE} and {MODEL_FILE} or {NATIVE_FILE}."
        )
    if model and native:
        raise ArtifactError(f"The artifact in {folder} has both {MODEL_FILE} and {NATIVE_FILE}; only one of them can be served.")
    return Artifact(folder, found, Signature.from_json(signature), model, native, definitions)


def _digest(folder: Path, keep: Callable[[str], bool]) -> tuple[str, dict[str, bytes]]:
    """The digest of `folder`, and the contents of the files whose relative paths `keep` wants."""
    if not folder.is_dir():
        raise ArtifactError(f"There is no artifact folder {folder}. Give the folder that holds {SIGNATURE_FILE} and the model.")
    lines, kept = [], {}
    try:
        for path in folder.rglob("*"):
            if not path.is_file():
                continue
            relative = path.relative_to(folder).as_posix()
            content = path.read_bytes()
            if keep(relative):
                kept[relative] = content
            lines.append(f"{hashlib.sha256(content).hexdigest()}  {relative}\n")
    except OSError as error:
        raise ArtifactError(f"Cannot read the artifact: {error}.") from error
    if not lines:
        raise ArtifactError(
            f"The artifact folder {folder} is empty; it needs {SIGNATURE_FILE} and {MODEL_FILE} or {NATIVE_FILE}."
        )
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest(), kept


def _check_signature(signature: Signature) -> None:
    _one_of("task", signature.task, TASKS)
    _one_of("onnx_input", signature.onnx_input, ONNX_INPUTS)
    if not isinstance(signature.model, str) or not signature.model:
        raise ArtifactError(f"signature.model is {signature.model!r}; it must be the model's name.")
    if not signature.features:
        raise ArtifactError("signature.features is empty; a model needs at least one feature.")
    names = [f.name for f in signature.features]
    for kind, listed in (("features", signature.features), ("request", signature.request)):
        for number, column in enumerate(listed):
            _one_of(f"{kind}[{number}].dtype", column.dtype, DTYPES)
            if not isinstance(column.name, str) or not column.name:
                raise ArtifactError(f"signature.{kind}[{number}].name is {column.name!r}; it must be a column name.")
    if doubled := {n for n in names if names.count(n) > 1}:
        raise ArtifactError(f"signature.features names {sorted(doubled)} more than once.")
    if taken := set(names) & set(RESERVED):
        raise ArtifactError(
            f"signature.features uses the reserved name {sorted(taken)}; requests use {', '.join(RESERVED)} for the row itself."
        )
    if signature.onnx_input == "tensor" and (strings := [f.name for f in signature.features if f.dtype == "string"]):
        raise ArtifactError(
            f"signature.onnx_input is 'tensor' but {strings} are strings; export the model with onnx_input 'columns'."
        )


def _one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArtifactError(f"signature.{field} is {value!r}; it must be one of {', '.join(allowed)}.")
