"""How long a bad version still answers after the command to switch back, at 1,000 requests a second, and how many requests fail."""

import time
from collections.abc import Iterator

from benchmarks._gateway_hosts import Two, two_versions
from benchmarks._load import Answer, Load, in_another_process
from benchmarks._predictor_servers import V1_BODY
from benchmarks.measure import Measurement
from mlops_dagster.core.routes import Routes, Sticky

RUNS = 5
PER_SECOND = 1000
LIMIT_SECONDS = 1.0
COMMAND = "make benchmark ONLY=switch_back"
GOOD = Routes.all_to("1", warm=["2"])
BAD = {
    "blue-green": Routes.split({"1": 0, "2": 100}),
    "A/B": Routes.split({"1": 50, "2": 50}, sticky=Sticky("header", "x-user", "salt")),
}


def run() -> Iterator[Measurement]:
    """The slowest of five switches back for each strategy; met only when no request of any run failed."""
    with two_versions(GOOD) as two:
        for strategy, bad in BAD.items():
            runs = [_switch_back(two, bad) for _ in range(RUNS)]
            slowest, failed, asked = max(run[0] for run in runs), sum(run[1] for run in runs), sum(run[2] for run in runs)
            met = slowest <= LIMIT_SECONDS and failed == 0
            goal = f"<= {LIMIT_SECONDS:g} s, 0 failed"
            label = f"switch back, {strategy} ({failed} of {asked} failed)"
            yield Measurement(label, "s", slowest, None, None, None, goal, met, COMMAND)


def _switch_back(two: Two, bad: Routes) -> tuple[float, int, int]:
    """Seconds from the command to the last answer of version 2; failed requests; all requests."""
    two.route(bad)
    two.settle()
    load = Load(two.url, V1_BODY, PER_SECOND, connections=64, headers=("x-user: somebody",))
    with in_another_process(load) as answers:
        time.sleep(2)
        command = time.perf_counter()
        two.route(GOOD)
        time.sleep(2)
    _check(answers, command)
    last = max((answer.done for answer in answers if answer.version == "2"), default=command)
    return max(last - command, 0.0), sum(answer.status != 200 for answer in answers), len(answers)


def _check(answers: list[Answer], command: float) -> None:
    """The load must have been what the figure claims, on both sides of the command."""
    before = sum(answer.done < command for answer in answers)
    bad = sum(answer.done < command and answer.version == "2" for answer in answers)
    if not bad or len(answers) < PER_SECOND * 3:
        raise RuntimeError(
            f"only {len(answers)} requests were sent, {before} before the command, of which the bad version answered {bad}"
        )
