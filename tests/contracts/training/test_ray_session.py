"""A local Ray cluster lives for one call and leaves nothing behind."""

import subprocess
import sys

import pytest

pytest.importorskip("ray")

CALL = """
import os, tempfile
import pyarrow
from mlops_dagster.resources.training.ray_trainer import RayTrainer

made, make = [], tempfile.mkdtemp
tempfile.mkdtemp = lambda *args, **options: made.append(make(*args, **options)) or made[-1]  # others make folders of Ray, too
table = pyarrow.table({"a": [1.0, 2.0], "y": [2, 4]})
estimator = RayTrainer(object_store_mebibytes=80).fit("tests.contracts.training.train_functions:ridge", table, "y", {"alpha": 1e-9})
import ray
print(round(float(estimator.predict(table.select(["a"]).to_pandas())[1]), 3), ray.is_initialized())
print(len(made), *filter(os.path.exists, made))
"""


def test_a_cluster_of_its_own_ends_with_the_call() -> None:
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[-3:] == ["4.0", "False", "1"], done.stderr[-2000:]


def test_a_cluster_that_is_not_there_is_transient() -> None:
    code = """
import sys
from mlops_dagster.core.errors import TransientError
from mlops_dagster.resources.training.ray_session import ray_session
try:
    with ray_session("127.0.0.1:9", 2, 80):
        pass
except TransientError as error:
    print(error)
"""
    environment = {"RAY_gcs_server_request_timeout_seconds": "3", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert "no cluster at '127.0.0.1:9'" in done.stdout, done.stderr[-2000:]
