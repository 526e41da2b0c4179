"""The same runs in Weights & Biases: offline files by default, which `wandb sync` uploads when somebody wants that."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import StorageError
from mlops_dagster.resources.tracking import RunRef, TrackedRun
from mlops_dagster.resources.tracking.mlflow_tracking import MlflowTracking
from mlops_dagster.resources.tracking.run_content import content_digest, files_of
from mlops_dagster.resources.tracking.wandb_records import wait_until_written

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)
_MARK = "mlops-content-sha256"


class WandbMirror(ConfigurableResource):
    """Writes a run a second time, for W&B. `offline` uses no network and no account."""

    folder: str = Field(description="Where the run folders go, below `wandb`.")
    mode: Literal["offline", "online"] = Field(
        default="offline", description="online sends to the account that wandb is logged in to."
    )
    entity: str | None = Field(default=None, description="W&B team or user; by default the account's own.")
    project: str | None = Field(default=None, description="W&B project of all runs; by default one for each experiment.")

    def log_run(
        self,
        experiment: str,
        run_key: str,
        parameters: Mapping[str, object],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: Mapping[str, Path | bytes],
    ) -> Path:
        """Write the run (see Tracking.log_run) as W&B project `experiment` and return its folder; a repeated call replaces it."""
        run_id = hashlib.sha256(f"{experiment}/{run_key}".encode()).hexdigest()[:16]
        texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in parameters.items()}
        content = content_digest(texts, metrics, tags, artifacts)
        before = sorted(Path(self.folder, "wandb").glob(f"*run-*-{run_id}"))
        for folder in before:
            if _marked(folder) == content:
                return folder
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            folder = self._write(experiment, run_key, run_id, parameters, metrics, tags, artifacts)
            if self.mode == "offline":
                wait_until_written(folder)
            (folder / _MARK).write_text(content)
            for old in before:
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise StorageError(f"{self.folder}: {error}; check that its disk is mounted, writable and not full") from error
        return folder

    def _write(
        self,
        experiment: str,
        run_key: str,
        run_id: str,
        parameters: Mapping[str, object],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: Mapping[str, Path | bytes],
    ) -> Path:
        import wandb

        with wandb.init(
            project=self.project or experiment,
            group=experiment,
            entity=self.entity,
            id=run_id,
            name=run_key,
            dir=self.folder,
            resume="allow" if self.mode == "online" else None,
            config={"parameters": json.loads(json.dumps(dict(parameters), default=str)), "tags": dict(tags)},
            reinit="create_new",
            settings=_quiet(self.mode),
        ) as run:
            run.summary.update({name: float(value) for name, value in metrics.items()})
            _save_files(run, artifacts)
            return Path(run.dir).parent


class MirroredTracking(ConfigurableResource):
    """Tracking (see the Protocol) in MLflow, with each run mirrored to W&B. MLflow decides: a mirror that fails is only warned about."""

    primary: MlflowTracking = Field(description="Where runs are kept and read.")
    mirror: WandbMirror = Field(description="Where they are written a second time.")

    def log_run(
        self,
        experiment: str,
        run_key: str,
        parameters: Mapping[str, object],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: Mapping[str, Path | bytes],
    ) -> RunRef:
        """See Tracking.log_run."""
        ref = self.primary.log_run(experiment, run_key, parameters, metrics, tags, artifacts)
        try:
            self.mirror.log_run(experiment, run_key, parameters, metrics, {**tags, "mlflow_run_id": ref.run_id}, artifacts)
        except Exception:
            logger.warning("run %r is in MLflow, but its W&B mirror in %s failed", run_key, self.mirror.folder, exc_info=True)
        return ref

    def read_run(self, experiment: str, run_key: str) -> TrackedRun | None:
        """See Tracking.read_run."""
        return self.primary.read_run(experiment, run_key)


def _marked(folder: Path) -> str | None:
    try:
        return (folder / _MARK).read_text()
    except OSError:
        return None


def _quiet(mode: str) -> Any:
    """No console capture, no machine or Git data, no statistics: the run is what was given, nothing more."""
    import wandb

    return wandb.Settings(
        mode=mode,  # pyright: ignore[reportArgumentType]
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
    )


def _save_files(run: "wandb.Run", artifacts: Mapping[str, Path | bytes]) -> None:
    for name, source in artifacts.items():
        for path, data in files_of(name, source):
            target = Path(run.dir, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            run.save(str(target), base_path=run.dir, policy="now")
