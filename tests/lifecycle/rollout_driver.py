"""What the rollout sensor does, in a process of its own that can be killed right after any single thing it did to the world.

`python -m tests.lifecycle.rollout_driver` forks such a process for each job that it reads, so that none has to import everything
anew: a line in is a pickled job in hexadecimal, a line out is the job's number and how its process ended.
"""

import datetime as dt
import gc
import importlib
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlops_dagster.assets import rollout
from mlops_dagster.assets.rollout import Parts, Tick
from mlops_dagster.core.rollout import Command
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.core.strategies import RolloutPolicy
from mlops_dagster.resources.live_metrics.tally import Tally
from tests.lifecycle.rollout_site import parts_in

TICK_SECONDS = 0.25
LONGEST_SECONDS = 90
SETTLE_SECONDS = 3.0  # a request takes milliseconds, and its line in the logs two seconds
# What a forked driver would otherwise import at its first use of them, for a second and a half each time.
PRELOADED = [
    "alembic.command",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlops_dagster.resources.data_lake.folder",
    "mlops_dagster.resources.feature_store.feast_store",
    "mlops_dagster.resources.ledger.sql",
    "mlops_dagster.resources.registry.mlflow_registry",
    "mlops_dagster.resources.tracking.mlflow_tracking",
    "mlops_dagster.resources.tuning.optuna_tuner",
    "pyarrow.parquet",
]


class Drivers:
    """The forking process, spoken to by any number of threads."""

    def __init__(self, server: "subprocess.Popen[str]") -> None:
        self._server, self._lock = server, threading.Lock()
        self._ends: list[Future[int]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def run(self, job: "Job") -> int:
        """Carry a job out in a fresh process; its exit code, negative for a signal."""
        assert self._server.stdin is not None
        with self._lock:
            end: Future[int] = Future()
            self._ends.append(end)
            self._server.stdin.write(pickle.dumps(job).hex() + "\n")
            self._server.stdin.flush()
        return end.result(LONGEST_SECONDS + 30)

    def _listen(self) -> None:
        for line in self._server.stdout or ():
            number, code = map(int, line.split())
            self._ends[number].set_result(code)
        for end in self._ends:
            if not end.done():
                end.set_exception(RuntimeError(f"the forking process ended with {self._server.wait()}"))


@contextmanager
def drivers() -> Iterator[Drivers]:
    """A forking process, ended afterwards."""
    command = [sys.executable, "-m", "tests.lifecycle.rollout_driver"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as server:
        yield Drivers(server)
        assert server.stdin is not None
        server.stdin.close()


@dataclass(frozen=True)
class Job:
    """A rollout to carry out: where and of which model; `killed` ends the process after each thing that nobody did before it.

    `command` is given once, before the first tick.
    """

    root: Path
    spec: ModelSpec
    killed: bool
    command: Command | None = None

    @property
    def notes(self) -> Path:
        """One line for each thing that was done, by whichever process."""
        return self.root / f"{self.spec.name}.done"


class Noted:
    """A system whose named calls are noted when they are done; in everything else it is the system itself."""

    def __init__(self, system: Any, done: Callable[[str], None], **calls: Callable[..., str]) -> None:
        self._system, self._done, self._calls = system, done, calls

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._system, name)
        if name not in self._calls:
            return attribute

        def call(*arguments: Any) -> Any:
            answer = attribute(*arguments)
            self._done(self._calls[name](*arguments))
            return answer

        return call


def carry_out(job: Job) -> None:
    """Tick until the rollout is over and its old version has been let go; killed on the way if the job says so."""
    done = _noting(job)
    parts = _watched(parts_in(job.root), job.spec.name, done)
    rollout.policy_of = _easily_convinced(rollout.policy_of)
    if job.command is not None:
        rollout.roll_back(parts, job.spec, job.command, dt.datetime.now(dt.UTC))
    end = time.monotonic() + LONGEST_SECONDS
    while not _over(_tick(parts, job.spec, now := dt.datetime.now(dt.UTC)), now):
        if time.monotonic() > end:
            raise TimeoutError(f"{job.spec.name} is not over: {rollout.current(parts, job.spec.name)}")
        time.sleep(TICK_SECONDS)


def _tick(parts: Parts, spec: ModelSpec, now: dt.datetime) -> Tick | None:
    """What `sensors/rollouts.py` and the run that it asks for do at a tick."""
    version = rollout.waiting(parts, spec, now)
    if version is not None:
        rollout.start(parts, spec, version, now)
    return rollout.tick(parts, spec, now)


def _over(found: Tick | None, now: dt.datetime) -> bool:
    """Whether the tick at `now` found nothing left to do, the end of the old version's warm time included."""
    if found is None or not found.state.phase.final or found.changed:
        return False
    return found.state.warm_until is None or now >= found.state.warm_until


def _noting(job: Job) -> Callable[[str], None]:
    """Notes each thing once; with `killed` the process does not live to do another one."""

    def done(what: str) -> None:
        known = job.notes.read_text().splitlines() if job.notes.exists() else []
        if what in known:
            return
        with job.notes.open("a") as file:
            file.write(what + "\n")
        if job.killed:
            os.kill(os.getpid(), signal.SIGKILL)

    return done


def _watched(parts: Parts, model: str, done: Callable[[str], None]) -> Parts:
    """The systems with everything noted that changes something: entries, servers and routes, aliases, artifacts, measurements."""
    replace_file = Path.replace

    # What is measured changes every second: it is noted once for each state of the rollout.
    def replaced(self: Path, target: Any) -> Path:
        moved = replace_file(self, target)
        if Path(target).parent.name == "rollouts":
            done(f"measured after entry {len(parts.ledger.entries(model))}")
        return moved

    def counting(count: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            answer = count(*arguments)
            done(f"{count.__name__} after entry {len(parts.ledger.entries(model))}")
            return answer

        return counted

    Path.replace = replaced  # type: ignore[method-assign]
    for name in ("count_agreement", "count_units", "count_labels"):
        setattr(Tally, name, counting(getattr(Tally, name)))
    return replace(
        parts,
        settle_seconds=SETTLE_SECONDS,
        ledger=Noted(parts.ledger, done, append=lambda new: f"recorded {new.key}"),
        serving=Noted(parts.serving, done, apply=_applied, remove=lambda model: f"removed {model}"),
        registry=Noted(
            parts.registry,
            done,
            set_alias=lambda model, alias, number: f"alias {alias} is {number}",
            fetch=lambda model, number, to: f"fetched {number}",
        ),
    )


def _applied(model: str, arms: Any, routes: Any, options: Any) -> str:
    return f"applied {[(arm.key, arm.name) for arm in arms]} {routes.to_json()}"


def _easily_convinced(policy_of: Callable[[ModelSpec], RolloutPolicy]) -> Callable[[ModelSpec], RolloutPolicy]:
    """The declared policy with larger effects, so that a second of traffic is enough for a verdict."""

    def policy(spec: ModelSpec) -> RolloutPolicy:
        return replace(policy_of(spec), beta=0.3, error_rate_increase=0.2, slow_share_increase=0.4)

    return policy


def main() -> None:
    """Fork a driver for each job until there are no more, and say how each ended."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()
    running: dict[int, int] = {}
    asked = selectors.DefaultSelector()
    asked.register(0, selectors.EVENT_READ)
    count, more, begun = 0, True, b""
    while more or running:
        if more and asked.select(0.01):
            more = bool(read := os.read(0, 1 << 20))
            *lines, begun = (begun + read).split(b"\n")
            for line in lines:
                running[_forked(pickle.loads(bytes.fromhex(line.decode())))] = count
                count += 1
        elif not more:
            time.sleep(0.01)
        for process in [*running]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                print(running.pop(process), os.waitstatus_to_exitcode(status), flush=True)


def _forked(job: Job) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        carry_out(job)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
