"""Real predictor processes, started and ended by tests."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import psutil

from mlops_dagster.serving.artifact import Signature

ROOT = Path(__file__).parents[2]
START_SECONDS = 120


@dataclass
class Model:
    """A fitted estimator and the folder that it was exported to."""

    folder: Path
    sha256: str
    signature: Signature
    estimator: Any
    rows: pd.DataFrame

    def instances(self, count: int) -> list[dict[str, Any]]:
        return self.rows.head(count).astype(object).where(self.rows.head(count).notna(), None).to_dict("records")

    def columns(self, count: int) -> pd.DataFrame:
        return self.rows.head(count)


def children(pid: int, module: str) -> list[psutil.Process]:
    """The living processes that the predictor `pid` has started to run `module` of its package."""

    def runs(child: psutil.Process) -> bool:
        try:
            return f"mlops_dagster.serving.{module}" in child.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            return False

    return [c for c in psutil.Process(pid).children() if runs(c)]


@dataclass
class Process:
    """A running predictor."""

    popen: subprocess.Popen[str]
    url: str = ""
    output: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def text(self) -> str:
        return "".join(self.output)

    def stop(self, seconds: float = 20) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(seconds)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def flush(self) -> dict[str, Any]:
        return httpx.post(f"{self.url}/admin/flush").json()


Starter = Callable[..., Process]


def command(model: Model, *options: str, name: str = "m", version: str = "7") -> list[str]:
    fixed = ["--artifact", str(model.folder), "--sha256", model.sha256, "--model", name, "--version", version]
    return [sys.executable, "-m", "mlops_dagster.serving.server", *fixed, "--port", "0", *options]


def launch(arguments: list[str]) -> Process:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    popen = subprocess.Popen(arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = Process(popen)
    listening = threading.Event()

    def follow() -> None:
        assert popen.stdout
        for line in popen.stdout:
            process.output.append(line)
            if found := re.search(r"listens on (http://\S+)", line):
                process.url = found[1]
                listening.set()
        listening.set()

    threading.Thread(target=follow, daemon=True).start()
    if not listening.wait(START_SECONDS):
        popen.kill()
        raise AssertionError(f"not started after {START_SECONDS} s: {process.text()}")
    assert process.url, f"the predictor ended with {popen.wait(10)}: {process.text()}"
    return process


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.02)
