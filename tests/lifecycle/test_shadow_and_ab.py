"""Shadows and A/B tests under callers' requests, with real servers and gateway: they end as what was answered says."""

import datetime as dt
import itertools
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pytest

from mlops_dagster.assets import live_performance, rollout
from mlops_dagster.assets.inference_log import callers_only
from mlops_dagster.assets.lake_paths import canonical, day_key
from mlops_dagster.assets.rollout import Parts, Tick
from mlops_dagster.core.ledger import Receipt
from mlops_dagster.core.measurements import Measurements
from mlops_dagster.core.rollout import Phase
from mlops_dagster.core.rollout_gates import QUANTILE_REQUESTS
from mlops_dagster.core.routes import assign
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.sensors.rollouts import event
from tests.contracts.serving.artifacts import make_artifact
from tests.lifecycle.rollout_site import decide, predict_url, site, spec_of
from tests.serving.gateway_hosts import eventually, new_model, pid_of

# Effects so large that seconds of traffic decide, on a busy machine.
EASY = {
    "beta": 0.2,
    "error_rate_increase": 0.2,
    "slow_share_increase": 0.6,
    "minimum_requests": 100,
    "step_seconds": 1,
    "watch_seconds": 1,
}
SHADOW = {**EASY, "shadow_seconds": 1}
NEVER = {"step_seconds": 600, "minimum_requests_to_fail": 1_000_000}  # what is counted of requests shall not decide
AB = {**EASY, "ab_minimum_effect": 0.2, "sticky_by": "cookie", "sticky_name": "uid"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with site(tmp_path_factory.mktemp("evidence")) as systems:
        yield replace(systems, settle_seconds=2.5, label_seconds=0.0)


@dataclass
class Callers:
    """Callers who keep asking; the first feature is `value(number)`, and each has a key of its own unless `keys` says which, in the
    cookie `uid` or, where it is named, in a header.
    """

    url: str
    value: Callable[[int], float]
    keys: Callable[[int], str] = "caller {}".format
    header: str = ""
    pause_seconds: float = 0.005
    answers: list[tuple[int, str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stop = threading.Event()
        self.numbers = itertools.count()
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(2)]

    def _ask(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self.stop.is_set():
                number = next(self.numbers)
                row = {"id": number, "a": self.value(number), "b": 0.0}
                key = self.keys(number)
                headers = {self.header: key} if self.header else {"cookie": f"theme=dark; uid={key}"}
                got = client.post(self.url, json={"instances": [row]}, headers=headers)
                prediction = got.json()["predictions"][0] if got.status_code == 200 else -1
                self.answers.append((got.status_code, got.headers.get("x-model-version", ""), prediction))
                time.sleep(self.pause_seconds)


@contextmanager
def calling(callers: Callers) -> Iterator[Callers]:
    for thread in callers.threads:
        thread.start()
    try:
        yield callers
    finally:
        callers.stop.set()
        for thread in callers.threads:
            thread.join()


def bring_in(parts: Parts, spec: ModelSpec, bias: float, slope: float = 40.0) -> None:
    """The next version, whose answer is 1 where the first feature is above -bias/slope; as far as its first step."""
    number = len(parts.registry.versions(spec.name)) + 1
    folder = parts.cache.parent / "made" / spec.name / str(number)
    digest = make_artifact(folder, slope=slope, bias=bias)
    sample = pa.table({"a": [0.0, 1.0], "b": [0.0, 0.0], "prediction": [float(bias > 0), float(slope + bias > 0)]})
    parts.lake.write(f"{spec.name}/trained_model/{digest}/reference_sample.parquet", sample)
    evidence = {"metrics": {"accuracy": 0.9}, "number": number}
    made = parts.registry.register(spec.name, folder, digest, evidence, {"author": "trainer"})
    version = decide(parts, made)
    rollout.start(parts, spec, version, now())
    last = Phase.PROMOTED if number == 1 else Phase.STEPPING
    assert ticks_until(parts, spec, lambda tick: tick.state.phase is last).phase is last
    assert eventually(lambda: parts.serving.observe(spec.name).ready)


def ticks_until(parts: Parts, spec: ModelSpec, holds: Callable[[Tick], bool], seconds: float = 40.0) -> Any:
    """Tick twice a second until a tick's outcome is the wanted one, or a rollout is over; its state."""
    end = time.monotonic() + seconds
    while True:
        found = look(parts, spec)
        assert found is not None
        if holds(found) or found.state.phase.final:
            return found.state
        assert time.monotonic() < end, (found.state.phase, found.action, found.verdict)
        time.sleep(0.5)


def look(parts: Parts, spec: ModelSpec) -> Any:
    return rollout.tick(parts, spec, now())


def running(parts: Parts, spec: ModelSpec) -> Any:
    return rollout.current(parts, spec.name)


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def evidence_of(tick: Tick) -> dict[str, Any]:
    return tick.verdict.evidence if tick.verdict else {}


def verdicts(parts: Parts, spec: ModelSpec) -> list[dict[str, Any]]:
    """The verdicts that the ledger has of the model's newest rollout, oldest first."""
    return [entry.evidence["verdict"] for entry in parts.ledger.entries(spec.name) if "verdict" in entry.evidence]


def served(parts: Parts, strategy: str, **declared: Any) -> ModelSpec:
    """A model whose version 1 is live: it answers 1 where the first feature is above 0.5."""
    spec = spec_of(new_model(), strategy, **declared)
    bring_in(parts, spec, bias=-20.0)
    return spec


def anything(_: int) -> float:
    return random.random()


def test_a_shadow_that_agrees_waits_for_a_person_and_nobody_meets_it(parts: Parts) -> None:
    spec = served(parts, "shadow", **SHADOW, shadow_ends="hold")
    bring_in(parts, spec, bias=-19.9)  # its scores are a little higher
    with calling(Callers(predict_url(parts, spec.name), anything)) as callers:
        held = ticks_until(parts, spec, lambda tick: tick.state.phase is Phase.PAUSED)
        assert (held.phase, held.passed, held.routes.percent("2")) == (Phase.PAUSED, True, 0)
    assert {(status, version) for status, version, _ in callers.answers} == {(200, "1")}
    evidence = verdicts(parts, spec)[-1]["evidence"]
    assert evidence["gates"]["disagreement"]["compared"] >= 100
    assert evidence["gates"]["disagreement"]["share"] < 0.05
    assert 0 < evidence["mean_absolute_distance"] < 0.02
    assert evidence["gates"]["latency"]["candidate"] is not None
    counted = rollout.rollout_evidence.tally_of(parts, spec, held).agreement
    ticks_until(parts, spec, lambda tick: counted().compared >= len(callers.answers))
    time.sleep(1.2)  # samples are taken once a second, and a tick is measured at a sample
    look(parts, spec)
    assert counted().compared == len(callers.answers), "every mirrored row once, however often one looks"
    file = parts.cache / spec.name / "rollouts" / f"{held.rollout_id}.json"
    seen = Measurements.from_json(json.loads(file.read_bytes()))
    assert sum(tick.arms["2"].compared for tick in seen.ticks if "2" in tick.arms) == len(callers.answers)
    rollout.command(parts, spec, rollout.Command("resume", "tester"), now())
    assert running(parts, spec).phase is Phase.WATCHING


def test_a_shadow_that_disagrees_in_three_of_ten_fails(parts: Parts) -> None:
    spec = served(parts, "shadow", **SHADOW, shadow_ends="promote")
    bring_in(parts, spec, bias=-8.0)  # above 0.2 instead of 0.5
    state, newest = running(parts, spec), parts.ledger.entries(spec.name)[-1]
    shown: Any = event(spec, parts, Tick(state, rollout.Action(rollout.Act.NONE), None, changed=True)).metadata
    assert (shown["phase"].value, shown["mirror_percent"].value) == ("stepping", {"2": 100.0})
    receipt = Receipt(shown["ledger_sequence"].value, shown["ledger_hash"].value)
    assert (receipt, parts.ledger.verify([receipt])) == (newest.receipt, None)
    with calling(Callers(predict_url(parts, spec.name), anything)) as callers:
        ended = ticks_until(parts, spec, lambda tick: False)
    assert ended.phase is Phase.ROLLED_BACK
    assert "answers that differ from the champion's" in ended.reason
    assert 0.15 < verdicts(parts, spec)[-1]["evidence"]["gates"]["disagreement"]["share"] < 0.45
    assert {(status, version) for status, version, _ in callers.answers} == {(200, "1")}


def monitor(parts: Parts, spec: ModelSpec, label: Callable[[int], float | None]) -> None:
    """What the assets of a day do: collect the log, land labels, join them."""
    day = now().date()
    log = callers_only(parts.inference_segments.read(spec.name, day))
    parts.lake.write(day_key(spec, "inference_log", day), log)
    parts.lake.write_bytes(f"{spec.name}/raw_data/tables.json", b'["requests"]')
    numbers = sorted({int(row) for row in log["row_id"].to_pylist()})
    landed = pa.table({"id": numbers, "late": pa.array([label(number) for number in numbers], pa.float64())})
    parts.lake.write(day_key(spec, "validated_data", day, "requests"), landed)
    parts.lake.write(day_key(spec, "live_performance", day), live_performance.labelled_rows(spec, parts.lake, day))
    summary = live_performance.summarize(spec, parts.lake, day, {}, now())
    parts.lake.write_bytes(day_key(spec, "live_performance", day, suffix="json"), canonical(summary))


def often_wrong(number: int) -> float:
    return (0.3, 1.0)[number % 2]


def test_the_better_arm_of_an_ab_test_is_promoted_by_labels_that_land_later(parts: Parts) -> None:
    spec = served(parts, "ab_test", **AB, ab_metric="accuracy")
    bring_in(parts, spec, bias=-8.0)
    step = running(parts, spec).current
    with calling(Callers(predict_url(parts, spec.name), often_wrong)) as callers:
        for _ in range(14):
            assert look(parts, spec).state.phase is Phase.STEPPING, "nothing is known before labels land"
            time.sleep(0.5)
        monitor(parts, spec, lambda number: 1.0)  # version 1 says 0 to every other row, version 2 never
        ended = ticks_until(parts, spec, lambda tick: False)
    assert ended.phase is Phase.PROMOTED, ended.reason
    passed = next(v for v in verdicts(parts, spec) if "metric" in v["evidence"].get("gates", {}) and v["outcome"] == "PASS")
    gates = passed["evidence"]["gates"]
    assert (0.3 < gates["metric"]["champion"] < 0.7, gates["metric"]["candidate"]) == (True, 1.0)
    assert gates["sample_ratio"]["misassigned"] == 0
    assert min(gates["sample_ratio"]["units"].values()) >= 100
    assert sum(gates["sample_ratio"]["units"].values()) <= len(callers.answers)
    assert {status for status, _, _ in callers.answers} == {200}
    assert step.routes.sticky.name == "uid"


def test_an_ab_test_by_header_is_decided_by_the_models_own_metric(parts: Parts) -> None:
    own = {"ab_metric": "tests.lifecycle.rollout_site.says_late", "sticky_by": "header", "sticky_name": "x-person"}
    spec = served(parts, "ab_test", **AB | own)
    bring_in(parts, spec, bias=-8.0)
    routes, person = running(parts, spec).current.routes, lambda number: f"person {number % 400}"
    with calling(Callers(predict_url(parts, spec.name), often_wrong, person, "x-person")) as callers:
        assert eventually(lambda: len(callers.answers) >= 1000)
        time.sleep(parts.settle_seconds)
        look(parts, spec)
        monitor(parts, spec, lambda number: float(number % 4 != 2))  # the two are right equally often
        log = callers_only(parts.inference_segments.read(spec.name, now().date())).select(["row_id", "version"]).to_pylist()
        ended = ticks_until(parts, spec, lambda tick: False)
    assert {row["version"] for row in log} == {"1", "2"}
    assert [row for row in log if assign(person(int(row["row_id"])), routes) != row["version"]] == []
    (gates,) = (v["evidence"]["gates"] for v in verdicts(parts, spec) if "metric" in v["evidence"].get("gates", {}))
    assert (ended.phase, gates["metric"]["candidate"], gates["sample_ratio"]["misassigned"]) == (Phase.PROMOTED, 1.0, 0), (
        ended.reason
    )
    assert 100 <= min(gates["sample_ratio"]["units"].values()) <= sum(gates["sample_ratio"]["units"].values()) <= 400


def test_a_canary_knows_what_the_champion_did_before_and_fails_by_labels(parts: Parts) -> None:
    spec = served(parts, "canary", **EASY | {"step_seconds": 600}, steps_percent=[50])
    with calling(Callers(predict_url(parts, spec.name), often_wrong, pause_seconds=0.04)) as callers:
        sampled = lambda: parts.live_metrics.measure(spec.name, now() - rollout.rollout_measurements.HISTORY).arms["1"]  # noqa: E731
        assert eventually(lambda: sum(sampled().latency) >= QUANTILE_REQUESTS)
        bring_in(parts, spec, bias=-8.0)
        gates: list[dict[str, Any]] = []
        ticks_until(parts, spec, lambda tick: gates.append(evidence_of(tick).get("gates", {})) or any(gates))
        first = rollout.rollout_measurements.measured(parts, spec, running(parts, spec), now())[0].ticks[0]
        assert eventually(lambda: sum(version == "2" for _, version, _ in callers.answers) > 150)
        monitor(parts, spec, lambda number: float(often_wrong(number) > 0.5))  # version 2 says 1 to everything
        ended = ticks_until(parts, spec, lambda tick: False)
    assert first.arms["1"].requests < QUANTILE_REQUESTS, "too few to know a percentile by"
    assert "slower_than_ms" in gates[-1]["latency"], "the champion's percentile is known from before the rollout"
    assert (ended.phase, "wrong predictions: " in ended.reason, "proven worse" in ended.reason) == (
        Phase.ROLLED_BACK,
        True,
        True,
    ), ended


def test_equal_arms_end_with_the_champion(parts: Parts) -> None:
    spec = served(parts, "ab_test", **AB, ab_metric="score", ab_maximum_seconds=60)
    bring_in(parts, spec, bias=-20.0, slope=40.5)
    with calling(Callers(predict_url(parts, spec.name), often_wrong)):
        ended = ticks_until(parts, spec, lambda tick: False)
    assert ended.phase is Phase.ROLLED_BACK
    assert "a gain of 20.00% is excluded" in ended.reason


def test_time_out_and_a_caller_with_one_key_leave_the_champion(parts: Parts) -> None:
    """Ten thousand requests of one person are one trial."""
    spec = served(parts, "ab_test", **AB, ab_metric="answered", ab_maximum_seconds=4)
    bring_in(parts, spec, bias=-20.0)
    with calling(Callers(predict_url(parts, spec.name), often_wrong, keys=lambda number: f"one of two {number % 2}")):
        ended = ticks_until(parts, spec, lambda tick: False)
    assert (ended.phase, "inconclusive after 4 s" in ended.reason) == (Phase.ROLLED_BACK, True), ended.reason


def test_a_sample_ratio_that_does_not_fit_never_promotes(parts: Parts) -> None:
    spec = served(parts, "ab_test", **AB, ab_metric="score", max_consecutive_errors=2)
    bring_in(parts, spec, bias=-8.0)  # it would win
    routes = running(parts, spec).current.routes
    ours = [key for key in map("caller {}".format, range(40_000)) if assign(key, routes) == "1" or hash(key) % 3 == 0]
    with calling(Callers(predict_url(parts, spec.name), often_wrong, keys=ours.__getitem__)):
        held = ticks_until(parts, spec, lambda tick: tick.state.phase is Phase.HELD)
        other = spec.model_copy(update={"rollout": spec.rollout.model_copy(update={"ab_metric": "answered"})})
        switched = look(parts, other).verdict
    assert "the test began with 'score'" in switched.reasons[0]
    assert held.phase is Phase.HELD
    assert "sample ratio mismatch" in held.reason
    assert verdicts(parts, spec)[-1]["outcome"] == "ERROR"


def test_a_candidate_that_keeps_dying_fails_fast_and_no_caller_notices(parts: Parts) -> None:
    spec = served(parts, "canary", **EASY | NEVER, steps_percent=[50], max_restarts=2)
    bring_in(parts, spec, bias=-20.0)
    version = parts.registry.versions(spec.name)[-1]
    arm = rollout.Arm("2", str(parts.cache), version.digest, "candidate")
    with calling(Callers(predict_url(parts, spec.name), anything)) as callers:
        look(parts, spec)
        for death in (1, 2):
            before = pid_of(parts.serving, spec.name, arm)  # type: ignore[arg-type]
            psutil.Process(before).kill()
            if death == 1:
                assert eventually(lambda before=before: pid_of(parts.serving, spec.name, arm) != before)  # type: ignore[arg-type, misc]
                assert eventually(lambda: parts.serving.observe(spec.name).ready)
                assert look(parts, spec).state.phase is Phase.STEPPING
        ended = ticks_until(parts, spec, lambda tick: False, seconds=15)
    assert (ended.phase, ended.reason) == (Phase.ROLLED_BACK, "the server of arm 2 died 2 times")
    assert {status for status, _, _ in callers.answers} == {200}


def test_a_candidate_that_stays_down_fails(parts: Parts) -> None:
    """Its server hangs: it neither answers nor ends, so nothing starts it again."""
    spec = served(parts, "canary", **EASY | NEVER, steps_percent=[50], max_down_seconds=2)
    bring_in(parts, spec, bias=-20.0)
    arm = rollout.Arm("2", str(parts.cache), parts.registry.versions(spec.name)[-1].digest, "candidate")
    hung = psutil.Process(pid_of(parts.serving, spec.name, arm))  # type: ignore[arg-type]
    hung.suspend()
    try:
        ended = ticks_until(parts, spec, lambda tick: False, seconds=20)
    finally:
        hung.resume()
    assert ended.phase is Phase.ROLLED_BACK
    assert re.fullmatch("the server of arm 2 has been down for [0-9]+ s", ended.reason), ended.reason
    assert ended.routes == rollout.Routes.all_to("1")
