"""How soon a bad version is out of a canary: from its first bad answer to its last answer of all, with the product's own servers.

Version 2 gets a tenth of 100 requests a second and fails a fifth of them, or is ten times slower than version 1. Looks are five
seconds apart, as Dagster's daemon makes them, and each run begins them at another moment.
"""

import datetime as dt
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._load import Answer, Load, in_another_process
from benchmarks.measure import Measurement
from mlops_dagster.assets import rollout
from mlops_dagster.assets.deployment import until_started
from mlops_dagster.assets.rollout import Parts
from mlops_dagster.core.rollout import Phase
from mlops_dagster.core.spec import ModelSpec
from tests.lifecycle.rollout_site import BODY, add_version, predict_url, site, spec_of

RUNS = 5
PER_SECOND = 100
LOOK_SECONDS = 5.0
LIMIT_SECONDS = 15.0
LONGEST_SECONDS = 60.0
MILLISECONDS = 6
COMMAND = "make benchmark ONLY=canary_rollback"
FAULTS: dict[str, dict[str, Any]] = {
    "fails 20 %": {"fail_every": 5, "slow_ms": MILLISECONDS},
    "10 x slower": {"slow_ms": 10 * MILLISECONDS},
}
CANARY = {"steps_percent": [10, 50], "step_seconds": 60, "watch_seconds": 60, "minimum_requests": 500, "keep_warm_seconds": 1}


def run() -> Iterator[Measurement]:
    """The median of five rollouts for each fault; met only when the slowest is within the limit and no other request failed."""
    with tempfile.TemporaryDirectory() as folder, site(Path(folder)) as parts:
        for number, (fault, faults) in enumerate(FAULTS.items()):
            spec = spec_of(f"canary_{number}", "canary", **CANARY)
            _begin(parts, spec, {"slow_ms": MILLISECONDS})
            runs = [_rolled_back(parts, spec, faults, LOOK_SECONDS * turn / RUNS) for turn in range(RUNS)]
            slowest, failed = max(seconds for seconds, _ in runs), sum(others for _, others in runs)
            label = f"canary back, {fault} (slowest {slowest:.1f} s)"
            goal, met = f"<= {LIMIT_SECONDS:g} s", slowest <= LIMIT_SECONDS and failed == 0
            yield Measurement(label, "s", statistics.median(seconds for seconds, _ in runs), None, None, None, goal, met, COMMAND)


def _begin(parts: Parts, spec: ModelSpec, faults: dict[str, Any]) -> str:
    """Approve a version with these faults and let its server start, as the deployment run does; its number."""
    made = add_version(parts, spec.name, faults)
    rollout.start(parts, spec, made, dt.datetime.now(dt.UTC))
    until_started(parts, spec)
    return str(made.number)


def _rolled_back(parts: Parts, spec: ModelSpec, faults: dict[str, Any], first_look: float) -> tuple[float, int]:
    """Seconds from the version's first bad answer to its last answer; requests that failed otherwise."""
    with in_another_process(Load(predict_url(parts, spec.name), BODY, PER_SECOND)) as answers:
        time.sleep(3)
        version = _begin(parts, spec, faults)
        time.sleep(first_look)
        _look_until_over(parts, spec)
        time.sleep(2)
    own = [answer for answer in answers if answer.version == version]
    bad = [answer for answer in own if answer.status == 500] if "fail_every" in faults else own
    _check(parts, spec, bad, answers)
    others = sum(answer.status != 200 for answer in answers) - sum(answer.status == 500 for answer in own)
    return max(answer.done for answer in own) - min(answer.done for answer in bad), others


def _look_until_over(parts: Parts, spec: ModelSpec) -> None:
    end = time.monotonic() + LONGEST_SECONDS
    while (found := rollout.tick(parts, spec, dt.datetime.now(dt.UTC))) and not found.state.phase.final:
        if time.monotonic() > end:
            raise RuntimeError(f"the rollout is still {found.state.phase} after {LONGEST_SECONDS:g} s: {found.action.reason}")
        time.sleep(LOOK_SECONDS)


def _check(parts: Parts, spec: ModelSpec, bad: list[Answer], answers: list[Answer]) -> None:
    """The version must have been bad and must have been found out."""
    state = rollout.current(parts, spec.name)
    if not bad or len(answers) < PER_SECOND * 2 or state is None or state.phase is not Phase.ROLLED_BACK:
        raise RuntimeError(f"{len(bad)} bad of {len(answers)} answers, and the rollout is {state and state.phase}")
