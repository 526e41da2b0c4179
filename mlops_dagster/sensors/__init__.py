"""What starts runs by itself: sensors close the loop, schedules keep the days."""

import dagster as dg

from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.sensors import new_data, retraining, rollouts, schedules


def build(spec: ModelSpec) -> dg.Definitions:
    """The sensors and schedules of a model."""
    return dg.Definitions(
        sensors=[new_data.build(spec), retraining.build(spec), rollouts.build(spec)], schedules=schedules.build(spec)
    )
