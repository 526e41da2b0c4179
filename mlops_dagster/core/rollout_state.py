"""A rollout's state and actions as values, and how they are written to the ledger and read back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from mlops_dagster.core import ledger
from mlops_dagster.core.analysis import Verdict
from mlops_dagster.core.errors import LedgerError, RolloutError
from mlops_dagster.core.routes import Routes
from mlops_dagster.core.strategies import Step

WAY_BACK = "way_back"
_KEY = "rollout/"
COMMANDS = ("pause", "resume", "promote", "abort", "rollback", "supersede")


class Phase(StrEnum):
    """Where a rollout stands."""

    PENDING = "pending"  # the candidate's server is starting
    STEPPING = "stepping"
    WATCHING = "watching"  # the candidate answers everything, the champion stands by
    PAUSED = "paused"  # a declared pause or a command; waits for a human
    HELD = "held"  # no verdict for too long; waits for a human, who has been alerted
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
    SUPERSEDED = "superseded"

    @property
    def final(self) -> bool:
        return self in (Phase.PROMOTED, Phase.ROLLED_BACK, Phase.ABORTED, Phase.SUPERSEDED)


class Act(StrEnum):
    """What is to be done; each is safe to repeat."""

    NONE = "none"
    START_ARM = "start_arm"
    SET_ROUTES = "set_routes"
    PROMOTE = "promote"  # set the routes; the candidate becomes champion in the registry
    ROLL_BACK = "roll_back"  # set the routes; the champion stays champion
    HOLD = "hold"  # leave the routes; tell a human


@dataclass(frozen=True)
class Action:
    """What is to be done now and why; with `alert` a human is told. `refused` says why a command changed nothing."""

    act: Act
    reason: str = ""
    routes: Routes | None = None
    arm: str | None = None
    alert: bool = False
    refused: bool = False


@dataclass(frozen=True)
class Command:
    """What a human or another part of the platform wants: pause, resume, promote, abort, rollback or supersede."""

    name: str
    actor: str = "platform"
    reason: str = ""

    def __post_init__(self) -> None:
        if self.name not in COMMANDS:
            raise RolloutError(f"rollout command {self.name!r} is unknown: use one of {', '.join(COMMANDS)}.")


@dataclass(frozen=True)
class RolloutState:
    """Everything about one rollout; `entered_at` is when the present step (or phase) began, `revision` counts the changes.

    `passed` is set while a declared pause waits: the step's gates have passed. `errors` counts ERRORs in a row.
    """

    rollout_id: str
    model: str
    strategy: str
    champion: str | None
    candidate: str
    steps: tuple[Step, ...]
    phase: Phase
    step: int
    entered_at: datetime
    routes: Routes | None
    revision: int = 0
    errors: int = 0
    passed: bool = False
    warm_until: datetime | None = None
    reason: str = ""

    @property
    def current(self) -> Step | None:
        """The step whose gates count now; None before the first and when the rollout is over."""
        return self.steps[self.step] if 0 <= self.step < len(self.steps) and not self.phase.final else None

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm that must run now."""
        running = self.routes.arms if self.routes else ()
        starting = (self.candidate, *(self.steps[0].routes.arms if self.steps else ())) if self.phase is Phase.PENDING else ()
        return tuple(dict.fromkeys((*running, *starting)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` is its inverse."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "steps": [step.to_json() for step in self.steps],
            "phase": str(self.phase),
            "entered_at": self.entered_at.isoformat(),
            "routes": self.routes and self.routes.to_json(),
            "warm_until": self.warm_until and self.warm_until.isoformat(),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "RolloutState":
        converted = {
            "steps": tuple(Step.from_json(step) for step in raw["steps"]),
            "phase": Phase(raw["phase"]),
            "entered_at": datetime.fromisoformat(raw["entered_at"]),
            "routes": Routes.from_json(raw["routes"]) if raw["routes"] else None,
            "warm_until": datetime.fromisoformat(raw["warm_until"]) if raw["warm_until"] else None,
        }
        return cls(**raw | converted)


def record(
    old: RolloutState | None,
    new: RolloutState,
    action: Action,
    signal: Verdict | Command | None,
    now: datetime,
    actor: str = "rollout",
) -> ledger.NewEntry:
    """The ledger entry of a change; its evidence holds the whole new state, the routes, and the verdict or command behind it."""
    evidence: dict[str, Any] = {
        "state": new.to_json(),
        "routes": new.routes and new.routes.to_json(),
        "champion": new.candidate if new.phase is Phase.PROMOTED else new.champion,
        "action": str(action.act),
        "from_phase": str(old.phase) if old else None,
    }
    if isinstance(signal, Verdict):
        evidence["verdict"] = signal.to_json()
    if isinstance(signal, Command):
        actor = signal.actor
        evidence["command"] = {"name": signal.name, "reason": signal.reason}
    key = f"{_KEY}{new.rollout_id}/{new.revision}"
    return ledger.NewEntry(_kind(old, new), new.model, new.candidate, actor, now, action.reason or new.reason, evidence, key)


def state_of(entry: ledger.Entry) -> RolloutState:
    """The rollout state that an entry brought in; raises LedgerError when it holds none, or was changed after it was written."""
    if ledger.chain_hash(entry) != entry.hash:
        raise LedgerError(
            f"ledger entry {entry.sequence} ({entry.kind}) of {entry.model} was changed after it was written: nothing is decided from "
            "it, and what serves stays. Run `mlops ledger verify` and put the entry back from a backup."
        )
    try:
        return RolloutState.from_json(entry.evidence["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"ledger entry {entry.sequence} ({entry.kind}) holds no rollout state: {error}.") from error


def replay(entries: Iterable[ledger.Entry], model: str | None = None) -> RolloutState | None:
    """The state of the newest rollout in a ledger's entries in order (of one model), or None when there has been none."""
    newest: ledger.Entry | None = None
    for entry in entries:
        if entry.key.startswith(_KEY) and (model is None or entry.model == model):
            newest = entry
    return state_of(newest) if newest else None


@dataclass(frozen=True)
class Standing:
    """The promotion that brought in the version that serves, and how many ways back from it were begun."""

    promotion: RolloutState
    ways_back: int


def standing(entries: Sequence[ledger.Entry], model: str) -> Standing | None:
    """The newest promotion in a model's entries in order, while no rollout is under way (those after it brought nothing in)."""
    told = [entry for entry in entries if entry.key.startswith(_KEY) and entry.model == model]
    if not told or not state_of(told[-1]).phase.final:
        return None
    ended = (state_of(entry) for entry in reversed(told) if entry.kind in (ledger.PROMOTION, ledger.ROLLBACK))
    promotion = next((state for state in ended if state.phase is Phase.PROMOTED), None)
    if promotion is None:
        return None
    back = f"{_KEY}{promotion.rollout_id}/back"
    return Standing(promotion, sum(entry.key.startswith(back) and entry.key.endswith("/0") for entry in told))


def replay_all(
    entries: Iterable[ledger.Entry], known: Mapping[str, RolloutState] = MappingProxyType({})
) -> dict[str, RolloutState]:
    """The newest state of every model, from what was `known` and the entries after that: one query for all models at a tick."""
    newest = {entry.model: entry for entry in entries if entry.key.startswith(_KEY)}
    return {**known, **{model: state_of(entry) for model, entry in newest.items()}}


_KINDS = {
    Phase.PENDING: ledger.ROLLOUT_STARTED,
    Phase.STEPPING: ledger.ROLLOUT_STEP,
    Phase.WATCHING: ledger.ROLLOUT_STEP,
    Phase.PAUSED: ledger.ROLLOUT_PAUSED,
    Phase.HELD: ledger.ROLLOUT_HELD,
    Phase.PROMOTED: ledger.PROMOTION,
    Phase.ROLLED_BACK: ledger.ROLLBACK,
    Phase.ABORTED: ledger.ROLLOUT_ABORTED,
    Phase.SUPERSEDED: ledger.ROLLOUT_SUPERSEDED,
}


def _kind(old: RolloutState | None, new: RolloutState) -> str:
    if new.phase is Phase.PROMOTED and new.strategy == WAY_BACK:
        return ledger.ROLLBACK
    if old is not None and old.phase is new.phase and old.errors != new.errors and old.step == new.step:
        return ledger.ROLLOUT_ERROR
    return _KINDS[new.phase]
