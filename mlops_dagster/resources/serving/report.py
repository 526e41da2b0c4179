"""From processes and Envoy's view of them to the phase of each arm, with a reason that a person can act on."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from mlops_dagster.resources.serving import ArmState, Phase
from mlops_dagster.resources.serving.adopt import Record
from mlops_dagster.resources.serving.envoy_admin import Host
from mlops_dagster.resources.serving.envoy_config import cluster_name
from mlops_dagster.resources.serving.fleet import Member, program_name
from mlops_dagster.resources.serving.state import Desired, Folder, read_json
from mlops_dagster.resources.serving.supervision import WRONG_ARTIFACT, WRONG_USAGE, Process, last_lines

QUICK_ENDS = 3  # so many starts in a row that ended at once are a failure, though starting goes on
REFUSALS = {WRONG_ARTIFACT: "the server refused the artifact", WRONG_USAGE: "the server refused its settings"}


def arm_states(
    folder: Folder,
    desired: Desired,
    fleet: Mapping[str, Member],
    ready: Collection[str],
    hosts: Mapping[str, Host],
    processes: Mapping[str, Process],
    now: float,
) -> dict[str, ArmState]:
    """The state of every desired arm by its key; how long one is down goes on from the last report."""
    before = (read_json(folder.observed_file(desired.model)) or {}).get("arms", {})
    found = {}
    for arm in desired.arms:
        program = program_name(desired.model, arm)
        process = processes.get(program)
        if process is not None and process.stopped and process.exit_code in REFUSALS:
            found[arm.key] = _failed(folder, program, f"{REFUSALS[process.exit_code]}, and is not started again")
        elif program in ready:
            found[arm.key] = ArmState(Phase.READY, _ejected(hosts.get(cluster_name(desired.model, arm.key))))
        else:
            found[arm.key] = _not_ready(folder, program, fleet.get(program), now)
        record = Record.read(folder.records / f"{program}.json")
        down = _down_since(found[arm.key], before.get(arm.key), now)
        found[arm.key] = replace(found[arm.key], deaths=record.deaths if record else 0, down_since=down)
    return found


def _down_since(state: ArmState, before: Mapping[str, Any] | None, now: float) -> float | None:
    if state.phase is Phase.READY or before is None:
        return None
    return now if before["phase"] == Phase.READY else before.get("down_since")


def _not_ready(folder: Folder, program: str, member: Member | None, now: float) -> ArmState:
    record = Record.read(folder.records / f"{program}.json")
    if record is not None and record.quick >= QUICK_ENDS:
        return _failed(folder, program, f"the server ended {record.quick} times in a row right after its start")
    if member is None or record is None:
        return ArmState(Phase.STARTING, "the server is being started")
    waited, limit = now - max(record.launched, member.since), member.options.start_seconds
    if waited > limit:
        return _failed(folder, program, f"the server has not become ready within {limit:g} s")
    return ArmState(Phase.STARTING, f"the server has been starting for {max(waited, 0):.0f} s")


def _ejected(host: Host | None) -> str:
    return "the gateway leaves it out for now: too many of its answers were errors" if host is not None and host.ejected else ""


def _failed(folder: Folder, program: str, what: str) -> ArmState:
    said = last_lines(folder, program)
    return ArmState(Phase.FAILED, f"{what}. Its last words: {said or '(none)'}")
