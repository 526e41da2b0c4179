"""A Ray cluster for the time of one call: the one that is there, or a small one on this machine."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlops_dagster.core.errors import TransientError

LOCAL = "local"
_MEBIBYTE = 1024 * 1024
_LOCAL_STARTS = 4
_REMOVALS = 50
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@contextmanager
def ray_session(address: str, cpus: int, object_store_mebibytes: int) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one with `local`; whatever was started here is ended here, its files too.

    A session that the process already has is used and left running. TransientError when the cluster does not answer.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    # Short, because Ray puts sockets below it and a socket's path has at most 107 bytes.
    scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp") if address == LOCAL else None
    try:
        _start_patiently(address, cpus, object_store_mebibytes, scratch)
        yield
    finally:
        ray.shutdown()
        if scratch:
            _remove(scratch)


def _remove(folder: str, sleep: Callable[[float], None] = time.sleep) -> None:
    """Remove Ray's files; again for a while, for what is written while one removes them keeps the folder: Ray's processes end late."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        sleep(0.1)


def _start_patiently(address: str, cpus: int, object_store_mebibytes: int, scratch: str | None) -> None:
    """Try a local start again: Ray gives its own processes 30 s to come up, too few on a busy machine (ray/_private/node.py)."""
    import ray

    left = _LOCAL_STARTS if scratch else 1
    while left:
        left -= 1
        try:
            _start(address, cpus, object_store_mebibytes, scratch)
            return
        except Exception as error:
            ray.shutdown()
            if not left:
                raise TransientError(f"ray: no cluster at {address!r} ({error}); start it or correct the address") from error


def _start(address: str, cpus: int, object_store_mebibytes: int, scratch: str | None) -> None:
    import ray

    if scratch is None:
        ray.init(address=address, log_to_driver=False)
        return
    with _inherited_imports():
        ray.init(
            address=LOCAL,
            num_cpus=cpus,
            num_gpus=0,
            object_store_memory=object_store_mebibytes * _MEBIBYTE,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=scratch,
            # One machine needs no watch over its nodes; on a busy one Ray would give up its only node and wait for ever.
            _system_config={"health_check_failure_threshold": 1000},
        )


@contextmanager
def _inherited_imports() -> Iterator[None]:
    """Let the workers, which inherit the environment, import all that this process can: a model's folder need not be installed."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
