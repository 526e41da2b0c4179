"""A user's own jobs and commands select the platform's assets by Dagster's strings, whatever else the platform installs."""

import dagster as dg
import pytest

from mlops_dagster.definitions import defs


@pytest.mark.parametrize("selection", ["flight_delay/raw_data", 'key:"flight_delay/training_set"+1', "group:flight_delay", "*"])
def test_a_string_selects_assets(selection: str) -> None:
    own = dg.Definitions(jobs=[dg.define_asset_job("own", selection=selection)])
    job = dg.Definitions.merge(defs, own).resolve_job_def("own")
    chosen = {key.to_user_string() for key in job.asset_layer.executable_asset_keys}
    assert chosen
    assert chosen <= {key.to_user_string() for key in defs.resolve_all_asset_keys()}
