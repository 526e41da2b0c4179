"""What callers meet at the gateway: versions by name, limits, API keys, JSON errors, the access log, metrics per arm."""

import datetime as dt
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks._load import Load, outcome
from mlops_dagster.core.analysis import Outcome, judge
from mlops_dagster.core.errors import DeclarationError, ServingError
from mlops_dagster.core.measurements import Measurements
from mlops_dagster.core.routes import Match, Mirror, Routes
from mlops_dagster.core.strategies import RolloutPolicy, count_tests, plan
from mlops_dagster.profiles import Settings, embedded
from mlops_dagster.resources.live_metrics.gateway import GatewayMetrics
from mlops_dagster.resources.serving import ServingOptions
from mlops_dagster.resources.serving.embedded import EmbeddedServing, hash_api_key
from mlops_dagster.resources.serving.envoy_admin import EnvoyAdmin
from mlops_dagster.resources.serving.state import Folder, free_port
from tests.contracts.serving.artifacts import ROW, make_arm
from tests.serving.gateway_hosts import FAULTY, eventually, new_model, predict_url, ready, serving_host

BODY = json.dumps(ROW).encode()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServing]:
    with serving_host(tmp_path_factory.mktemp("gateway"), predictor=FAULTY, max_body_bytes=2 << 20) as serving:
        yield serving


@pytest.fixture
def model(host: EmbeddedServing) -> Iterator[str]:
    name = new_model()
    yield name
    host.remove(name)


def test_a_caller_can_name_the_version_that_must_answer(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    arms = [make_arm(tmp_path, "1", answer=0), make_arm(tmp_path, "2", "candidate", answer=1)]
    host.apply(model, arms, Routes.all_to("1", warm=["2"]))
    ready(host, model)
    named = httpx.post(predict_url(host, model), json=ROW, headers={"x-mlops-version": "2"})
    assert (named.headers["x-model-version"], named.json()["predictions"]) == ("2", [1])
    unknown = httpx.post(predict_url(host, model), json=ROW, headers={"x-mlops-version": "7"})
    assert unknown.status_code == 404
    assert "there are: 1, 2" in unknown.json()["error"]


def test_whoever_names_a_version_is_no_evidence(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    arms = [make_arm(tmp_path, "1"), make_arm(tmp_path, "2", "candidate")]
    host.apply(model, arms, Routes.split({"1": 50, "2": 50}))
    ready(host, model)
    with httpx.Client() as client:
        for number in range(40):
            named = {"x-mlops-version": "2", "x-request-id": f"named-{model}"}
            assert client.post(predict_url(host, model), json={"instances": 3}, headers=named).status_code == 400
            own = client.post(predict_url(host, model), json=ROW if number else {"instances": 3})
            assert own.status_code == (200 if number else 400)
    metrics = GatewayMetrics(root=host.root)
    answers = lambda: sum(counts.answers for counts in metrics.totals(model).arms.values())  # noqa: E731 -- read twice
    assert eventually(lambda: answers() >= 40)
    time.sleep(2.5)  # two more samples: what is named does not come later either
    seen = metrics.totals(model).arms
    assert seen.keys() == {"1", "2"}
    for kind in ("requests", "answers"):
        assert sum(getattr(counts, kind) for counts in seen.values()) == 40
    assert sum(sum(counts.latency) for counts in seen.values()) == 40
    assert sum(counts.refused for counts in seen.values()) == 1
    log = Folder(host.root).logs / "access.jsonl"
    assert eventually(lambda: log.read_text().count(f"named-{model}") == 40)


def test_a_version_that_refuses_every_caller_fails_its_canary(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    refusing = {"faults.json": json.dumps({"fail_every": 1, "fail_status": 422})}
    arms = [make_arm(tmp_path, "1"), make_arm(tmp_path, "2", "candidate", extra=refusing)]
    host.apply(model, arms, Routes.split({"1": 50, "2": 50}))
    ready(host, model)
    policy, metrics = RolloutPolicy(steps_percent=(50.0,)), GatewayMetrics(root=host.root)
    steps, measured, begin = plan("1", "2", policy), Measurements(), dt.datetime.now(dt.UTC)
    with httpx.Client() as client:
        for _ in range(4):
            reading = metrics.totals(model)
            measured = measured.observe(reading.at, reading.arms)
            counts = Counter(client.post(predict_url(host, model), json=ROW).status_code for _ in range(60))
            assert counts.keys() == {200, 422}
            assert eventually(lambda at=reading.at: (metrics.totals(model).at - at).total_seconds() > 1)
    verdict = judge(steps[0], count_tests(steps), begin, measured, policy, dt.datetime.now(dt.UTC))
    assert verdict.outcome is Outcome.FAIL
    assert verdict.evidence["gates"]["errors"]["candidate"] == 0
    assert "refused requests (4xx): 100.00% against the champion's 0.00%, proven worse" in verdict.reasons


def test_a_preview_is_judged_by_those_who_name_it(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    arms = [make_arm(tmp_path, "1"), make_arm(tmp_path, "2", "candidate")]
    host.apply(model, arms, Routes.split({"1": 100, "2": 0}, match=Match("x-mlops-arm", "2", "2")))
    ready(host, model)
    for header in ("x-mlops-version", "x-mlops-arm"):
        assert httpx.post(predict_url(host, model), json=ROW, headers={header: "2"}).headers["x-model-version"] == "2"
    metrics = GatewayMetrics(root=host.root)
    assert eventually(lambda: metrics.totals(model).arms["2"].answers == metrics.totals(model).arms["2"].requests == 2)


def test_paths_with_a_version_reach_that_version(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    arms = [make_arm(tmp_path, "1", answer=0), make_arm(tmp_path, "2", "candidate", answer=1)]
    host.apply(model, arms, Routes.split({"1": 50, "2": 50}))
    ready(host, model)
    base, ask = f"{host.endpoint(model)}/v2/models/{model}", {"inputs": []}
    for version in ("1", "2"):
        for _ in range(10):
            assert httpx.get(f"{base}/versions/{version}/ready").status_code == 200
            assert httpx.get(f"{base}/versions/{version}").json()["versions"] == [version]
            assert httpx.post(f"{base}/versions/{version}/infer", json=ask).headers["x-model-version"] == version
    unknown = httpx.get(f"{base}/versions/11/ready")
    assert unknown.status_code == 404
    assert "error" in unknown.json()
    seen = httpx.get(f"{host.endpoint(model)}/v2").json()
    own = httpx.get(f"http://{server_address(host, model, '1')}/v2").json()
    assert (seen["version"], seen["extensions"]) == (own["version"], own["extensions"])


def test_errors_of_the_gateway_are_json_and_say_what_to_do(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    host.apply(model, [make_arm(tmp_path, "1")], Routes.all_to("1"))
    ready(host, model)
    base = host.endpoint(model)
    assert "GET /v1/models" in httpx.post(f"{base}/v1/models/{model}-other:predict", json=ROW).json()["error"]
    assert model in httpx.get(f"{base}/v1/models").json()["models"]
    assert httpx.get(f"{base}/v2/health/ready").json() == {"ready": True}
    many = {"instances": ROW["instances"] * 80_000}  # 1.5 MB: more than the gateway keeps for a second try, less than its limit
    assert len(httpx.post(predict_url(host, model), json=many, timeout=60).json()["predictions"]) == 80_000
    large = httpx.post(predict_url(host, model), content=b" " * (3 << 20))
    assert large.status_code == 413
    assert "error" in large.json()


def test_a_request_keeps_its_id_or_gets_one(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    host.apply(model, [make_arm(tmp_path, "1")], Routes.all_to("1"))
    ready(host, model)
    kept = httpx.post(predict_url(host, model), json=ROW, headers={"x-request-id": "mine-1"})
    assert kept.headers["x-request-id"] == "mine-1"
    assert len(httpx.post(predict_url(host, model), json=ROW).headers["x-request-id"]) > 8


def test_the_access_log_tells_the_arm(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    arms = [make_arm(tmp_path, "1"), make_arm(tmp_path, "2", "candidate")]
    host.apply(model, arms, Routes.split({"1": 0, "2": 100}))
    ready(host, model)
    httpx.post(predict_url(host, model), json=ROW, headers={"x-request-id": f"log-{model}"})
    log = Folder(host.root).logs / "access.jsonl"

    def line() -> dict | None:
        lines = [json.loads(text) for text in log.read_text().splitlines() if f"log-{model}" in text]
        return lines[0] if lines else None

    assert eventually(line)
    found = line()
    assert found is not None
    assert (found["model"], found["version"], found["status"], found["attempts"]) == (model, "2", 200, 1)
    assert found["arm"].startswith(f"{model}/2")


def test_only_the_gateway_marks_copies(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    arms = [make_arm(tmp_path, "1"), make_arm(tmp_path, "2", "shadow")]
    host.apply(model, arms, Routes.split({"1": 100, "2": 0}, mirror=Mirror("2", 500)))
    ready(host, model)
    with httpx.Client() as client:
        for _ in range(100):
            client.post(predict_url(host, model), json=ROW, headers={"x-mlops-shadow": "1"})
    metrics = {version: server_counts(host, model, version) for version in ("1", "2")}
    assert eventually(lambda: server_counts(host, model, "2").get("true", 0) > 20)
    assert metrics["1"] == {"false": 100}, "a caller's own shadow header must not hide a request from the log"
    copies = server_counts(host, model, "2")["true"]
    assert 25 <= copies <= 75
    assert eventually(lambda: GatewayMetrics(root=host.root).totals(model).arms["2"].answers == copies)


def server_address(host: EmbeddedServing, model: str, version: str) -> str:
    fleet = json.loads((Folder(host.root).host / "fleet.json").read_text())
    return next(m["address"] for m in fleet.values() if m["model"] == model and m["arm"]["version"] == version)


def server_counts(host: EmbeddedServing, model: str, version: str) -> dict[str, int]:
    """How many predictions a server itself says it answered, by whether they were copies."""
    address = server_address(host, model, version)
    counts: dict[str, int] = {}
    for line in httpx.get(f"http://{address}/metrics").text.splitlines():
        if line.startswith("mlops_requests_total{"):
            shadow = line.split('shadow="')[1].split('"')[0]
            counts[shadow] = counts.get(shadow, 0) + int(float(line.split()[-1]))
    return counts


def test_more_requests_than_allowed_are_refused_with_429(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    host.apply(model, [make_arm(tmp_path, "1")], Routes.all_to("1"), ServingOptions(requests_per_second=50))
    ready(host, model)
    with Load(predict_url(host, model), BODY, per_second=200, connections=8) as load:
        time.sleep(2)
    counts = outcome(load.answers)
    assert set(counts) == {(200, "1"), (429, "")}
    assert 100 <= counts[200, "1"] <= 200  # 50 a second for two seconds, and one bucket


def test_the_gateways_port_is_set_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLOPS_GATEWAY_PORT", str(free_port()))
    monkeypatch.setenv("MLOPS_HOME", str(tmp_path))
    with serving_host(tmp_path / "serving", port=embedded(Settings())["serving"].port) as serving:  # type: ignore[attr-defined]
        serving.start()
        assert serving.endpoint().endswith(f":{os.environ['MLOPS_GATEWAY_PORT']}")
        assert eventually(lambda: gateway_answers(serving))


def gateway_answers(serving: EmbeddedServing) -> bool:
    try:
        return httpx.get(f"{serving.endpoint()}/v2").json()["name"] == "mlops-gateway"
    except httpx.TransportError:
        return False


def test_metrics_per_arm_count_requests_errors_and_latency(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    slow = {"faults.json": json.dumps({"fail_every": 4, "slow_ms": 30})}
    arms = [make_arm(tmp_path, "1"), make_arm(tmp_path, "2", "candidate", extra=slow)]
    host.apply(model, arms, Routes.split({"1": 50, "2": 50}))
    ready(host, model)
    begin = dt.datetime.now(dt.UTC)
    with httpx.Client() as client:
        answers = [client.post(predict_url(host, model), json=ROW) for _ in range(120)]
    mine = {version: [a for a in answers if a.headers["x-model-version"] == version] for version in ("1", "2")}
    failed = sum(answer.status_code == 500 for answer in mine["2"])
    assert failed == len(mine["2"]) // 4
    metrics = GatewayMetrics(root=host.root)
    total = lambda: sum(counts.requests for counts in metrics.totals(model).arms.values())  # noqa: E731 -- read twice
    assert eventually(lambda: total() == 120), total()
    arms_seen = metrics.totals(model).arms
    assert (arms_seen["1"].requests, arms_seen["1"].errors) == (len(mine["1"]), 0)
    assert (arms_seen["2"].requests, arms_seen["2"].errors) == (len(mine["2"]), failed)
    assert eventually(lambda: sum(metrics.totals(model).arms["2"].latency) == len(mine["2"]))
    slow_answers = sum(metrics.totals(model).arms["2"].latency[11:])  # more than 20 ms
    assert slow_answers >= len(mine["2"]) - failed - 1
    assert metrics.measure(model, begin).at >= begin
    with pytest.raises(ServingError, match="no metrics of nobody"):
        metrics.totals("nobody")


def test_an_answers_latency_is_counted_as_soon_as_the_answer(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    host.apply(model, [make_arm(tmp_path, "1")], Routes.all_to("1"))
    ready(host, model)
    admin = EnvoyAdmin(Folder(host.root).socket("admin"))
    counted = lambda: sum(max(n for _, n in cluster) for name, cluster in admin.latencies().items() if name.startswith(model))  # noqa: E731
    for number in (1, 2, 3):  # the first may come just before Envoy merges its histograms, the others come just after
        httpx.post(predict_url(host, model), json=ROW).raise_for_status()
        assert eventually(lambda number=number: counted() == number, seconds=3)  # type: ignore[misc]


def test_api_keys_are_asked_for_and_only_their_digests_are_kept(tmp_path: Path) -> None:
    key = "k" * 70  # longer than one block of the hash
    keys = {"dashboard": hash_api_key(key), "other": hash_api_key("short")}
    with serving_host(tmp_path / "host", api_keys=keys) as serving:
        serving.apply("m", [make_arm(tmp_path, "1")], Routes.all_to("1"))
        ready(serving, "m")
        url = predict_url(serving, "m")
        assert httpx.post(url, json=ROW).status_code == 401
        wrong = httpx.post(url, json=ROW, headers={"x-api-key": key + "x"})
        assert (wrong.status_code, wrong.json()["error"]) == (401, "the API key is not known")
        for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}, {"x-api-key": "short"}):
            for _ in range(2):
                assert httpx.post(url, json=ROW, headers=headers).status_code == 200
        assert httpx.get(f"{serving.endpoint('m')}/v2/health/ready").status_code == 200
        log = Folder(serving.root).logs / "access.jsonl"
        assert eventually(lambda: '"client":"dashboard"' in log.read_text())
        kept = [path for path in Path(serving.root).rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
        assert not kept
    with pytest.raises(DeclarationError, match="SHA-256"):
        EmbeddedServing(root=str(tmp_path / "bad"), api_keys={"x": "secret"}).start()
