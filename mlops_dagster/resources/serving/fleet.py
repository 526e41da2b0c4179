"""Decisions of the serving host as pure functions: which servers run, and which routes may go live."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlops_dagster.core.routes import Routes
from mlops_dagster.resources.serving import Arm, ServingOptions
from mlops_dagster.resources.serving.state import Desired

STANDBY = ("champion", "previous")  # parts that were approved to answer callers, so they may stand in even at weight 0


@dataclass(frozen=True)
class Member:
    """One server of the fleet. `address` is `host:port`; `since` is when it joined; `left` is when it stopped being desired
    (None: it is desired).
    """

    model: str
    arm: Arm
    options: ServingOptions
    address: str
    since: float
    left: float | None = None

    @property
    def program(self) -> str:
        """The name of its process: model, arm, and the beginning of the artifact's digest."""
        return program_name(self.model, self.arm)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Member":
        return cls(**{**raw, "arm": Arm(**raw["arm"]), "options": ServingOptions(**raw["options"])})


def program_name(model: str, arm: Arm) -> str:
    return f"{model}--{arm.key}--{arm.sha256[:8]}"


def next_fleet(
    desired: Mapping[str, Desired],
    damaged: Collection[str],
    fleet: Mapping[str, Member],
    live: Mapping[str, Routes],
    now: float,
    new_address: Callable[[], str],
) -> dict[str, Member]:
    """The servers that should run now, by program name.

    A desired arm runs; one that requests still reach stays as it is; any other one runs on for its grace time. The servers of a
    model that was removed go as soon as no route leads to them.
    """
    wanted = {program_name(m.model, arm): (m, arm) for m in desired.values() for arm in m.arms}
    result = {}
    for program, (model, arm) in wanted.items():
        known = fleet.get(program)
        if known is None:
            known = Member(model.model, arm, model.options, new_address(), now)
        result[program] = replace(known, arm=arm, options=model.options, left=None)
    for program, member in fleet.items():
        if program in wanted:
            continue
        if member.model in damaged or _carries_requests(member, live, wanted):
            result[program] = replace(member, left=None)
        elif member.model in desired and now - (member.left or now) < desired[member.model].options.grace_seconds:
            result[program] = replace(member, left=member.left or now)
    return result


def _carries_requests(member: Member, live: Mapping[str, Routes], wanted: Mapping[str, Any]) -> bool:
    """Whether a live route leads to this very server (and not to another artifact under the same version)."""
    routes = live.get(member.model)
    if routes is None or member.arm.key not in routes.arms:
        return False
    return not any(name.startswith(f"{member.model}--{member.arm.key}--") for name in wanted)


def next_routes(desired: Desired, live: Routes | None, ready: Collection[str]) -> tuple[Routes, str]:
    """The routes that should be live now and, if they aren't the desired ones yet, why.

    `ready` holds the keys of the arms that are ready. New routes wait until every arm that gains weight by them is ready:
    sending requests to an arm that cannot answer is never better than what is live. The first routes of a model don't wait.
    """
    wanted = desired.routes
    if live is None or live == wanted:
        return wanted, ""
    gaining = [arm for arm, weight in wanted.weights if weight > dict(live.weights).get(arm, 0)]
    if wanted.match is not None and wanted.match != live.match:
        gaining.append(wanted.match.arm)
    waiting = [arm for arm in dict.fromkeys(gaining) if arm not in ready]
    if waiting:
        return live, f"the new routes wait until {', '.join(f'version {arm}' for arm in waiting)} is ready"
    return wanted, ""


def answering_order(arm: str, routes: Routes, names: Mapping[str, str]) -> tuple[str, ...]:
    """Who answers a caller that was assigned to `arm`: the arm itself, then those that may stand in when it is dead.

    Standing in are the other arms that answer callers, heaviest first, then a champion or previous version kept warm; never an
    arm that only gets copies of requests, nor a candidate that has no weight. `names` gives each running arm's part.
    """
    weights = dict(routes.weights)
    others = sorted((key for key in routes.serving if key != arm), key=lambda key: -weights[key])
    shadow = routes.mirror.arm if routes.mirror else None
    standby = [key for part in STANDBY for key, name in names.items() if name == part and key not in (arm, shadow, *others)]
    return (arm, *(key for key in others if key in names), *standby)
