"""What commands print after a decision and about a moment, and how they refuse what is typed wrong: in words, never a traceback."""

import datetime as dt
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mlops_dagster import cli, reproduce
from mlops_dagster.assets import rollout
from mlops_dagster.assets.rollout import Parts
from mlops_dagster.core import rollout as engine
from mlops_dagster.core.analysis import Verdict
from mlops_dagster.core.errors import DataError, ServingError
from mlops_dagster.core.ledger import PROMOTION, ROLLBACK, ROLLOUT_STEP, NewEntry
from mlops_dagster.core.rollout import Command, Phase
from mlops_dagster.core.rollout_gates import Outcome
from mlops_dagster.core.routes import Match, Mirror, Routes
from mlops_dagster.core.strategies import RolloutPolicy
from mlops_dagster.processes import require_free
from mlops_dagster.resources.registry import Version
from tests.lifecycle.rollout_site import add_version, decide, parts_in

NOW = dt.datetime(2024, 2, 1, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return parts_in(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def model(parts: Parts, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A model of each test's own, on the real registry and ledger."""
    monkeypatch.setattr(cli, "resources", lambda: {"registry": parts.registry, "ledger": parts.ledger, "serving": parts.serving})
    return re.sub(r"\W", "_", request.node.name)[-50:]


def mlops(*words: str) -> str:
    done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the console script says on stderr as one line; it ends with a code, and raises nothing else."""
    monkeypatch.setattr("sys.argv", ["mlops", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    assert (ended.value.code in (1, 2), told.out) == (True, "")
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", told.err).split())


def brought_in(parts: Parts, version: Version, champion: str | None, phase: Phase, back: bool = False) -> None:
    """The ledger's entries of a rollout that came to `phase`, and of the way back from it."""
    state, action = engine.begin(rollout.rollout_id(version), version.model, champion, str(version.number), RolloutPolicy(), NOW)
    parts.ledger.append(engine.record(None, state, action, None, NOW))
    while state.phase is not phase:
        name = "promote" if phase is Phase.PROMOTED and state.step >= 0 else "abort"
        signal: Any = Verdict(Outcome.PASS) if state.step < 0 and phase is not Phase.ABORTED else Command(name, "ann")
        new, action = engine.advance(state, signal, RolloutPolicy(), NOW)
        parts.ledger.append(engine.record(state, new, action, signal, NOW))
        state = new
    if back:
        state, action = engine.way_back(state, RolloutPolicy(), NOW, "rollback by ann")
        parts.ledger.append(engine.record(None, state, action, None, NOW))


def test_an_approval_says_what_follows(parts: Parts, model: str) -> None:
    add_version(parts, model, approve=False)
    assert (
        mlops("approve", model, "1", "--by", "ann")
        == f"{model} version 1 approved by ann; the sensor {model}_rollouts brings it in"
    )


def test_an_approval_that_was_there_before_stands(parts: Parts, model: str) -> None:
    made = add_version(parts, model)
    assert made.approval is not None
    said = mlops("approve", model, "1", "--by", "bob")
    at = made.approval.at.isoformat(timespec="seconds")  # type: ignore[union-attr]
    assert said == (
        f"{model} version 1 was approved before, by tester at {at}: that stands, nothing was changed; "
        f"the sensor {model}_rollouts brings it in"
    )


def test_a_rejection_that_was_there_before_stands(parts: Parts, model: str) -> None:
    made = add_version(parts, model, approve=False)
    assert mlops("reject", model, "1", "--by", "ann") == f"{model} version 1 rejected by ann"
    assert mlops("reject", model, "1", "--by", "bob").startswith(f"{model} version 1 was rejected before, by ann at ")
    assert made.number == 1


@pytest.mark.parametrize(
    ("phase", "back", "words"),
    [
        (Phase.PENDING, False, "its rollout is under way (pending)"),
        (Phase.PROMOTED, False, "it is the champion already"),
        (Phase.PROMOTED, True, "it is the champion already"),
        (
            Phase.ABORTED,
            False,
            "it had its rollout (aborted), so no sensor brings it in; `mlops rollout start {model} --version 1` does",
        ),
    ],
    ids=["under_way", "promoted", "way_back", "aborted"],
)
def test_a_version_that_had_its_rollout_is_not_promised(parts: Parts, model: str, phase: Phase, back: bool, words: str) -> None:
    made = add_version(parts, model)
    brought_in(parts, made, "0", phase, back)
    said = mlops("approve", model, "1", "--by", "bob")
    assert said.endswith(f"; {words.format(model=model)}"), said


def test_a_version_older_than_the_champion_or_than_another_approved_one_is_not_promised(parts: Parts, model: str) -> None:
    first, second, third = (add_version(parts, model, approve=False) for _ in range(3))
    decide(parts, third)
    said = mlops("approve", model, str(second.number), "--by", "ann")
    assert said.endswith(
        f"; version 3, which is newer, is approved too, so no sensor brings it in; `mlops rollout start {model} --version 2` does"
    ), said
    brought_in(parts, third, None, Phase.PROMOTED)
    said = mlops("approve", model, str(first.number), "--by", "ann")
    assert said.endswith(
        f"; it is older than the champion, version 3, so no sensor brings it in; `mlops rollout start {model} --version 1` does"
    ), said


def test_live_prints_every_share_and_what_made_the_champion(parts: Parts, model: str) -> None:
    steps = [
        (PROMOTION, "3", Routes.all_to("3"), "watch: passed"),
        (ROLLOUT_STEP, "4", Routes.split({"3": 50, "4": 50}), "canary 20 %: passed; now canary 50 %"),
        (ROLLBACK, "4", Routes.all_to("3"), "failed requests: proven worse"),
        (ROLLOUT_STEP, "5", Routes.split({"3": 100}, mirror=Mirror("5", 500), match=Match("x-arm", "5", "5")), "now shadow"),
        (ROLLBACK, "3", Routes.all_to("3"), ""),
    ]
    for hour, (kind, version, routes, reason) in enumerate(steps):
        evidence = {"routes": routes.to_json(), "champion": "3"}
        parts.ledger.append(
            NewEntry(kind, model, version, "rollout", NOW + dt.timedelta(hours=hour), reason, evidence, f"{model}/{hour}")
        )
    first, second, third, fourth, fifth = (e.sequence for e in parts.ledger.entries(model))
    crowned = f"version 3 is the champion since 2024-02-01T00:00:00+00:00 (ledger entry {first}, promotion of version 3 by rollout): watch: passed"
    assert mlops("live", model, "--at", "2024-02-01T01:30").splitlines() == [
        f"version 3: 50 %, version 4: 50 %; so since 2024-02-01T01:00:00+00:00 (ledger entry {second}, rollout_step of version 4 by rollout): "
        "canary 20 %: passed; now canary 50 %",
        crowned,
    ]
    assert mlops("live", model, "--at", "2024-02-01T03:30+01:00").splitlines() == [
        f"version 3: 100 %; so since 2024-02-01T02:00:00+00:00 (ledger entry {third}, rollback of version 4 by rollout): "
        "failed requests: proven worse",
        crowned,
    ]
    assert mlops("live", model, "--at", "2024-02-01T03:00").splitlines()[0] == (
        "version 3: 100 %, requests with x-arm: 5 go to version 5, copies of 50 % go to version 5, whose answers nobody gets; "
        f"so since 2024-02-01T03:00:00+00:00 (ledger entry {fourth}, rollout_step of version 5 by rollout): now shadow"
    )
    assert f"(ledger entry {fifth}, rollback to version 3 by rollout)" in mlops("live", model).splitlines()[0]
    assert mlops("live", model, "--at", "2024-01-31") == f"nothing of {model} was live at 2024-01-31T00:00:00+00:00"


WRONG = {
    "moment": (["live", "m", "--at", "yesterday"], "Invalid value for '--at': 'yesterday'", "give a moment such as"),
    "month": (["live", "m", "--at", "2024-13-01"], "month must be in 1..12", "give a moment such as"),
    "no file": (["predict", "m", "@/nofile"], "'@/nofile': the file cannot be read (No such file", "give @ and a file of JSON"),
    "folder": (["predict", "m", "@."], "'@.': the file cannot be read (Is a directory)", "give @ and a file of JSON"),
    "bytes": (["predict", "m", "@{tmp}/bytes"], "the file is not UTF-8 text", "give @ and a file of JSON"),
    "no JSON": (["predict", "m", "@{tmp}/text"], "Invalid value for instances: not JSON in", "a list of rows, or @FILE"),
    "no JSON text": (["predict", "m", "{"], "Invalid value for instances: not JSON (", "a list of rows, or @FILE"),
    "deep": (["predict", "m", "[" * 5000], "Invalid value for instances: not JSON (", "a list of rows, or @FILE"),
    "day": (["demo", "--through", "yesterday"], "Invalid value for '--through': 'yesterday'", "give a day such as 2013-06-30"),
    "folder of a file": (
        ["demo", "--json", "/nofolder/x"],
        "for '--json': '/nofolder/x' cannot be written",
        "folder that exists",
    ),
    "port": (["up", "--dagster-port", "99999"], "Invalid value for '--dagster-port'", "less than or equal to 65535"),
    "live": (["live", "nosuch"], "the ledger has no entry of a model 'nosuch'", "it has entries of:"),
    "ledger": (["ledger", "show", "nosuch"], "the ledger has no entry of a model 'nosuch'", "it has entries of:"),
}


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(("words", "said", "remedy"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_refused_by_name(
    words: list[str], said: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    (tmp_path / "text").write_text("{")
    monkeypatch.setenv("MLOPS_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "400")
    told = refused(monkeypatch, capsys, *(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert said in told
    assert remedy in told


@pytest.mark.parametrize(
    ("name", "value", "said", "words"),
    [
        ("MLOPS_HOME", "{tmp}/file", "the state folder {tmp}/file cannot be made or used", ["status"]),
        ("MLOPS_HOME", "{tmp}/file/below", "set MLOPS_HOME to a folder that can be written", ["live", "m"]),
        ("MLOPS_PROFILE", "nonsense", "MLOPS_PROFILE is 'nonsense': Input should be 'embedded'", ["status"]),
        ("MLOPS_PROFILE", "nonsense", "MLOPS_PROFILE is 'nonsense': Input should be 'embedded'", ["trace", "r1"]),
    ],
)
def test_a_wrong_setting_is_refused_by_name(
    name: str,
    value: str,
    said: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MLOPS_HOME", str(tmp_path / "state"))
    monkeypatch.setenv(name, value.replace("{tmp}", str(tmp_path)))
    assert said.replace("{tmp}", str(tmp_path)) in refused(monkeypatch, capsys, *words)


def test_a_host_that_is_no_address_is_named() -> None:
    with pytest.raises(ServingError, match="--host 'no such host' is no address of this machine"):
        require_free("dagster", "no such host", 0)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="--keep .*file/below: it cannot be made"), reproduce._folder(tmp_path / "file" / "below"):
        pass
