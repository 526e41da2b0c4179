"""The Prometheus text: KServe's names, and counts that are right."""

import httpx
import numpy as np
from predictor_processes import Model, Starter
from prometheus_client.parser import text_string_to_metric_families

from mlops_dagster.serving.metrics import STAGES, Metrics


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in text_string_to_metric_families(text) for s in f.samples}


def value(text: str, name: str, **labels: str) -> float:
    (found,) = [v for (n, given), v in samples(text).items() if n == name and labels.items() <= dict(given).items()]
    return found


def test_every_answer_is_counted_at_once(start: Starter, number_model: Model) -> None:
    process = start(number_model, "--arm", "challenger")
    predict = f"{process.url}/v1/models/m:predict"
    for _ in range(3):
        httpx.post(predict, json={"instances": number_model.instances(4)})
    httpx.post(predict, json={"instances": number_model.instances(1)}, headers={"x-mlops-shadow": "1"})
    httpx.post(predict, json={"instances": [{}]})
    httpx.post(f"{process.url}/v2/models/m/infer", json={})
    text = httpx.get(f"{process.url}/metrics").text
    arm = {"model_name": "m", "model_version": "7", "arm": "challenger"}
    assert value(text, "mlops_requests_total", **arm, protocol="v1", code="200", shadow="false") == 3
    assert value(text, "mlops_requests_total", **arm, protocol="v1", code="200", shadow="true") == 1
    assert value(text, "mlops_requests_total", **arm, protocol="v1", code="400", shadow="false") == 1
    assert value(text, "mlops_requests_total", **arm, protocol="v2", code="400", shadow="false") == 1
    assert value(text, "mlops_predicted_rows_total", **arm, shadow="false") == 12
    assert value(text, "mlops_request_seconds_count", **arm) == 6
    for stage in STAGES[:3]:
        assert value(text, f"{stage}_count", model_name="m") == 4
        assert 0 < value(text, f"{stage}_sum", model_name="m") < 4
    assert value(text, "process_resident_memory_bytes") > 1e6


def test_the_names_are_those_of_kserve() -> None:
    from kserve import metrics as kserves

    histograms = (kserves.PRE_HIST_TIME, kserves.PREDICT_HIST_TIME, kserves.POST_HIST_TIME, kserves.EXPLAIN_HIST_TIME)
    assert [h._name for h in histograms] == list(STAGES)
    assert kserves.PROM_LABELS == ["model_name"]


def test_buckets_are_cumulative_and_have_one_at_the_latency_limit() -> None:
    metrics = Metrics("m", "1", 'a"b\\')
    arrived = np.zeros((4, 5), dtype=np.int64)
    arrived[:, 4] = [1_000_000, 99_000_000, 101_000_000, 60_000_000_000]
    metrics.answered(arrived, ["v1"] * 4, [False] * 4, [1] * 4)
    text = metrics.render().decode()
    for bound, count in (("0.001", 1), ("0.1", 2), ("0.125", 3), ("10.0", 3), ("+Inf", 4)):
        assert value(text, "mlops_request_seconds_bucket", le=bound) == count
    assert value(text, "mlops_request_seconds_count", arm='a"b\\') == 4
