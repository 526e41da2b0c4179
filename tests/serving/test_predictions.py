"""The V1 protocol over real processes: answers are the native model's, and what is wrong is named."""

import gzip
import re

import httpx
import numpy as np
import pytest
from predictor_processes import Model, Process, Starter

PREDICT = "/v1/models/m:predict"


def post(process: Process, instances: object, **headers: str) -> httpx.Response:
    return httpx.post(process.url + PREDICT, json={"instances": instances}, headers=headers)


@pytest.mark.parametrize("count", [1, 2, 300])
def test_classifier_answers_as_the_native_model(served_numbers: Process, number_model: Model, count: int) -> None:
    answer = post(served_numbers, number_model.instances(count)).json()
    values = number_model.columns(count).to_numpy()
    assert answer["predictions"] == number_model.estimator.predict(values).tolist()
    np.testing.assert_allclose(answer["probabilities"], number_model.estimator.predict_proba(values), atol=1e-5)


@pytest.mark.parametrize("count", [1, 300])
def test_lightgbm_with_null_whole_and_boolean_answers_as_the_native_model(
    served_boosted: Process, boosted_model: Model, count: int
) -> None:
    rows = boosted_model.columns(count)
    assert rows["n3"].isna().any() or count == 1
    answer = post(served_boosted, boosted_model.instances(count)).json()
    np.testing.assert_allclose(
        answer["probabilities"], boosted_model.estimator.predict_proba(rows.astype(float).to_numpy()), atol=1e-5
    )


def test_a_null_in_one_row_is_nan_and_leaves_no_trace_in_the_next(served_boosted: Process, boosted_model: Model) -> None:
    rows = boosted_model.rows
    null_row = rows[rows["n3"].isna()].head(1)
    for row in (null_row, rows[rows["n3"].notna()].head(1), null_row):
        instance = {k: (None if v != v else v) for k, v in row.astype(object).iloc[0].items()}
        expected = boosted_model.estimator.predict_proba(row.astype(float).to_numpy())
        np.testing.assert_allclose(post(served_boosted, [instance]).json()["probabilities"], expected, atol=1e-5)


@pytest.mark.parametrize("count", [1, 200])
def test_strings_in_and_string_classes_out(served_mixed: Process, mixed_model: Model, count: int) -> None:
    answer = post(served_mixed, mixed_model.instances(count)).json()
    assert answer["predictions"] == mixed_model.estimator.predict(mixed_model.columns(count)).tolist()
    np.testing.assert_allclose(
        answer["probabilities"], mixed_model.estimator.predict_proba(mixed_model.columns(count)), atol=1e-5
    )


@pytest.mark.parametrize("count", [1, 200])
def test_regression_answers_values_without_probabilities(start: Starter, regression_model: Model, count: int) -> None:
    answer = post(start(regression_model), regression_model.instances(count)).json()
    assert answer.keys() == {"predictions"}
    expected = regression_model.estimator.predict(regression_model.columns(count).to_numpy())
    np.testing.assert_allclose(answer["predictions"], expected, rtol=1e-4, atol=1e-4)


def test_lists_in_signature_order_and_objects_answer_alike(served_numbers: Process, number_model: Model) -> None:
    instances = number_model.instances(3)
    assert post(served_numbers, [list(i.values()) for i in instances]).json() == post(served_numbers, instances).json()


def test_fields_may_come_in_any_order(served_numbers: Process, number_model: Model) -> None:
    instance = number_model.instances(1)[0]
    assert post(served_numbers, [dict(reversed(instance.items()))]).json() == post(served_numbers, [instance]).json()


def test_headers_say_version_and_request(served_numbers: Process, number_model: Model) -> None:
    answer = post(served_numbers, number_model.instances(1), **{"x-request-id": "mine"})
    assert (answer.headers["x-model-version"], answer.headers["x-request-id"]) == ("7", "mine")
    given = {post(served_numbers, number_model.instances(1)).headers["x-request-id"] for _ in range(5)}
    assert len(given) == 5


WRONG_ROWS = {
    "missing feature": ({"n4": ...}, r"instances\[1\]\.n4 is missing"),
    "unknown feature": ({"speed": 1.0}, r"instances\[1\]\.speed is not a feature"),
    "unknown instead of known": ({"n4": ..., "speed": 1.0}, r"instances\[1\]\.speed is not a feature"),
    "string": ({"n0": "1.5"}, r"instances\[1\]\.n0 is a string \('1.5'\); it must be a number"),
    "boolean": ({"n0": True}, r"instances\[1\]\.n0 is a boolean"),
    "null": ({"n0": None}, r"instances\[1\]\.n0 is null"),
    "list": ({"n0": [1.0]}, r"instances\[1\]\.n0 is a list"),
    "too large for the model's float": ({"n0": 1e39}, r"instances\[1\]\.n0 is 1e\+39, outside the range"),
    "id of a wrong type": ({"id": 1.5}, r"instances\[1\]\.id is a number"),
    "time that is none": ({"event_timestamp": "yesterday"}, r"instances\[1\]\.event_timestamp is 'yesterday'"),
    "time out of reach": (
        {"event_timestamp": "0001-01-01T00:00:00Z"},
        r"instances\[1\]\.event_timestamp is '0001-.* between 1900",
    ),
    "time as a number": ({"event_timestamp": 5}, r"instances\[1\]\.event_timestamp is 5"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_ROWS.values(), ids=WRONG_ROWS.keys())
@pytest.mark.parametrize("alone", [True, False], ids=["one row", "second of two"])
def test_a_wrong_row_is_refused_by_name(
    served_numbers: Process, number_model: Model, change: dict[str, object], message: str, alone: bool
) -> None:
    good, bad = number_model.instances(2)
    bad = {k: v for k, v in {**bad, **change}.items() if v is not ...}
    answer = post(served_numbers, [bad] if alone else [good, bad])
    assert answer.status_code == 400
    assert re.search(message.replace(r"\[1\]", r"\[0\]") if alone else message, answer.json()["error"])


WRONG_BODIES = {
    "empty": (b"", "it is empty"),
    "no JSON": (b"{instances", "not JSON"),
    "NaN": (b'{"instances":[[NaN,1,1,1,1]]}', "not JSON"),
    "infinite": (b'{"instances":[[1e999,1,1,1,1]]}', "not JSON"),
    "list": (b"[1]", "must be an object"),
    "without instances": (b'{"rows":[]}', '"instances" is missing'),
    "V2 body": (b'{"inputs":[]}', "this is a V2 body"),
    "instances are an object": (b'{"instances":{}}', "must be a list"),
    "no instances": (b'{"instances":[]}', "is empty"),
    "instance is a number": (b'{"instances":[5]}', "instances[0] is a number"),
    "short list": (b'{"instances":[[1,2]]}', "instances[0] has 2 values; the model has 5"),
    "not UTF-8": (b'{"instances":["\xff"]}', "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize(("body", "message"), WRONG_BODIES.values(), ids=WRONG_BODIES.keys())
def test_a_wrong_body_is_refused(served_numbers: Process, body: bytes, message: str) -> None:
    answer = httpx.post(served_numbers.url + PREDICT, content=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_whole_numbers_and_booleans_are_checked(served_boosted: Process, boosted_model: Model) -> None:
    good = {**boosted_model.instances(1)[0], "n3": None}
    same = post(served_boosted, [{**good, "n1": float(good["n1"])}])
    assert same.json() == post(served_boosted, [good]).json()
    for change, message in [
        ({"n1": 1.5}, "n1 is a number (1.5); it must be a whole number"),
        ({"n1": 2**63}, "n1 is 9223372036854775808, outside the range"),
        ({"n1": 2**64}, "n1 is 18446744073709551616, outside the range"),
        ({"n4": 1}, "n4 is a number (1); it must be true or false"),
        ({"n1": None}, "n1 is null"),
    ]:
        answer = post(served_boosted, [{**good, **change}])
        assert (answer.status_code, message in answer.json()["error"]) == (400, True), answer.text


def test_two_rows_with_one_id_are_refused(served_numbers: Process, number_model: Model) -> None:
    answer = post(served_numbers, [{**i, "id": "a"} for i in number_model.instances(2)])
    assert answer.status_code == 400
    assert "instances[1].id is 'a', which is also instances[0].id" in answer.json()["error"]


def test_bodies_beyond_the_limit_are_refused_however_they_are_sent(served_numbers: Process, number_model: Model) -> None:
    rows = b'{"instances":[' + b",".join([b"[1,2,3,4,5]"] * 30_000) + b"]}"
    for content in (rows, (rows[at : at + 5000] for at in range(0, len(rows), 5000))):
        answer = httpx.post(served_numbers.url + PREDICT, content=content)
        assert answer.status_code == 413
        assert "200000 bytes" in answer.json()["error"]
    assert post(served_numbers, number_model.instances(1)).status_code == 200


def test_a_body_without_a_length_is_read_to_its_end(served_numbers: Process, number_model: Model) -> None:
    body = httpx.Request("POST", "http://x", json={"instances": number_model.instances(200)}).content
    answer = httpx.post(served_numbers.url + PREDICT, content=(body[at : at + 1000] for at in range(0, len(body), 1000)))
    assert len(answer.json()["predictions"]) == 200


def test_a_compressed_body_is_refused_with_415(served_numbers: Process) -> None:
    answer = httpx.post(
        served_numbers.url + PREDICT, content=gzip.compress(b'{"instances":[]}'), headers={"content-encoding": "gzip"}
    )
    assert answer.status_code == 415


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/m", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/", 200),
        ("GET", "/v1/models/other", 404),
        ("POST", "/v1/models/other:predict", 404),
        ("POST", "/v1/models/m:explain", 404),
        ("GET", "/v1/models/m:predict", 405),
        ("POST", "/metrics", 405),
        ("PUT", "/v1/models/m:predict", 405),
        ("DELETE", "/v2/models/m", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/v2/models/m/versions/8", 404),
        ("POST", "/v2/models/m/versions/8/infer", 404),
        ("GET", "/%ff%00", 404),
    ],
)
def test_routes(served_numbers: Process, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, served_numbers.url + path)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]


def test_a_request_id_too_long_is_refused(served_numbers: Process, number_model: Model) -> None:
    assert post(served_numbers, number_model.instances(1), **{"x-request-id": "a" * 257}).status_code == 400
