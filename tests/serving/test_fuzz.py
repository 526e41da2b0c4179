"""Whatever is sent to a predictor, it answers 2xx or 4xx and goes on."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from predictor_processes import Model, Process

FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
NAMES = st.sampled_from(["distance", "hour", "carrier", "id", "event_timestamp", "features", "", "n0", "\x00", "é"])
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([1e39, -0.0, 1e-320, 2**63])
)
TEXT = st.text(max_size=8)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, st.datetimes().map(str))
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | TEXT, inner, max_size=4), max_leaves=12
)
GOOD_ROW = {"distance": 0.5, "hour": 3, "carrier": "AA"}
SIZES = st.sampled_from([0, 1, 2**31, 2**32, 2**62, 2**63, 2**64, 1.0, -(2**63)])
MANY_ONES = st.integers(60, 70).map(lambda count: [1] * count)  # an array of NumPy has at most 64 dimensions
DATATYPES = st.sampled_from(["FP32", "FP64", "FP16", "INT8", "INT32", "INT64", "UINT64", "BOOL", "BYTES", "BF16", "x"])
PATHS = ["/v1/models/m:predict", "/v2/models/m/infer", "/v2/models/m/versions/7/infer"]


@pytest.fixture(scope="module")
def client(served_mixed: Process) -> Any:
    with httpx.Client(base_url=served_mixed.url, timeout=20) as found:
        yield found


@st.composite
def altered_rows(draw: st.DrawFn) -> dict[str, Any]:
    row: dict[str, Any] = {**GOOD_ROW, **draw(st.dictionaries(NAMES, JSON, max_size=2))}
    for name in draw(st.lists(st.sampled_from(sorted(GOOD_ROW)), max_size=1)):
        row.pop(name, None)
    return row


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(st.lists(st.integers(-1, 4) | SIZES, max_size=3) | MANY_ONES | JSON)
    data = draw(st.lists(SCALARS, max_size=12) | JSON)
    made = {"name": draw(NAMES | JSON), "shape": shape, "datatype": draw(DATATYPES | JSON), "data": data}
    if draw(st.booleans()):
        made["parameters"] = draw(st.fixed_dictionaries({"binary_data_size": st.integers(-5, 60)}) | JSON)
    for name in draw(st.lists(st.sampled_from(sorted(made)), max_size=1)):
        made.pop(name)
    return made


def answered(client: httpx.Client, path: str, body: bytes, headers: dict[str, str] | None = None) -> int:
    answer = client.post(path, content=body, headers=headers)
    assert answer.status_code == 200 or (400 <= answer.status_code < 500 and answer.json()["error"]), (body, answer.text)
    return answer.status_code


@FUZZ
@given(rows=st.lists(altered_rows(), min_size=1, max_size=3))
def test_altered_rows(client: httpx.Client, rows: list[Any]) -> None:
    answered(client, PATHS[0], json.dumps({"instances": rows}).encode())


@FUZZ
@given(body=JSON, path=st.sampled_from(PATHS))
def test_any_json(client: httpx.Client, body: Any, path: str) -> None:
    for sent in (
        body,
        {"instances": body},
        {"inputs": body},
        {"instances": [body]},
        {"inputs": [body], "outputs": body, "parameters": body},
    ):
        answered(client, path, json.dumps(sent).encode())


@FUZZ
@given(
    inputs=st.lists(tensors(), max_size=4),
    tail=st.binary(max_size=80),
    split=st.none() | st.integers(-40, 40),
    extra=st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), JSON),
)
def test_tensors(client: httpx.Client, inputs: list[Any], tail: bytes, split: int | None, extra: dict[str, Any]) -> None:
    head = json.dumps({"inputs": inputs, **extra}).encode()
    headers = {} if split is None else {"inference-header-content-length": str(len(head) + split)}
    answered(client, PATHS[1], head + tail, headers)


@FUZZ
@given(
    shape=st.lists(SIZES, min_size=1, max_size=3) | MANY_ONES,
    one=st.sampled_from([("FP32", 1, b"\0\0\0\0"), ("BOOL", True, b"\1"), ("BYTES", "a", b"\1\0\0\0a"), ("INT64", 1, bytes(8))]),
    count=st.integers(0, 2),
    binary=st.booleans(),
)
def test_any_shape(client: httpx.Client, shape: list[Any], one: tuple[str, Any, bytes], count: int, binary: bool) -> None:
    datatype, value, stored = one
    sent: dict[str, Any] = {"name": "features", "datatype": datatype, "shape": shape}
    sent |= {"parameters": {"binary_data_size": len(stored) * count}} if binary else {"data": [value] * count}
    head = json.dumps({"inputs": [sent]}).encode()
    if binary:
        answered(client, PATHS[1], head + stored * count, {"inference-header-content-length": str(len(head))})
    else:
        answered(client, PATHS[1], head)


@FUZZ
@given(name=st.sampled_from(["distance", "hour", "carrier"]), datatype=DATATYPES, data=st.binary(min_size=0, max_size=24))
def test_binary_columns(client: httpx.Client, name: str, datatype: str, data: bytes) -> None:
    kinds = {"distance": ("FP32", [1.0]), "hour": ("INT64", [1]), "carrier": ("BYTES", ["AA"])}
    inputs: list[dict[str, Any]] = [
        {"name": n, "datatype": k, "shape": [1, 1], "data": v} for n, (k, v) in kinds.items() if n != name
    ]
    inputs.append({"name": name, "datatype": datatype, "shape": [1], "parameters": {"binary_data_size": len(data)}})
    head = json.dumps({"inputs": inputs}).encode()
    answered(client, PATHS[1], head + data, {"inference-header-content-length": str(len(head))})


@FUZZ
@given(body=st.binary(max_size=300), path=st.sampled_from(PATHS))
def test_any_bytes(client: httpx.Client, body: bytes, path: str) -> None:
    answered(client, path, body)


@FUZZ
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH", "TRACE"]),
    path=st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#?"), max_size=40),
    prefix=st.sampled_from(["/", "/v1/models/", "/v2/models/m/", "/v2/", "//"]),
    headers=st.dictionaries(
        st.sampled_from(["x-request-id", "x-mlops-shadow", "inference-header-content-length"]), st.binary(max_size=20)
    ),
)
def test_any_route_and_header(client: httpx.Client, method: str, path: str, prefix: str, headers: dict[str, bytes]) -> None:
    sent = {k: bytes(b for b in v if b >= 32 and b != 127).strip() for k, v in headers.items()}
    answer = client.request(
        method,
        httpx.URL(str(client.base_url).rstrip("/")).copy_with(raw_path=(prefix + path).encode()),
        headers=sent,
        content=b"{}",
    )
    assert answer.status_code < 500


@FUZZ
@given(value=st.binary(max_size=40))
def test_any_request_id_on_a_good_request(client: httpx.Client, value: bytes) -> None:
    identity = bytes(b for b in value if b >= 32 and b != 127).strip()
    assert answered(client, PATHS[0], json.dumps({"instances": [GOOD_ROW]}).encode(), {"x-request-id": identity}) == 200  # type: ignore[dict-item]
    inputs = [
        {"name": n, "datatype": "BYTES" if n == "carrier" else "INT32", "shape": [1], "data": [v if n == "carrier" else 1]}
        for n, v in GOOD_ROW.items()
    ]
    assert answered(client, PATHS[1], json.dumps({"inputs": inputs, "id": value.decode("latin-1")}).encode()) == 200


def test_it_is_still_right_after_all_that(served_mixed: Process, mixed_model: Model) -> None:
    answer = httpx.post(f"{served_mixed.url}/v1/models/m:predict", json={"instances": mixed_model.instances(5)})
    assert answer.json()["predictions"] == mixed_model.estimator.predict(mixed_model.columns(5)).tolist()
    assert "Traceback" not in served_mixed.text()
