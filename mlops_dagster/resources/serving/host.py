"""The serving host: `python -m mlops_dagster.resources.serving.host --state FOLDER`, kept running by the supervisor.

Several times a second, and at once when woken, it brings what runs to what is desired: the fleet of servers, Envoy's files, and
the report of what it sees. Every step starts from the files on disk, so it may be killed at any line and is simply started
again.
"""

import argparse
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mlops_dagster.core.errors import MlopsError
from mlops_dagster.core.routes import Routes
from mlops_dagster.resources.live_metrics.samples import Samples
from mlops_dagster.resources.live_metrics.scrape import counters
from mlops_dagster.resources.serving.adopt import Record, end
from mlops_dagster.resources.serving.client_keys import digests
from mlops_dagster.resources.serving.envoy_admin import EnvoyAdmin, Host
from mlops_dagster.resources.serving.envoy_config import Backend, Published, cluster_name
from mlops_dagster.resources.serving.fleet import Member, answering_order, next_fleet, next_routes
from mlops_dagster.resources.serving.gateway import EnvoyFiles
from mlops_dagster.resources.serving.predictor import new_address, predictor
from mlops_dagster.resources.serving.probe import is_ready
from mlops_dagster.resources.serving.report import arm_states
from mlops_dagster.resources.serving.settings import HostSettings
from mlops_dagster.resources.serving.state import Desired, Folder, read_json, write_json
from mlops_dagster.resources.serving.supervision import PORT_TAKEN, Process, Program, Supervisor, adopted

TICK_SECONDS = 0.25
SAMPLE_SECONDS = 1.0

log = logging.getLogger("serving-host")


@dataclass(frozen=True)
class Seen:
    """What one round found."""

    now: float
    fleet: Mapping[str, Member]
    ready: set[str]
    hosts: Mapping[str, Host]
    processes: Mapping[str, Process]
    pending: Mapping[str, str]
    problem: str


class ServingHost:
    """One state folder's host; `tick` is one round."""

    def __init__(self, folder: Folder, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.clock = clock
        self.admin = EnvoyAdmin(folder.socket("admin"))
        self.envoy = EnvoyFiles(folder, self.admin)
        self.supervisor = Supervisor(folder)
        self.samples = Samples(folder.samples)
        self.kept: tuple[Program, ...] = ()
        self.sampled = 0.0
        self.proven: dict[str, int] = {}

    def tick(self) -> None:
        """One round. Raises MlopsError when a part of it could not be done; the next round tries it again."""
        now = self.clock()
        settings = HostSettings.read(self.folder)
        desired, damaged = self.folder.models()
        live, problem = self.envoy.look()
        processes = self.supervisor.processes()
        fleet = next_fleet(desired, damaged, self._fleet(processes), live, now, new_address)
        write_json(self.folder.host / "fleet.json", {name: asdict(member) for name, member in fleet.items()})
        self._keep(settings, fleet, processes)
        hosts = self._hosts()
        ready = {name for name, member in fleet.items() if self._is_ready(name, member, hosts, processes.get(name))}
        wanted, pending = _routes(desired, damaged, live, fleet, ready)
        try:
            self.envoy.publish(settings.gateway, self._published(fleet, wanted, desired, digests(self.folder)))
        except MlopsError as error:
            problem = problem or str(error)
        seen = Seen(now, fleet, ready, hosts, processes, pending, problem)
        self._report(desired, seen)
        self._sample(now)

    def _fleet(self, processes: Mapping[str, Process]) -> dict[str, Member]:
        """The fleet as it was; a server that found its port taken (by somebody else, since it was chosen) gets another one."""
        raw = read_json(self.folder.host / "fleet.json") or {}
        fleet = {name: Member.from_json(member) for name, member in raw.items()}
        for name, member in fleet.items():
            process = processes.get(name)
            if process is not None and process.stopped and process.exit_code == PORT_TAKEN:
                fleet[name] = replace(member, address=new_address())
        return fleet

    def _hosts(self) -> dict[str, Host]:
        with suppress(MlopsError):
            return self.admin.hosts()
        return {}

    def _keep(self, settings: HostSettings, fleet: Mapping[str, Member], known: Mapping[str, Process]) -> None:
        """Have the supervisor keep Envoy and the fleet, and end what a crash left running that is no longer wanted."""
        envoy = Program(
            "envoy", adopted(self.folder, "envoy", self.envoy.command(settings.gateway, settings.concurrency), stop_seconds=3)
        )
        programs = (envoy, *(predictor(self.folder, member, settings.predictor) for member in fleet.values()))
        names = {program.name for program in programs}
        _end_strays(self.folder, names | known.keys())
        if programs != self.kept or known.keys() != {"host"} | names:
            self.kept = programs if self.supervisor.keep(programs) else ()

    def _is_ready(self, name: str, member: Member, hosts: Mapping[str, Host], process: Process | None) -> bool:
        """Whether the gateway finds this very server healthy.

        After each start the server is also asked directly, once: the gateway learns of an end only by its next checks, and
        until then what it says is about the process before.
        """
        host = hosts.get(cluster_name(member.model, member.arm.key))
        address = member.address
        if process is None or not process.running:
            self.proven.pop(name, None)
            return False
        if self.proven.get(name) != process.pid and is_ready(address):
            self.proven[name] = process.pid
        proven = self.proven.get(name) == process.pid
        return proven and host is not None and host.healthy and host.address == address

    def _published(
        self,
        fleet: Mapping[str, Member],
        wanted: Mapping[str, Routes],
        desired: Mapping[str, Desired],
        clients: Mapping[str, Mapping[str, str]],
    ) -> dict[str, Published]:
        found = {}
        for model, routes in wanted.items():
            of_model = [member for member in fleet.values() if member.model == model]
            members = {
                member.arm.key: member for member in sorted(of_model, key=lambda member: member.left is None)
            }  # desired ones win
            names = {arm.key: arm.name for arm in desired[model].arms} if model in desired else {}
            backends = tuple(Backend(key, member.address) for key, member in members.items())
            order = {arm: answering_order(arm, routes, names) for arm in routes.arms}
            options = next(member.options for member in members.values())
            found[model] = Published(model, backends, routes, order, options, clients.get(model))
        return found

    def _report(self, desired: Mapping[str, Desired], seen: Seen) -> None:
        for model, spec in desired.items():
            states = arm_states(self.folder, spec, seen.fleet, seen.ready, seen.hosts, seen.processes, seen.now)
            report = {
                "arms": {key: asdict(state) for key, state in states.items()},
                "pending": seen.pending.get(model, ""),
                "warm": sorted(m.arm.key for m in seen.fleet.values() if m.model == model and m.left is not None),
                "problem": seen.problem,
                "routes": spec.routes.to_json(),
            }
            write_json(self.folder.observed_file(model), report)
        for path in self.folder.observed.glob("*.json"):
            if path.stem not in desired and not self.folder.desired_file(path.stem).exists():
                path.unlink(missing_ok=True)

    def _sample(self, now: float) -> None:
        if 0 <= now - self.sampled < SAMPLE_SECONDS:
            return
        self.sampled = now
        self.samples.add(now, counters(self.admin))
        self.envoy.keep_logs_small()


def _routes(
    desired: Mapping[str, Desired],
    damaged: frozenset[str],
    live: Mapping[str, Routes],
    fleet: Mapping[str, Member],
    ready: set[str],
) -> tuple[dict[str, Routes], dict[str, str]]:
    """The routes that should be live of every model, and of those that must wait, why."""
    wanted = {model: routes for model, routes in live.items() if model in damaged}
    pending = {}
    for model, spec in desired.items():
        can = {member.arm.key for name, member in fleet.items() if name in ready and member.model == model}
        wanted[model], why = next_routes(spec, live.get(model), can)
        if why:
            pending[model] = why
    return wanted, pending


def _end_strays(folder: Folder, known: set[str]) -> None:
    """End programs that an earlier host started, that nobody supervises now and that are no longer wanted."""
    for path in folder.records.glob("*.json"):
        if path.stem in known:
            continue
        record = Record.read(path)
        if record is not None and (process := record.process()) is not None:
            log.warning("ending %s, left by an earlier host", path.stem)
            end(process, stop_seconds=5)
        path.unlink(missing_ok=True)


def run(folder: Folder) -> int:
    """Rounds until the supervisor that started this process is gone; then a new one is started, which adopts what runs."""
    parent = os.getppid()
    host = ServingHost(folder)
    wake = _wake_socket(folder)
    said = ""
    while os.getppid() == parent:
        try:
            host.tick()
            told = ""
        except MlopsError as error:
            told = str(error)
        except Exception as error:  # a fault of ours must not end the host: what runs is better off watched by the rest of it
            told = f"internal error: {error!r}"
            if told != said:
                log.exception("internal error")
        if told and told != said:
            log.warning("%s", told)
        said = told
        with suppress(OSError):
            folder.heartbeat.touch()
        with suppress(TimeoutError):
            wake.recv(16)
    if not folder.stopped.exists():
        log.warning("the supervisor is gone; starting another one")
        from mlops_dagster.resources.serving.start import ensure_running

        ensure_running(folder)
    return 0


def _wake_socket(folder: Folder) -> socket.socket:
    path = folder.socket("wake")
    path.unlink(missing_ok=True)
    wake = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    wake.bind(str(path))
    wake.settimeout(TICK_SECONDS)
    return wake


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="the serving folder below MLOPS_HOME")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    return run(Folder(parser.parse_args().state))


if __name__ == "__main__":
    sys.exit(main())
