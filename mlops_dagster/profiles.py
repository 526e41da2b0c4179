"""Where resources get their configuration, and nowhere else: `embedded` (one machine, Python packages only), or servers by address."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from mlops_dagster import backends

if TYPE_CHECKING:
    import dagster as dg


class Settings(BaseSettings):
    """The platform's settings, from environment variables `MLOPS_…`; what is not set is a file below `home`.

    S3 takes its endpoint from AWS_ENDPOINT_URL and its credentials from the standard AWS_… variables.
    """

    model_config = SettingsConfigDict(env_prefix="MLOPS_", hide_input_in_errors=True)

    home: Path = Field(default=Path(".mlops"), description="Folder of everything that the embedded profile keeps.")
    profile: Literal["embedded"] = Field(default="embedded", description="Which backends are used.")
    ledger_url: str | None = Field(default=None, description="SQLAlchemy URL of the ledger; default: SQLite in `home`.")
    lake_url: str | None = Field(default=None, description="s3://BUCKET/PREFIX of the data lake; default: a folder in `home`.")
    dvc_remote: str | None = Field(
        default=None,
        description="Folder or s3://BUCKET/PREFIX that each recorded version is sent to at once; default: a folder in `home`, "
        "sent to when asked.",
    )
    online_store: str = Field(default="sqlite", description="sqlite, redis://… or postgresql://… of Feast's online store.")
    mlflow_url: str | None = Field(
        default=None, description="http(s)://HOST:PORT of an MLflow server, or its database; default: SQLite in `home`."
    )
    wandb_project: str | None = Field(
        default=None, description="W&B project that runs are mirrored to, as WANDB_MODE says (offline by default)."
    )
    gateway_port: int = Field(default=0, ge=0, le=65535, description="The gateway's port; 0: a free one, chosen once.")

    @property
    def root(self) -> Path:
        """`home` as an absolute path."""
        return self.home.expanduser().absolute()


def embedded(settings: Settings) -> dict[str, object]:
    """Every resource, on files below `settings.home` or where the settings say. Nothing is opened before it is used.

    Raises DeclarationError naming the variable that is wrong. The online store's password goes into this process's environment,
    where Feast looks for it, and into no file.
    """
    from mlops_dagster.resources.artifact_cache import ArtifactCache
    from mlops_dagster.resources.drift_reports.evidently_reports import EvidentlyReports
    from mlops_dagster.resources.feature_engine.duckdb_engine import DuckDBEngine
    from mlops_dagster.resources.feature_engine.ray_engine import RayEngine
    from mlops_dagster.resources.feature_engine.spark_engine import SparkEngine
    from mlops_dagster.resources.inference_segments import FolderSegments
    from mlops_dagster.resources.ledger.opened import LedgerResource
    from mlops_dagster.resources.live_metrics.gateway import GatewayMetrics
    from mlops_dagster.resources.serving.embedded import EmbeddedServing
    from mlops_dagster.resources.training.local import LocalTrainer
    from mlops_dagster.resources.training.ray_trainer import RayTrainer
    from mlops_dagster.resources.tuning.optuna_tuner import OptunaTuner
    from mlops_dagster.resources.tuning.ray_tuner import RayTuner

    root = settings.root
    return {
        **backends.lake(root, settings.lake_url, settings.dvc_remote),
        **backends.tracking(root, settings.mlflow_url, settings.wandb_project),
        "feature_store": backends.feature_store(root, settings.lake_url, settings.online_store),
        "feature_engine_duckdb": DuckDBEngine(),
        "feature_engine_spark": SparkEngine(),
        "feature_engine_ray": RayEngine(),
        "tuning_local": OptunaTuner(folder=str(root / "tuning")),
        "tuning_ray": RayTuner(folder=str(root / "tuning")),
        "training_local": LocalTrainer(),
        "training_ray": RayTrainer(),
        "serving": EmbeddedServing(root=str(root / "serving"), port=settings.gateway_port),
        "live_metrics": GatewayMetrics(root=str(root / "serving")),
        "artifact_cache": ArtifactCache(root=str(root / "artifacts")),
        "inference_segments": FolderSegments(root=str(root / "serving" / "inference_log")),
        "drift_reports": EvidentlyReports(folder=str(root / "reports"), workspace=str(root / "reports" / "workspace")),
        "ledger": LedgerResource(url=settings.ledger_url or f"sqlite:///{root / 'ledger.db'}"),
    }


@cache
def definitions() -> "dg.Definitions":
    """The resources as definitions; one object in a process, so that every model's definitions can carry it."""
    import dagster as dg  # here, so that the settings alone are read in a tenth of the time

    return dg.Definitions(resources=embedded(Settings()))
