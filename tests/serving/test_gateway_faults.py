"""What dies, hangs or cannot start: callers get no error while another arm can answer, and everything comes back by itself."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import httpx
import psutil
import pytest

from benchmarks._load import Load, outcome
from mlops_dagster.core.errors import ServingError, StorageError
from mlops_dagster.core.routes import Routes
from mlops_dagster.resources.serving import Arm, Phase, ServingOptions, wait_ready
from mlops_dagster.resources.serving.embedded import EmbeddedServing
from mlops_dagster.resources.serving.envoy_admin import EnvoyAdmin
from mlops_dagster.resources.serving.envoy_config import Backend, Published
from mlops_dagster.resources.serving.envoy_listener import Gateway
from mlops_dagster.resources.serving.gateway import EnvoyFiles
from mlops_dagster.resources.serving.state import Folder, free_port
from mlops_dagster.resources.serving.supervision import Supervisor
from tests.contracts.serving.artifacts import ROW, make_arm
from tests.serving.gateway_hosts import (
    FAULTY,
    eventually,
    new_model,
    pid_of,
    predict_url,
    processes_of,
    ready,
    record,
    serving_host,
)

BODY = json.dumps(ROW).encode()
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServing]:
    with serving_host(tmp_path_factory.mktemp("faults"), predictor=FAULTY) as serving:
        yield serving


@pytest.fixture
def model(host: EmbeddedServing) -> Iterator[str]:
    name = new_model()
    yield name
    host.remove(name)


@pytest.fixture
def pair(host: EmbeddedServing, model: str, tmp_path: Path) -> tuple[Arm, Arm]:
    """A champion and a candidate with half of the requests each, both ready."""
    arms = make_arm(tmp_path, "1"), make_arm(tmp_path, "2", "candidate")
    host.apply(model, arms, Routes.split({"1": 50, "2": 50}))
    ready(host, model)
    return arms


@pytest.mark.parametrize("dying", [0, 1], ids=["champion", "candidate"])
def test_a_killed_server_costs_no_caller_an_error(host: EmbeddedServing, model: str, pair: tuple[Arm, Arm], dying: int) -> None:
    with Load(predict_url(host, model), BODY, per_second=200, connections=16) as load:
        time.sleep(1)
        victim = pid_of(host, model, pair[dying])
        os.kill(victim, signal.SIGKILL)
        time.sleep(3)
    counts = outcome(load.answers)
    assert {status for status, _ in counts} == {200}, counts
    assert len(load.answers) > 700
    assert eventually(lambda: pid_of(host, model, pair[dying]) != victim), "the server was not started again"
    ready(host, model)


def test_a_server_that_hangs_costs_time_but_no_error(host: EmbeddedServing, model: str, pair: tuple[Arm, Arm]) -> None:
    stuck = pid_of(host, model, pair[1])
    try:
        with Load(predict_url(host, model), BODY, per_second=50, connections=300) as load:
            time.sleep(1)
            os.kill(stuck, signal.SIGSTOP)
            time.sleep(10)
    finally:
        os.kill(stuck, signal.SIGCONT)
    assert {status for status, _ in outcome(load.answers)} == {200}
    newest = max(answer.due for answer in load.answers)
    late = [answer for answer in load.answers if answer.due > newest - 1]
    assert max(answer.done - answer.due for answer in late) < 1, "the stuck server is still asked"


def test_a_dead_gateway_comes_back_on_the_same_address(host: EmbeddedServing, model: str, pair: tuple[Arm, Arm]) -> None:
    url, before = predict_url(host, model), record(host, "envoy").pid
    os.kill(before, signal.SIGKILL)
    assert eventually(lambda: record(host, "envoy").pid != before)
    ready(host, model)
    assert predict_url(host, model) == url
    assert httpx.post(url, json=ROW).status_code == 200


def test_a_gateway_that_cannot_listen_says_so_and_listens_when_it_can(
    host: EmbeddedServing, model: str, pair: tuple[Arm, Arm]
) -> None:
    url, before = predict_url(host, model), record(host, "envoy").pid
    port = int(host.endpoint(model).rpartition(":")[2])
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        os.kill(before, signal.SIGKILL)
        assert eventually(lambda: _listens(squatter, port), 5)
        assert eventually(lambda: "cannot bind" in host.observe(model).problem), host.observe(model)
    ready(host, model)
    assert httpx.post(url, json=ROW).status_code == 200


def test_a_host_that_is_killed_again_and_again_ends_in_the_desired_state(
    host: EmbeddedServing, model: str, pair: tuple[Arm, Arm]
) -> None:
    supervisor = Supervisor(Folder(host.root))
    random = Random(7)
    for number in range(8):
        wanted = Routes.split({"1": 100 - 10 * number, "2": 10 * number})
        host.apply(model, pair, wanted)
        time.sleep(random.uniform(0, 0.3))
        keepers = [p for p in processes_of(host) if "-m mlops_dagster.resources.serving.host" in " ".join(p.cmdline())]
        if number % 3 == 0 and (pid := supervisor.pid()) is not None:
            keepers.append(psutil.Process(pid))
        for keeper in keepers:
            keeper.kill()
    assert ready(host, model).routes == wanted
    servers = [
        p
        for p in processes_of(host)
        if f"--model {model} " in " ".join(p.cmdline()) and "serving.adopt" not in " ".join(p.cmdline())
    ]
    assert sorted(p.pid for p in servers) == sorted(pid_of(host, model, arm) for arm in pair)


def test_a_killed_supervisor_is_replaced_and_the_servers_run_on(host: EmbeddedServing, model: str, pair: tuple[Arm, Arm]) -> None:
    supervisor = Supervisor(Folder(host.root))
    before, servers = supervisor.pid(), [pid_of(host, model, arm) for arm in pair]
    assert before is not None
    with Load(predict_url(host, model), BODY, per_second=100, connections=8) as load:
        time.sleep(0.5)
        os.kill(before, signal.SIGKILL)
        assert eventually(lambda: supervisor.pid() not in (None, before))
        time.sleep(1)
    assert {status for status, _ in outcome(load.answers)} == {200}
    ready(host, model)
    assert [pid_of(host, model, arm) for arm in pair] == servers, "a survivor was started twice instead of adopted"
    os.kill(servers[1], signal.SIGKILL)  # what was adopted is still watched
    assert eventually(lambda: pid_of(host, model, pair[1]) != servers[1])
    ready(host, model)


def test_when_all_of_the_host_died_a_look_brings_it_back(tmp_path: Path) -> None:
    with serving_host(tmp_path / "host") as serving:
        arm = make_arm(tmp_path, "1")
        serving.apply("m", [arm], Routes.all_to("1"))
        ready(serving, "m")
        server = pid_of(serving, "m", arm)
        keepers = [
            p for p in processes_of(serving) if "supervisord" in " ".join(p.cmdline()) or "serving.host" in " ".join(p.cmdline())
        ]
        assert len(keepers) == 2
        for keeper in keepers:
            keeper.kill()
        psutil.wait_procs(keepers, timeout=5)
        assert httpx.post(predict_url(serving, "m"), json=ROW).status_code == 200, "serving needs no keeper to go on"
        serving.observe("m")
        ready(serving, "m")
        assert pid_of(serving, "m", arm) == server


def test_the_host_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    arm = make_arm(tmp_path, "1")
    code = (
        "import sys; from mlops_dagster.resources.serving.embedded import EmbeddedServing\n"
        "from mlops_dagster.resources.serving import Arm, wait_ready; from mlops_dagster.core.routes import Routes\n"
        "s = EmbeddedServing(root=sys.argv[1]); s.apply('m', [Arm('1', sys.argv[2], sys.argv[3], 'champion')], Routes.all_to('1'))\n"
        "wait_ready(s, 'm', 45)"
    )
    with serving_host(tmp_path / "host") as serving:
        command = [sys.executable, "-c", code, serving.root, arm.artifact, arm.sha256]
        starter = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        assert starter.wait(timeout=60) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGTERM)  # nothing is left in its session
        assert httpx.post(predict_url(serving, "m"), json=ROW).status_code == 200
        serving.stop()
        assert processes_of(serving) == []
        assert serving.observe("m").arms["1"].phase is Phase.STOPPED
        serving.start()
        ready(serving, "m")


def test_a_server_that_keeps_ending_fails_with_its_last_words(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    ending = make_arm(tmp_path, "2", "candidate", extra={"faults.json": '{"exit": 7}'})
    host.apply(model, [ending], Routes.all_to("2"))
    with pytest.raises(ServingError, match=r"3 times in a row.*the server ends as asked for"):
        wait_ready(host, model, 45)
    again = record(host, f"{model}--2--{ending.sha256[:8]}").launched
    assert eventually(lambda: record(host, f"{model}--2--{ending.sha256[:8]}").launched > again), "it is tried again, slowly"


def test_a_server_that_never_becomes_ready_fails_in_time(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    silent = make_arm(tmp_path, "2", "candidate", extra={"faults.json": '{"never_ready": true}'})
    host.apply(model, [silent], Routes.all_to("2"), ServingOptions(start_seconds=3))
    with pytest.raises(ServingError, match=r"not become ready within 3 s.*the server never listens") as raised:
        wait_ready(host, model, 45)
    assert str(tmp_path) not in str(raised.value)


def test_a_changed_artifact_is_refused_once_and_not_started_again(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    arm = make_arm(tmp_path, "1")
    Path(arm.artifact, "model.onnx").write_bytes(b"changed")
    host.apply(model, [arm], Routes.all_to("1"))
    with pytest.raises(ServingError, match=r"refused the artifact.*bytes changed"):
        wait_ready(host, model, 45)
    launched = record(host, f"{model}--1--{arm.sha256[:8]}").launched
    time.sleep(3)
    assert record(host, f"{model}--1--{arm.sha256[:8]}").launched == launched


def test_an_old_version_runs_on_for_its_grace_time(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    arms = make_arm(tmp_path, "1"), make_arm(tmp_path, "2", "candidate")
    options = ServingOptions(grace_seconds=4)
    host.apply(model, arms, Routes.split({"1": 50, "2": 50}), options)
    ready(host, model)
    old = pid_of(host, model, arms[1])
    host.apply(model, arms[:1], Routes.all_to("1"), options)
    assert eventually(lambda: host.observe(model).warm == ("2",), 3)
    host.apply(model, arms, Routes.all_to("2"), options)  # the way back needs no start
    ready(host, model)
    assert pid_of(host, model, arms[1]) == old
    host.apply(model, arms[:1], Routes.all_to("1"), options)
    assert eventually(lambda: not psutil.pid_exists(old), 15)
    assert eventually(lambda: host.observe(model).warm == ())


def test_a_port_that_was_taken_since_is_replaced(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    arm = make_arm(tmp_path, "1")
    host.apply(model, [arm], Routes.all_to("1"))
    ready(host, model)
    fleet = json.loads((Folder(host.root).host / "fleet.json").read_text())
    port = int(next(m["address"] for m in fleet.values() if m["model"] == model).rpartition(":")[2])
    server = psutil.Process(pid_of(host, model, arm))
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.kill()
        assert eventually(lambda: _listens(squatter, port), 5)
        assert eventually(lambda: _address(host, model) != port, 30)
        ready(host, model)
        assert httpx.post(predict_url(host, model), json=ROW).status_code == 200


def _listens(squatter: socket.socket, port: int) -> bool:
    try:
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
    except OSError:
        return False
    return True


def _address(host: EmbeddedServing, model: str) -> int:
    fleet = json.loads((Folder(host.root).host / "fleet.json").read_text())
    return int(next(m["address"] for m in fleet.values() if m["model"] == model).rpartition(":")[2])


def test_a_taken_gateway_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        port = squatter.getsockname()[1]
        with serving_host(tmp_path / "host", port=port) as serving, pytest.raises(ServingError, match=f"{port}.*is taken"):
            serving.apply("m", [make_arm(tmp_path, "1")], Routes.all_to("1"))


def test_a_configuration_that_envoy_finds_invalid_never_goes_live(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.make()
    files = EnvoyFiles(folder, EnvoyAdmin(folder.socket("admin")))
    gateway = Gateway("127.0.0.1", free_port())
    files.command(gateway, 1)
    before = {path.name: path.read_bytes() for path in folder.envoy.glob("?ds.json")}
    routes = Routes.all_to("1")
    wrong = Published("m", (Backend("1", "127.0.0.1:99999"),), routes, {"1": ("1",)}, ServingOptions())
    with pytest.raises(ServingError, match=r"invalid, the live one stays.*[Pp]ort") as raised:
        files.publish(gateway, {"m": wrong})
    assert str(tmp_path) not in str(raised.value)
    assert {path.name: path.read_bytes() for path in folder.envoy.glob("?ds.json")} == before


def test_a_full_disk_keeps_the_old_state(host: EmbeddedServing, model: str, tmp_path: Path) -> None:
    arm = make_arm(tmp_path, "1")
    host.apply(model, [arm], Routes.all_to("1"))
    ready(host, model)
    code = (
        "import resource, signal, sys; from mlops_dagster.core.errors import StorageError\n"
        "from mlops_dagster.resources.serving.state import Desired, Folder, write_json\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        "folder = Folder(sys.argv[1]); wanted = folder.model(sys.argv[2]).to_json(); wanted['options']['grace_seconds'] = 1.5\n"
        "try: write_json(folder.desired_file(sys.argv[2]), wanted)\n"
        "except StorageError as error: print(error)\n"
        "else: sys.exit('written')"
    )
    done = subprocess.run([sys.executable, "-c", code, host.root, model], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "cannot write it" in done.stdout) == (0, True), done
    assert ready(host, model).ready
    assert [path.name for path in Folder(host.root).desired.glob(".*")] == []


def test_damaged_state_is_reported_and_serving_goes_on(host: EmbeddedServing, model: str, pair: tuple[Arm, Arm]) -> None:
    Folder(host.root).desired_file(model).write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        host.observe(model)
    time.sleep(1)
    for _ in range(10):
        assert httpx.post(predict_url(host, model), json=ROW).status_code == 200
    host.apply(model, pair, Routes.all_to("1", warm=["2"]))
    ready(host, model)
