"""API keys of models, enforced by the real gateway."""

import datetime as dt
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import Result
from gateway_hosts import FAULTY, eventually, predict_url, ready, serving_host
from typer.testing import CliRunner

from mlops_dagster import cli, cli_keys
from mlops_dagster.core.errors import DeclarationError, NotFoundError, StorageError
from mlops_dagster.core.routes import Routes
from mlops_dagster.requests import client_of
from mlops_dagster.resources.serving import client_keys
from mlops_dagster.resources.serving.embedded import EmbeddedServing, hash_api_key
from mlops_dagster.resources.serving.start import wake
from mlops_dagster.resources.serving.state import Folder
from tests.contracts.serving.artifacts import ROW, make_arm

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServing]:
    """Two models behind one gateway; `kept` is the one that gets keys."""
    root = tmp_path_factory.mktemp("keys")
    with serving_host(root / "host", predictor=FAULTY) as host:
        for model in ("kept", "open"):
            host.apply(model, [make_arm(root / model, "1")], Routes.all_to("1"))
        for model in ("kept", "open"):
            ready(host, model)
        yield host


def status(client: httpx.Client, serving: EmbeddedServing, model: str, key: str = "") -> int:
    return client.post(predict_url(serving, model), json=ROW, headers={"x-api-key": key} if key else {}).status_code


def test_keys_are_of_one_model_and_hold_at_once_on_open_connections(serving: EmbeddedServing) -> None:
    folder = Folder(serving.root)
    with httpx.Client() as client:
        assert status(client, serving, "kept") == 200
        client_keys.add(folder, "kept", "dashboard", "first-key", NOW)
        client_keys.add(folder, "kept", "batch", "second-key", NOW)
        wake(folder)
        assert eventually(lambda: status(client, serving, "kept") == 401, 5)
        assert [status(client, serving, "kept", key) for key in ("first-key", "second-key", "other")] == [200, 200, 401]
        bearer = client.post(predict_url(serving, "kept"), json=ROW, headers={"authorization": "Bearer first-key"})
        assert bearer.status_code == 200
        assert client.get(f"{serving.endpoint('kept')}/v2/models/kept").status_code == 401
        assert client.get(f"{serving.endpoint('kept')}/v2/health/ready").status_code == 200
        assert status(client, serving, "open") == 200
        assert client_of(serving, "kept").predict("kept", ROW["instances"])["predictions"] == [1]
        assert eventually(lambda: '"client":"batch"' in (folder.logs / "access.jsonl").read_text())
        client_keys.revoke(folder, "kept", "dashboard")
        wake(folder)
        assert eventually(lambda: status(client, serving, "kept", "first-key") == 401, 5)
        assert status(client, serving, "kept", "second-key") == 200
        client_keys.revoke(folder, "kept", "batch")
        wake(folder)
        assert eventually(lambda: status(client, serving, "kept", "second-key") == 401, 5)
        assert status(client, serving, "kept") == 401
        client_keys.open_to_all(folder, "kept")
        wake(folder)
        assert eventually(lambda: status(client, serving, "kept") == 200, 5)


def test_only_digests_are_kept(serving: EmbeddedServing) -> None:
    folder = Folder(serving.root)
    client_keys.add(folder, "kept", "dashboard", "a-secret-that-is-nowhere", NOW)
    wake(folder)
    with httpx.Client() as client:
        assert eventually(lambda: status(client, serving, "kept") == 401, 5)
        assert status(client, serving, "kept", "a-secret-that-is-nowhere") == 200
    files = [path for path in folder.root.rglob("*") if path.is_file()]
    assert not [path for path in files if b"a-secret-that-is-nowhere" in path.read_bytes()]
    assert [path for path in files if hash_api_key("a-secret-that-is-nowhere").encode() in path.read_bytes()]
    own = folder.host / "own.key"
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    assert [path for path in files if own.read_bytes() in path.read_bytes()] == [own]
    client_keys.open_to_all(folder, "kept")


def test_an_empty_key_is_none_even_where_the_platforms_own_was_lost(serving: EmbeddedServing) -> None:
    folder = Folder(serving.root)
    client_keys.add(folder, "kept", "dashboard", "key", NOW)
    (folder.host / "own.key").write_text("")
    wake(folder)
    with httpx.Client() as client:
        assert eventually(lambda: status(client, serving, "kept") == 401, 5)
        empty = client.post(predict_url(serving, "kept"), json=ROW, headers={"x-api-key": ""})
        assert (empty.status_code, "an API key is needed" in empty.text) == (401, True)
        assert len(client_keys.own_key(folder)) == 43
        client_keys.open_to_all(folder, "kept")
        wake(folder)
        assert eventually(lambda: status(client, serving, "kept") == 200, 5)


def test_a_damaged_file_lets_nobody_in(serving: EmbeddedServing) -> None:
    folder = Folder(serving.root)
    client_keys.add(folder, "kept", "dashboard", "key", NOW)
    (folder.root / "keys/kept.json").write_text("{")
    wake(folder)
    with httpx.Client() as client:
        assert eventually(lambda: status(client, serving, "kept") == 401, 5)
        assert status(client, serving, "kept", "key") == 401
    with pytest.raises(StorageError, match=r"kept\.json: the file is damaged"):
        client_keys.clients(folder, "kept")
    client_keys.open_to_all(folder, "kept")
    wake(folder)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "serving")
    client_keys.add(folder, "m", "one", "k", NOW)
    with pytest.raises(DeclarationError, match="one has a key since 2026-01-01T00:00:00"):
        client_keys.add(folder, "m", "one", "k", NOW)
    for name in ("", "a b", 'x"', "platform"):
        with pytest.raises(DeclarationError, match="client name"):
            client_keys.add(folder, "m", name, "k", NOW)
    with pytest.raises(NotFoundError, match="no client 'two' has a key; there are: one"):
        client_keys.revoke(folder, "m", "two")
    with pytest.raises(DeclarationError, match="model is"):
        client_keys.add(folder, "../m", "one", "k", NOW)
    assert client_keys.clients(folder, "m") == {"one": "2026-01-01T00:00:00+00:00"}
    assert client_keys.clients(folder, "n") is None


def test_the_command_prints_a_key_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path / "serving")
    folder.make()
    folder.desired_file("m").write_text("{}")

    runner = CliRunner(env={"MLOPS_HOME": str(tmp_path)})

    def keys(*words: str) -> Result:
        return runner.invoke(cli.app, ["keys", *words])

    assert keys("list", "m").stdout == "m asks for no key\n"
    key = keys("add", "m", "dashboard").stdout.strip()
    assert len(key) == 43
    assert list(client_keys.digests(folder)["m"].values()).count("dashboard") == 1
    assert client_keys.digests(folder)["m"][hash_api_key(key)] == "dashboard"
    assert keys("list", "m").stdout.startswith("dashboard  20")
    assert keys("revoke", "m", "dashboard").stdout == "m answers dashboard no more\n"
    assert "answers nobody" in keys("list", "m").stdout
    digest = hash_api_key(keys("add", "m", "batch").stdout.strip())
    folder.envoy.mkdir(exist_ok=True)
    (folder.envoy / "rds.json").write_text(digest)
    monkeypatch.setattr(cli_keys, "TAKEN_SECONDS", 0.1)
    assert "may still accept it: the serving host does not run" in str(keys("revoke", "m", "batch").exception)
    assert keys("open", "m").exit_code == 0
    assert client_keys.clients(folder, "m") is None
    refused = keys("add", "nobody", "x").exception
    assert isinstance(refused, NotFoundError)
    assert "model 'nobody': no version of it" in str(refused)
