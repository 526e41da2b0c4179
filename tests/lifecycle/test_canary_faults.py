"""Faulty versions brought in by canary under callers' requests: back at weight 0 in seconds, and the champion serves on."""

import datetime as dt
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
from dagster._daemon import sensor as daemon

from benchmarks._load import Load, outcome
from mlops_dagster.assets import rollout
from mlops_dagster.assets.deployment import until_started
from mlops_dagster.assets.rollout import Parts, Tick
from mlops_dagster.core.ledger import ROLLBACK
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.serving import Arm
from mlops_dagster.resources.serving.fleet import program_name
from mlops_dagster.sensors.rollouts import TICK_SECONDS
from tests.lifecycle.rollout_site import BODY, add_version, predict_url, site, spec_of
from tests.serving.gateway_hosts import eventually, new_model, record

SENSOR_SECONDS = 5.0  # how often Dagster's daemon has the rollout sensor look
BACK_WITHIN_SECONDS = 30.0  # how long it takes on a machine of its own is measured by benchmarks/canary_rollback.py
PER_SECOND = 100
# A tenth of the requests for a minute: what is wrong must be seen in the first step.
CANARY = {"steps_percent": [10, 50], "step_seconds": 60, "watch_seconds": 60, "minimum_requests": 200, "keep_warm_seconds": 5}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with site(tmp_path_factory.mktemp("canaries")) as systems:
        yield systems


@pytest.fixture
def spec(parts: Parts) -> Iterator[ModelSpec]:
    """A model whose first version is live; its answers take 6 ms."""
    spec = spec_of(new_model(), "canary", **CANARY)
    bring_in(parts, spec, {"slow_ms": 6})
    until_started(parts, spec)
    yield spec
    parts.serving.remove(spec.name)


def bring_in(parts: Parts, spec: ModelSpec, faults: dict[str, Any] | None) -> None:
    """Approve a version with these faults and begin its rollout, as the deployment run does."""
    add_version(parts, spec.name, faults)
    now = dt.datetime.now(dt.UTC)
    version = rollout.waiting(parts, spec, now)
    assert version is not None
    rollout.start(parts, spec, version, now)


def until_over(parts: Parts, spec: ModelSpec, seconds: float, every: float = SENSOR_SECONDS) -> Tick:
    """Tick as often as the sensor does until the rollout is over."""
    end = time.monotonic() + seconds
    while True:
        found = rollout.tick(parts, spec, dt.datetime.now(dt.UTC))
        assert found is not None
        if found.state.phase.final or time.monotonic() > end:
            return found
        time.sleep(every)


def seconds_to_zero(parts: Parts, spec: ModelSpec, load: Load, bad: Callable[[Any], bool]) -> tuple[float, float]:
    """From the first bad answer: until the decision was in the ledger, and until the version gave its last answer."""
    first = min(answer.done for answer in load.answers if bad(answer))
    last = max(answer.done for answer in load.answers if answer.version == "2")
    decided = parts.ledger.entries(spec.name, ROLLBACK)[-1].time.timestamp() - (time.time() - time.perf_counter())
    return decided - first, last - first


@pytest.mark.parametrize(
    ("faults", "reason", "torn"),
    [
        ({"fail_every": 5, "slow_ms": 6}, "failed requests", False),
        ({"fail_every": 5, "slow_ms": 6}, "failed requests", True),
        ({"slow_ms": 60}, "answers slower than", False),
    ],
    ids=["fails_a_fifth", "fails_a_fifth_and_its_tally_is_torn", "ten_times_slower"],
)
def test_a_bad_version_has_no_weight_soon_after_its_first_bad_answer(
    parts: Parts, spec: ModelSpec, faults: dict[str, Any], reason: str, torn: bool
) -> None:
    with Load(predict_url(parts, spec.name), BODY, PER_SECOND) as load:
        time.sleep(5)  # what the champion's latency is when no server starts beside it
        bring_in(parts, spec, faults)
        until_started(parts, spec)
        if torn:
            state = rollout.current(parts, spec.name)
            assert state is not None
            rollout.rollout_evidence.tally_of(parts, spec, state).path.write_bytes(b"torn" * 2000)
        found = until_over(parts, spec, 40)
        assert eventually(lambda: parts.serving.observe(spec.name).routes == found.state.routes)
        time.sleep(1)
    assert (str(found.state.phase), found.state.routes and found.state.routes.percent("2")) == ("rolled_back", 0.0), found
    assert reason in found.state.reason
    failing = "fail_every" in faults
    decided, last = seconds_to_zero(parts, spec, load, lambda a: a.version == "2" and (a.status == 500 or not failing))
    print(f"{reason}: decided {decided:.1f} s, last answer {last:.1f} s after the first bad one")
    assert 0 < max(decided, last) <= BACK_WITHIN_SECONDS  # of a version that fails one in five, the last failure may come before
    wrong = {answer for answer in outcome(load.answers) if answer[0] != 200}
    assert wrong == ({(500, "2")} if failing else set()), "only what the version itself answered"


def test_the_sensor_looks_at_every_round_of_the_daemon() -> None:
    assert daemon.MIN_INTERVAL_LOOP_TIME == SENSOR_SECONDS
    # The daemon counts from the end of a tick: a sensor that asked for the whole round would miss every second one.
    assert TICK_SECONDS <= SENSOR_SECONDS - 2


def test_a_version_whose_process_dies_costs_no_caller_an_error(parts: Parts, spec: ModelSpec) -> None:
    with Load(predict_url(parts, spec.name), BODY, PER_SECOND) as load:
        bring_in(parts, spec, {"slow_ms": 6})
        until_started(parts, spec)
        server = program_name(spec.name, arm_of(parts, spec, 2))
        end, killed = time.monotonic() + 60, set()
        while time.monotonic() < end:
            found = until_over(parts, spec, 0, every=0)
            if found.state.phase.final:
                break
            if (victim := record(parts.serving, server).process()) is not None:  # type: ignore[arg-type]
                with suppress(psutil.Error):
                    victim.kill()
                    killed.add(victim.pid)
            time.sleep(1)
        time.sleep(1)
    print(f"killed {len(killed)} processes; {found.state.reason}")
    assert str(found.state.phase) == "rolled_back"
    assert len(killed) >= 2
    assert {status for status, _ in outcome(load.answers)} == {200}
    assert len(load.answers) > 3 * PER_SECOND


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"exit": 7}, r"cannot be served: .*3 times in a row.*the server ends as asked for"),
        ({"never_ready": True}, "was not ready"),
    ],
    ids=["ends_at_once", "hangs"],
)
def test_a_version_that_never_becomes_ready_fails_and_the_champion_serves_on(
    parts: Parts, spec: ModelSpec, faults: dict[str, Any], words: str
) -> None:
    with Load(predict_url(parts, spec.name), BODY, 50, connections=8) as load:
        bring_in(parts, spec, faults)
        if "exit" in faults:
            found = until_over(parts, spec, 45, every=0.5)
        else:
            state = rollout.current(parts, spec.name)
            assert state is not None
            limit = dt.timedelta(seconds=rollout.policy_of(spec).start_seconds)
            early = rollout.tick(parts, spec, state.entered_at + limit - dt.timedelta(seconds=1))
            assert early is not None
            assert str(early.state.phase) == "pending"
            found = rollout.tick(parts, spec, state.entered_at + limit)
            assert found is not None
        time.sleep(1)
    assert str(found.state.phase) == "rolled_back"
    assert re.search(words, found.state.reason), found.state.reason
    assert outcome(load.answers).keys() == {(200, "1")}
    assert [v.number for v in parts.registry.versions(spec.name) if "champion" in v.aliases] == [1]


def arm_of(parts: Parts, spec: ModelSpec, number: int) -> Arm:
    version = next(v for v in parts.registry.versions(spec.name) if v.number == number)
    return Arm(str(number), "", version.digest, "candidate")
