"""Parcels of one CSV file."""

import datetime as dt
import os

import pandas as pd
import pandera.pandas as pa


class ParcelSchema(pa.DataFrameModel):
    """One parcel."""

    id: str
    depot: str
    weight_kg: float = pa.Field(ge=0)
    late: float = pa.Field(isin=[0, 1], nullable=True)


def read_day(day: dt.date) -> pd.DataFrame:
    """The parcels that were sent on a day."""
    rows = pd.read_csv(
        os.environ["PARCELS_CSV"], dtype={"id": str, "depot": str}, parse_dates=["event_timestamp", "delivered_at"]
    )
    return rows[rows["event_timestamp"].dt.date == day].reset_index(drop=True)
