"""A real S3 server for tests: one that the environment names, or one started from the folder of test servers."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dagster_aws.s3 import S3Resource

from tests.contracts.feature_store.online_servers import free_port

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Server:
    endpoint: str
    access_key: str
    secret_key: str

    def resource(self, **settings: Any) -> S3Resource:
        return S3Resource(
            **{
                "endpoint_url": self.endpoint,
                "aws_access_key_id": self.access_key,
                "aws_secret_access_key": self.secret_key,
                "region_name": "us-east-1",
                "max_attempts": 2,
            }
            | settings
        )

    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key, "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[Server]:
    """`MLOPS_TEST_S3` (with `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`), else `s3 up` in `MLOPS_TEST_SERVERS`, else a skip that says so."""
    if endpoint := os.environ.get("MLOPS_TEST_S3"):
        yield Server(endpoint, os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        return
    program = Path(os.environ.get("MLOPS_TEST_SERVERS", ROOT.parent / "shared" / "servers")) / "s3"
    if not program.exists():
        pytest.skip(
            f"needs an S3 server: set MLOPS_TEST_S3 to its address, or MLOPS_TEST_SERVERS to a folder with `s3` (not at {program})"
        )
    with tempfile.TemporaryDirectory(prefix="s3-") as folder:
        environment = os.environ | {"S3_DIR": f"{folder}/server", "S3_PORT": str(free_port())}
        try:
            done = subprocess.run([program, "up"], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
            yield Server(done.stdout.split()[-1], "minioadmin", "minioadmin")
        finally:
            subprocess.run([program, "down"], env=environment, check=True, timeout=60)
