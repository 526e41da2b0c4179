"""The resources that a setting can move from a folder of this machine to a server."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops_dagster.core import addresses
from mlops_dagster.core.errors import DeclarationError

if TYPE_CHECKING:
    from mlops_dagster.resources.feature_store.feast_store import FeastStore

PASSWORD = "MLOPS_ONLINE_STORE_PASSWORD"
WANDB_MODES = ("offline", "online")


def lake(root: Path, lake_url: str | None, dvc_remote: str | None) -> dict[str, object]:
    """The data lake and its versions: folders below `root`, or a bucket. Raises DeclarationError."""
    from mlops_dagster.resources.data_lake.folder import FolderLake
    from mlops_dagster.resources.data_versions.dvc import DvcVersions

    remote: dict[str, Any] = {"remote": str(root / "dvc_remote")} if dvc_remote is None else _remote(dvc_remote)
    if lake_url is None:
        folder = str(root / "lake")
        return {"data_lake": FolderLake(root=folder), "data_versions": DvcVersions(root=folder, **remote)}
    from dagster_aws.s3 import S3Resource

    from mlops_dagster.resources.data_lake.s3 import S3Lake
    from mlops_dagster.resources.data_versions.dvc_bucket import BucketVersions

    bucket, prefix = addresses.s3_place("MLOPS_LAKE_URL", lake_url)
    s3 = S3Lake(s3=S3Resource(endpoint_url=_endpoint(), max_attempts=4), bucket=bucket, prefix=prefix)
    return {"data_lake": s3, "data_versions": BucketVersions(root=str(root / "lake_versions"), lake=s3, **remote)}


def _remote(address: str) -> dict[str, Any]:
    """Where versions are sent at once."""
    if "://" not in address:
        return {"remote": str(Path(address).expanduser().absolute()), "push_each": True}
    addresses.s3_place("MLOPS_DVC_REMOTE", address)
    endpoint = _endpoint()
    return {"remote": address, "push_each": True, "remote_options": {"endpointurl": endpoint} if endpoint else {}}


def feature_store(root: Path, lake_url: str | None, online_store: str) -> "FeastStore":
    """Feast over the lake, with the online store at an address. Raises DeclarationError."""
    from mlops_dagster.resources.feature_store.feast_store import ASOF, FeastStore

    online = addresses.online_store("MLOPS_ONLINE_STORE", online_store, PASSWORD)
    # Feast replaces ${NAME} by the environment, within quotes; the model servers inherit it.
    os.environ.update({name: json.dumps(value)[1:-1] for name, value in online.secrets.items()})
    return FeastStore(
        root=str(root / "feature_store"),
        lake_root=lake_url or str(root / "lake"),
        s3_endpoint=_endpoint() if lake_url else None,
        offline_store={"type": ASOF, "as_known_at": True},
        online_store=dict(online.section),
    )


def mlflow_address(root: Path, mlflow_url: str | None) -> str:
    """Where MLflow keeps runs and versions: a file below `root`, or as the setting says. Raises DeclarationError."""
    if mlflow_url is None:
        return f"sqlite:///{root / 'mlflow' / 'mlflow.db'}"
    return addresses.mlflow_server("MLOPS_MLFLOW_URL", mlflow_url)


def tracking(root: Path, mlflow_url: str | None, wandb_project: str | None) -> dict[str, object]:
    """Tracking and registry in MLflow, `mlflow` for users' own assets, runs mirrored to W&B where a project is named.

    Raises DeclarationError.
    """
    from mlops_dagster.resources.registry.mlflow_registry import MlflowRegistry
    from mlops_dagster.resources.tracking import dagster_run
    from mlops_dagster.resources.tracking.mlflow_tracking import MlflowTracking

    address = mlflow_address(root, mlflow_url)
    # A server keeps the artifacts itself.
    artifacts = None if address.startswith("http") else str(root / "mlflow" / "artifacts")
    primary = MlflowTracking(tracking_uri=address, artifacts_folder=artifacts)
    registry = MlflowRegistry(tracking_uri=address, artifacts_folder=artifacts)
    own = {dagster_run.KEY: dagster_run.DagsterRunTracking(tracking=primary)}
    if not wandb_project:
        return {"tracking": primary, "registry": registry, **own}
    from mlops_dagster.resources.tracking.wandb_mirror import MirroredTracking, WandbMirror

    mode = os.environ.get("WANDB_MODE", "offline")
    if mode not in WANDB_MODES:
        raise DeclarationError(f"WANDB_MODE is {mode!r}; with MLOPS_WANDB_PROJECT use {' or '.join(WANDB_MODES)}")
    mirror = WandbMirror(folder=str(root / "wandb"), mode=mode, project=wandb_project, entity=os.environ.get("WANDB_ENTITY"))
    return {"tracking": MirroredTracking(primary=primary, mirror=mirror), "registry": registry, **own}


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
