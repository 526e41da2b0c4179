"""Making sure that a serving host runs for a state folder, from any process, and stopping it."""

import socket
from contextlib import suppress
from dataclasses import replace

from mlops_dagster.core.errors import ServingError
from mlops_dagster.resources.serving.adopt import Record, end
from mlops_dagster.resources.serving.settings import HostSettings
from mlops_dagster.resources.serving.state import Folder, free_port, port_is_free
from mlops_dagster.resources.serving.supervision import Supervisor


def ensure_running(folder: Folder) -> None:
    """Start the host unless it runs; of several callers at once one starts it. Raises ServingError, StorageError."""
    supervisor = Supervisor(folder)
    if supervisor.alive():
        return
    with folder.lock("start"):
        if supervisor.alive():
            return
        settings = HostSettings.read(folder)
        envoy = Record.read(folder.records / "envoy.json")
        if (envoy is None or envoy.process() is None) and not port_is_free(settings.gateway.host, settings.gateway.port):
            settings = _other_port(settings)
        settings.write(folder)
        for path in folder.observed.glob("*.json"):  # what an earlier host saw is no longer known to be so
            path.unlink(missing_ok=True)
        supervisor.start()


def _other_port(settings: HostSettings) -> HostSettings:
    gateway = settings.gateway
    if not settings.port_is_chosen:
        raise ServingError(
            f"the gateway's port {gateway.port} on {gateway.host} is taken by another program: end that program, or set MLOPS_GATEWAY_PORT."
        )
    return replace(settings, gateway=replace(gateway, port=free_port()))


def stop(folder: Folder) -> None:
    """End the host and everything that it runs, and also what a crashed host left running; returns when all has ended."""
    if not folder.host.exists():
        return
    folder.stopped.touch()
    with folder.lock("start"):
        Supervisor(folder).shut_down()
        for path in folder.records.glob("*.json"):
            record = Record.read(path)
            if record is not None and (process := record.process()) is not None:
                end(process, stop_seconds=5)
            path.unlink(missing_ok=True)


def wake(folder: Folder) -> None:
    """Have the host look at once instead of at its next round; when it does not run this does nothing."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(b".", str(folder.socket("wake")))
