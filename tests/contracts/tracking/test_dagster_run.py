"""What users find under `mlflow` in their own assets: real Dagster runs whose MLflow runs are read back from the store."""

import os
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import mlflow
import pytest
from dagster._core.events import EngineEventData

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.resources.tracking.dagster_run import KEY, DagsterRunTracking
from mlops_dagster.resources.tracking.mlflow_tracking import MlflowTracking
from tests.contracts.feature_store.online_servers import free_port
from tests.contracts.tracking.mlflow_server import serve


@dg.asset(key_prefix="flight", required_resource_keys={KEY})
def study(context: dg.AssetExecutionContext) -> None:
    context.resources.mlflow.log_params({"depth": 3})
    context.resources.mlflow.log_metric("gain", 0.25)
    context.resources.mlflow.log_text("as planned", "notes.txt")


@dg.asset(key_prefix="flight", deps=[study])
def summary(mlflow: dg.ResourceParam[Any]) -> None:
    mlflow.log_metric("second", 2.0)


@dg.asset(key_prefix="flight", required_resource_keys={KEY})
def faulty(context: dg.AssetExecutionContext) -> None:
    context.resources.mlflow.log_metric("before", 1.0)
    raise RuntimeError("no such luck")


@dg.asset(key_prefix="other", required_resource_keys={KEY})
def others(context: dg.AssetExecutionContext) -> None:
    context.resources.mlflow.log_metric("other", 1.0)


@dg.asset(key_prefix="unrelated")
def unrelated() -> None:
    assert mlflow.active_run() is not None, "an asset of the same process meets the run"


def materialize(tracking: MlflowTracking, *assets: dg.AssetsDefinition, **how: Any) -> dg.ExecuteInProcessResult:
    return dg.materialize([*assets], resources={KEY: DagsterRunTracking(tracking=tracking)}, **how)


def runs(tracking: MlflowTracking, experiment: str, dagster_run_id: str) -> list[Any]:
    """Every MLflow run of a Dagster run."""
    client = mlflow.MlflowClient(tracking_uri=tracking.tracking_uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id], f"tags.dagster_run_id = '{dagster_run_id}'"))


def test_steps_log_to_one_run_in_the_models_experiment_on_the_same_store(tracking: MlflowTracking) -> None:
    done = materialize(tracking, study, summary, unrelated)
    (run,) = runs(tracking, "flight", done.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.params, run.data.metrics) == ({"depth": "3"}, {"gain": 0.25, "second": 2.0})
    read = tracking.read_run("flight", f"dagster:{done.run_id}")
    assert read is not None
    assert read.metrics == run.data.metrics
    client = mlflow.MlflowClient(tracking_uri=tracking.tracking_uri)
    assert [entry.path for entry in client.list_artifacts(run.info.run_id)] == ["notes.txt"]
    if tracking.tracking_uri.startswith("sqlite"):
        assert f"{tracking.tracking_uri.removeprefix('sqlite://').rpartition('/')[0]}/artifacts/flight/" in run.info.artifact_uri


def test_a_failed_step_fails_its_run_and_the_next_dagster_run_has_one_of_its_own(tracking: MlflowTracking) -> None:
    failed = materialize(tracking, faulty, raise_on_error=False)
    done = materialize(tracking, study)
    (first,), (second,) = runs(tracking, "flight", failed.run_id), runs(tracking, "flight", done.run_id)
    assert (first.info.status, first.data.metrics) == ("FAILED", {"before": 1.0})
    assert (second.info.status, second.data.metrics) == ("FINISHED", {"gain": 0.25})


def test_nothing_is_left_for_the_rest_of_the_process(tracking: MlflowTracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "77")
    before = mlflow.is_tracking_uri_set()
    materialize(tracking, study)
    materialize(tracking, faulty, raise_on_error=False)
    assert mlflow.active_run() is None
    assert mlflow.is_tracking_uri_set() is before is False
    assert os.environ["MLFLOW_EXPERIMENT_ID"] == "77"
    assert mlflow.tracking.fluent._active_experiment_id is None


def test_assets_of_two_models_need_the_name_of_an_experiment(tracking: MlflowTracking) -> None:
    with pytest.raises(dg.DagsterResourceFunctionError) as error:
        materialize(tracking, study, others)
    assert isinstance(error.value.__cause__, DeclarationError)
    assert "resources.mlflow.config.experiment_name is not given, and the run makes assets of flight, other" in str(
        error.value.__cause__
    )
    config = {"resources": {KEY: {"config": {"experiment_name": "both", "extra_tags": {"why": "compare"}}}}}
    (run,) = runs(tracking, "both", materialize(tracking, study, others, run_config=config).run_id)
    assert run.data.metrics == {"gain": 0.25, "other": 1.0}
    assert run.data.tags["why"] == "compare"
    # Only what the run makes counts, not what else is in its job.
    assert runs(tracking, "flight", materialize(tracking, study, others, selection=[study]).run_id)


def test_a_run_that_somebody_left_active_is_not_written_to(tracking: MlflowTracking) -> None:
    client = mlflow.MlflowClient(tracking_uri=tracking.tracking_uri)
    mlflow.set_tracking_uri(tracking.tracking_uri)
    left = mlflow.start_run(experiment_id="0")
    try:
        with pytest.raises(dg.DagsterResourceFunctionError) as error:
            materialize(tracking, study)
        assert f"the MLflow run {left.info.run_id} is active in this process; end it" in str(error.value.__cause__)
        assert client.get_run(left.info.run_id).data.metrics == {}
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(None)  # pyright: ignore[reportArgumentType]


def test_a_server_that_is_away_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = MlflowTracking(tracking_uri=f"http://u:hunter2@127.0.0.1:{free_port()}")
    with pytest.raises(dg.DagsterResourceFunctionError) as error:
        materialize(away, study)
    told = "".join(traceback.format_exception(error.value))
    assert f"http://u:***@{away.tracking_uri.rpartition('@')[2]}: MLflow could not do it now" in told
    assert "hunter2" not in told


def test_a_server_that_goes_away_during_the_run_leaves_nothing_active_and_shows_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = ExitStack()
    address = server.enter_context(serve(tmp_path)).replace("http://", "http://u:hunter2@")

    @dg.asset(key_prefix="flight", required_resource_keys={KEY})
    def last(context: dg.AssetExecutionContext) -> None:
        context.resources.mlflow.start_run(nested=True)
        server.close()

    with server:
        done = materialize(MlflowTracking(tracking_uri=address), last)
    data = [event.event_specific_data for event in done.all_events if "Teardown of resources" in (event.message or "")]
    (told,) = [str(entry.error) for entry in data if isinstance(entry, EngineEventData)]
    assert f"mlops_dagster.core.errors.TransientError: {address.replace('hunter2', '***')}: " in told
    assert "hunter2" not in told
    assert mlflow.active_run() is None


@dg.op(required_resource_keys={KEY})
def left(context: dg.OpExecutionContext) -> None:
    context.resources.mlflow.log_metric("left", 1.0)


@dg.op(required_resource_keys={KEY})
def right(context: dg.OpExecutionContext) -> None:
    context.resources.mlflow.log_metric("right", 1.0)


def parallel() -> dg.JobDefinition:
    @dg.job(resource_defs={KEY: DagsterRunTracking(tracking=MlflowTracking(tracking_uri=os.environ["PARALLEL_MLFLOW"]))})
    def both() -> None:
        left()
        right()

    return both


def test_parallel_processes_log_to_one_run(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = MlflowTracking(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    tracking.open_run("warm", "tables")  # MLflow makes its tables now, so that the two steps begin at once
    monkeypatch.setenv("PARALLEL_MLFLOW", tracking.tracking_uri)
    config = {
        "resources": {KEY: {"config": {"experiment_name": "ops"}}},
        "execution": {"config": {"multiprocess": {"max_concurrent": 2}}},
    }
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        done = dg.execute_job(dg.reconstructable(parallel), instance=instance, run_config=config)
        assert done.success
    with pytest.raises(dg.DagsterResourceFunctionError) as error:
        parallel().execute_in_process()
    assert "makes no asset whose key would tell it; give it in the run's config" in str(error.value.__cause__)
    (run,) = runs(tracking, "ops", done.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"left": 1.0, "right": 1.0})
