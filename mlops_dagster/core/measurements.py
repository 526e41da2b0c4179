"""What was counted about each arm, tick by tick: the only thing that verdicts are made from.

Servers report counters that only grow (and start anew when a server does); `Measurements.observe` turns them into what happened
between two looks. A tick is final once it is there, because the tests of `core.sequential` need the ticks of a look to be the
ticks of every later look.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Any

from mlops_dagster.core.errors import DataError

# Envoy's and KServe's default buckets are too coarse near 100 ms; the predictor reports these (upper bounds, milliseconds).
DEFAULT_BOUNDS_MS = (0.5, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2500, 5000, 10000)


@dataclass(frozen=True)
class Counters:
    """Counts of one arm: all since its server began, or, in a tick, those of the tick.

    `errors` are attempts that failed by the server's fault (5xx, time-outs, resets), `refused` the answers 4xx among `answers` (a
    caller's fault, or a version's that refuses what others accept). `latency` has one count per
    bucket of `Measurements.bounds_ms` and a last one for what is slower (not cumulative). `compared`, `disagreed` and `shifted`
    are mirrored requests joined with the champion's answer, `labelled` and `wrong` predictions whose label has landed, `trials`
    and `successes` the pre-declared metric of an A/B test, `units` the different sticky keys seen and `misassigned` those among
    them that `routes.assign` sends to another arm. Raises DataError naming the field when a count is negative or exceeds what it
    is counted among.
    """

    requests: int = 0
    errors: int = 0
    latency: tuple[int, ...] = ()
    compared: int = 0
    disagreed: int = 0
    shifted: int = 0
    labelled: int = 0
    wrong: int = 0
    trials: int = 0
    successes: int = 0
    units: int = 0
    misassigned: int = 0
    answers: int = 0
    refused: int = 0

    def __post_init__(self) -> None:
        for name in _NAMES:
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise DataError(f"counters.{name} is {count!r}: give a whole number that is not negative.")
        if any(count < 0 for count in self.latency):
            raise DataError(f"counters.latency is {list(self.latency)}: counts per bucket are not negative (nor cumulative).")
        for part, whole in _PARTS:
            if getattr(self, part) > getattr(self, whole):
                raise DataError(f"counters.{part} is {getattr(self, part)}, more than {whole} {getattr(self, whole)}.")

    def since(self, before: "Counters") -> "Counters":
        """What was counted after `before`; counters that went down began anew, with those that come from the same source."""
        counts: dict[str, Any] = {}
        for names in _SOURCES:
            counts |= _grown(self, before, names)
        latency = self.latency
        if len(before.latency) == len(latency) and all(then <= now for now, then in zip(latency, before.latency, strict=True)):
            latency = tuple(now - then for now, then in zip(latency, before.latency, strict=True))
        return Counters(latency=latency, **counts)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON without the zeros; `from_json` is its inverse."""
        return {name: getattr(self, name) for name in _NAMES if getattr(self, name)} | (
            {"latency": list(self.latency)} if self.latency else {}
        )

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Counters":
        return cls(**{**raw, "latency": tuple(raw.get("latency", ()))})


_NAMES = tuple(item.name for item in fields(Counters) if item.name != "latency")
_PARTS = (
    ("errors", "requests"),
    ("disagreed", "compared"),
    ("shifted", "compared"),
    ("wrong", "labelled"),
    ("successes", "trials"),
    ("misassigned", "units"),
    ("refused", "answers"),
)
_SOURCES = (
    ("requests", "errors"),
    ("compared", "disagreed", "shifted"),
    ("labelled", "wrong"),
    ("trials", "successes"),
    ("units", "misassigned"),
    ("answers", "refused"),
)


def _grown(now: Counters, before: Counters, names: tuple[str, ...]) -> dict[str, int]:
    counts = {name: getattr(now, name) - getattr(before, name) for name in names}
    whole = counts[names[0]]
    return counts if all(0 <= count <= whole for count in counts.values()) else {name: getattr(now, name) for name in names}


@dataclass(frozen=True)
class Tick:
    """What happened from the tick before until `at`, for the arms whose counters could be read."""

    at: datetime
    arms: Mapping[str, Counters]


@dataclass(frozen=True)
class Measurements:
    """The ticks of one rollout, the counters at the last of them, and what was known of the champion before.

    `began` is when the counters were first read: the first tick starts there. `history` is the champion's counts before that.
    """

    bounds_ms: tuple[float, ...] = DEFAULT_BOUNDS_MS
    began: datetime | None = None
    ticks: tuple[Tick, ...] = ()
    last: Mapping[str, Counters] = field(default_factory=dict)
    history: Counters = Counters()

    def observe(self, at: datetime, totals: Mapping[str, Counters], minimum_seconds: float = 1.0) -> "Measurements":
        """The measurements with what happened until `at`, given each arm's counters as they now stand.

        An arm whose counters could not be read is left out of `totals`; what it did meanwhile is in its next tick. A look less
        than `minimum_seconds` after the last changes nothing. An arm that is new starts from zero; the first look of all only
        sets the start. Raises DataError when a histogram does not fit `bounds_ms`.
        """
        for arm, counters in totals.items():
            if counters.latency and len(counters.latency) != len(self.bounds_ms) + 1:
                raise DataError(
                    f"counters of arm {arm!r}: latency has {len(counters.latency)} buckets, not the {len(self.bounds_ms) + 1} "
                    "of bounds_ms (one per bound and one above)."
                )
        if self.began is None:
            return replace(self, began=at, last=dict(totals))
        newest = self.ticks[-1].at if self.ticks else self.began
        if (at - newest).total_seconds() < minimum_seconds:
            return self
        arms = {arm: counters.since(self.last.get(arm, Counters())) for arm, counters in totals.items()}
        return replace(self, ticks=(*self.ticks, Tick(at, arms)), last={**self.last, **totals})

    def starts(self) -> list[datetime]:
        """When each tick began."""
        assert self.began is not None or not self.ticks
        return [self.began, *(tick.at for tick in self.ticks[:-1])] if self.began and self.ticks else []

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` is its inverse."""
        return {
            "bounds_ms": list(self.bounds_ms),
            "began": self.began and self.began.isoformat(),
            "ticks": [{"at": tick.at.isoformat(), "arms": _arms_json(tick.arms)} for tick in self.ticks],
            "last": _arms_json(self.last),
            "history": self.history.to_json(),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Measurements":
        return cls(
            tuple(raw["bounds_ms"]),
            datetime.fromisoformat(raw["began"]) if raw["began"] else None,
            tuple(Tick(datetime.fromisoformat(tick["at"]), _arms(tick["arms"])) for tick in raw["ticks"]),
            _arms(raw["last"]),
            Counters.from_json(raw["history"]),
        )


def tick_seconds(maximum_seconds: float | None, least_seconds: float = 5.0) -> float:
    """How long a tick should last so that the longest step has no more than 5,000 (judging that many takes about 0.2 s)."""
    return max(least_seconds, (maximum_seconds or 0.0) / 5000)


def histogram(latencies_ms: Any, bounds_ms: tuple[float, ...] = DEFAULT_BOUNDS_MS) -> tuple[int, ...]:
    """How many of `latencies_ms` fall into each bucket `(bound before, bound]` and above the last bound."""
    counts = [0] * (len(bounds_ms) + 1)
    for latency in latencies_ms:
        counts[bisect_left(bounds_ms, latency)] += 1
    return tuple(counts)


def _arms_json(arms: Mapping[str, Counters]) -> dict[str, Any]:
    return {arm: counters.to_json() for arm, counters in arms.items()}


def _arms(raw: Mapping[str, Any]) -> dict[str, Counters]:
    return {arm: Counters.from_json(counters) for arm, counters in raw.items()}
