"""Labels that land days after a promotion undo it, for classes as for values; the version before serves again."""

import datetime as dt
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from mlops_dagster.assets import live_performance, rollout
from mlops_dagster.assets.deployment import until_started
from mlops_dagster.assets.lake_paths import canonical, day_key
from mlops_dagster.assets.rollout import Parts, Tick
from mlops_dagster.core.errors import NotFoundError, RolloutError
from mlops_dagster.core.rollout import Command, Phase, RolloutState
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.registry.mlflow_registry import MlflowRegistry
from mlops_dagster.resources.serving import Arm
from mlops_dagster.resources.serving.state import free_port
from mlops_dagster.resources.tracking.mlflow_connection import connect
from tests.lifecycle.rollout_site import add_version, site, spec_of
from tests.serving.gateway_hosts import eventually, pid_of

ROWS = 400
FIRST = dt.date(2024, 1, 1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with site(tmp_path_factory.mktemp("labels")) as systems:
        yield replace(systems, label_seconds=0.0)


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def promoted(parts: Parts, spec: ModelSpec) -> RolloutState:
    """A model whose second version (accuracy 0.9 and mean absolute error 1.0 at evaluation) was promoted by a person."""
    for _ in range(2):
        rollout.start(parts, spec, add_version(parts, spec.name), now())
        until_started(parts, spec)
    for _ in range(2):  # into the watch, and out of it
        rollout.command(parts, spec, Command("promote", "tester"), now())
    state = rollout.current(parts, spec.name)
    assert state is not None
    assert (state.phase, state.candidate) == (Phase.PROMOTED, "2")
    return state


def land(parts: Parts, spec: ModelSpec, number: int, version: str, harm: float) -> None:
    """A day's log and labels, by the code of the stages; `harm` 1 is as at evaluation, 2 twice as wrong."""
    day, random = FIRST + dt.timedelta(days=number), np.random.default_rng(number)
    label = random.normal(100, 10, ROWS) if spec.training.task == "regression" else (random.random(ROWS) < 0.5).astype(float)
    wrong = random.random(ROWS) < 0.1 * harm
    said = label + random.exponential(harm, ROWS) if spec.training.task == "regression" else np.where(wrong, 1 - label, label)
    rows = [f"{day} {row}" for row in range(ROWS)]
    log = {"request_id": rows, "row_id": rows, "version": [version] * ROWS, "prediction": said, "shadow": [False] * ROWS}
    score = pa.nulls(ROWS, pa.float64())
    moment = [dt.datetime.combine(day, dt.time(1), dt.UTC)] * ROWS
    parts.lake.write(day_key(spec, "inference_log", day), pa.table({**log, "score": score, "logged_at": moment}))
    parts.lake.write_bytes(f"{spec.name}/raw_data/tables.json", b'["requests"]')
    parts.lake.write(day_key(spec, "validated_data", day, "requests"), pa.table({"id": rows, "late": label}))
    parts.lake.write(day_key(spec, "live_performance", day), live_performance.labelled_rows(spec, parts.lake, day))
    summary = live_performance.summarize(spec, parts.lake, day, {}, now())
    parts.lake.write_bytes(day_key(spec, "live_performance", day, suffix="json"), canonical(summary))


def look(parts: Parts, spec: ModelSpec) -> Tick:
    found = rollout.tick(parts, spec, now())
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("task", "reason"),
    [("classification", "wrong predictions: "), ("regression", "mean absolute error: ")],
)
def test_labels_that_land_after_a_promotion_undo_it(parts: Parts, task: str, reason: str) -> None:
    spec = spec_of(f"{task}_model", "blue_green", keep_warm_seconds=600)
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"task": task})})
    promoted(parts, spec)
    for number in range(3):
        land(parts, spec, number, "2", harm=1.0)
        assert look(parts, spec).state.phase is Phase.PROMOTED
    parts.lake.write_bytes(day_key(spec, "live_performance", FIRST, suffix="json"), b"{")
    land(parts, spec, 3, "1", harm=9.0)
    assert look(parts, spec).state.phase is Phase.PROMOTED, "another version's labels, and a damaged day, are nothing"
    later = 0
    for number in range(4, 14):
        land(parts, spec, number, "2", harm=2.0)
        seldom = rollout.tick(replace(parts, label_seconds=600.0), spec, now())
        assert seldom is not None
        assert not seldom.changed, "the lake was looked at a moment ago"
        later = number
        if look(parts, spec).changed:
            break
    assert later < 10, "a few days' labels are enough"
    state = until_started(parts, spec)
    assert state is not None
    assert (state.phase, state.strategy, state.candidate) == (Phase.PROMOTED, "way_back", "1")
    assert state.reason.startswith(f"labels: {reason}"), state.reason
    assert {v.number: v.aliases for v in parts.registry.versions(spec.name)}[1] == ("champion",)
    assert not look(parts, spec).changed, "it is undone once"


@pytest.mark.parametrize("what", ["lost", "changed"])
def test_labels_undo_a_promotion_whatever_the_registry_says_of_the_version_meanwhile(parts: Parts, what: str) -> None:
    spec = spec_of(f"{what}_model", "blue_green", keep_warm_seconds=600)
    promoted(parts, spec)
    client = connect(parts.registry.tracking_uri)  # type: ignore[attr-defined]
    if what == "lost":
        client.delete_model_version(spec.name, "2")
    else:
        client.set_model_version_tag(spec.name, "2", "mlops.evidence.metrics", '{"accuracy": 0.1}')
    for number in range(10):
        land(parts, spec, number, "2", harm=3.0)
    assert look(parts, spec).changed
    state = until_started(parts, spec)
    assert state is not None
    assert (state.strategy, state.candidate) == ("way_back", "1")
    assert "wrong predictions: " in state.reason


def test_labels_that_cannot_be_read_leave_the_routes_kept(parts: Parts, tmp_path: Path) -> None:
    spec = spec_of("unread_model", "blue_green", keep_warm_seconds=600)
    state = promoted(parts, spec)
    (tmp_path / "lake").write_text("a file in place of the lake")
    away = replace(parts, lake=type(parts.lake)(root=str(tmp_path / "lake")))  # type: ignore[call-arg]
    found = look(away, spec)
    assert (found.changed, found.state) == (False, state)


def test_a_promotion_is_undone_while_the_registry_is_away(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("unregistered_model", "blue_green", keep_warm_seconds=600)
    promoted(parts, spec)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = replace(parts, registry=MlflowRegistry(tracking_uri=f"http://127.0.0.1:{free_port()}"))
    rollout.roll_back(away, spec, Command("rollback", "tester"), now())  # the aliases have to wait
    for _ in range(3):
        rollout.tick(away, spec, now())
    assert eventually(lambda: parts.serving.observe(spec.name).routes == rollout.Routes.all_to("1"))
    assert (look(parts, spec).state.phase, look(parts, spec).state.candidate) == (Phase.PROMOTED, "1")
    assert {v.number: v.aliases for v in parts.registry.versions(spec.name)}[1] == ("champion",)


def failed_rollout(parts: Parts, spec: ModelSpec) -> None:
    """A third version that a person gives up."""
    rollout.start(parts, spec, add_version(parts, spec.name), now())
    rollout.command(parts, spec, Command("abort", "tester"), now())


def test_labels_undo_a_promotion_after_a_later_rollout_failed(parts: Parts) -> None:
    spec = spec_of("later_model", "blue_green", keep_warm_seconds=600)
    promoted(parts, spec)
    failed_rollout(parts, spec)
    for number in range(10):
        land(parts, spec, number, "2", harm=3.0)
    assert look(parts, spec).changed
    state = until_started(parts, spec)
    assert state is not None
    assert (state.phase, state.strategy, state.candidate) == (Phase.PROMOTED, "way_back", "1")
    assert not look(parts, spec).changed


def test_asked_twice_to_end_a_rollout_the_promotion_before_it_stays(parts: Parts) -> None:
    spec, wanted = spec_of("twice_model", "blue_green", keep_warm_seconds=600), Command("rollback", "tester")
    promoted(parts, spec)
    rollout.start(parts, spec, add_version(parts, spec.name), now())
    with pytest.raises(RolloutError, match="version 2 of twice_model is not what a rollback would undo now: that is version 3"):
        rollout.roll_back(parts, spec, wanted, now(), leave="2")
    ended = rollout.roll_back(parts, spec, wanted, now())
    assert ended is not None
    assert ended.state.phase is Phase.ROLLED_BACK
    with pytest.raises(RolloutError, match="to go back from version 2, which serves, add --from 2"):
        rollout.roll_back(parts, spec, wanted, now())
    with pytest.raises(RolloutError, match="version 3 of twice_model is not what a rollback would undo now: that is version 2"):
        rollout.roll_back(parts, spec, wanted, now(), leave="3")
    back = rollout.roll_back(parts, spec, wanted, now(), leave="2")
    assert back is not None
    assert (back.state.phase, back.state.candidate) == (Phase.PROMOTED, "1"), "it is warm: nothing waits for the sensor"
    assert eventually(lambda: parts.serving.observe(spec.name).routes == rollout.Routes.all_to("1"), 5)


def test_a_way_back_that_failed_is_tried_again_when_a_person_asks(parts: Parts) -> None:
    spec, wanted = spec_of("again_model", "blue_green", keep_warm_seconds=1), Command("rollback", "tester")
    promoted(parts, spec)
    arm = Arm("1", "", parts.version(spec.name, "1").digest, "previous")
    old = pid_of(parts.serving, spec.name, arm)  # type: ignore[arg-type]
    assert eventually(lambda: look(parts, spec) and not psutil.pid_exists(old), 30)
    begun = rollout.roll_back(parts, spec, wanted, now())
    assert begun is not None
    assert begun.state.phase is Phase.PENDING
    twice = rollout.roll_back(parts, spec, wanted, now())
    assert twice is not None
    assert (twice.action.refused, twice.state.phase) == (True, Phase.PENDING), "asked twice, it goes back once"
    assert "is going back to version 1 already" in twice.action.reason
    rollout.command(parts, spec, Command("abort", "tester"), now())
    for number in range(10):
        land(parts, spec, number, "2", harm=3.0)
    assert not look(parts, spec).changed, "by itself it would fail again at every look"
    again = rollout.roll_back(parts, spec, wanted, now())
    assert again is not None
    assert again.state.rollout_id == f"{begun.state.rollout_id}/2"
    state = until_started(parts, spec)
    assert state is not None
    assert (state.phase, state.strategy, state.candidate) == (Phase.PROMOTED, "way_back", "1")
    assert parts.ledger.verify() is None
    with pytest.raises(RolloutError, match="went back to version 1 already"):
        rollout.roll_back(parts, spec, wanted, now())


def test_a_version_that_was_given_up_is_brought_in_again_when_it_is_named(parts: Parts) -> None:
    spec = spec_of("named_model", "blue_green", keep_warm_seconds=600)
    promoted(parts, spec)
    failed_rollout(parts, spec)
    assert rollout.waiting(parts, spec, now()) is None, "not by itself"
    for _ in range(2):
        version = rollout.chosen(parts, spec, 3, now())
        begun = rollout.start(parts, spec, version, now(), again=True)
        assert (begun.changed, begun.state.phase, begun.state.candidate) == (True, Phase.PENDING, "3")
        with pytest.raises(RolloutError, match="version 3 of named_model is being brought in already: pending"):
            rollout.chosen(parts, spec, 3, now())
        rollout.command(parts, spec, Command("abort", "tester"), now())
    ids = {e.key.rpartition("/")[0] for e in parts.ledger.entries(spec.name) if e.subject == "3" and e.key.startswith("rollout/")}
    assert sorted(i.partition(version.registered_hash[:12])[2] for i in ids) == ["", "/again/1", "/again/2"]
    with pytest.raises(RolloutError, match="version 2 of named_model is the champion already"):
        rollout.start(parts, spec, rollout.chosen(parts, spec, 2, now()), now(), again=True)
    waiting = add_version(parts, spec.name, approve=False)
    with pytest.raises(RolloutError, match="version 4 of named_model is not approved as it is now"):
        rollout.chosen(parts, spec, waiting.number, now())
    with pytest.raises(NotFoundError):
        rollout.chosen(parts, spec, 9, now())
