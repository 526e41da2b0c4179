"""Start, stop and what must not start: the predictor as a process."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from predictor_processes import ROOT, Model, Process, Starter, command, launch, wait_until


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("file", ["model.onnx", "signature.json", "extra.txt"])
def test_an_artifact_with_other_bytes_is_never_served(number_model: Model, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(number_model.folder, folder)
    with open(folder / file, "ab") as stream:
        stream.write(b"\n")
    ended = run([*command(Model(**{**vars(number_model), "folder": folder}))])
    assert ended.returncode == 3
    assert number_model.sha256 in ended.stderr
    assert "its bytes changed" in ended.stderr
    assert "listens" not in ended.stdout


def test_a_missing_folder_and_a_missing_model_end_with_3(number_model: Model, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        ended = run(command(Model(**{**vars(number_model), "folder": folder})))
        assert (ended.returncode, str(folder) in ended.stderr) == (3, True)


def test_a_taken_port_is_said_and_nothing_else_happens(number_model: Model, served_numbers: Process, tmp_path: Path) -> None:
    ended = run([*command(number_model), "--port", str(served_numbers.port), "--log-root", str(tmp_path / "log")])
    assert ended.returncode == 4
    assert f"cannot listen on 127.0.0.1:{served_numbers.port}" in ended.stderr
    assert not (tmp_path / "log").exists()


def test_an_unusable_log_folder_ends_with_5(number_model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = run([*command(number_model), "--log-root", str(tmp_path / "file")])
    assert (ended.returncode, "--log-root" in ended.stderr) == (5, True)


@pytest.mark.parametrize("options", [["--timezone", "Mars/Base"], ["--version", "a/b"], ["--arm", ""], ["--port", "x"]])
def test_wrong_options_end_with_2(number_model: Model, options: list[str]) -> None:
    assert run([*command(number_model), *options]).returncode == 2


def test_it_listens_on_loopback_only(served_numbers: Process) -> None:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    addresses = {r[1].split(":")[0] for r in rows if r[3] == "0A" and int(r[1].split(":")[1], 16) == served_numbers.port}
    assert addresses == {"0100007F"}


def test_while_it_drains_it_is_not_ready_but_answers(start: Starter, number_model: Model) -> None:
    process = start(number_model, "--drain-seconds", "1.5")
    with httpx.Client(base_url=process.url) as client:
        assert client.get("/v2/health/ready").status_code == 200
        process.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/v2/health/ready").status_code == 503)
        assert client.get("/v1/models/m").status_code == client.get("/v2/models/m/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200
        assert client.post("/v1/models/m:predict", json={"instances": number_model.instances(1)}).status_code == 200
    assert process.popen.wait(10) == 0
    assert not listening(process.port)


def test_a_request_in_flight_when_it_stops_is_answered(start: Starter, number_model: Model) -> None:
    process = start(number_model)
    body = httpx.Request("POST", "http://x", json={"instances": number_model.instances(1)}).content
    with socket.create_connection(("127.0.0.1", process.port)) as caller:
        caller.sendall(b"POST /v1/models/m:predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:20])
        time.sleep(0.3)
        process.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: not listening(process.port))
        caller.sendall(body[20:])
        assert b"200 OK" in caller.recv(4096)
    assert process.popen.wait(10) == 0


def test_a_caller_that_never_ends_does_not_hold_up_the_stop(start: Starter, number_model: Model) -> None:
    process = start(number_model, "--grace-seconds", "0.5")
    with socket.create_connection(("127.0.0.1", process.port)) as caller:
        caller.sendall(b"POST /v1/models/m:predict HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n")
        time.sleep(0.2)
        assert process.stop(5) == 0
    assert "were cut" in process.text()


def test_slow_senders_hold_up_nobody(served_numbers: Process, number_model: Model) -> None:
    slow = [socket.create_connection(("127.0.0.1", served_numbers.port)) for _ in range(50)]
    try:
        for caller in slow:
            caller.sendall(b"POST /v1/models/m:predict HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
        begin = time.monotonic()
        answer = httpx.post(f"{served_numbers.url}/v1/models/m:predict", json={"instances": number_model.instances(1)}, timeout=5)
        assert answer.status_code == 200
        assert time.monotonic() - begin < 2
    finally:
        for caller in slow:
            caller.close()


@pytest.mark.parametrize("framing", [b"content-length: 500", b"transfer-encoding: chunked"])
def test_a_body_that_never_ends_is_given_up(number_model: Model, framing: bytes, tmp_path: Path) -> None:
    script = tmp_path / "impatient.py"
    script.write_text(
        "from mlops_dagster.serving import server\nserver.SWEEP_SECONDS, server.BODY_SECONDS = 0.1, 0.5\nserver.main()\n"
    )
    process = launch([sys.executable, str(script), *command(number_model)[3:]])
    try:
        with socket.create_connection(("127.0.0.1", process.port)) as caller:
            caller.sendall(b"POST /v1/models/m:predict HTTP/1.1\r\nhost: x\r\n" + framing + b"\r\n\r\n")
            caller.settimeout(5)
            assert caller.recv(4096).startswith(b"HTTP/1.1 408")
            assert caller.recv(4096) == b""
        assert httpx.get(f"{process.url}/v2/health/live").status_code == 200
    finally:
        process.kill()


@pytest.mark.parametrize("length", [b"+5", b"5, 5", b"-1", b"99999999999999999999999", b"0x5", b""])
def test_odd_content_lengths_are_refused(served_numbers: Process, length: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served_numbers.port)) as caller:
        caller.sendall(b"POST /v1/models/m:predict HTTP/1.1\r\nhost: x\r\ncontent-length: " + length + b"\r\n\r\n{}abc")
        caller.settimeout(5)
        assert caller.recv(4096).startswith(b"HTTP/1.1 4")


def test_no_answer_is_lost_when_it_stops_under_load(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--drain-seconds", "0.3")
    answered, failed = [], []

    def send() -> None:
        with httpx.Client() as client:
            while True:
                try:
                    answer = client.post(f"{process.url}/v1/models/m:predict", json={"instances": number_model.instances(1)})
                except httpx.ConnectError:
                    return
                except httpx.HTTPError as error:
                    # A kept connection that is idle may be closed just as a caller reuses it; a request that was read is never dropped.
                    failed.append(error)
                    return
                answered.append(answer.headers["x-request-id"])
                assert answer.status_code == 200

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    wait_until(lambda: len(answered) > 100)
    assert process.stop() == 0
    for sender in senders:
        sender.join()
    from mlops_dagster.serving.segments import days, read_segments

    stored = {i for d in days(tmp_path, "m") for i in read_segments(tmp_path, "m", d)["request_id"].to_pylist()}
    assert set(answered) <= stored


def test_it_ends_with_the_process_that_started_it(number_model: Model) -> None:
    port = free_port()
    arguments = [*command(number_model), "--port", str(port), "--die-with-parent"]
    script = f"import subprocess, time; p = subprocess.Popen({arguments!r}); print(p.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    try:
        wait_until(lambda: listening(port), 30)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not listening(port))


def test_status_says_what_is_served(served_numbers: Process, number_model: Model) -> None:
    status = httpx.get(f"{served_numbers.url}/admin/status").json()
    assert (status["version"], status["sha256"], status["pid"]) == ("7", number_model.sha256, served_numbers.popen.pid)
