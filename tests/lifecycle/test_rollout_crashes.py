"""The process that carries rollouts out is killed right after every single thing that it does, with real servers and callers.

Each rollout is carried out twice, side by side: by a process that nobody disturbs, and by processes of which each is killed as
soon as it has done one thing that no process before it had done. So every action is once the last one of a process, and what
the next process finds is only what is on disk.
"""

import asyncio
import itertools
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest

from benchmarks._load import Answer, Load, outcome
from mlops_dagster.assets import rollout
from mlops_dagster.assets.rollout import Parts
from mlops_dagster.core.ledger import ROLLOUT_STARTED
from mlops_dagster.core.rollout import Command
from tests.lifecycle.rollout_driver import Drivers, Job, drivers
from tests.lifecycle.rollout_site import BODY, add_version, predict_url, site, spec_of
from tests.serving.gateway_hosts import eventually

PER_SECOND = 100
MOST_PROCESSES = 60
RULES = {"steps_percent": [25, 50], "ab_metric": "score"}
KEYS = itertools.count(1)


@dataclass(frozen=True)
class Scenario:
    """What is brought in and how; `faults` are the second version's, `phase` is where its rollout must end, `answer` is what the
    first version says to everything (the second says 1).
    """

    strategy: str
    phase: str = "promoted"
    faults: dict[str, Any] | None = None
    undone: bool = False
    answer: int = 1


SCENARIOS = {
    "first": Scenario("canary"),
    "canary": Scenario("canary"),
    "canary_undone": Scenario("canary", undone=True),
    "canary_of_a_bad_version": Scenario("canary", "rolled_back", {"fail_every": 3}),
    "blue_green": Scenario("blue_green"),
    "shadow": Scenario("shadow"),
    "ab_test": Scenario("ab_test", answer=0),
}


@dataclass(frozen=True)
class Ended:
    """How it was left, and what was seen on the way; nothing in it tells one model's name or a moment."""

    state: dict[str, Any]
    entries: list[tuple[str, str]]
    done: list[str]
    kills: int
    answers: Counter[tuple[int, str]]


Runs = dict[tuple[str, bool], Future[Ended]]


class Callers(Load):
    """Requests of which each connection's have a key of their own, so that an A/B test has someone to count."""

    async def _connection(self, due: "asyncio.Queue[float | None]") -> None:
        caller = (f"x-mlops-key: caller {next(KEYS)}",)
        await Load(self.url, self.body, self.per_second, headers=caller, answers=self.answers)._connection(due)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with site(tmp_path_factory.mktemp("crashes")) as systems:
        systems.registry.versions("nobody")  # MLflow makes its tables now, once
        yield systems


@pytest.fixture(scope="module")
def forks() -> Iterator[Drivers]:
    with drivers() as forking:
        yield forking


@pytest.fixture(scope="module")
def lanes() -> Iterator[ThreadPoolExecutor]:
    """All rollouts go on side by side: most of their time is waiting."""
    with ThreadPoolExecutor(2 * len(SCENARIOS) + 1) as threads:
        yield threads


@pytest.fixture(scope="module")
def overtaken(lanes: ThreadPoolExecutor, parts: Parts, forks: Drivers) -> "Future[Overtaken]":
    return lanes.submit(overtake, forks, parts)


@pytest.fixture(scope="module")
def ended(lanes: ThreadPoolExecutor, parts: Parts, forks: Drivers, overtaken: "Future[Overtaken]") -> Runs:
    """Every scenario, undisturbed (False) and killed (True)."""
    runs = [(name, killed) for name in SCENARIOS for killed in (False, True)]
    return {run: lanes.submit(live, forks, parts, *run) for run in runs}


def model_of(name: str, killed: bool) -> str:
    return f"{name}_{'killed' if killed else 'calm'}"


def live(forks: Drivers, parts: Parts, name: str, killed: bool) -> Ended:
    """One model's first version, and then what the scenario says, under the requests of callers."""
    scenario, model = SCENARIOS[name], model_of(name, killed)
    root = parts.cache.parent
    job = Job(root, spec_of(model, scenario.strategy, **RULES), killed)
    add_version(parts, model, answer=scenario.answer)
    if name == "first":
        return seen(parts, job, run(forks, job), Counter())
    run(forks, replace(job, killed=False))
    job.notes.unlink()
    add_version(parts, model, scenario.faults)
    with Callers(predict_url(parts, model), BODY, PER_SECOND, connections=64) as load:
        kills = run(forks, job)
        if scenario.undone:
            kills += run(forks, replace(job, command=Command("rollback", "tester")))
    return seen(parts, job, kills, outcome(load.answers))


def run(forks: Drivers, job: Job) -> int:
    """Start the driver again until it ends by itself; how often it was killed."""
    for kills in range(MOST_PROCESSES):
        code = forks.run(job)
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, f"{job.spec.name}: the driver failed with {code}"
        job = replace(job, command=None)  # what a person said once is in the ledger now
    raise AssertionError(f"{job.spec.name} is not over after {MOST_PROCESSES} processes: {job.notes.read_text()}")


def seen(parts: Parts, job: Job, kills: int, answers: Counter[tuple[int, str]]) -> Ended:
    """What is left once the gateway follows the last routes."""
    model = job.spec.name
    state = rollout.current(parts, model)
    assert state is not None
    assert eventually(lambda: parts.serving.observe(model).ready), parts.serving.observe(model)
    observed = parts.serving.observe(model)
    assert observed.routes is not None
    left = {
        "phase": str(state.phase),
        "revision": state.revision,
        "routes": observed.routes.to_json(),
        "arms": sorted(observed.arms),
        "aliases": {version.number: sorted(version.aliases) for version in parts.registry.versions(model)},
    }
    entries = [(entry.kind, entry.key.replace(model, "m")) for entry in parts.ledger.entries(model)]
    return Ended(left, entries, job.notes.read_text().replace(model, "m").splitlines(), kills, answers)


@pytest.mark.parametrize("name", SCENARIOS)
def test_it_ends_as_if_nothing_had_happened(ended: Runs, name: str) -> None:
    calm, killed = ended[name, False].result(), ended[name, True].result()
    assert killed.state == calm.state
    assert killed.state["phase"] == SCENARIOS[name].phase
    assert killed.entries == calm.entries, "the ledger tells another story"
    assert len({key for _, key in killed.entries}) == len(killed.entries)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_single_action_was_once_the_last_of_a_process(ended: Runs, name: str) -> None:
    calm, killed = ended[name, False].result(), ended[name, True].result()
    assert calm.kills == 0
    # On a busy machine the next process may begin when the old version's warm time is over already.
    assert [line for line in calm.done if line not in killed.done and "'previous'" not in line] == []
    assert killed.kills == len(killed.done)
    kinds = {line.split()[0] for line in calm.done}
    assert {"recorded", "applied", "alias"} <= kinds
    assert name == "first" or "measured" in kinds


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "first"])
def test_no_caller_noticed(ended: Runs, name: str) -> None:
    answers = ended[name, True].result().answers
    assert answers.total() > 5 * PER_SECOND
    wrong = {answer: count for answer, count in answers.items() if answer[0] != 200}
    if SCENARIOS[name].faults:
        assert set(wrong) == {(500, "2")}, "only what the version itself answered"
    else:
        assert wrong == {}


@dataclass(frozen=True)
class Overtaken:
    """A third version that was approved when the second one's promotion was in the ledger and nowhere else yet."""

    champion_before: int
    measured_against: str
    aliases: dict[int, tuple[str, ...]]
    answers: list[Answer]


def overtake(forks: Drivers, parts: Parts) -> Overtaken:
    spec = spec_of("next_version", "blue_green", **RULES)
    job = Job(parts.cache.parent, spec, killed=True)
    add_version(parts, spec.name)
    run(forks, replace(job, killed=False))
    add_version(parts, spec.name)
    with Callers(predict_url(parts, spec.name), BODY, PER_SECOND, connections=64) as load:
        while (state := rollout.current(parts, spec.name)) is None or state.candidate != "2" or not state.phase.final:
            assert forks.run(job) == -signal.SIGKILL
        before = next((v for v in parts.registry.versions(spec.name) if "champion" in v.aliases), None)
        add_version(parts, spec.name)
        run(forks, replace(job, killed=False))
    (begun,) = (e for e in parts.ledger.entries(spec.name, ROLLOUT_STARTED) if e.subject == "3")
    aliases = {version.number: version.aliases for version in parts.registry.versions(spec.name)}
    return Overtaken(before.number if before else 0, begun.evidence["champion"], aliases, load.answers)


def test_a_version_approved_after_a_crash_is_measured_against_what_the_ledger_calls_champion(
    overtaken: "Future[Overtaken]", ended: Runs
) -> None:
    seen = overtaken.result()
    assert seen.champion_before == 1, "the registry was not told yet"
    assert seen.measured_against == "2"
    assert seen.aliases == {1: (), 2: ("previous",), 3: ("champion",)}
    order = [answer.version for answer in sorted(seen.answers, key=lambda answer: answer.done)]
    assert "1" not in order[order.index("3") :]
    assert {answer.status for answer in seen.answers} == {200}


def test_the_ledger_is_whole(parts: Parts, ended: Runs) -> None:
    for run in ended.values():
        run.result()
    assert parts.ledger.verify() is None
    assert len(parts.ledger.entries()) > 10 * len(SCENARIOS)
