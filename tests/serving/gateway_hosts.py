"""Serving hosts for the gateway's tests: each in a folder of its own, always stopped, with nothing left running."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from mlops_dagster.resources.serving import Observed, wait_ready
from mlops_dagster.resources.serving.adopt import Record
from mlops_dagster.resources.serving.embedded import EmbeddedServing
from mlops_dagster.resources.serving.fleet import program_name
from mlops_dagster.resources.serving.state import Folder

READY_SECONDS = 45.0
FAULTY = "tests.serving.faulty_server"
NUMBERS = itertools.count(1)


@contextmanager
def serving_host(root: Path, **settings: Any) -> Iterator[EmbeddedServing]:
    """A host that is stopped at the end; fails when a process of it is left."""
    serving = EmbeddedServing(root=str(root), **settings)
    try:
        yield serving
    finally:
        serving.stop()
        left = processes_of(serving)
        for process in left:
            process.kill()
        assert not left, [process.pid for process in left]


def new_model() -> str:
    return f"model_{next(NUMBERS)}"


def processes_of(serving: EmbeddedServing) -> list[psutil.Process]:
    """Every process that has the host's folder in its command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and str(Folder(serving.root).root) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def record(serving: EmbeddedServing, program: str) -> Record:
    found = Record.read(Folder(serving.root).records / f"{program}.json")
    assert found is not None, program
    return found


def pid_of(serving: EmbeddedServing, model: str, arm: Any) -> int:
    """The process id of an arm's server."""
    return record(serving, program_name(model, arm)).pid


def ready(serving: EmbeddedServing, model: str) -> Observed:
    return wait_ready(serving, model, READY_SECONDS)


def predict_url(serving: EmbeddedServing, model: str) -> str:
    return f"{serving.endpoint(model)}/v1/models/{model}:predict"


def eventually(holds: Callable[[], Any], seconds: float = 20.0) -> bool:
    """Whether `holds()` becomes true within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return False
