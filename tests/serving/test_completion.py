"""Rows that lack features are completed from a feature store while other callers are answered."""

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import pytest
from predictor_processes import Model

from mlops_dagster.core.errors import DataError
from mlops_dagster.serving.app import Predictor
from mlops_dagster.serving.artifact import load
from mlops_dagster.serving.http_server import Server
from mlops_dagster.serving.inference_log import InferenceLog
from mlops_dagster.serving.metrics import Metrics
from mlops_dagster.serving.pages import Pages
from mlops_dagster.serving.scoring import Scorer
from mlops_dagster.serving.segments import days, read_segments
from mlops_dagster.serving.server import bind


class Planes:
    """An online store in memory, of features by the entity `plane`; it can be slow."""

    def __init__(self, known: dict[str, dict[str, Any]]) -> None:
        self.known = known
        self.reads: list[int] = []
        self.slow = threading.Event()

    def complete(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.reads.append(len(rows))
        if self.slow.is_set():
            time.sleep(1)
        if unknown := [r["plane"] for r in rows if r["plane"] not in self.known]:
            raise DataError(f"plane {unknown[0]!r} is not in the online store")
        return [{**self.known[r["plane"]]} for r in rows]


@pytest.fixture
def served(number_model: Model, tmp_path: Path) -> Iterator[tuple[str, Planes, Path]]:
    artifact = load(number_model.folder, number_model.sha256)
    scorer, metrics = Scorer(artifact), Metrics("m", "7", "champion")
    planes = Planes({f"N{n}": row for n, row in enumerate(number_model.instances(20))})
    log = InferenceLog(tmp_path, scorer.signature, "m", "7", "champion", metrics, ZoneInfo("UTC"))
    pages = Pages(scorer, "m", "7", "champion", artifact.sha256, "0", log, metrics)
    with ThreadPoolExecutor(4) as pool:
        predictor = Predictor(scorer, pages, log, metrics, (f"r{n}" for n in itertools.count()), 10_000, planes, pool)
        bound = bind("127.0.0.1", 0)
        port = bound.getsockname()[1]
        server = Server(bound, predictor, predictor.maximum_body_bytes)
        log.start()
        server.start()
        yield f"http://127.0.0.1:{port}", planes, tmp_path
        server.stop()
        assert server.wait(10)
        log.close()


def test_rows_with_keys_only_answer_as_whole_rows(served: tuple[str, Planes, Path], number_model: Model) -> None:
    url, planes, _root = served
    whole = httpx.post(f"{url}/v1/models/m:predict", json={"instances": number_model.instances(5)}).json()
    assert planes.reads == []
    keys = [{"plane": f"N{n}", "id": f"flight{n}"} for n in range(5)]
    assert httpx.post(f"{url}/v1/models/m:predict", json={"instances": keys}).json() == whole
    assert planes.reads == [5]
    tensor = {"name": "plane", "datatype": "BYTES", "shape": [5, 1], "data": [k["plane"] for k in keys]}
    found = httpx.post(f"{url}/v2/models/m/infer", json={"inputs": [tensor]}).json()
    assert found["outputs"][0]["data"] == whole["predictions"]
    mixed = [number_model.instances(1)[0], keys[1]]
    assert httpx.post(f"{url}/v1/models/m:predict", json={"instances": mixed}).json()["predictions"] == whole["predictions"][:2]
    assert planes.reads == [5, 5, 1]


def test_the_log_holds_the_completed_features(served: tuple[str, Planes, Path], number_model: Model) -> None:
    url, _, root = served
    httpx.post(f"{url}/v1/models/m:predict", json={"instances": [{"plane": "N3", "id": "f"}]})
    assert httpx.post(f"{url}/admin/flush").json()["log"]["written"] == 1
    (day,) = days(root, "m")
    (row,) = read_segments(root, "m", day).to_pylist()
    assert (row["row_id"], row["features"]) == ("f", number_model.instances(4)[3])


def test_what_the_store_lacks_is_a_422(served: tuple[str, Planes, Path]) -> None:
    answer = httpx.post(f"{served[0]}/v1/models/m:predict", json={"instances": [{"plane": "N99"}]})
    assert (answer.status_code, "'N99' is not in the online store" in answer.json()["error"]) == (422, True)


def test_a_feature_sent_beside_the_keys_is_checked_and_used(served: tuple[str, Planes, Path], number_model: Model) -> None:
    url, _, root = served
    whole, key = number_model.instances(2)[1], {"plane": "N1"}
    changed = httpx.post(f"{url}/v1/models/m:predict", json={"instances": [whole | {"n2": 9.0}]}).json()
    assert httpx.post(f"{url}/v1/models/m:predict", json={"instances": [key | {"n2": 9, "id": "sent"}]}).json() == changed
    tensors = [
        {"name": "plane", "datatype": "BYTES", "shape": [1], "data": ["N1"]},
        {"name": "n2", "datatype": "FP64", "shape": [1], "data": [9.0]},
    ]
    found = httpx.post(f"{url}/v2/models/m/infer", json={"inputs": tensors}).json()
    assert found["outputs"][0]["data"] == changed["predictions"]
    httpx.post(f"{url}/admin/flush")
    rows = read_segments(root, "m", days(root, "m")[0]).to_pylist()
    assert [row["features"]["n2"] for row in rows] == [9.0] * 3


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"n2": "junk"}, "instances[1].n2 is a string ('junk'); it must be a number."),
        ({"n2": None}, "instances[1].n2 is null (NaN)"),
        ({"n9": 1.0}, "instances[1].n9 is not a feature of this model"),
    ],
)
def test_a_wrong_value_beside_the_keys_is_refused_unread(
    served: tuple[str, Planes, Path], number_model: Model, sent: dict[str, Any], said: str
) -> None:
    url, planes, _ = served
    instances = [number_model.instances(1)[0], {"plane": "N1"} | sent]
    answer = httpx.post(f"{url}/v1/models/m:predict", json={"instances": instances})
    assert (answer.status_code, said in answer.json()["error"]) == (400, True), answer.json()
    assert planes.reads == []


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ({"name": "n2", "datatype": "BYTES", "data": ["junk"]}, "The input tensor n2 is BYTES"),
        ({"name": "n2", "datatype": "FP64", "data": [None]}, "The input tensor n2 "),
        ({"name": "n9", "datatype": "FP64", "data": [1.0]}, "The input tensor n9 is not a feature"),
    ],
)
def test_a_wrong_tensor_beside_the_keys_is_refused_unread(
    served: tuple[str, Planes, Path], tensor: dict[str, Any], said: str
) -> None:
    url, planes, _ = served
    inputs = [{"name": "plane", "datatype": "BYTES", "shape": [1], "data": ["N1"]}, {**tensor, "shape": [1]}]
    answer = httpx.post(f"{url}/v2/models/m/infer", json={"inputs": inputs})
    assert (answer.status_code, said in answer.json()["error"]) == (400, True), answer.json()
    assert planes.reads == []


def test_a_slow_store_does_not_hold_up_callers_with_whole_rows(served: tuple[str, Planes, Path], number_model: Model) -> None:
    url, planes, _ = served
    planes.slow.set()
    waiting = threading.Thread(target=lambda: httpx.post(f"{url}/v1/models/m:predict", json={"instances": [{"plane": "N1"}]}))
    waiting.start()
    time.sleep(0.1)
    begin = time.monotonic()
    assert httpx.post(f"{url}/v1/models/m:predict", json={"instances": number_model.instances(1)}).status_code == 200
    assert httpx.get(f"{url}/v2/health/ready").status_code == 200
    assert time.monotonic() - begin < 0.8
    waiting.join()


def test_many_callers_at_once_each_get_their_own_answer(served: tuple[str, Planes, Path], number_model: Model) -> None:
    url, _, _root = served
    expected = httpx.post(f"{url}/v1/models/m:predict", json={"instances": number_model.instances(20)}).json()["probabilities"]
    wrong: list[int] = []

    def ask(offset: int) -> None:
        with httpx.Client() as client:
            for step in range(40):
                n = (offset + step) % 20
                row = {"plane": f"N{n}"} if step % 2 else number_model.instances(20)[n]
                answer = client.post(f"{url}/v1/models/m:predict", json={"instances": [row]}).json()
                if abs(answer["probabilities"][0][1] - expected[n][1]) > 1e-6:
                    wrong.append(n)

    callers = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
