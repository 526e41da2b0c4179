"""How long a bad version still answers after the command to roll back, at 1,000 requests a second, and how many requests fail.

The command is what `mlops rollback` calls, with registry, ledger, gateway and servers of the product: version 2 was promoted by
blue-green and is undone, or runs at half of an A/B test and is given up.
"""

import datetime as dt
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks._load import Answer, Load, in_another_process
from benchmarks.measure import Measurement
from mlops_dagster.assets import rollout
from mlops_dagster.assets.deployment import until_started
from mlops_dagster.assets.rollout import Parts
from mlops_dagster.core.rollout import Command
from mlops_dagster.core.spec import ModelSpec
from tests.lifecycle.rollout_site import BODY, add_version, predict_url, site, spec_of

RUNS = 5
PER_SECOND = 1000
LIMIT_SECONDS = 1.0
COMMAND = "make benchmark ONLY=switch_back"
STRATEGIES = {
    "blue-green": ("blue_green", {"keep_warm_seconds": 600}),
    "A/B": ("ab_test", {"sticky_by": "header", "sticky_name": "x-user"}),
}


def run() -> Iterator[Measurement]:
    """The slowest of five switches back for each strategy; met only when no request of any run failed."""
    with tempfile.TemporaryDirectory() as folder, site(Path(folder)) as parts:
        for number, (label, (strategy, settings)) in enumerate(STRATEGIES.items()):
            spec = spec_of(f"switched_{number}", strategy, **settings)
            for _ in range(2):
                rollout.start(parts, spec, add_version(parts, spec.name), _now())
                until_started(parts, spec)
            runs = [_switch_back(parts, spec, turn) for turn in range(RUNS)]
            slowest, failed, asked = max(run[0] for run in runs), sum(run[1] for run in runs), sum(run[2] for run in runs)
            met = slowest <= LIMIT_SECONDS and failed == 0
            goal = f"<= {LIMIT_SECONDS:g} s, 0 failed"
            name = f"switch back, {label} ({failed} of {asked} failed)"
            yield Measurement(name, "s", slowest, None, None, None, goal, met, COMMAND)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _switch_back(parts: Parts, spec: ModelSpec, turn: int) -> tuple[float, int, int]:
    """Seconds from the command to the last answer of version 2; failed requests; all requests."""
    if turn:
        rollout.start(parts, spec, rollout.chosen(parts, spec, 2, _now()), _now(), again=True)
        until_started(parts, spec)
    if spec.rollout.strategy == "blue_green":
        for _ in range(2):  # into the watch, and out of it
            rollout.command(parts, spec, Command("promote", "benchmark"), _now())
    time.sleep(1)
    load = Load(predict_url(parts, spec.name), BODY, PER_SECOND, connections=64, headers=(f"x-user: {_user(parts, spec)}",))
    with in_another_process(load) as answers:
        time.sleep(2)
        command = time.perf_counter()
        rollout.roll_back(parts, spec, Command("rollback", "benchmark"), _now())
        time.sleep(2)
    _check(answers, command)
    last = max((answer.done for answer in answers if answer.version == "2"), default=command)
    return max(last - command, 0.0), sum(answer.status != 200 for answer in answers), len(answers)


def _user(parts: Parts, spec: ModelSpec) -> str:
    """A user whom the A/B test gives version 2."""
    import httpx

    for number in range(1000):
        answer = httpx.post(predict_url(parts, spec.name), content=BODY, headers={"x-user": f"user {number}"})
        if answer.headers.get("x-model-version") == "2":
            return f"user {number}"
    raise RuntimeError("version 2 answers nobody of a thousand users")


def _check(answers: list[Answer], command: float) -> None:
    """The load must have been what the figure claims, on both sides of the command."""
    before = sum(answer.done < command for answer in answers)
    bad = sum(answer.done < command and answer.version == "2" for answer in answers)
    if not bad or len(answers) < PER_SECOND * 3:
        raise RuntimeError(
            f"only {len(answers)} requests were sent, {before} before the command, of which the bad version answered {bad}"
        )
