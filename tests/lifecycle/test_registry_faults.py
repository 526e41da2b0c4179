"""A registry that cannot be asked, lost a version, or lost its artifacts: what serves goes on, and every way back is open."""

import datetime as dt
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import httpx
import pytest

from mlops_dagster.assets import approvals, rollout, rollout_versions
from mlops_dagster.assets.deployment import until_started
from mlops_dagster.assets.rollout import RESOURCES, Parts, Tick
from mlops_dagster.core.errors import ArtifactError, DeclarationError, NotFoundError, StorageError
from mlops_dagster.core.rollout import Command, Phase
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.registry import Version
from mlops_dagster.resources.registry.mlflow_registry import MlflowRegistry
from mlops_dagster.resources.serving.state import free_port
from mlops_dagster.resources.tracking.mlflow_connection import connect
from mlops_dagster.sensors import rollouts
from tests.contracts.serving.artifacts import ROW
from tests.lifecycle.rollout_site import add_version, decide, predict_url, site, spec_of, stored_model
from tests.serving.gateway_hosts import eventually, new_model, ready


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with site(tmp_path_factory.mktemp("registry")) as systems:
        yield systems


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def look(parts: Parts, spec: ModelSpec) -> Tick:
    found = rollout.tick(parts, spec, now())
    assert found is not None
    return found


def start(parts: Parts, spec: ModelSpec, version: Version) -> None:
    rollout.start(parts, spec, version, now())
    until_started(parts, spec)


def live(parts: Parts) -> ModelSpec:
    """A model of its own whose first version serves; the second one's canary lasts."""
    spec = spec_of(new_model(), step_seconds=600.0, steps_percent=[50.0], keep_warm_seconds=600)
    start(parts, spec, add_version(parts, spec.name))
    ready(parts.serving, spec.name)  # type: ignore[arg-type]
    return spec


def promoted(parts: Parts, spec: ModelSpec) -> None:
    start(parts, spec, add_version(parts, spec.name, {"slow_ms": 0}))
    for _ in range(2):  # into the watch, and out of it
        rollout.command(parts, spec, Command("promote", "tester"), now())
    assert look(parts, spec).state.candidate == "2"


def lose(parts: Parts, spec: ModelSpec, version: str) -> None:
    """Delete a version as MLflow's UI does, before this process has asked for it."""
    connect(parts.registry.tracking_uri).delete_model_version(spec.name, version)  # type: ignore[attr-defined]
    rollout_versions._KNOWN.clear()


def answering(parts: Parts, spec: ModelSpec) -> set[str]:
    answers = [httpx.post(predict_url(parts, spec.name), json=ROW) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.headers["x-model-version"] for answer in answers}


def away() -> MlflowRegistry:
    return MlflowRegistry(tracking_uri=f"http://u:hunter2@127.0.0.1:{free_port()}")


def misconfigured() -> MlflowRegistry:
    return MlflowRegistry(tracking_uri="ftp://u:hunter2@registry")


@contextmanager
def unmounted(store: Path) -> Iterator[None]:
    """The folder of a version's artifact is gone for a while."""
    aside = store.rename(store.with_name("aside"))
    yield
    aside.rename(store)


def test_a_champion_that_the_registry_lost_serves_on_and_is_what_the_next_version_is_measured_against(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    spec = live(parts)
    add_version(parts, spec.name, {"slow_ms": 0})
    lose(parts, spec, "1")
    found = look(parts, spec)
    assert (found.changed, found.state.phase, answering(parts, spec)) == (False, Phase.PROMOTED, {"1"})
    waiting, trouble = rollouts.waiting(parts, spec, now())
    assert (waiting and waiting.number, trouble) == (2, [])
    assert waiting is not None
    start(parts, spec, waiting)
    state = look(parts, spec).state
    assert (state.strategy, state.champion, state.phase) == ("canary", "1", Phase.STEPPING)
    assert eventually(lambda: answering(parts, spec) == {"1", "2"})
    own = [record.message for record in caplog.records if record.name.startswith("mlops_dagster")]
    assert own == [], "of what is lost no alias is asked for"
    lose(parts, spec, "2")
    ended = look(parts, spec).state
    assert (ended.phase, ended.reason) == (Phase.ROLLED_BACK, "version 2 is no longer in the registry")
    assert eventually(lambda: answering(parts, spec) == {"1"})


def test_a_lost_champion_does_not_bring_older_versions_back(parts: Parts) -> None:
    spec = spec_of(new_model(), keep_warm_seconds=600)
    for _ in range(2):
        add_version(parts, spec.name)
    newest = rollout.waiting(parts, spec, now())
    assert newest is not None
    assert newest.number == 2
    start(parts, spec, newest)
    lose(parts, spec, "2")
    assert rollout.waiting(parts, spec, now()) is None


def test_a_promotion_is_undone_when_the_registry_lost_the_version_before(parts: Parts) -> None:
    spec = live(parts)
    promoted(parts, spec)
    lose(parts, spec, "1")
    rollout.roll_back(parts, spec, Command("rollback", "tester"), now())
    state = until_started(parts, spec)
    assert state is not None
    assert (state.phase, state.candidate) == (Phase.PROMOTED, "1")
    assert eventually(lambda: answering(parts, spec) == {"1"})


def test_what_neither_registry_nor_ledger_knows_is_named(parts: Parts) -> None:
    spec = live(parts)
    with pytest.raises(NotFoundError, match=f"version 9 of {spec.name} is neither in the registry nor approved in the ledger"):
        parts.version(spec.name, "9")


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("registry", [away, misconfigured])
def test_a_registry_that_cannot_be_asked_hinders_no_look_and_no_way_back(
    parts: Parts, registry: Callable[[], MlflowRegistry], restarted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spec = live(parts)
    promoted(parts, spec)
    without = replace(parts, registry=registry())
    if restarted:
        rollout_versions._KNOWN.clear()
    version, (trouble,) = rollouts.waiting(without, spec, now())
    assert (version, "hunter2" in trouble) == (None, False)
    rollout.roll_back(without, spec, Command("rollback", "tester"), now())
    state = until_started(without, spec)
    assert state is not None
    assert (state.phase, state.candidate) == (Phase.PROMOTED, "1")
    assert eventually(lambda: answering(parts, spec) == {"1"})
    look(parts, spec)
    assert {v.number: v.aliases for v in parts.registry.versions(spec.name)}[1] == ("champion",), "told as soon as it can be"


def test_a_registry_that_cannot_be_asked_before_the_first_rollout_is_an_error(parts: Parts) -> None:
    spec, without = spec_of(new_model()), replace(parts, registry=misconfigured())
    with pytest.raises(DeclarationError, match=r"tracking_uri: 'ftp://u:\*\*\*@registry' is not an address"):
        rollouts.waiting(without, spec, now())
    with pytest.raises(DeclarationError):
        without.versions(spec.name)


def test_aliases_that_cannot_be_set_wait_and_hold_nothing_up(parts: Parts) -> None:
    spec = live(parts)
    database = sqlite3.connect(parts.registry.tracking_uri.removeprefix("sqlite:///"))  # type: ignore[attr-defined]
    for verb in ("INSERT", "UPDATE"):
        database.execute(
            f"CREATE TRIGGER no_{verb} BEFORE {verb} ON registered_model_aliases BEGIN SELECT RAISE(ABORT, 'refused'); END"
        )
    try:
        promoted(parts, spec)
        assert eventually(lambda: answering(parts, spec) == {"2"})
        assert [v.aliases for v in parts.registry.versions(spec.name)] == [("champion",), ()]
    finally:
        for verb in ("INSERT", "UPDATE"):
            database.execute(f"DROP TRIGGER no_{verb}")
        database.close()
    look(parts, spec)
    assert [v.aliases for v in parts.registry.versions(spec.name)] == [("previous",), ("champion",)]


def test_an_artifact_store_that_is_away_holds_a_candidate_and_does_not_reject_it(parts: Parts) -> None:
    spec = live(parts)
    made = add_version(parts, spec.name, {"slow_ms": 1})
    with unmounted(stored_model(parts, made).parent):
        with pytest.raises(StorageError, match="nothing is found at .*check that the artifact store is mounted"):
            rollout.start(parts, spec, made, now())
        found = look(parts, spec)
        assert (found.state.phase, found.state.errors) == (Phase.PENDING, 1), found
        assert "nothing is found at" in found.action.reason
    state = until_started(parts, spec)
    assert (state and state.phase) is Phase.STEPPING


def test_bytes_that_changed_of_what_one_goes_back_to_wait_for_a_person(parts: Parts) -> None:
    spec = spec_of(new_model(), keep_warm_seconds=0.01)
    first = add_version(parts, spec.name, {"slow_ms": 2})
    start(parts, spec, first)
    promoted(parts, spec)
    assert eventually(lambda: look(parts, spec) and [*parts.serving.observe(spec.name).arms] == ["2"]), "the old one is gone"
    cached, stored = parts.cache / spec.name / first.digest / "model.onnx", stored_model(parts, first)
    whole = stored.read_bytes()
    for file in (cached, stored):
        file.write_bytes(b"another model")
    with pytest.raises(ArtifactError, match="its bytes have digest"):
        rollout.roll_back(parts, spec, Command("rollback", "tester"), now())
    seen = [look(parts, spec) for _ in range(rollout.policy_of(spec).max_consecutive_errors)][-1]
    assert (seen.state.phase, seen.action.alert, "its bytes have digest" in seen.state.reason) == (Phase.HELD, True, True), seen
    assert answering(parts, spec) == {"2"}
    stored.write_bytes(whole)
    rollout.command(parts, spec, Command("resume", "tester"), now())
    state = until_started(parts, spec)
    assert state is not None
    assert (state.phase, state.candidate) == (Phase.PROMOTED, "1")
    assert eventually(lambda: answering(parts, spec) == {"1"})


def test_a_cache_that_cannot_be_written_is_a_storage_error(parts: Parts, tmp_path: Path) -> None:
    spec = spec_of(new_model())
    made = add_version(parts, spec.name)
    (tmp_path / "file").write_text("in place of the cache's disk")
    with pytest.raises(StorageError, match="its disk is mounted, writable and not full"):
        rollout_versions.artifact_of(replace(parts, cache=tmp_path / "file" / "cache"), spec, made)


@pytest.mark.parametrize("empty", [False, True])
def test_a_copy_in_the_cache_that_cannot_be_used_is_fetched_again(parts: Parts, empty: bool) -> None:
    spec = spec_of(new_model())
    made = add_version(parts, spec.name)
    folder = parts.cache / spec.name / made.digest
    folder.mkdir(parents=True)
    if not empty:
        (folder / "model.onnx").write_bytes(b"half")
    assert rollout_versions.artifact_of(parts, spec, made) == folder
    assert (folder / "signature.json").is_file()


def test_an_approval_by_tag_whose_artifact_is_away_keeps_no_other_version_waiting(parts: Parts) -> None:
    spec = spec_of(new_model())
    first = add_version(parts, spec.name, {"slow_ms": 3}, approve=False)
    second = add_version(parts, spec.name, approve=False)
    client = connect(parts.registry.tracking_uri)  # type: ignore[attr-defined]
    for name, value in (("mlops.approved_by", "anna"), ("mlops.approval", "approved")):
        client.set_model_version_tag(spec.name, "1", name, value)
    decide(parts, second)
    with unmounted(stored_model(parts, first).parent):
        version, (told,) = rollouts.waiting(parts, spec, now())
    assert (version and version.number, "does not count" in told, "nothing is found at" in told) == (2, True, True)
    later = approvals.adopt(parts.registry, parts.ledger, spec.name, now() + approvals.LOOK_AGAIN)
    assert [v.number for v in later] == [1, 2]


def test_the_sensor_looks_at_what_runs_before_anything_else(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = live(parts)
    start(parts, spec, made := add_version(parts, spec.name))
    decide(parts, made, "rejected")

    def broken(*_: object) -> None:
        raise RuntimeError("an error that nobody thought of")

    monkeypatch.setattr(rollouts, "waiting", broken)
    names = {"artifact_cache": SimpleNamespace(root=str(parts.cache)), "data_lake": parts.lake}
    resources = {name: names.get(name) or getattr(parts, name) for name in RESOURCES}
    context = dg.build_sensor_context(resources=resources)
    with pytest.raises(RuntimeError, match="nobody thought of"):
        rollouts.build(spec).evaluate_tick(context)
    state = rollout.current(parts, spec.name)
    assert state is not None
    assert (state.phase, state.reason) == (Phase.ROLLED_BACK, "version 2 was rejected")
