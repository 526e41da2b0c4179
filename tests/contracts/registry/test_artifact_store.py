"""An artifact store that is away or empty: nothing is approved, nothing is rejected, and no error shows a password."""

import traceback
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlops_dagster.core.errors import StorageError
from mlops_dagster.resources.registry import Approval
from mlops_dagster.resources.registry.mlflow_registry import MlflowRegistry, _download, _version_tags
from mlops_dagster.resources.tracking.mlflow_connection import connect
from mlops_dagster.serving.artifact import digest
from tests.contracts.tracking.mlflow_server import free_port

YES = Approval("approved", "anna", datetime(2013, 3, 1, 12, tzinfo=UTC))


def refused(registry: MlflowRegistry, model: str, to: Path) -> str:
    """What fetching and approving the only version both say."""
    told = []
    for way in (lambda: registry.fetch(model, 1, to), lambda: registry.record_approval(model, 1, YES)):
        with pytest.raises(StorageError) as error:
            way()
        told.append("".join(traceback.format_exception(error.value)))
        assert str(error.value).startswith(f"{model} version 1: ")
    assert registry.versions(model)[0].approval is None
    return "\n".join(told)


def test_an_empty_store_may_be_one_that_is_not_mounted(
    registry: MlflowRegistry, model: str, artifact: Path, tmp_path: Path
) -> None:
    made = registry.register(model, artifact, digest(artifact), {"rows": 1}, {})
    served = registry.fetch(model, 1, tmp_path / "served")
    source = connect(registry.tracking_uri).get_model_version_download_uri(model, "1")
    get_artifact_repository(source, tracking_uri=registry.tracking_uri).delete_artifacts()
    assert "nothing is found at" in refused(registry, model, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert digest(registry.fetch(model, 1, served)) == made.digest, "what is here already needs no store"


def test_a_store_that_does_not_answer(
    registry: MlflowRegistry, model: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    for name, value in (("MLFLOW_S3_ENDPOINT_URL", address), ("AWS_MAX_ATTEMPTS", "1"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hunter2")
    made = registry.register(f"{model}-whole", artifact, digest(artifact), {"rows": 1}, {})
    client = connect(registry.tracking_uri)
    client.create_registered_model(model)
    tags = _version_tags(made.digest, {"rows": 1}, made.registered_hash, {})
    client.create_model_version(model, "s3://nowhere/model", tags=tags)
    told = refused(registry, model, tmp_path / "served")
    assert f's3://nowhere/model cannot be read (Could not connect to the endpoint URL: "{address}' in told
    assert "hunter2" not in told


@pytest.mark.parametrize("place", ["tracking", "source"])
def test_a_store_that_does_not_answer_is_told_without_a_password(
    model: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = MlflowRegistry(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    made = registry.register(model, artifact, digest(artifact), {"rows": 1}, {})
    address, path = f"http://u:hunter2@127.0.0.1:{free_port()}", "mlflow-artifacts/artifacts/1/model"
    tracking, source = {
        "tracking": (address, "mlflow-artifacts:/1/model"),
        "source": (registry.tracking_uri, f"{address}/api/2.0/{path}"),
    }[place]
    with pytest.raises(StorageError, match="version 1: .* cannot be read") as error:
        _download(source, tracking, tmp_path / "to", made)
    told = "".join(traceback.format_exception(error.value))
    assert "http://u:***@127.0.0.1" in told
    assert "hunter2" not in told


@pytest.mark.parametrize("left", ["nothing", "a file in its place"])
def test_a_folder_that_is_no_artifact_is_replaced(
    registry: MlflowRegistry, model: str, artifact: Path, tmp_path: Path, left: str
) -> None:
    made = registry.register(model, artifact, digest(artifact), {"rows": 1}, {})
    to = tmp_path / "served"
    to.mkdir() if left == "nothing" else to.write_text("")
    assert digest(registry.fetch(model, 1, to)) == made.digest


def test_a_disk_that_cannot_be_written_is_a_storage_error(
    registry: MlflowRegistry, model: str, artifact: Path, tmp_path: Path
) -> None:
    registry.register(model, artifact, digest(artifact), {"rows": 1}, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="its disk is mounted, writable and not full"):
        registry.fetch(model, 1, tmp_path / "file" / "served")
