"""`mlops up` and the command line, as a user meets them: an empty state folder, real servers, Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
import time
import typing
from pathlib import Path

import httpx
import psutil
import pytest

from mlops_dagster import backends, processes
from mlops_dagster.core.spec import Features, Training, Tuning
from mlops_dagster.profiles import Settings, embedded

MLOPS = str(Path(sys.executable).parent / "mlops")
START_SECONDS = 180


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def environment(tmp_path):
    return {**os.environ, "MLOPS_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}


def test_all_pages_answer_and_ctrl_c_leaves_nothing_behind(environment, tmp_path):
    ports = {name: free_port() for name in ("dagster", "mlflow", "evidently")}
    command = [MLOPS, "up", *(part for name, port in ports.items() for part in (f"--{name}-port", str(port)))]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as up:
        try:
            waiting, deadline = dict(ports), time.monotonic() + START_SECONDS
            while waiting and time.monotonic() < deadline and up.poll() is None:
                waiting = {name: port for name, port in waiting.items() if not answers(port)}
                time.sleep(0.5)
            started = [p.pid for p in psutil.Process(up.pid).children(recursive=True)] if up.poll() is None else []
        finally:
            up.send_signal(signal.SIGINT)
            told = up.communicate(timeout=60)[0]
    assert waiting == {}, told
    assert len(started) >= 3
    assert up.returncode == 0, told
    assert f":{ports['dagster']}" in told
    assert told.rstrip().endswith("stopped")
    gone = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in started) and time.monotonic() < gone:
        time.sleep(0.2)
    assert [pid for pid in started if psutil.pid_exists(pid)] == []


def test_an_mlflow_that_does_not_answer_is_told_before_anything_is_started(environment, tmp_path):
    address = f"http://u:hunter2@127.0.0.1:{free_port()}"
    settings = {"MLOPS_MLFLOW_URL": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = subprocess.run(
        [MLOPS, "up"], env={**environment, **settings}, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 1
    assert f"MLOPS_MLFLOW_URL is '{address.replace('hunter2', '***')}', which cannot be used: " in done.stderr
    assert "Connection refused" in done.stderr
    assert "without MLOPS_MLFLOW_URL `mlops up` starts an MLflow server of its own" in done.stderr
    assert "hunter2" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("named", "started"),
    [
        (None, "sqlite:////state/mlflow/mlflow.db"),
        ("postgresql://u:hunter2@h/runs", "postgresql://u:hunter2@h/runs"),
        ("http://u:hunter2@h:5000", None),
    ],
)
def test_the_mlflow_page_is_of_the_address_that_is_set_and_no_password_is_on_a_command_line(named, started):
    address = backends.mlflow_address(Path("/state"), named)
    pages = processes.commands(Path("/state"), "127.0.0.1", {"dagster": 1, "mlflow": 2, "evidently": 3}, address)
    (page,) = (page for page in pages if page.name == "MLflow")
    assert dict(page.environment).get("MLFLOW_BACKEND_STORE_URI") == started
    assert (page.url, bool(page.command)) == (("http://127.0.0.1:2", True) if started else ("http://u:***@h:5000", False))
    assert "hunter2" not in repr(pages)


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", follow_redirects=True, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["approve", "nobody", "1", "--by", "me"], "NotFoundError: nobody has no version 1; it has: none"),
        (["predict", "nobody", "{}"], "nobody"),
        (["rollout", "pause", "nobody", "--by", "me"], "declares no model 'nobody'; it declares: arrival_delay, flight_delay"),
        (["rollback", "flight_delay", "--by", "me"], "there has been no rollout of this model yet"),
        (["demo", "--restart"], "was not made by a demo"),
    ],
)
def test_an_error_is_a_paragraph_not_a_traceback(command, words, environment, tmp_path):
    (tmp_path / "state").mkdir()
    done = subprocess.run(
        [MLOPS, *command], env=environment, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_ledger_verifies_and_nothing_is_live(environment):
    done = subprocess.run([MLOPS, "ledger", "verify"], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "0 entries, the chain is whole")


def test_every_engine_that_a_declaration_may_name_has_its_resource():
    names = {
        f"{prefix}_{engine}"
        for prefix, section in (("feature_engine", Features), ("training", Training), ("tuning", Tuning))
        for engine in typing.get_args(section.model_fields["engine"].annotation)
        if engine != "none"
    }
    assert names <= embedded(Settings()).keys()
