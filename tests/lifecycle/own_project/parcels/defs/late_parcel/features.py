"""What is known of a depot, and of the parcel at hand."""

from feast import Entity, FeatureView, Field, RequestSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64
from feast.value_type import ValueType


def feature_views(source):
    depot = Entity(name="depot", join_keys=["depot"], value_type=ValueType.STRING)
    record = FeatureView(
        name="depot_record",
        entities=[depot],
        schema=[Field(name=name, dtype=Float64) for name in ("depot_late_share", "depot_parcels", "depot_weight")],
        source=source("depot_record"),
    )
    request = RequestSource(name="parcel", schema=[Field(name="weight_kg", dtype=Float64)])

    @on_demand_feature_view(sources=[request], schema=[Field(name="weight", dtype=Float64)], mode="python")
    def at_request(inputs):
        return {"weight": inputs["weight_kg"]}

    return [depot, record, at_request]


def compute():
    return {
        "depot_record": """
            SELECT depot, $day_end AS event_timestamp, avg(late) AS depot_late_share, CAST(count(*) AS DOUBLE) AS depot_parcels,
                   avg(weight_kg / 3) AS depot_weight
            FROM rows WHERE delivered_at <= $day_end GROUP BY depot
        """
    }
