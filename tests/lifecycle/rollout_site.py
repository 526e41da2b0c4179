"""A site for rollouts in one folder: the real registry, ledger, lake, gateway and servers, and small versions to bring in."""

import datetime as dt
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from mlops_dagster.assets import approvals
from mlops_dagster.assets.rollout import Parts
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.profiles import Settings, embedded
from mlops_dagster.resources.registry import Approval, Version
from mlops_dagster.resources.serving.embedded import EmbeddedServing
from mlops_dagster.resources.tracking.mlflow_connection import connect
from tests.contracts.serving.artifacts import ROW, make_artifact
from tests.serving.gateway_hosts import FAULTY, serving_host

BODY = json.dumps(ROW).encode()
ANSWERS = 5


def spec_of(model: str, strategy: str = "canary", **rollout: Any) -> ModelSpec:
    """A declaration whose rollouts are short; a busy machine's latency is not what its limit is there for."""
    short = {"step_seconds": 1, "watch_seconds": 1, "shadow_seconds": 1, "keep_warm_seconds": 4, "minimum_requests": 20}
    return ModelSpec.model_validate(
        {
            "name": model,
            "package": "tests.lifecycle",
            "source": {"read": ".x.x", "schema": ".x.x", "partitions": {"start": "2024-01-01"}},
            "features": {"define": ".x.x", "compute": ".x.x"},
            "label": {"column": "late"},
            "training": {"train": ".x.x"},
            "rollout": {"strategy": strategy, "shadow_ends": "promote", **short, **rollout},
            "monitoring": {"max_p99_latency_ms": 2000},
        }
    )


def parts_in(root: Path) -> Parts:
    """The embedded profile's systems; its servers may have faults (see `tests.serving.faulty_server`)."""
    systems = embedded(Settings(home=root, ledger_url=f"sqlite:///{root / 'ledger.db'}"))
    systems["serving"] = EmbeddedServing(root=str(root / "serving"), predictor=FAULTY)
    return Parts.of(SimpleNamespace(**systems))


@contextmanager
def site(root: Path) -> Iterator[Parts]:
    """The systems, with every server of theirs ended afterwards."""
    with serving_host(root / "serving", predictor=FAULTY):
        yield parts_in(root)


def add_version(parts: Parts, model: str, faults: dict[str, Any] | None = None, approve: bool = True, answer: int = 1) -> Version:
    """Register the next version, which always answers `answer` and has these faults, and approve it."""
    number = len(parts.registry.versions(model)) + 1
    folder = parts.cache.parent / "made" / model / str(number)
    digest = make_artifact(folder, answer, extra={"faults.json": json.dumps(faults)} if faults else None)
    sample = pa.table({"a": [1.0] * ANSWERS, "b": [2.0] * ANSWERS, "prediction": [float(answer)] * ANSWERS})
    parts.lake.write(f"{model}/trained_model/{digest}/reference_sample.parquet", sample)
    evidence = {"metrics": {"accuracy": 0.9, "mean_absolute_error": 1.0}, "number": number}
    made = parts.registry.register(model, folder, digest, evidence, {"author": "trainer"})
    return decide(parts, made) if approve else made


def decide(parts: Parts, version: Version, decision: Any = "approved") -> Version:
    """Approve or reject a version as a person would."""
    approval = Approval(decision, "tester", dt.datetime.now(dt.UTC), "seen")
    return approvals.decide(parts.registry, parts.ledger, version.model, version.number, approval)


def stored_model(parts: Parts, made: Version) -> Path:
    """The file of the model in MLflow's artifact store."""
    client = connect(parts.registry.tracking_uri)  # type: ignore[attr-defined]
    uri = client.get_model_version_download_uri(made.model, str(made.number))
    return Path(uri.removeprefix("file://")) / "model.onnx"


def says_late(rows: pa.Table) -> list[int | None]:
    """A model's own metric of an A/B test (`rollout.ab_metric`): whether late was said, right or wrong; unknown without a label."""
    pairs = zip(rows["prediction"].to_pylist(), rows["label"].to_pylist(), strict=True)
    return [None if label is None else int(prediction == 1) for prediction, label in pairs]


def predict_url(parts: Parts, model: str) -> str:
    return f"{parts.serving.endpoint(model)}/v1/models/{model}:predict"
