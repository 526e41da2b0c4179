"""`mlflow` for the assets that users put beside a model: dagster-mlflow's object, on the platform's MLflow, one MLflow run for a Dagster run.

dagster-mlflow alone leaves its run active and unfinished; what is done about it here is in docs/adr/0005-dagster-mlflow.md.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
from pydantic import Field

from mlops_dagster.core.errors import DeclarationError, MlopsError
from mlops_dagster.resources.tracking.mlflow_connection import translated
from mlops_dagster.resources.tracking.mlflow_tracking import MlflowTracking

KEY = "mlflow"
_EXPERIMENT_ID = "MLFLOW_EXPERIMENT_ID"


class DagsterRunTracking(dg.ConfigurableResource):
    """An MLflow run for all steps of a Dagster run that use it; has all of mlflow's functions, such as `log_metric`.

    Give `experiment_name` where it is not to be the first part of the key of the asset that uses it.
    """

    tracking: dg.ResourceDependency[MlflowTracking]  # the platform's
    experiment_name: str | None = Field(
        default=None,
        description="Experiment; by default the first part of the asset's key, so the model whose key prefix it has.",
    )
    extra_tags: dict[str, str] = Field(default={}, description="Tags that the run gets.")

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Generator[Any, None, None]:
        """The run as active run of this thread, ended afterwards: FAILED where a step of the Dagster run failed, else FINISHED.

        Raises DeclarationError where the experiment is not told or another MLflow run is active, and as Tracking.log_run.
        """
        assert context.run is not None
        address, experiment = self.tracking.tracking_uri, self.experiment_name or _prefix(context)
        # Made before dagster-mlflow looks for it: parallel steps would make two, and on a file the artifacts would lie elsewhere.
        run = self.tracking.open_run(experiment, f"dagster:{context.run.run_id}")
        config = {
            "experiment_name": experiment,
            "mlflow_tracking_uri": address,
            "mlflow_run_id": run.run_id,
            "extra_tags": self.extra_tags,
        }
        with translated(address):
            import mlflow
            from dagster_mlflow.resources import MlFlow

        if active := mlflow.active_run():
            raise DeclarationError(
                f"the MLflow run {active.info.run_id} is active in this process; end it (mlflow.end_run()) before assets use `{KEY}`"
            )
        with _settings_kept():
            try:
                with translated(address):
                    handed = MlFlow(context.replace_config(config))
                yield handed
            finally:
                _end_runs(address, _status(context))


def _prefix(context: dg.InitResourceContext) -> str:
    """The first part of the keys of the run's assets that use the resource. Raises DeclarationError where it is not one."""
    instance, run = context.instance, context.run
    assert instance is not None
    assert run is not None
    assert run.job_snapshot_id is not None
    assert run.execution_plan_snapshot_id is not None
    job = instance.get_job_snapshot(run.job_snapshot_id)
    plan = instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id)
    users = {snap.name for snap in job.node_defs_snapshot.op_def_snaps if KEY in snap.required_resource_keys}
    made = [
        output.properties.asset_key
        for step in plan.steps
        if step.key in plan.step_keys_to_execute and step.node_handle_id.rpartition(".")[2] in users
        for output in step.outputs
        if output.properties and output.properties.asset_key
    ]
    found = sorted({key.path[0] for key in made})
    if len(found) == 1:
        return found[0]
    because = f"makes assets of {', '.join(found)}" if found else "makes no asset whose key would tell it"
    raise DeclarationError(
        f"resources.{KEY}.config.experiment_name is not given, and the run {because}; give it in the run's config"
    )


def _end_runs(address: str, status: str) -> None:
    """End all active runs of this thread. Where the store cannot be told they are active no more either; then raises MlopsError."""
    import mlflow

    trouble = None
    while mlflow.active_run():
        try:
            with translated(address):
                mlflow.end_run(status)
        except MlopsError as error:
            trouble = error
    if trouble is not None:
        raise trouble


def _status(context: dg.InitResourceContext) -> str:
    assert context.instance is not None
    assert context.run is not None
    failures = context.instance.get_records_for_run(context.run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE, limit=1)
    return "FAILED" if failures.records else "FINISHED"


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Put back what is set for the whole process: later runs in it, and code that names no address, must not meet it."""
    import mlflow
    from mlflow.tracking import fluent

    address = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    # There is no public way to unset it.
    experiment, variable = fluent._active_experiment_id, os.environ.get(_EXPERIMENT_ID)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(address)  # pyright: ignore[reportArgumentType] None unsets it
        fluent._active_experiment_id = experiment
        os.environ.pop(_EXPERIMENT_ID, None)
        if variable is not None:
            os.environ[_EXPERIMENT_ID] = variable
