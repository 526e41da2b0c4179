"""A live version while its model's feature definitions change; prints what was seen as JSON, a line a step."""

from feast import Field, RequestSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64
from life import MODEL, Life
from parcels.defs.late_parcel.features import feature_views

from mlops_dagster import reproduce
from mlops_dagster.core.errors import MlopsError
from mlops_dagster.requests import Client

ROW = {"depot": "d1", "weight_kg": 6.0, "event_timestamp": "2024-01-31T06:00:00+00:00"}


def changed(source):
    """The same views, but a weight in grams and one more value to send."""
    parcel = RequestSource(name="parcel", schema=[Field(name=name, dtype=Float64) for name in ("weight_kg", "height_cm")])

    @on_demand_feature_view(
        sources=[parcel], schema=[Field(name=name, dtype=Float64) for name in ("weight", "height")], mode="python"
    )
    def at_request(inputs):
        return {"weight": [1000 * value for value in inputs["weight_kg"]], "height": inputs["height_cm"]}

    return [*(item for item in feature_views(source) if item.name != "at_request"), at_request]


def ask(life: Life, step: str, client: Client) -> None:
    answers = []
    for row in (ROW, ROW | {"weight": 0.0}, ROW | {"weight": "junk"}, ROW | {"height_cm": 1.0}):
        try:
            answers.append(client.predict(MODEL, [row], {}))
        except MlopsError as error:
            answers.append(str(error))
    life.tell(step, answers=answers)


def main() -> None:
    life = Life()
    try:
        life.run("ingest", "ingest", days=("2024-01-01", "2024-01-30"))
        life.run("train", "train")
        life.decide(1, "approved")
        life.run("deploy", "deploy")
        client = Client(life.resources["serving"].endpoint(MODEL))
        ask(life, "before", client)
        made = reproduce.reproduce(life.spec, "parcels", 1, life.resources, lambda text: None)
        life.tell("reproduced", artifact=made.artifact.same)
        now = life.resources["feature_store"].apply(MODEL, changed)
        life.tell("applied", request=now.request)
        ask(life, "after", client)
    finally:
        life.resources["serving"].stop()


if __name__ == "__main__":
    main()
