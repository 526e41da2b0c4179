"""The V2 protocol over real processes, checked by clients and documents that are not ours."""

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from predictor_processes import ROOT, Model, Process, Starter

INFER = "/v2/models/m/infer"
SCHEMA = Path(os.environ.get("MLOPS_SCHEMAS", ROOT / "../shared/schemas")) / "open-inference-rest.yaml"


def tensor(name: str, datatype: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def block(model: Model, count: int, datatype: str = "FP32") -> dict[str, Any]:
    return tensor("features", datatype, [count, 5], model.columns(count).to_numpy().reshape(-1).tolist())


def by_column(model: Model, count: int, datatypes: dict[str, str]) -> list[dict[str, Any]]:
    rows = model.instances(count)
    return [
        tensor(f.name, datatypes.get(f.name, "FP64"), [count, 1], [r[f.name] for r in rows]) for f in model.signature.features
    ]


def infer(process: Process, inputs: list[dict[str, Any]], **more: Any) -> httpx.Response:
    return httpx.post(process.url + INFER, json={"inputs": inputs, **more})


def outputs(answer: httpx.Response) -> dict[str, np.ndarray]:
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in answer.json()["outputs"]}


def test_one_tensor_of_all_features(served_numbers: Process, number_model: Model) -> None:
    answer = infer(served_numbers, [block(number_model, 40)], id="abc")
    values = number_model.columns(40).to_numpy()
    assert answer.json() | {"outputs": 0} == {"model_name": "m", "model_version": "7", "id": "abc", "outputs": 0}
    assert outputs(answer)["label"].tolist() == number_model.estimator.predict(values).tolist()
    np.testing.assert_allclose(outputs(answer)["probabilities"], number_model.estimator.predict_proba(values), atol=1e-5)


def test_nested_data_and_any_name_for_a_single_tensor(served_numbers: Process, number_model: Model) -> None:
    nested = {**block(number_model, 4), "name": "input-0", "data": number_model.columns(4).to_numpy().tolist()}
    assert (
        outputs(infer(served_numbers, [nested]))["label"].tolist()
        == outputs(infer(served_numbers, [block(number_model, 4)]))["label"].tolist()
    )


def test_a_tensor_for_each_column(served_mixed: Process, mixed_model: Model) -> None:
    answer = infer(served_mixed, by_column(mixed_model, 30, {"hour": "INT32", "carrier": "BYTES"}))
    assert outputs(answer)["label"].tolist() == mixed_model.estimator.predict(mixed_model.columns(30)).tolist()
    assert answer.json()["outputs"][0]["datatype"] == "BYTES"


def test_columns_may_feed_a_model_that_takes_one_tensor(served_boosted: Process, boosted_model: Model) -> None:
    answer = infer(served_boosted, by_column(boosted_model, 200, {"n1": "INT64", "n4": "BOOL"}))
    expected = boosted_model.estimator.predict_proba(boosted_model.columns(200).astype(float).to_numpy())
    np.testing.assert_allclose(outputs(answer)["probabilities"], expected, atol=1e-5)


@pytest.mark.parametrize(
    "datatype", ["FP16", "FP32", "FP64", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"]
)
def test_every_number_type(served_numbers: Process, datatype: str) -> None:
    given = infer(served_numbers, [tensor("features", datatype, [2, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])])
    assert (
        outputs(given)["label"].tolist()
        == outputs(infer(served_numbers, [tensor("x", "FP32", [2, 5], list(range(10)))]))["label"].tolist()
    )


def test_only_the_outputs_that_were_asked_for(served_numbers: Process, number_model: Model) -> None:
    answer = infer(served_numbers, [block(number_model, 2)], outputs=[{"name": "probabilities"}])
    assert list(outputs(answer)) == ["probabilities"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no inputs": ({"inputs": []}, '"inputs" must be a non-empty list'),
    "inputs of a wrong type": ({"inputs": 5}, '"inputs" must be'),
    "id of a wrong type": ({"id": 5}, '"id" must be a string'),
    "unknown output": ({"outputs": [{"name": "p"}]}, "outputs[0].name is 'p'; the model has the outputs label, probabilities"),
    "unknown tensor": ({"inputs": [tensor("speed", "FP32", [1], [1])]}, "speed is not a feature"),
    "missing tensor": ({"inputs": [tensor("n0", "FP32", [1], [1])]}, "input tensor n1 is missing"),
    "twice": ({"inputs": [tensor("n0", "FP32", [1], [1])] * 2}, "given twice: ['n0']"),
    "width": ({"inputs": [tensor("features", "FP32", [1, 4], [1] * 4)]}, "shape [1, 4]; the model has 5 features"),
    "shape and data": ({"inputs": [tensor("features", "FP32", [2, 5], [1] * 9)]}, "needs 10 values, data has 9"),
    "negative shape": ({"inputs": [tensor("features", "FP32", [-1, 5], [1] * 5)]}, "shape [-1, 5] must be"),
    "no columns": ({"inputs": [tensor("features", "FP32", [3, 0], [])]}, "shape [3, 0] has no rows or no columns"),
    "no rows of endless width": ({"inputs": [tensor("features", "FP32", [0, 2**62], [])]}, "has no rows"),
    "endless shape": ({"inputs": [tensor("features", "FP32", [2**63, 2**63], [1] * 5)]}, "values, data has 5"),
    "fraction in the shape": (
        {"inputs": [tensor("features", "FP32", [1, 5], [1] * 5) | {"shape": [1.0, 5]}]},
        "shape [1.0, 5] must be",
    ),
    "65 dimensions": ({"inputs": [tensor("features", "FP32", [1] * 65, [1])]}, "has 65 dimensions; give [rows]"),
    "65 dimensions of strings": ({"inputs": [tensor("features", "BYTES", [1] * 65, ["a"])]}, "has 65 dimensions; give [rows]"),
    "three dimensions": ({"inputs": [tensor("features", "FP32", [0, 2**62, 8], [])]}, "has 3 dimensions"),
    "an output twice": ({"outputs": [{"name": "label"}] * 2}, "outputs[1].name is 'label', which is asked for twice"),
    "no rows": ({"inputs": [tensor("features", "FP32", [0, 5], [])]}, "has no rows"),
    "datatype": ({"inputs": [tensor("features", "FLOAT", [1, 5], [1] * 5)]}, "datatype 'FLOAT' is not one of"),
    "strings as numbers": ({"inputs": [tensor("features", "FP32", [1, 5], ["1"] * 5)]}, "data[0] is '1'; FP32 needs a number"),
    "null": ({"inputs": [tensor("features", "FP64", [1, 5], [1, None, 1, 1, 1])]}, "features[:, 1] (n1) is null (NaN) in row 0"),
    "BYTES for a number": ({"inputs": [tensor("features", "BYTES", [1, 5], ["1"] * 5)]}, "the feature is float64 and needs"),
    "integer out of range": ({"inputs": [tensor("features", "INT8", [1, 5], [300, 0, 0, 0, 0])]}, "outside the range of INT8"),
    "float out of range": (
        {"inputs": [tensor("features", "FP64", [1, 5], [1e39, 0, 0, 0, 0])]},
        "n0 is 1e+39, outside the range",
    ),
    "fp32 overflow": ({"inputs": [tensor("features", "FP32", [1, 5], [1e39, 0, 0, 0, 0])]}, "outside the range of FP32"),
    "ragged": ({"inputs": [tensor("features", "FP32", [1, 5], [[1, 2], 3, 4, 5])]}, "mixes lists and single values"),
    "parameters": ({"inputs": [tensor("features", "FP32", [1, 5], [1] * 5) | {"parameters": 1}]}, "parameters must be an object"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_request_is_refused_by_name(served_numbers: Process, change: dict[str, Any], message: str) -> None:
    good = {"inputs": [tensor("features", "FP32", [1, 5], [1] * 5)]}
    answer = httpx.post(served_numbers.url + INFER, json={**good, **change})
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_binary_data_that_does_not_fit_is_refused(served_numbers: Process) -> None:
    head = b'{"inputs":[{"name":"features","datatype":"FP32","shape":[1,5],"parameters":{"binary_data_size":%d}}]}'
    for size, tail, length, message in [
        (20, bytes(16), None, "binary_data_size 20 does not fit"),
        (16, bytes(16), None, "needs 20 bytes, binary_data_size is 16"),
        (20, bytes(24), None, "4 bytes of binary data belong to no input"),
        (20, bytes(20), "x", "Inference-Header-Content-Length is 'x'"),
        (20, bytes(20), "9999", "Inference-Header-Content-Length is '9999'"),
        (20, bytes(20), "9" * 5000, "Inference-Header-Content-Length is '9999"),
        (20, b"\xff" * 20, None, "is null (NaN) in row 0"),
    ]:
        text = head % size
        headers = {"inference-header-content-length": length or str(len(text))}
        answer = httpx.post(served_numbers.url + INFER, content=text + tail, headers=headers)
        assert (answer.status_code, message in answer.json()["error"]) == (400, True), answer.text


@pytest.mark.parametrize(("shape", "words"), [([1] * 65, "has 65 dimensions"), ([0, 2**62], "has no rows"), ([2**62], "is 20")])
@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_a_shape_of_binary_data_that_no_array_has_is_refused(
    served_numbers: Process, shape: list[int], words: str, datatype: str
) -> None:
    one = {"name": "features", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": 20}}
    head = orjson.dumps({"inputs": [one]})
    tail = b"\x10\0\0\0" + bytes(16)
    answer = httpx.post(
        served_numbers.url + INFER, content=head + tail, headers={"inference-header-content-length": str(len(head))}
    )
    assert answer.status_code == 400
    assert "inputs[0] (features)" in answer.json()["error"]
    assert words in answer.json()["error"] or f"{2**62} strings are announced" in answer.json()["error"]


@pytest.mark.parametrize("where", ["id", "name", "shape", "datatype", "data", "size", "output"])
def test_a_value_that_nests_deeper_than_python_prints_is_refused(served_numbers: Process, where: str) -> None:
    deep = '{"a":' * 1010 + "1" + "}" * 1010
    said: dict[str, Any] = {"name": "features", "datatype": "FP32", "shape": [1, 5], "data": [1] * 5}
    body: dict[str, Any] = {"inputs": [said]}
    if where == "id":
        body["id"] = "@"
    elif where == "output":
        body["outputs"] = [{"name": "@"}]
    elif where == "size":
        said["parameters"] = {"binary_data_size": "@"}
    else:
        said[where] = "@" if where != "data" else ["@", 1, 1, 1, 1]
    answer = httpx.post(served_numbers.url + INFER, content=orjson.dumps(body).replace(b'"@"', deep.encode()))
    assert answer.status_code == 400, answer.text
    v1 = httpx.post(f"{served_numbers.url}/v1/models/m:predict", content=f'{{"instances": [[{deep}, 1, 1, 1, 1]]}}')
    assert (v1.status_code, "instances[0].n0 is an object" in v1.json()["error"]) == (400, True)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_is_told_that_it_must_not_compress(served_numbers: Process, algorithm: str, binary: bool) -> None:
    from tritonclient.http import InferenceServerClient, InferInput
    from tritonclient.utils import InferenceServerException

    given = InferInput("features", [200, 5], "FP32")
    given.set_data_from_numpy(np.zeros((200, 5), dtype=np.float32), binary_data=binary)
    with (
        InferenceServerClient(served_numbers.url.removeprefix("http://")) as client,
        pytest.raises(InferenceServerException, match="The body is compressed; send it without Content-Encoding") as refused,
    ):
        client.infer("m", [given], request_compression_algorithm=algorithm)
    assert refused.value.status() == "415"


def test_metadata_health_and_both_version_routes(served_numbers: Process, number_model: Model) -> None:
    get = lambda path: httpx.get(served_numbers.url + path)  # noqa: E731
    assert get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").json() == {"ready": True}
    assert get("/v2/models/m/ready").json() == get("/v2/models/m/versions/7/ready").json() == {"name": "m", "ready": True}
    found = get("/v2/models/m/versions/7").json()
    assert found["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 5]}]
    assert [o["shape"] for o in found["outputs"]] == [[-1], [-1, 2]]
    assert found["properties"]["sha256"] == number_model.sha256
    assert (
        httpx.post(f"{served_numbers.url}/v2/models/m/versions/7/infer", json={"inputs": [block(number_model, 1)]}).status_code
        == 200
    )


@pytest.mark.skipif(not SCHEMA.exists(), reason=f"the protocol's OpenAPI document is not at {SCHEMA} (set MLOPS_SCHEMAS)")
def test_answers_meet_the_published_openapi(
    served_numbers: Process, served_mixed: Process, number_model: Model, mixed_model: Model
) -> None:
    import yaml
    from openapi_schema_validator import OAS30Validator
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT4

    document = yaml.safe_load(SCHEMA.read_text())
    registry = Registry().with_resource("urn:oip", Resource.from_contents(document, default_specification=DRAFT4))

    def check(name: str, content: Any) -> None:
        OAS30Validator({"$ref": f"urn:oip#/components/schemas/{name}"}, registry=registry).validate(content)

    check("metadata_server_response", httpx.get(f"{served_numbers.url}/v2/").json())
    for process, inputs in [
        (served_numbers, [block(number_model, 3)]),
        (served_mixed, by_column(mixed_model, 3, {"hour": "INT64", "carrier": "BYTES"})),
    ]:
        check("metadata_model_response", httpx.get(f"{process.url}/v2/models/m/versions/7").json())
        check("inference_request", {"inputs": inputs})
        check("inference_response", infer(process, inputs).json())
        check("inference_error_response", infer(process, [tensor("q", "FP32", [1], [1])]).json())
    with pytest.raises(Exception, match="is not of type"):
        check("inference_response", {"model_name": 5, "outputs": []})


def test_kserves_own_client(served_numbers: Process, number_model: Model) -> None:
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    values = number_model.columns(6).to_numpy()
    expected = number_model.estimator.predict(values).tolist()

    async def ask() -> None:
        v1 = InferenceRESTClient(RESTConfig(protocol="v1"))
        answer = await v1.infer(served_numbers.url, {"instances": number_model.instances(6)}, model_name="m")
        assert isinstance(answer, dict)
        assert answer["predictions"] == expected
        assert await v1.is_server_live(served_numbers.url)
        assert await v1.is_model_ready(served_numbers.url, "m")
        v2 = InferenceRESTClient(RESTConfig(protocol="v2"))
        assert await v2.is_server_ready(served_numbers.url)
        assert await v2.is_model_ready(served_numbers.url, "m")
        for binary in (False, True):
            given = InferInput("features", [6, 5], "FP32")
            given.set_data_from_numpy(values.astype(np.float32), binary_data=binary)
            found = await v2.infer(served_numbers.url, InferRequest("m", [given], request_id="k1"), model_name="m")
            assert found.id == "k1"  # type: ignore[union-attr]
            assert found.get_output_by_name("label").as_numpy().tolist() == expected  # type: ignore[union-attr]

    asyncio.run(ask())


def test_tritons_client_with_binary_and_json_tensors(served_mixed: Process, mixed_model: Model) -> None:
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    columns = mixed_model.columns(20)
    with InferenceServerClient(served_mixed.url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("m")
        assert client.is_model_ready("m", "7")
        assert client.get_server_metadata()["name"] == "mlops-predictor"
        metadata = client.get_model_metadata("m")
        types = {i["name"]: i["datatype"] for i in metadata["inputs"]}
        for binary in (True, False):
            inputs = []
            for name, kind, array in [
                ("distance", types["distance"], columns["distance"].to_numpy(np.float32)),
                ("hour", types["hour"], columns["hour"].to_numpy(np.int64)),
                ("carrier", types["carrier"], columns["carrier"].to_numpy(object)),
            ]:
                inputs.append(InferInput(name, [20, 1], kind))
                inputs[-1].set_data_from_numpy(array.reshape(20, 1), binary_data=binary)
            wanted = [
                InferRequestedOutput("label", binary_data=binary),
                InferRequestedOutput("probabilities", binary_data=binary),
            ]
            for asked in (wanted, None):
                found = client.infer("m", inputs, outputs=asked, request_id="t1", model_version="7")
                labels = [v.decode() if isinstance(v, bytes) else v for v in found.as_numpy("label").tolist()]
                assert labels == mixed_model.estimator.predict(columns).tolist()
                np.testing.assert_allclose(
                    found.as_numpy("probabilities"), mixed_model.estimator.predict_proba(columns), atol=1e-5
                )
                assert found.get_response()["id"] == "t1"


def test_a_regression_has_one_output(start: Starter, regression_model: Model) -> None:
    answer = infer(start(regression_model), [block(regression_model, 7)])
    expected = regression_model.estimator.predict(regression_model.columns(7).to_numpy())
    np.testing.assert_allclose(outputs(answer)["variable"].reshape(-1), expected, rtol=1e-4, atol=1e-4)
