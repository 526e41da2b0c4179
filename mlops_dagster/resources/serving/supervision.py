"""Supervisor (supervisord) as the keeper of processes: it starts, restarts, stops and logs; what should run is decided
elsewhere.

One detached supervisord per state folder, spoken to over a private Unix socket by its XML-RPC interface. The only program in
its own configuration is the serving host (`host.py`); every other program is one file in `host/programs/`, which the host
writes and removes.
"""

import os
import shlex
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import ServingError
from mlops_dagster.resources.serving.state import Folder, write_bytes

STOP_SECONDS = 10.0
WRONG_USAGE, WRONG_ARTIFACT, PORT_TAKEN = 2, 3, 4  # the predictor's exit codes after which starting it again cannot help
NOT_RESTARTED = (WRONG_USAGE, WRONG_ARTIFACT, PORT_TAKEN)
PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])


@dataclass(frozen=True)
class Program:
    """A command that is kept running under `name`, with what it prints in `logs/<name>.log`."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Process:
    """What the supervisor says of a program: running or not, process id (0: none), last exit code (None: not ended yet)."""

    name: str
    running: bool
    stopped: bool
    pid: int
    exit_code: int | None
    started: float


class Supervisor:
    """The supervisord of one state folder. Every method raises ServingError when it does not answer."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def alive(self) -> bool:
        """Whether it answers."""
        try:
            with self._server() as server:
                return server.supervisor.getState()["statecode"] == 1
        except ServingError:
            return False

    def start(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Start it detached from this process and its session, so that it outlives both; wait until it answers."""
        write_bytes(self.folder.host / "supervisord.conf", _main_configuration(self.folder).encode())
        done = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.folder.host / "supervisord.conf")],
            env=_environment(),
            cwd=self.folder.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
        for _ in range(100):
            if self.alive():
                return
            sleep(0.05)
        said = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise ServingError(f"the serving host did not start: {' / '.join(said) or 'see host/supervisord.log'}. Then apply again.")

    def shut_down(self, sleep: Callable[[float], None] = time.sleep, timeout_seconds: float = STOP_SECONDS + 10) -> None:
        """Stop every program, then itself; wait until all have ended."""
        pid = self.pid()
        with suppress(ServingError), self._server() as server:
            server.supervisor.shutdown()
        end = time.monotonic() + timeout_seconds
        while pid is not None and _runs(pid) and time.monotonic() < end:
            sleep(0.05)

    def pid(self) -> int | None:
        try:
            with self._server() as server:
                return int(server.supervisor.getPID())
        except ServingError:
            return None

    def processes(self) -> dict[str, Process]:
        """All programs that it keeps, by name."""
        with self._server() as server:
            return {info["name"]: _process(info) for info in server.supervisor.getAllProcessInfo()}

    def keep(self, programs: Iterable[Program]) -> bool:
        """Keep exactly these running (and the host); False while some that must go are still ending, then call again."""
        wanted = {program.name: program for program in programs}
        for path in self.folder.programs.glob("*.ini"):
            if path.stem not in wanted:
                path.unlink(missing_ok=True)
        for program in wanted.values():
            write_bytes(self.folder.programs / f"{program.name}.ini", _section(self.folder, program).encode())
        with self._server() as server:
            return self._update(server.supervisor)

    def start_again(self, name: str) -> None:
        """Start a program that has ended and was not to be restarted."""
        with suppress(ServingError), self._server() as server:
            server.supervisor.startProcess(name, False)

    def _update(self, rpc: Any) -> bool:
        added, changed, removed = rpc.reloadConfig()[0]
        settled = True
        for name in (*changed, *removed):
            if name == "host":  # it cannot end itself; its own command only changes with the package
                continue
            rpc.stopProcessGroup(name, False)
            try:
                rpc.removeProcessGroup(name)
            except xmlrpc.client.Fault:  # still running: the next call finds it in the list again
                settled = False
            else:
                added += [name] if name in changed else []
        for name in added:
            rpc.addProcessGroup(name)
        return settled

    @contextmanager
    def _server(self) -> Any:
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self.folder.socket('supervisor')}")
        try:
            with xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport) as server:
                yield server
        except (OSError, xmlrpc.client.Error, EOFError) as error:
            raise ServingError(
                f"the supervisor of the serving host does not answer ({error}). Apply again; it is then started anew."
            ) from error
        finally:
            transport.close()


def adopted(folder: Folder, name: str, command: Iterable[str], stop_seconds: float = STOP_SECONDS) -> tuple[str, ...]:
    """The command wrapped so that a survivor of a killed supervisor is taken over instead of started twice (see `adopt`)."""
    wrapper = (sys.executable, "-m", "mlops_dagster.resources.serving.adopt", "--record", str(folder.records / f"{name}.json"))
    return (*wrapper, "--stop-seconds", f"{stop_seconds:g}", "--", *command)


def last_lines(folder: Folder, name: str, lines: int = 5) -> str:
    """The end of a program's log, without machine paths, on one line; "" when it said nothing."""
    try:
        with (folder.logs / f"{name}.log").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    said = [line.strip() for line in text.splitlines() if line.strip()][-lines:]
    return (
        " | ".join(said)
        .replace(str(folder.root), "<serving>")
        .replace(sys.prefix, "<python>")
        .replace(PACKAGE_PARENT, "<package>")
    )


def _process(info: Mapping[str, Any]) -> Process:
    state = info["statename"]
    ended = info["stop"] > 0 and state in ("EXITED", "STOPPED", "FATAL", "BACKOFF")
    return Process(
        name=info["name"],
        running=state in ("STARTING", "RUNNING"),
        stopped=state in ("STOPPED", "EXITED", "FATAL"),
        pid=int(info["pid"]),
        exit_code=int(info["exitstatus"]) if ended else None,
        started=float(info["start"]),
    )


def _runs(pid: int) -> bool:
    import psutil

    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


# Feast points PROMETHEUS_MULTIPROC_DIR at a folder that it removes when the process that imported it ends; pyspark.pandas, which Pandera
# imports, has Arrow ignore time zones.
_OF_ONE_PROCESS = ("DAGSTER_RUN_", "DAGSTER_PIPES_", "PROMETHEUS_MULTIPROC", "PYARROW_IGNORE_TIMEZONE")


def _environment() -> dict[str, str]:
    """This process's environment without what belongs to one Dagster run; the package is found wherever it was found here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_ONE_PROCESS)}
    known = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(part)]
    path = os.pathsep.join(dict.fromkeys([PACKAGE_PARENT, *known]))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**kept, **threads, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _escaped(value: str) -> str:
    return value.replace("%", "%%")


def _main_configuration(folder: Folder) -> str:
    host = Program("host", (sys.executable, "-m", "mlops_dagster.resources.serving.host", "--state", str(folder.root)))
    lines = [
        "[unix_http_server]",
        f"file={_escaped(str(folder.socket('supervisor')))}",
        "chmod=0600",
        "[supervisord]",
        f"logfile={_escaped(str(folder.logs / 'supervisord.log'))}",
        "logfile_maxbytes=1MB",
        "logfile_backups=1",
        "loglevel=info",
        f"pidfile={_escaped(str(folder.host / 'supervisord.pid'))}",
        "umask=077",
        *(["user=root"] if os.getuid() == 0 else []),  # else it warns of it at every start
        f"directory={_escaped(str(folder.root))}",
        f"childlogdir={_escaped(str(folder.logs))}",
        "minfds=1024",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
        "[include]",
        "files=programs/*.ini",  # relative to this file: a path with a space would be taken for two
    ]
    return "\n".join(lines) + "\n" + _section(folder, host)


def _section(folder: Folder, program: Program) -> str:
    """One program. `startsecs=0`: exit codes and back-off are ours (`adopt`), for supervisor hides the code of an early exit."""
    values = {
        "command": _escaped(shlex.join(program.command)),
        "directory": _escaped(str(folder.root)),
        "autostart": "true",
        "autorestart": "unexpected",
        "exitcodes": ",".join(map(str, NOT_RESTARTED)),
        "startsecs": "0",
        "startretries": "1000000",
        "stopsignal": "TERM",
        "stopwaitsecs": f"{STOP_SECONDS + 5:.0f}",
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": _escaped(str(folder.logs / f"{program.name}.log")),
        "stdout_logfile_maxbytes": "1MB",
        "stdout_logfile_backups": "1",
    }
    if program.environment:
        values["environment"] = ",".join(f'{name}="{_escaped(value)}"' for name, value in program.environment)
    return f"[program:{program.name}]\n" + "".join(f"{name}={value}\n" for name, value in values.items())
