"""The declared space of a hyperparameter search: what may be tried, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from mlops_dagster.core.errors import DeclarationError

ALGORITHMS = ("random", "tpe", "grid", "cmaes", "halton", "sobol")
DIRECTIONS = ("maximize", "minimize")
Scalar = str | int | float | bool | None
_RANGE_FIELDS = {"min", "max", "log", "integer"}


@dataclass(frozen=True)
class Range:
    """Numbers from `minimum` to `maximum`, both included; on a logarithmic scale with `log`, whole ones with `integer`."""

    minimum: float
    maximum: float
    log: bool = False
    integer: bool = False

    def spaced(self, points: int) -> tuple[float | int, ...]:
        """At most `points` values at equal distances (ratios with `log`), the ends among them; one point is the middle."""
        shares = [0.5] if points == 1 else [step / (points - 1) for step in range(points)]
        if self.log:
            low, high = math.log(self.minimum), math.log(self.maximum)
            values = [math.exp(low + share * (high - low)) for share in shares]
        else:
            values = [self.minimum + share * (self.maximum - self.minimum) for share in shares]
        held = [min(max(value, self.minimum), self.maximum) for value in values]
        return tuple(dict.fromkeys(round(value) if self.integer else value for value in held))


@dataclass(frozen=True)
class Choices:
    """A list of values without an order."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class SearchSpace:
    """The parameters to search, by name."""

    parameters: Mapping[str, Range | Choices]

    def grid(self, trials: int) -> dict[str, tuple[Scalar, ...]]:
        """The finest regular grid of at most `trials` combinations; DeclarationError when the choices alone have more."""
        smallest = self._sizes(1)
        if smallest > trials:
            raise DeclarationError(
                f"tuning.trials: a grid over these choices has {smallest} combinations; give at least as many, not {trials}"
            )
        points = 1
        while points < trials and self._sizes(points) < self._sizes(points + 1) <= trials:
            points += 1
        return self._grid(points)

    def _grid(self, points: int) -> dict[str, tuple[Scalar, ...]]:
        return {name: one.values if isinstance(one, Choices) else one.spaced(points) for name, one in self.parameters.items()}

    def _sizes(self, points: int) -> int:
        return math.prod(len(values) for values in self._grid(points).values())

    def combinations(self, trials: int) -> list[dict[str, Scalar]]:
        """The grid's points, the last parameter varying fastest."""
        grid = self.grid(trials)
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def parse_search_space(declaration: Mapping[str, object], where: str = "tuning.parameters") -> SearchSpace:
    """Read `{name: {min, max, log?, integer?} | {choices: [...]}}`; DeclarationError names the field that is wrong.

    >>> parse_search_space({"depth": {"min": 2, "max": 8, "integer": True}}).parameters["depth"]
    Range(minimum=2, maximum=8, log=False, integer=True)
    """
    if not declaration:
        raise DeclarationError(f"{where}: is empty; name at least one parameter to search, or leave tuning out")
    return SearchSpace({name: _parameter(f"{where}.{name}", entry) for name, entry in declaration.items()})


def check_search(algorithm: str, direction: str, trials: int) -> None:
    """DeclarationError when a search cannot be run as asked."""
    if algorithm not in ALGORITHMS:
        raise DeclarationError(f"tuning.algorithm: {algorithm!r} is unknown; use one of {', '.join(ALGORITHMS)}")
    if direction not in DIRECTIONS:
        raise DeclarationError(f"tuning.direction: {direction!r} is unknown; use one of {', '.join(DIRECTIONS)}")
    if trials < 1:
        raise DeclarationError(f"tuning.trials: {trials} must be at least 1")


def _parameter(where: str, entry: object) -> Range | Choices:
    if not isinstance(entry, Mapping):
        raise DeclarationError(f"{where}: {entry!r} must be {{min, max}} or {{choices: [...]}}")
    return _choices(where, entry) if "choices" in entry else _range(where, entry)


def _choices(where: str, entry: Mapping[str, object]) -> Choices:
    if extra := sorted(set(entry) - {"choices"}):
        raise DeclarationError(f"{where}: {', '.join(extra)} cannot stand beside choices; remove one of them")
    values = entry["choices"]
    if not isinstance(values, (list, tuple)) or not values:
        raise DeclarationError(f"{where}.choices: {values!r} must be a list with at least one value")
    for value in values:
        if not isinstance(value, Scalar):
            raise DeclarationError(f"{where}.choices: {value!r} must be text, a number, true, false or null")
    if len({(type(value), value) for value in values}) < len(values):
        raise DeclarationError(f"{where}.choices: {list(values)!r} names a value twice; remove one")
    return Choices(tuple(values))


def _range(where: str, entry: Mapping[str, object]) -> Range:
    if extra := sorted(set(entry) - _RANGE_FIELDS):
        raise DeclarationError(f"{where}: {', '.join(extra)} is unknown; a range has {', '.join(sorted(_RANGE_FIELDS))}")
    if missing := [name for name in ("min", "max") if name not in entry]:
        raise DeclarationError(f"{where}: {' and '.join(missing)} is missing; give {{min, max}} or {{choices: [...]}}")
    minimum, maximum = _number(f"{where}.min", entry["min"]), _number(f"{where}.max", entry["max"])
    log, integer = _flag(f"{where}.log", entry.get("log", False)), _flag(f"{where}.integer", entry.get("integer", False))
    if minimum >= maximum:
        raise DeclarationError(f"{where}: min {minimum} must be below max {maximum}")
    if log and minimum <= 0:
        raise DeclarationError(f"{where}.min: {minimum} must be above 0 on a logarithmic scale")
    if integer and not (float(minimum).is_integer() and float(maximum).is_integer()):
        raise DeclarationError(f"{where}: min {minimum} and max {maximum} must be whole numbers with integer: true")
    return Range(int(minimum), int(maximum), log, True) if integer else Range(minimum, maximum, log)


def _number(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DeclarationError(f"{where}: {value!r} must be a finite number")
    return value


def _flag(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise DeclarationError(f"{where}: {value!r} must be true or false")
    return value
