"""New data: every day that has ended and is not in the lake yet is ingested."""

import datetime as dt

import dagster as dg

from mlops_dagster.assets import jobs
from mlops_dagster.assets.lake_paths import stored_days, tables
from mlops_dagster.core.errors import NotFoundError
from mlops_dagster.core.spec import ModelSpec, Partitions

DAYS_A_TICK = 5


def build(spec: ModelSpec) -> dg.SensorDefinition:
    """The sensor `<model>_new_data`. It runs by default only where the source has no last day: a closed history is ingested on purpose."""
    live = spec.source.partitions.end is None

    @dg.sensor(
        name=f"{spec.name}_new_data",
        job_name=jobs.name(spec.name, "ingest"),
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING if live else dg.DefaultSensorStatus.STOPPED,
        description="Ingests each ended day that the lake does not have, in order, with its features.",
        required_resource_keys={"data_lake"},
        tags={"mlops/model": spec.name},
    )
    def new_data(context: dg.SensorEvaluationContext):
        lake = context.resources.data_lake
        try:
            stored = stored_days(lake, spec, "raw_data", tables(lake, spec)[0])
        except NotFoundError:
            stored = []
        missing = ended_days(spec.source.partitions, stored[-1] if stored else None, dt.datetime.now(dt.UTC))
        if not missing:
            return dg.SkipReason(f"every ended day is in the lake; the newest is {stored[-1] if stored else 'none'}")
        return [request(spec, day) for day in missing]

    return new_data


def ended_days(declared: Partitions, newest: dt.date | None, now: dt.datetime) -> list[dt.date]:
    """The next days after the newest stored one, up to DAYS_A_TICK, that are over and that the source has."""
    day = newest + dt.timedelta(days=1) if newest else declared.start
    found = []
    while len(found) < DAYS_A_TICK and declared.bounds(day)[1] <= now and (declared.end is None or day <= declared.end):
        found.append(day)
        day += dt.timedelta(days=1)
    return found


def request(spec: ModelSpec, day: dt.date) -> dg.RunRequest:
    """The run that ingests a day."""
    return dg.RunRequest(
        run_key=f"{spec.name}:ingest:{day}", partition_key=day.isoformat(), tags={"mlops/reason": f"new data: {day} has ended"}
    )
