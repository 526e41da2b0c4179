"""The flights of January and February with their features as of each push-back, made once for all tests of the two models."""

import datetime as dt

import polars as pl
import pytest

from mlops_dagster.defs.flight_delay import study


@pytest.fixture(scope="session")
def january_february() -> pl.DataFrame:
    return study.joined(dt.date(2013, 1, 1), dt.date(2013, 2, 28))
