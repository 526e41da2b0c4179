"""Where resources get their configuration, and nowhere else: `embedded` (one machine, Python packages only)."""

from functools import cache
from pathlib import Path
from typing import Literal

import dagster as dg
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """The platform's settings, from environment variables `MLOPS_…`."""

    model_config = SettingsConfigDict(env_prefix="MLOPS_")

    home: Path = Field(default=Path(".mlops"), description="Folder of everything that the embedded profile keeps.")
    profile: Literal["embedded"] = Field(default="embedded", description="Which backends are used.")
    ledger_url: str | None = Field(default=None, description="SQLAlchemy URL of the ledger; default: SQLite in `home`.")

    @property
    def root(self) -> Path:
        """`home` as an absolute path."""
        return self.home.expanduser().absolute()


def embedded(settings: Settings) -> dict[str, object]:
    """Every resource of the embedded profile, on files below `settings.home`. Nothing is opened before it is used."""
    from mlops_dagster.resources.artifact_cache import ArtifactCache
    from mlops_dagster.resources.data_lake.folder import FolderLake
    from mlops_dagster.resources.data_versions.dvc import DvcVersions
    from mlops_dagster.resources.drift_reports.evidently_reports import EvidentlyReports
    from mlops_dagster.resources.feature_engine.duckdb_engine import DuckDBEngine
    from mlops_dagster.resources.feature_engine.ray_engine import RayEngine
    from mlops_dagster.resources.feature_engine.spark_engine import SparkEngine
    from mlops_dagster.resources.feature_store.feast_store import ASOF, FeastStore
    from mlops_dagster.resources.inference_segments import FolderSegments
    from mlops_dagster.resources.ledger.opened import LedgerResource
    from mlops_dagster.resources.live_metrics.gateway import GatewayMetrics
    from mlops_dagster.resources.registry.mlflow_registry import MlflowRegistry
    from mlops_dagster.resources.serving.embedded import EmbeddedServing
    from mlops_dagster.resources.tracking.mlflow_tracking import MlflowTracking
    from mlops_dagster.resources.training.local import LocalTrainer
    from mlops_dagster.resources.training.ray_trainer import RayTrainer
    from mlops_dagster.resources.tuning.optuna_tuner import OptunaTuner
    from mlops_dagster.resources.tuning.ray_tuner import RayTuner

    root = settings.root
    lake, mlflow = str(root / "lake"), f"sqlite:///{root / 'mlflow' / 'mlflow.db'}"
    artifacts = str(root / "mlflow" / "artifacts")
    return {
        "data_lake": FolderLake(root=lake),
        "data_versions": DvcVersions(root=lake, remote=str(root / "dvc_remote")),
        "feature_engine_duckdb": DuckDBEngine(),
        "feature_engine_spark": SparkEngine(),
        "feature_engine_ray": RayEngine(),
        "feature_store": FeastStore(
            root=str(root / "feature_store"), lake_root=lake, offline_store={"type": ASOF, "as_known_at": True}
        ),
        "tuning_local": OptunaTuner(folder=str(root / "tuning")),
        "tuning_ray": RayTuner(folder=str(root / "tuning")),
        "training_local": LocalTrainer(),
        "training_ray": RayTrainer(),
        "tracking": MlflowTracking(tracking_uri=mlflow, artifacts_folder=artifacts),
        "registry": MlflowRegistry(tracking_uri=mlflow, artifacts_folder=artifacts),
        "serving": EmbeddedServing(root=str(root / "serving")),
        "live_metrics": GatewayMetrics(root=str(root / "serving")),
        "artifact_cache": ArtifactCache(root=str(root / "artifacts")),
        "inference_segments": FolderSegments(root=str(root / "serving" / "inference_log")),
        "drift_reports": EvidentlyReports(folder=str(root / "reports"), workspace=str(root / "reports" / "workspace")),
        "ledger": LedgerResource(url=settings.ledger_url or f"sqlite:///{root / 'ledger.db'}"),
    }


@cache
def definitions() -> dg.Definitions:
    """The resources as definitions; one object in a process, so that every model's definitions can carry it."""
    return dg.Definitions(resources=embedded(Settings()))
