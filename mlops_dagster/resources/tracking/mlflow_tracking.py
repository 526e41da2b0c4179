"""Tracking on MLflow: an SQLite file without any server, or a tracking server."""

import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import DataError, DeclarationError, NotFoundError
from mlops_dagster.resources.tracking import RunRef, TrackedRun
from mlops_dagster.resources.tracking.mlflow_connection import checked_uri, connect, database_file, exclusive, translated
from mlops_dagster.resources.tracking.run_content import content_digest, files_of

RUN_KEY_TAG = "mlops.run_key"
CONTENT_TAG = "mlops.content_sha256"
# Tags and parameters of one request (mlflow/utils/validation.py), and the longest value that MLflow keeps whole.
_BATCH = 100
_LONGEST_PARAMETER = 6000
_RUN_KEY = re.compile(r"[A-Za-z0-9._:/@+=\-]{1,250}")


class MlflowTracking(ConfigurableResource):
    """Tracking (see the Protocol) in MLflow; safe with several processes, also when the database is still to be made."""

    tracking_uri: str = Field(description="sqlite:///FILE (no server needed), http(s)://HOST:PORT or postgresql://….")
    artifacts_folder: str | None = Field(
        default=None,
        description="Folder of run artifacts; by default `artifacts` beside the SQLite file, or where the server keeps them.",
    )

    def log_run(
        self,
        experiment: str,
        run_key: str,
        parameters: Mapping[str, object],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: Mapping[str, Path | bytes],
    ) -> RunRef:
        """See Tracking.log_run; a crash half-way leaves an unfinished run that the next call completes."""
        texts = {name: _text(name, value) for name, value in parameters.items()}
        _check(run_key, metrics, artifacts)
        content = content_digest(texts, metrics, tags, artifacts)
        client = connect(self.tracking_uri)
        with exclusive(self.tracking_uri), translated(self.tracking_uri):
            experiment_id = self._experiment(client, experiment)
            run = self._run(client, experiment_id, run_key)
            ref = _ref(run)
            if run.data.tags.get(CONTENT_TAG) == content and run.info.status == "FINISHED":
                return ref
            _write_parameters(client, run, run_key, texts)
            _write_metrics(client, run, metrics)
            _write_artifacts(client, ref.run_id, artifacts)
            _write_tags(client, ref.run_id, {**tags, CONTENT_TAG: content})
            client.set_terminated(ref.run_id, "FINISHED")
        return ref

    def open_run(self, experiment: str, run_key: str) -> RunRef:
        """The run of this key, made where there is none; one for all processes that ask. What is logged to it is the caller's affair."""
        _check(run_key, {}, {})
        client = connect(self.tracking_uri)
        with exclusive(self.tracking_uri), translated(self.tracking_uri):
            return _ref(self._run(client, self._experiment(client, experiment), run_key))

    def read_run(self, experiment: str, run_key: str) -> TrackedRun | None:
        """See Tracking.read_run."""
        _check(run_key, {}, {})
        client = connect(self.tracking_uri)
        with translated(self.tracking_uri):
            found = client.get_experiment_by_name(experiment)
            runs = [] if found is None else _find(client, found.experiment_id, run_key)
        if not runs:
            return None
        run = runs[0]
        tags = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
        return TrackedRun(_ref(run), run.info.status == "FINISHED", dict(run.data.params), dict(run.data.metrics), tags)

    def _experiment(self, client: Any, name: str) -> str:
        """The id of the experiment; made when missing, restored when somebody deleted it in the UI."""
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return client.create_experiment(name, artifact_location=self._artifact_location(name))
            except Exception as error:
                if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _artifact_location(self, experiment: str) -> str | None:
        file = database_file(checked_uri(self.tracking_uri))
        if self.artifacts_folder is None and file is None:
            return None
        root = Path(self.artifacts_folder).expanduser().absolute() if self.artifacts_folder else file.parent / "artifacts"  # pyright: ignore
        return (root / re.sub(r"[^A-Za-z0-9._-]", "_", experiment)).as_uri()

    def _run(self, client: Any, experiment_id: str, run_key: str) -> Any:
        """The run of this key. Two machines that create it at once through a server agree on the older one."""
        runs = _find(client, experiment_id, run_key)
        if runs:
            return runs[0]
        made = client.create_run(experiment_id, run_name=run_key, tags={RUN_KEY_TAG: run_key})
        first = _find(client, experiment_id, run_key)[0]
        if first.info.run_id != made.info.run_id:
            client.delete_run(made.info.run_id)
        return first


def _find(client: Any, experiment_id: str, run_key: str) -> list[Any]:
    runs = client.search_runs([experiment_id], filter_string=f"tags.`{RUN_KEY_TAG}` = '{run_key}'")
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def _ref(run: Any) -> RunRef:
    return RunRef(run.info.run_id, f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}")


def _text(name: str, value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    if len(text) > _LONGEST_PARAMETER:
        raise DeclarationError(
            f"parameters.{name}: {len(text)} characters, MLflow keeps {_LONGEST_PARAMETER}; give it as an artifact instead"
        )
    return text


def _check(run_key: str, metrics: Mapping[str, float], artifacts: Mapping[str, Path | bytes]) -> None:
    if not _RUN_KEY.fullmatch(run_key):
        raise DeclarationError(f"run_key: {run_key!r} must be 1 to 250 letters, digits or . _ : / @ + = -")
    for name, value in metrics.items():
        if math.isinf(value):
            raise DataError(f"metrics.{name}: {value} cannot be stored; leave an unbounded metric out")
    for name, source in artifacts.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise DeclarationError(f"artifacts: {name!r} must be a relative path below the run")
        if isinstance(source, Path) and not source.exists():
            raise NotFoundError(f"artifacts.{name}: {source} does not exist")


def _write_parameters(client: Any, run: Any, run_key: str, texts: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    stored = run.data.params
    for name, text in texts.items():
        if name in stored and stored[name] != text:
            raise DataError(
                f"parameters.{name}: run {run_key!r} was logged with {stored[name]!r}, not {text!r}; use a run_key of its own"
            )
    missing = [Param(name, text) for name, text in texts.items() if name not in stored]
    for start in range(0, len(missing), _BATCH):
        client.log_batch(run.info.run_id, params=missing[start : start + _BATCH])


def _write_metrics(client: Any, run: Any, metrics: Mapping[str, float]) -> None:
    """Log what changed, stamped after the value before it: MLflow shows the value with the latest timestamp."""
    from mlflow.entities import Metric

    changed = []
    for name, value in metrics.items():
        stamp = run.info.start_time
        if name in run.data.metrics:
            if repr(run.data.metrics[name]) == repr(float(value)):
                continue
            stamp = max(entry.timestamp for entry in client.get_metric_history(run.info.run_id, name)) + 1
        changed.append(Metric(name, float(value), stamp, 0))
    for start in range(0, len(changed), _BATCH):
        client.log_batch(run.info.run_id, metrics=changed[start : start + _BATCH])


def _write_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    entries = [RunTag(name, str(value)) for name, value in tags.items()]
    for start in range(0, len(entries), _BATCH):
        client.log_batch(run_id, tags=entries[start : start + _BATCH])


def _write_artifacts(client: Any, run_id: str, artifacts: Mapping[str, Path | bytes]) -> None:
    if not artifacts:
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name, source in artifacts.items():
            for path, data in files_of(name, source):
                target = Path(scratch, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        client.log_artifacts(run_id, scratch)
