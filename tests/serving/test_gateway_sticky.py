"""Sticky keys at the gateway: the key that is hashed is the key that is logged, however a caller writes it."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mlops_dagster.core.routes import Routes, Sticky, assign
from mlops_dagster.resources.live_metrics.gateway import GatewayMetrics
from mlops_dagster.resources.serving import client_keys
from mlops_dagster.resources.serving.embedded import EmbeddedServing
from mlops_dagster.resources.serving.state import Folder
from tests.contracts.serving.artifacts import ROW, make_arm
from tests.serving.gateway_hosts import FAULTY, eventually, new_model, predict_url, ready, serving_host

Headers = list[tuple[bytes, bytes]]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServing]:
    with serving_host(tmp_path_factory.mktemp("sticky"), predictor=FAULTY) as serving:
        yield serving


@pytest.fixture
def model(host: EmbeddedServing) -> Iterator[str]:
    name = new_model()
    yield name
    host.remove(name)


def cookies(number: int) -> list[tuple[str, Headers]]:
    """Ways to write a cookie, and the key that it is."""
    key = f"k{number}".encode()
    return [
        (key.decode(), [(b"cookie", b'uid="' + key + b'"')]),
        (key.decode(), [(b"cookie", b"uid=" + key + b"; uid=z")]),
        (key.decode(), [(b"cookie", b"a=b"), (b"cookie", b"uid=" + key)]),
        (key.decode(), [(b"cookie", b"uid=" + key), (b"cookie", b"uid=z")]),
        (key.decode(), [(b"cookie", b"notuid=x;uid=" + key + b" ; c=d=e")]),
        (f"{key.decode()}%E9", [(b"cookie", b"uid=" + key + b"\xe9")]),
        (f"{key.decode()}é", [(b"cookie", b"uid=" + key + "é".encode())]),
        (f'{key.decode()}"\\', [(b"cookie", b"uid=" + key + b'"\\')]),
    ]


def names(number: int) -> list[tuple[str, Headers]]:
    """The same for a header."""
    key = f"k{number}".encode()
    return [
        (key.decode(), [(b"X-User", key)]),
        (f"{key.decode()}%E9", [(b"x-user", key + b"\xe9")]),
        (key.decode(), [(b"x-user", key), (b"x-user", b"z")]),
        (key.decode(), [(b"x-user", key), (b"x-mlops-unit", b"s:z")]),
    ]


@pytest.mark.parametrize(("sticky", "ways"), [(Sticky("cookie", "uid", "s"), cookies), (Sticky("header", "X-User", "s"), names)])
def test_the_key_that_is_hashed_is_the_key_that_is_logged(
    host: EmbeddedServing, model: str, tmp_path: Path, sticky: Sticky, ways
) -> None:
    routes = Routes.split({"1": 50, "2": 50}, sticky=sticky)
    host.apply(model, [make_arm(tmp_path, "1"), make_arm(tmp_path, "2", "candidate")], routes)
    ready(host, model)
    begin = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    sent: dict[str, tuple[str, str]] = {}
    with httpx.Client() as client:
        for number in range(20):
            for way, (key, headers) in enumerate(ways(number)):
                identity = f"{model}-{number}-{way}"
                answer = client.post(predict_url(host, model), json=ROW, headers=[*headers, (b"x-request-id", identity.encode())])
                sent[identity] = (key, answer.headers["x-model-version"])
                assert sent[identity] == (key, assign(key, routes)), headers
    metrics = GatewayMetrics(root=host.root)
    logged = lambda: metrics.assigned(model, begin, dt.datetime.now(dt.UTC)).to_pylist()  # noqa: E731 -- read twice
    assert eventually(lambda: len(logged()) == len(sent))
    assert {line["request_id"]: (line["key"], line["arm"]) for line in logged()} == sent


def test_a_request_without_a_key_goes_by_weight_and_is_no_unit(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    routes = Routes.split({"1": 50, "2": 50}, sticky=Sticky("cookie", "uid", "s"))
    host.apply(model, [make_arm(tmp_path, "1"), make_arm(tmp_path, "2", "candidate")], routes)
    ready(host, model)
    begin = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    without: list[dict[str, str]] = [{}, {"cookie": "uid="}, {"cookie": 'uid=""'}, {"cookie": "uid"}, {"x-mlops-unit": "s:a"}]
    for headers in without:
        met = {httpx.post(predict_url(host, model), json=ROW, headers=headers).headers["x-model-version"] for _ in range(20)}
        assert met == {"1", "2"}, headers
    named = {"cookie": "uid=a", "x-mlops-version": "1"}
    assert httpx.post(predict_url(host, model), json=ROW, headers=named).headers["x-model-version"] == "1"
    httpx.post(predict_url(host, model), json=ROW, headers={"cookie": "uid=b"})
    metrics = GatewayMetrics(root=host.root)
    logged = lambda: metrics.assigned(model, begin, dt.datetime.now(dt.UTC))["key"].to_pylist()  # noqa: E731 -- read twice
    assert eventually(lambda: "b" in logged())
    assert logged() == ["b"]


def test_nobody_can_call_himself_a_client(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    host.apply(model, [make_arm(tmp_path, "1")], Routes.all_to("1"))
    ready(host, model)
    headers = {"x-mlops-client": "mallory", "x-request-id": f"client-{model}"}
    httpx.post(predict_url(host, model), json=ROW, headers=headers)
    log = Folder(host.root).logs / "access.jsonl"
    assert eventually(lambda: f"client-{model}" in log.read_text())
    line = next(line for line in log.read_text().splitlines() if f"client-{model}" in line)
    assert "mallory" not in line


def test_a_model_with_clients_of_its_own_has_sticky_keys_too(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    routes = Routes.split({"1": 50, "2": 50}, sticky=Sticky("header", "x-user", "s"))
    client_keys.add(Folder(host.root), model, "batch", "its-key", dt.datetime.now(dt.UTC))
    host.apply(model, [make_arm(tmp_path, "1"), make_arm(tmp_path, "2", "candidate")], routes)
    ready(host, model)
    begin = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    with httpx.Client() as client:
        assert client.post(predict_url(host, model), json=ROW, headers={"x-user": "u"}).status_code == 401
        for number in range(20):
            answer = client.post(predict_url(host, model), json=ROW, headers={"x-user": f"u{number}", "x-api-key": "its-key"})
            assert answer.headers["x-model-version"] == assign(f"u{number}", routes)
    metrics = GatewayMetrics(root=host.root)
    logged = lambda: metrics.assigned(model, begin, dt.datetime.now(dt.UTC))["key"].to_pylist()  # noqa: E731 -- read twice
    assert eventually(lambda: len(logged()) == 20)
    assert '"client":"batch"' in (Folder(host.root).logs / "access.jsonl").read_text()
