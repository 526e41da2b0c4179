"""Canaries by simulation: how often an equal version is rolled back, how often a worse one is found, and how soon.

Every tick of every run is looked at. Before a figure is reported, some runs of its world are put through the real `judge` and
`advance`, which must end alike. The peer is the usual two-proportion test on the same counts, looked at just as often.
"""

from collections.abc import Iterator

import numpy as np

from benchmarks._canaries import PROMOTED, ROLLED_BACK, Fleet, Truth, World, replayed, simulate
from benchmarks.measure import Measurement
from mlops_dagster.core.strategies import RolloutPolicy

RUNS = 10_000
CHUNK = 2_500  # runs that are simulated together: bounds the memory
CHECKED = 12
COMMAND = "make benchmark ONLY=verdicts"
POLICY = RolloutPolicy()
SECONDS_GOAL = 15.0


def run() -> Iterator[Measurement]:
    equal = [
        fleets(World(rate, Truth()), ticks, seed) for rate, ticks, seed in ((20.0, 900, 1), (200.0, 400, 2), (2000.0, 300, 3))
    ]
    worst = max(equal, key=lambda world: share(world, ROLLED_BACK))
    naive = max(float(np.mean([fleet.ztest.mean() for fleet in world])) for world in equal)
    false = share(worst, ROLLED_BACK)
    name = "canary A/A false rollbacks"
    better = naive / false if false else float(RUNS)
    yield Measurement(
        name, "share", false, naive, "z test every tick", better, f"<= {POLICY.alpha:g}", false <= POLICY.alpha, COMMAND
    )
    least = min(share(world, PROMOTED) for world in equal)
    yield _row("canary A/A promotions", "share", least, ">= 0.95", least >= 0.95)
    errors = fleets(World(200.0, Truth(errors=0.01 + POLICY.error_rate_increase)), 400, 4)
    slow = fleets(World(200.0, Truth(slow=0.05 + POLICY.slow_share_increase)), 400, 5)
    for what, world in (("errors", errors), ("latency", slow)):
        found = share(world, ROLLED_BACK)
        yield _row(f"canary power, {what}", "share", found, ">= 0.9", found >= 0.9)
    yield from _seconds()
    fewest = min(fleet.fewest for world in (*equal, errors, slow) for fleet in world)
    yield _row(
        "fewest requests behind a step", "count", fewest, f">= {POLICY.minimum_requests}", fewest >= POLICY.minimum_requests
    )


def fleets(world: World, ticks: int, seed: int, runs: int = RUNS) -> list[Fleet]:
    """The runs of one world, some of them checked against the real code."""
    made = [simulate(world, POLICY, CHUNK, ticks, seed * 1000 + part) for part in range(runs // CHUNK)]
    for run_number in range(CHECKED):
        fleet = made[run_number % len(made)]
        real, simulated = replayed(fleet, run_number), (fleet.phase[run_number], fleet.ended[run_number])
        if real != simulated:
            raise AssertionError(f"run {run_number}: judge and advance end in {real}, the simulation in {simulated}")
    return made


def share(world: list[Fleet], phase: int) -> float:
    return float(np.mean([fleet.share(phase) for fleet in world]))


def _seconds() -> Iterator[Measurement]:
    """From the first bad answer to the decision, at 200 requests/s and 5 %: the fault begins 45 s into the canary."""
    for what, truth in (("20 % failing", Truth(errors=0.2)), ("10 x slower", Truth(slow=0.99, over_limit_of_slow=0.3))):
        world = World(200.0, Truth(), later=truth, turns=9)
        made = fleets(world, 400, 6, runs=CHUNK)
        ended = np.concatenate([fleet.ended[fleet.phase == ROLLED_BACK] for fleet in made])
        seconds = float(np.quantile((ended + 1 - world.turns) * world.tick_seconds, 0.99)) if len(ended) else float("inf")
        met = seconds <= SECONDS_GOAL and share(made, ROLLED_BACK) == 1.0
        yield _row(f"canary decision, {what}, P99", "s", seconds, f"<= {SECONDS_GOAL:g}", met)


def _row(name: str, unit: str, ours: float, goal: str, met: bool) -> Measurement:
    return Measurement(name, unit, ours, None, None, None, goal, met, COMMAND)
