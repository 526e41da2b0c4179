"""Running jobs and evaluating sensors of the code location in this process, on the persistent instance."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from mlops_dagster.core import errors
from mlops_dagster.core.errors import TerminalError

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
RUN_KEY_TAG = "dagster/run_key"
RANGE_TAGS = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")


class Runner:
    """Runs jobs as the daemon would: each run is stored in the instance and seen in its UI."""

    def __init__(self, definitions: dg.Definitions, instance: dg.DagsterInstance) -> None:
        self.definitions, self.instance = definitions, instance

    def run(
        self,
        job: str,
        *,
        day: str | None = None,
        days: tuple[str, str] | None = None,
        run_config: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        only: Sequence[dg.AssetKey] | None = None,
    ) -> dg.ExecuteInProcessResult:
        """Run a job, or only some of its assets, for one day, for all days from the first to the last in one run, or without partition.

        Raises TerminalError with the failed step's own message.
        """
        ranged = dict(zip(RANGE_TAGS, days, strict=True)) if days else {}
        result = self.definitions.resolve_job_def(job).execute_in_process(
            instance=self.instance,
            partition_key=day,
            run_config={**QUIET, **(run_config or {})},
            tags={**(tags or {}), **ranged},
            raise_on_error=False,
            asset_selection=only,
        )
        if not result.success:
            raise TerminalError(f"the run {result.run_id} of {job} failed: {failure(result)}")
        return result

    def evaluate(self, sensor: str) -> list[str]:
        """Evaluate a sensor once, store its events, and run what it asks for (each run key once); returns the ids of the runs."""
        repository, definition = self.definitions.get_repository_def(), self.definitions.resolve_sensor_def(sensor)
        resources = {k: r for k, r in repository.get_top_level_resources().items() if k in definition.required_resource_keys}
        with dg.build_sensor_context(
            instance=self.instance, repository_def=repository, sensor_name=sensor, resources=resources
        ) as context:
            outcome = definition.evaluate_tick(context)
        for event in outcome.asset_events:
            self.instance.report_runless_asset_event(event)
        return [
            self._requested(str(definition.job_name), request)
            for request in outcome.run_requests or []
            if not self._known(request.run_key)
        ]

    def _known(self, run_key: str | None) -> bool:
        return bool(run_key) and bool(self.instance.get_run_records(dg.RunsFilter(tags={RUN_KEY_TAG: str(run_key)}), limit=1))

    def _requested(self, targeted: str, request: dg.RunRequest) -> str:
        job = request.job_name or targeted
        tags = {**request.tags, RUN_KEY_TAG: str(request.run_key)}
        return self.run(job, day=request.partition_key, run_config=request.run_config, tags=tags).run_id


def failure(result: dg.ExecuteInProcessResult) -> str:
    """What the first failed step said, or the failed blocking check, without the framework around it."""
    for event in result.all_events:
        if event.is_step_failure:
            error = event.step_failure_data.error
            failed = [c for c in result.get_asset_check_evaluations() if not c.passed and c.blocking]
            if error is not None and error.cls_name == "DagsterAssetCheckFailedError" and failed:
                return "; ".join(f"check {c.check_name} of {c.asset_key.to_user_string()}: {c.description}" for c in failed)
            told = event.step_failure_data.user_failure_data
            if told is not None and told.description:
                return told.description
            return _told(error) if error is not None else "no reason was recorded"
    return "see its log in the Dagster UI"


def _told(error: Any) -> str:
    """The message of the first error of ours in a chain of causes, which says what to do; of the last where none is ours."""
    ours = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MlopsError)}
    while error.cause is not None and error.cls_name not in ours:
        error = error.cause
    return error.message.strip()
