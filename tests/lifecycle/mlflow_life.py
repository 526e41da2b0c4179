"""The foreign project's model as an estimator without an ONNX form, from its data to its monitored answers; run like `life.py`."""

import datetime as dt

import httpx
from life import MODEL, Life

from mlops_dagster.core.errors import MlopsError
from mlops_dagster.replay import Replay

DAY = dt.date(2024, 1, 31)


def failing(life: Life) -> None:
    """What a person reads who leaves out `training.format`."""
    from parcels.defs.late_parcel.training import Wary

    from mlops_dagster.resources.training import onnx_export
    from mlops_dagster.serving.artifact import Feature, Signature

    try:
        onnx_export.export(Wary(), Signature(MODEL, "classification", (Feature("weight", "float64"),), classes=(0, 1)))
    except MlopsError as error:
        life.tell("without format", error=str(error))


def answers(life: Life) -> None:
    """One row by each protocol, by entity and request values alone."""
    row = {"id": "p-1", "depot": "d3", "weight_kg": 3.5}
    base = life.resources["serving"].endpoint(MODEL)
    v1 = httpx.post(f"{base}/v1/models/{MODEL}:predict", json={"instances": [row]}, timeout=30)
    kinds = {"id": "BYTES", "depot": "BYTES", "weight_kg": "FP64"}
    inputs = [{"name": n, "shape": [1], "datatype": kinds[n], "data": [v]} for n, v in row.items()]
    v2 = httpx.post(f"{base}/v2/models/{MODEL}/infer", json={"inputs": inputs}, timeout=30)
    wrong = httpx.post(f"{base}/v1/models/{MODEL}:predict", json={"instances": [{**row, "weight_kg": "heavy"}]}, timeout=30)
    metadata = httpx.get(f"{base}/v2/models/{MODEL}", timeout=30).json()
    told = {"v1": v1.json(), "v2": v2.json(), "wrong": [wrong.status_code, wrong.json()], "platform": metadata["platform"]}
    life.tell("answers", **told)


def main() -> None:
    life = Life()
    try:
        failing(life)
        life.run("ingest", "ingest", days=("2024-01-01", "2024-01-30"))
        life.run("train", "train")
        life.decide(1, "approved")
        life.run("deploy", "deploy")
        answers(life)
        life.tell("monitored", sent=life.monitor(Replay(life.spec, life.resources), DAY))
        logged = life.resources["inference_segments"].read(MODEL, DAY)
        life.tell("logged", rows=logged.num_rows, scored=sum(s is not None for s in logged["score"].to_pylist()))
    finally:
        life.resources["serving"].stop()


if __name__ == "__main__":
    main()
