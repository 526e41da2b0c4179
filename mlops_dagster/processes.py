"""`mlops up`: the pages and the model servers as one process tree that ends cleanly."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops_dagster import backends, instance
from mlops_dagster.core import addresses
from mlops_dagster.core.errors import MlopsError, ServingError, StorageError
from mlops_dagster.declared import root_module

if TYPE_CHECKING:
    from mlops_dagster.resources.serving.embedded import EmbeddedServing

STOP_SECONDS = 20


@dataclass(frozen=True)
class Page:
    """A server: its name, its address, and the command that starts it with these additions to the environment; none where it runs already."""

    name: str
    url: str
    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = field(default=(), repr=False)


def up(root: Path, host: str, ports: dict[str, int]) -> int:
    """Start everything, print the addresses, wait for Ctrl-C or for a process to end. Returns an exit code.

    Raises ServingError naming a port that is taken or an MLflow server that does not answer, StorageError for a state folder
    that cannot be written.
    """
    from mlops_dagster.profiles import Settings

    address = backends.mlflow_address(root, Settings().mlflow_url)
    own = {name: port for name, port in ports.items() if name != "mlflow" or not _served(address)}
    for name, port in own.items():
        require_free(name, host, port)
    if _served(address):
        require_mlflow(address)
    instance.prepare(root)
    pages = commands(root, host, ports, address)
    serving = start_serving()
    logs = root / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        running = {page: start(page, logs) for page in pages if page.command}
    except OSError as error:
        raise StorageError(f"{logs} cannot be written ({error.strerror}); correct its permissions or set MLOPS_HOME") from error
    try:
        tell(pages, serving, logs)
        return wait(running, logs)
    finally:
        stop(list(running.values()))
        serving.stop()
        print("stopped")


def require_free(name: str, host: str, port: int) -> None:
    """Raises ServingError where a port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise ServingError(f"--host {host!r} is no address of this machine ({error.strerror}); use 127.0.0.1") from None
        except OSError as error:
            raise ServingError(
                f"port {port} for {name} is not free ({error.strerror}); choose another with --{name}-port"
            ) from None


def require_mlflow(address: str) -> None:
    """Raises ServingError where MLOPS_MLFLOW_URL names a server that does not answer as MLflow."""
    from mlops_dagster.resources.tracking.mlflow_connection import require_answer

    try:
        require_answer(address)
    except MlopsError as error:
        raise ServingError(
            f"MLOPS_MLFLOW_URL is {addresses.masked(address)!r}, which cannot be used: {error}. Start that server or correct the "
            "address; without MLOPS_MLFLOW_URL `mlops up` starts an MLflow server of its own"
        ) from error


def _served(mlflow_address: str) -> bool:
    """Whether an MLflow address is a running server's, not a database that a page is to be opened on."""
    return mlflow_address.startswith(("http://", "https://"))


def commands(root: Path, host: str, ports: dict[str, int], mlflow_address: str) -> list[Page]:
    """The three servers with UIs; MLflow's is not started where `mlflow_address` is a server's."""
    workspace = ["-w", "workspace.yaml"] if Path("workspace.yaml").exists() else ["-m", f"{root_module(Path.cwd())}.definitions"]
    artifacts = str(root / "mlflow" / "artifacts")
    modules = {
        "Dagster": ["dagster", "dev", *workspace],
        "MLflow": ["mlflow", "server", "--artifacts-destination", artifacts, "--workers", "1"],
        "Evidently": ["evidently.cli", "ui", "--workspace", str(root / "reports" / "workspace")],
    }
    # By the environment, for a command line shows a database's password to everybody on the machine.
    environments = {"MLflow": (("MLFLOW_BACKEND_STORE_URI", mlflow_address),)}
    pages = []
    for name, module in modules.items():
        if name == "MLflow" and _served(mlflow_address):
            pages.append(Page(name, addresses.masked(mlflow_address)))
            continue
        port = str(ports[name.lower()])
        command = (sys.executable, "-m", *module, "--host", host, "--port", port)
        pages.append(Page(name, f"http://{host}:{port}", command, environments.get(name, ())))
    return pages


def start(page: Page, logs: Path) -> "subprocess.Popen[bytes]":
    """Start a server in a process group of its own, so that Ctrl-C reaches it through us alone, once."""
    with (logs / f"{page.name.lower()}.log").open("ab") as log:
        environment = {**os.environ, **dict(page.environment)}
        return subprocess.Popen(
            page.command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )


def start_serving() -> "EmbeddedServing":
    """The serving host with every model that is deployed."""
    from mlops_dagster.profiles import Settings, embedded

    serving: Any = embedded(Settings())["serving"]
    serving.start()
    return serving


def tell(pages: list[Page], serving: "EmbeddedServing", logs: Path) -> None:
    """Print what is where."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "where")
    for page in pages:
        table.add_row(page.name, page.url)
    table.add_row("Models", serving.endpoint(""))
    table.add_row("Logs", str(logs))
    Console().print(table, "Ctrl-C stops everything.")


def wait(running: "dict[Page, subprocess.Popen[bytes]]", logs: Path) -> int:
    """Until a signal (exit code 0) or until one of the processes has ended by itself (1)."""
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: asked.append(received))
    while not asked:
        for page, process in running.items():
            if process.poll() is not None:
                print(
                    f"{page.name} ended with code {process.returncode}; see {logs / (page.name.lower() + '.log')}",
                    file=sys.stderr,
                )
                return 1
        time.sleep(0.2)
    return 0


def stop(processes: "list[subprocess.Popen[bytes]]") -> None:
    """Ask every process group to end, then insist."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
