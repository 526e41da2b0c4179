"""Schedules: yesterday's ingest and monitoring every day, a retraining every month for those who want one regardless."""

import dagster as dg

from mlops_dagster.assets import jobs
from mlops_dagster.assets.stage import key, partitions
from mlops_dagster.core.spec import ModelSpec


def build(spec: ModelSpec) -> list[dg.ScheduleDefinition]:
    """The daily schedules run by default where the source has no last day; the monthly retraining is for the user to switch on."""
    live = spec.source.partitions.end is None
    status = dg.DefaultScheduleStatus.RUNNING if live else dg.DefaultScheduleStatus.STOPPED
    return [
        _daily(spec, "monitor", hour=2, status=status),
        dg.ScheduleDefinition(
            name=f"{spec.name}_monthly_retraining",
            job_name=jobs.name(spec.name, "train"),
            cron_schedule="0 4 1 * *",
            execution_timezone=spec.source.partitions.timezone,
            default_status=dg.DefaultScheduleStatus.STOPPED,
            description="Trains on the first of each month whatever monitoring says.",
            tags={"mlops/reason": "monthly schedule"},
        ),
    ]


def _daily(spec: ModelSpec, part: str, hour: int, status: dg.DefaultScheduleStatus) -> dg.ScheduleDefinition:
    """Yesterday's partition of a part, every day at `hour` o'clock in the partitions' time zone."""
    days = partitions(spec)

    @dg.schedule(
        name=f"{spec.name}_daily_{part}",
        job_name=jobs.name(spec.name, part),
        cron_schedule=f"0 {hour} * * *",
        execution_timezone=spec.source.partitions.timezone,
        default_status=status,
        description=f"Makes {', '.join(jobs.PARTS[part])} of the day before.",
    )
    def daily(context: dg.ScheduleEvaluationContext):
        with dg.partition_loading_context(context.scheduled_execution_time):
            newest = days.get_last_partition_key()
        if newest is None:
            return dg.SkipReason("no day has ended yet")
        if not context.instance.get_latest_materialization_event(key(spec, "deployment")):
            return dg.SkipReason("nothing is deployed yet")
        return dg.RunRequest(
            run_key=f"{spec.name}:{part}:{newest}", partition_key=newest, tags={"mlops/reason": f"daily {part} of {newest}"}
        )

    return daily
