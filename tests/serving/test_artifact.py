"""The artifact's digest and signature."""

import hashlib
import json
from pathlib import Path

import pytest

from mlops_dagster.core.errors import ArtifactError
from mlops_dagster.serving.artifact import Feature, RequestInput, Signature, digest, load, load_signature, write_signature

SIGNATURE = Signature(
    "m",
    "classification",
    (Feature("a", "float64", True), Feature("b", "int64")),
    ("plane",),
    (RequestInput("dep", "float64"),),
    (0, 1),
)


def folder_of(path: Path, **files: str) -> Path:
    for name, content in files.items():
        target = path / name.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    return path


def test_the_digest_is_that_of_the_sorted_lines(tmp_path: Path) -> None:
    folder_of(tmp_path, b="2", a="1", sub__c="3")
    lines = sorted(f"{hashlib.sha256(c.encode()).hexdigest()}  {n}\n" for n, c in (("b", "2"), ("a", "1"), ("sub/c", "3")))
    assert digest(tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("change", [{"a": "2"}, {"c": ""}, {"sub__a": "1"}])
def test_any_change_of_content_or_name_changes_the_digest(tmp_path: Path, change: dict[str, str]) -> None:
    before = digest(folder_of(tmp_path, a="1", b="2"))
    assert digest(folder_of(tmp_path, **change)) != before
    swapped = folder_of(tmp_path / "x", a="2", b="1")
    assert digest(swapped) != digest(folder_of(tmp_path / "y", a="1", b="2"))


def test_a_signature_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_signature(tmp_path, SIGNATURE)
    first = (tmp_path / "signature.json").read_bytes()
    assert load_signature(tmp_path) == SIGNATURE
    write_signature(tmp_path, SIGNATURE)
    assert (tmp_path / "signature.json").read_bytes() == first
    assert json.loads(first)["features"][0] == {"name": "a", "dtype": "float64", "nullable": True}


def test_load_gives_the_bytes_that_were_compared(tmp_path: Path) -> None:
    write_signature(tmp_path, SIGNATURE)
    (tmp_path / "model.onnx").write_bytes(b"model")
    artifact = load(tmp_path, digest(tmp_path).upper())
    assert (artifact.model, artifact.signature) == (b"model", SIGNATURE)
    with pytest.raises(ArtifactError, match="its bytes changed"):
        load(tmp_path, "0" * 64)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    write_signature(tmp_path, SIGNATURE)
    with pytest.raises(ArtifactError, match=r"has no model\.onnx"):
        load(tmp_path, digest(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ArtifactError, match="no artifact folder"):
        digest(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="is empty"):
        digest(empty)
    with pytest.raises(ArtifactError, match=r"Cannot read .*signature\.json"):
        load_signature(empty)


GOOD = json.loads(SIGNATURE.to_json())
WRONG = {
    "not JSON": ("{", "not JSON"),
    "a list": ([], "holds a list"),
    "no features": ({**GOOD, "features": []}, "features is empty"),
    "field missing": ({k: v for k, v in GOOD.items() if k != "task"}, "no field 'task'"),
    "task": ({**GOOD, "task": "ranking"}, "signature.task is 'ranking'"),
    "dtype": ({**GOOD, "features": [{"name": "a", "dtype": "float"}]}, r"features\[0\].dtype is 'float'"),
    "misspelt": ({**GOOD, "features": [{"nam": "a", "dtype": "float64"}]}, "nam"),
    "twice": ({**GOOD, "features": GOOD["features"] * 2}, "more than once"),
    "reserved": ({**GOOD, "features": [{"name": "id", "dtype": "string"}], "onnx_input": "columns"}, "reserved name"),
    "strings in a tensor": ({**GOOD, "features": [{"name": "a", "dtype": "string"}]}, "onnx_input is 'tensor' but"),
    "onnx_input": ({**GOOD, "onnx_input": "table"}, "onnx_input is 'table'"),
}


@pytest.mark.parametrize(("raw", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_signature_is_named(raw: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Signature.from_json(raw if isinstance(raw, str) else json.dumps(raw))
