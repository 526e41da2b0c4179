"""What every registry backend must do, on the embedded SQLite store and on a real server."""

import multiprocessing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mlops_dagster.core.errors import ApprovalError, ArtifactError, DataError, DeclarationError, NotFoundError
from mlops_dagster.resources.registry import Approval, ApprovalState, Registry, approval_is_valid, approval_state, evidence_hash
from mlops_dagster.resources.registry.mlflow_registry import MlflowRegistry
from mlops_dagster.resources.tracking.mlflow_connection import connect
from mlops_dagster.serving.artifact import digest

EVIDENCE = {"metrics": {"accuracy": 0.9111111111111111, "roc_auc": 1 / 3}, "data_hash": "d" * 64, "rows": 51955}
AT = datetime(2013, 3, 1, 12, tzinfo=UTC)
YES = Approval("approved", "anna", AT, "better in every month")
NO = Approval("rejected", "ben", AT, "worse in Denver")


def test_satisfies_the_protocol(registry: MlflowRegistry) -> None:
    assert isinstance(registry, Registry)


def test_a_version_reads_back_whole(registry: MlflowRegistry, model: str, artifact: Path) -> None:
    made = registry.register(model, artifact, digest(artifact), EVIDENCE, {"trained_on": "2013-01-01/2013-02-28"})
    assert made.number == 1
    assert made.evidence == EVIDENCE
    assert made.registered_hash == evidence_hash(made.digest, EVIDENCE)
    assert made.tags["trained_on"] == "2013-01-01/2013-02-28"
    assert made.run_id
    assert made.url_path == f"/#/models/{model}/versions/1"
    assert approval_state(made) is ApprovalState.NONE
    assert registry.versions(model) == (made,)


def test_the_same_registration_is_the_same_version(registry: MlflowRegistry, model: str, artifact: Path) -> None:
    first = registry.register(model, artifact, digest(artifact), EVIDENCE, {})
    assert registry.register(model, artifact, digest(artifact), EVIDENCE, {"other": "tag"}).number == first.number
    assert registry.register(model, artifact, digest(artifact), {**EVIDENCE, "rows": 1}, {}).number == 2
    (artifact / "signature.json").write_text((artifact / "signature.json").read_text() + " ")
    assert registry.register(model, artifact, digest(artifact), EVIDENCE, {}).number == 3
    assert [version.number for version in registry.versions(model)] == [1, 2, 3]


def test_an_unknown_model_has_no_versions(registry: MlflowRegistry) -> None:
    assert registry.versions("never-registered") == ()


def test_aliases_move(registry: MlflowRegistry, model: str, artifact: Path) -> None:
    registry.register(model, artifact, digest(artifact), EVIDENCE, {})
    registry.register(model, artifact, digest(artifact), {"rows": 2}, {})
    registry.set_alias(model, "candidate", 1)
    registry.set_alias(model, "champion", 1)
    registry.set_alias(model, "champion", 2)
    registry.set_alias(model, "champion", 2)
    assert [version.aliases for version in registry.versions(model)] == [("candidate",), ("champion",)]
    registry.set_alias(model, "candidate", None)
    registry.set_alias(model, "candidate", None)
    assert [version.aliases for version in registry.versions(model)] == [(), ("champion",)]
    with pytest.raises(
        DeclarationError, match=r"alias: 'winner' is unknown; use one of candidate, challenger, champion, previous"
    ):
        registry.set_alias(model, "winner", 1)
    with pytest.raises(NotFoundError, match=r"version 7 does not exist; there are: 1, 2"):
        registry.set_alias(model, "champion", 7)


def test_an_approval_is_bound_to_its_evidence(registry: MlflowRegistry, model: str, artifact: Path) -> None:
    registry.register(model, artifact, digest(artifact), EVIDENCE, {})
    approved = registry.record_approval(model, 1, YES)
    assert approval_is_valid(approved)
    assert approved.approval == replace(YES, evidence_hash=approved.registered_hash)
    again = registry.record_approval(model, 1, replace(YES, by="cleo"))
    assert again.approval is not None
    assert again.approval.by == "anna"
    client = connect(registry.tracking_uri)
    client.set_model_version_tag(model, "1", "mlops.evidence.rows", "60000")
    changed = registry.versions(model)[0]
    assert approval_state(changed) is ApprovalState.VOID
    with pytest.raises(ApprovalError, match="its evidence was changed"):
        registry.record_approval(model, 1, YES)
    client.set_model_version_tag(model, "1", "mlops.evidence.rows", "51955")
    assert approval_is_valid(registry.versions(model)[0])
    client.set_model_version_tag(model, "1", "mlops.artifact_digest", "0" * 64)
    assert approval_state(registry.versions(model)[0]) is ApprovalState.VOID


def test_a_rejection_is_final_and_an_approval_can_be_revoked(registry: MlflowRegistry, model: str, artifact: Path) -> None:
    registry.register(model, artifact, digest(artifact), EVIDENCE, {})
    registry.record_approval(model, 1, YES)
    rejected = registry.record_approval(model, 1, NO)
    assert approval_state(rejected) is ApprovalState.REJECTED
    assert rejected.approval is not None
    assert (rejected.approval.by, rejected.approval.reason) == ("ben", "worse in Denver")
    with pytest.raises(ApprovalError, match="was rejected by ben"):
        registry.record_approval(model, 1, YES)


def test_a_tag_set_by_hand_is_seen_and_then_bound(registry: MlflowRegistry, model: str, artifact: Path) -> None:
    registry.register(model, artifact, digest(artifact), EVIDENCE, {})
    client = connect(registry.tracking_uri)
    client.set_model_version_tag(model, "1", "mlops.approval", "Approved")
    client.set_model_version_tag(model, "1", "mlops.approved_by", "dora")
    by_hand = registry.versions(model)[0]
    assert by_hand.approval == Approval("approved", "dora")
    assert approval_state(by_hand) is ApprovalState.UNBOUND
    assert not approval_is_valid(by_hand)
    assert approval_is_valid(registry.record_approval(model, 1, replace(YES, by="dora")))
    client.set_model_version_tag(model, "1", "mlops.approval", "rejected")
    assert approval_state(registry.versions(model)[0]) is ApprovalState.REJECTED


@pytest.mark.parametrize("approval", [replace(YES, by=" "), replace(YES, at=None)])
def test_an_approval_needs_a_name_and_a_time(registry: MlflowRegistry, model: str, artifact: Path, approval: Approval) -> None:
    registry.register(model, artifact, digest(artifact), EVIDENCE, {})
    with pytest.raises(ApprovalError, match="version 1: an approval needs"):
        registry.record_approval(model, 1, approval)
    with pytest.raises(NotFoundError, match="version 9 does not exist"):
        registry.record_approval(model, 9, YES)


def test_fetch_gives_the_registered_bytes(registry: MlflowRegistry, model: str, artifact: Path, tmp_path: Path) -> None:
    native = tmp_path / "estimator.pkl"
    native.write_bytes(b"never unpickled")
    made = registry.register(model, artifact, digest(artifact), EVIDENCE, {}, native=native)
    to = registry.fetch(model, 1, tmp_path / "served" / "1")
    assert digest(to) == made.digest
    assert sorted(path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file()) == [
        "model.onnx",
        "profiles/reference_profile.json",
        "signature.json",
    ]
    (to / "model.onnx").write_bytes(b"changed on disk")
    assert digest(registry.fetch(model, 1, to)) == made.digest
    with pytest.raises(NotFoundError, match="version 2 does not exist; there are: 1"):
        registry.fetch(model, 2, tmp_path / "served" / "2")


def test_changed_bytes_are_refused(registry: MlflowRegistry, model: str, artifact: Path, tmp_path: Path) -> None:
    made = registry.register(model, artifact, digest(artifact), EVIDENCE, {})
    client = connect(registry.tracking_uri)
    assert made.run_id is not None
    place = client.list_artifacts(made.run_id)[0].path
    (tmp_path / "model.onnx").write_bytes(b"another model")
    client.log_artifact(made.run_id, str(tmp_path / "model.onnx"), place)
    with pytest.raises(ArtifactError, match=f"version 1: its bytes have digest .* not the {made.digest}"):
        registry.fetch(model, 1, tmp_path / "served")
    assert not (tmp_path / "served").exists()
    with pytest.raises(ArtifactError, match=f"version 1: its bytes have digest .* not the {made.digest}"):
        registry.record_approval(model, 1, YES)
    assert registry.versions(model) == (made,), "nothing of the approval is left"
    assert approval_state(registry.record_approval(model, 1, NO)) is ApprovalState.REJECTED
    with pytest.raises(ArtifactError, match="artifact_folder: its bytes have digest"):
        registry.register(model, artifact, "0" * 64, EVIDENCE, {})


def test_mlflow_itself_can_load_it(registry: MlflowRegistry, model: str, artifact: Path) -> None:
    import mlflow
    import numpy

    registry.register(model, artifact, digest(artifact), EVIDENCE, {})
    client = connect(registry.tracking_uri)
    uri = client.get_model_version_download_uri(model, "1")
    folder = mlflow.artifacts.download_artifacts(artifact_uri=uri, tracking_uri=registry.tracking_uri)
    loaded = mlflow.pyfunc.load_model(folder)
    answer = loaded.predict(numpy.array([[3.0, 1.0]], dtype="float32"))
    assert float(answer["variable"][0][0]) == 6.0
    assert "features" in str(loaded.metadata.signature)


@pytest.mark.parametrize(
    ("evidence", "tags", "error", "message"),
    [
        ({"accuracy": float("nan")}, {}, DataError, "evidence: .*finite numbers"),
        ({"report": object()}, {}, DataError, "evidence: .*not JSON serializable"),
        ({"report": "x" * 100_001}, {}, DataError, r"mlops.evidence.report: 100003 characters"),
        ({}, {"mlops.approval": "approved"}, DeclarationError, "mlops.approval begin with 'mlops.'"),
    ],
)
def test_bad_input_is_named(
    registry: MlflowRegistry, model: str, artifact: Path, evidence: dict, tags: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        registry.register(model, artifact, digest(artifact), evidence, tags)
    assert registry.versions(model) == ()


def test_an_artifact_without_a_model_is_refused(registry: MlflowRegistry, model: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no model")
    with pytest.raises(ArtifactError, match=r"model.onnx is missing"):
        registry.register(model, tmp_path / "empty", digest(tmp_path / "empty"), EVIDENCE, {})
    with pytest.raises(ArtifactError, match="is not a folder"):
        registry.register(model, tmp_path / "nowhere", "0" * 64, EVIDENCE, {})


def _register(uri: str, model: str, artifact: Path, known: str) -> int:
    return MlflowRegistry(tracking_uri=uri).register(model, artifact, known, EVIDENCE, {}).number


def test_two_processes_register_one_version(registry: MlflowRegistry, model: str, artifact: Path) -> None:
    arguments = (registry.tracking_uri, model, artifact, digest(artifact))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        numbers = pool.starmap(_register, [arguments, arguments])
    known = registry.versions(model)
    assert len(known) == 1
    assert numbers == [known[0].number] * 2
