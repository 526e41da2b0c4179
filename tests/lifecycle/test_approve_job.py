"""Deciding about versions by the Dagster job, as the Launchpad runs it, on a real registry and ledger."""

import datetime as dt
from pathlib import Path

import dagster as dg
import pytest

from mlops_dagster.assets import approvals, approve
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.ledger.opened import LedgerResource
from mlops_dagster.resources.registry import ApprovalState, approval_state
from mlops_dagster.resources.registry.mlflow_registry import MlflowRegistry
from mlops_dagster.resources.tracking.mlflow_connection import connect
from mlops_dagster.runs import failure
from mlops_dagster.serving.artifact import Feature, Signature, digest, write_signature

MODEL = "double"
EVIDENCE = {"metrics": {"accuracy": 0.93}, "training_set": "f00d"}
JOB = "double_approve"


@pytest.fixture
def registry(tmp_path: Path) -> MlflowRegistry:
    folder = tmp_path / "artifact"
    write_signature(folder, Signature(MODEL, "regression", (Feature("x", "float64"),)))
    (folder / "model.onnx").write_bytes(b"never loaded here")
    made = MlflowRegistry(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", artifacts_folder=str(tmp_path / "artifacts"))
    for rows in (1, 2):
        made.register(MODEL, folder, digest(folder), {**EVIDENCE, "rows": rows}, {"author": "ann", "four_eyes": "true"})
    return made


@pytest.fixture
def ledger(tmp_path: Path) -> LedgerResource:
    return LedgerResource(url=f"sqlite:///{tmp_path / 'ledger.db'}")


def decide(registry: MlflowRegistry, ledger: LedgerResource, **config) -> dg.ExecuteInProcessResult:
    sections = {"source": {"read": "a.b", "schema": "a.b", "partitions": {"start": "2024-01-01"}}, "label": {"column": "y"}}
    sections |= {"features": {"define": "a.b", "compute": "a.b"}, "training": {"train": "a.b"}}
    spec = ModelSpec.model_validate({"name": MODEL, "package": "a", **sections})
    definitions = dg.Definitions(jobs=[approve.build(spec, JOB)], resources={"registry": registry, "ledger": ledger})
    run_config = {"ops": {f"{MODEL}_decide": {"config": config}}}
    return definitions.resolve_job_def(JOB).execute_in_process(run_config=run_config, raise_on_error=False)


def test_an_approval_reaches_registry_and_ledger_once(registry: MlflowRegistry, ledger: LedgerResource) -> None:
    for _ in range(2):
        assert decide(registry, ledger, version=1, by="ben", reason="better in Denver").success
    decided = registry.versions(MODEL)[0]
    assert approval_state(decided) is ApprovalState.APPROVED
    assert decided.approval
    assert (decided.approval.by, decided.approval.reason) == ("ben", "better in Denver")
    assert [(e.kind, e.subject, e.actor) for e in ledger.entries(MODEL)] == [("approval", "1", "ben")]


def test_a_rejection_is_final(registry: MlflowRegistry, ledger: LedgerResource) -> None:
    assert decide(registry, ledger, version=2, by="ben", decision="rejected").success
    refused = decide(registry, ledger, version=2, by="cleo")
    assert not refused.success
    assert "was rejected by ben" in failure(refused)
    assert [e.kind for e in ledger.entries(MODEL)] == ["rejection"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": 1, "by": "ann"}, "double asks for four eyes: 'ann' made version 1, so somebody else must approve it"),
        ({"version": 1, "by": " Ann "}, "somebody else must approve it, and by name ('Ann' is given)"),
        ({"version": 9, "by": "ben"}, "double has no version 9; it has: 1, 2"),
        ({"version": 1, "by": " "}, "version 1: an approval needs"),
    ],
)
def test_a_refused_decision_says_why_and_leaves_nothing(
    registry: MlflowRegistry, ledger: LedgerResource, config: dict, message: str
) -> None:
    refused = decide(registry, ledger, **config)
    assert not refused.success
    assert message in failure(refused)
    assert not ledger.entries(MODEL)
    assert all(version.approval is None for version in registry.versions(MODEL))


def test_a_tag_set_in_the_registrys_ui_counts_and_keeps_four_eyes(registry: MlflowRegistry, ledger: LedgerResource) -> None:
    client, now = connect(registry.tracking_uri), dt.datetime(2024, 5, 1, tzinfo=dt.UTC)
    client.set_model_version_tag(MODEL, "1", "mlops.approval", "approved")
    assert approvals.adopt(registry, ledger, MODEL, now) == [], "nobody is not somebody else"
    for version, by in (("1", "ben"), ("2", "ann")):
        client.set_model_version_tag(MODEL, version, "mlops.approved_by", by)
        client.set_model_version_tag(MODEL, version, "mlops.approval", "approved")
    valid = approvals.adopt(registry, ledger, MODEL, now)
    assert [version.number for version in valid] == [1]
    assert [(e.kind, e.subject, e.actor) for e in ledger.entries(MODEL)] == [("approval", "1", "ben")]
    assert approvals.adopt(registry, ledger, MODEL, now) == valid


@pytest.mark.parametrize(("tag", "value"), [("mlops.evidence.training_set", '"beef"'), ("mlops.artifact_digest", "0" * 64)])
def test_an_approval_is_void_when_what_it_rests_on_changes(
    registry: MlflowRegistry, ledger: LedgerResource, tag: str, value: str
) -> None:
    assert decide(registry, ledger, version=1, by="ben").success
    connect(registry.tracking_uri).set_model_version_tag(MODEL, "1", tag, value)
    assert approval_state(registry.versions(MODEL)[0]) is ApprovalState.VOID
    assert approvals.adopt(registry, ledger, MODEL, dt.datetime(2024, 5, 1, tzinfo=dt.UTC)) == []
