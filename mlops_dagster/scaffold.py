"""`dg scaffold defs mlops_dagster.ModelLifecycle <name>`: a new model that loads, with the places to fill in."""

import textwrap

import dagster as dg

SOURCE = '''
"""Where the rows come from."""

import datetime as dt

import pandas as pd
import pandera.pandas as pa


class RowSchema(pa.DataFrameModel):
    """What a row must look like; rows that do not are kept apart with the reason."""

    id: str = pa.Field(unique=True)
    customer: str
    amount: float = pa.Field(ge=0)
    label: float = pa.Field(isin=[0, 1], nullable=True)


def read_day(day: dt.date) -> pd.DataFrame:
    """The rows of one day: `id`, `event_timestamp` (UTC), join keys, request-time values, the label (null until it is known)."""
    raise NotImplementedError("Read the rows of one day from your source and return them as a table.")
'''

FEATURES = '''
"""What the model knows of a row's entities."""

from feast import Entity, FeatureView, Field, RequestSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64
from feast.value_type import ValueType


def feature_views(source):
    """Feast's own objects; `source(view)` is where the platform keeps the rows of a view."""
    customer = Entity(name="customer", join_keys=["customer"], value_type=ValueType.STRING)
    spending = FeatureView(
        name="spending", entities=[customer], schema=[Field(name="mean_amount", dtype=Float64)], source=source("spending")
    )
    request = RequestSource(name="request", schema=[Field(name="amount", dtype=Float64)])

    @on_demand_feature_view(sources=[request], schema=[Field(name="amount_now", dtype=Float64)], mode="python")
    def at_request(inputs):
        return {"amount_now": inputs["amount"]}

    return [customer, spending, at_request]


def compute():
    """SQL for each view over the validated rows of the last days; `event_timestamp` says from when on a value is known."""
    return {
        "spending": "SELECT customer, $day_end AS event_timestamp, avg(amount) AS mean_amount FROM rows GROUP BY customer",
    }
'''

TRAINING = '''
"""How the estimator is made."""

from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


def train(features, label, **parameters):
    """Any scikit-learn compatible estimator; `features` has the model's columns in the order of its signature."""
    return make_pipeline(SimpleImputer(), LogisticRegression(**parameters)).fit(features, label)
'''


class ModelScaffolder(dg.Scaffolder):
    """Writes `defs.yaml` and the Python that it names."""

    def scaffold(self, request: dg.ScaffoldRequest) -> None:
        attributes = {
            "description": "What does the model answer?",
            "source": {"read": ".source.read_day", "schema": ".source.RowSchema", "partitions": {"start": "2026-01-01"}},
            "features": {"define": ".features.feature_views", "compute": ".features.compute"},
            "label": {"column": "label"},
            "training": {"train": ".training.train"},
        }
        dg.scaffold_component(request, attributes)
        for name, text in (("__init__", ""), ("source", SOURCE), ("features", FEATURES), ("training", TRAINING)):
            file = request.target_path / f"{name}.py"
            if not file.exists():
                file.write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
