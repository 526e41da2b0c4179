"""Which arm answers which request: weights, a mirror, a header match and sticky assignment, as one value.

An *arm* is a version (`"7"`), or a version and `@baseline` (`"7@baseline"`): a second, fresh server of the same version that a
canary may be compared with. `version_of` gives the version that an arm serves.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlops_dagster.core.errors import DeclarationError

PER_MILLE = 1000
BASELINE = "@baseline"

_ARM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(@baseline)?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2: what a header or a cookie may be called
_SALT = re.compile(r"[A-Za-z0-9._:/@-]{1,128}")  # it goes into a header as it is


def version_of(arm: str) -> str:
    """The version that an arm serves: `version_of("7@baseline") == "7"`."""
    return arm.removesuffix(BASELINE)


@dataclass(frozen=True)
class Mirror:
    """A copy of `per_mille` thousandths of the requests goes to `arm`; its answers never reach a caller."""

    arm: str
    per_mille: int = PER_MILLE

    def __post_init__(self) -> None:
        _check_arm("mirror.arm", self.arm)
        _check_per_mille("mirror.percent", self.per_mille)


@dataclass(frozen=True)
class Match:
    """Requests whose header `header` equals `value` go to `arm`, whatever the weights say."""

    header: str
    value: str
    arm: str

    def __post_init__(self) -> None:
        _check_token("match.header", self.header)
        if not isinstance(self.value, str) or not self.value or not self.value.isprintable():
            raise DeclarationError(f"match.value is {self.value!r}: give the printable text that the header must equal.")
        _check_arm("match.arm", self.arm)


@dataclass(frozen=True)
class Sticky:
    """The same value of the header or cookie `name` always reaches the same arm; `salt` keeps two experiments independent."""

    by: Literal["header", "cookie"]
    name: str
    salt: str

    def __post_init__(self) -> None:
        if self.by not in ("header", "cookie"):
            raise DeclarationError(f"sticky.by is {self.by!r}: use 'header' or 'cookie'.")
        _check_token("sticky.name", self.name)
        if not isinstance(self.salt, str) or not _SALT.fullmatch(self.salt):
            raise DeclarationError(f"sticky.salt is {self.salt!r}: use 1 to 128 letters, digits or . _ : / @ -")


@dataclass(frozen=True)
class Routes:
    """How the requests of one model are divided; weights are thousandths that sum to exactly 1000.

    An arm of weight 0 is named on purpose: it gets no caller's request but is kept running (a preview, a warm old version).
    The order of `weights` matters for sticky assignment (see `assign`). Raises DeclarationError naming the field.
    """

    weights: tuple[tuple[str, int], ...]
    mirror: Mirror | None = None
    match: Match | None = None
    sticky: Sticky | None = None

    def __post_init__(self) -> None:
        arms = [arm for arm, _ in self.weights]
        for arm, per_mille in self.weights:
            _check_arm("weights", arm)
            _check_per_mille(f"weights[{arm!r}]", per_mille)
        if len(set(arms)) != len(arms):
            raise DeclarationError(f"weights names an arm twice: {', '.join(arms)}. Name each arm once.")
        total = sum(per_mille for _, per_mille in self.weights)
        if total != PER_MILLE:
            raise DeclarationError(f"weights sum to {total / 10:g} %: they must sum to exactly 100 %.")
        if self.mirror is not None and dict(self.weights).get(self.mirror.arm, 0) > 0:
            raise DeclarationError(f"mirror.arm is {self.mirror.arm!r}, which answers callers too: mirror to an arm of weight 0.")

    @classmethod
    def all_to(cls, arm: str, warm: Iterable[str] = ()) -> "Routes":
        """Every request to `arm`; the arms in `warm` keep running at weight 0."""
        return cls(((arm, PER_MILLE), *((other, 0) for other in warm)))

    @classmethod
    def split(
        cls,
        percents: Mapping[str, float],
        *,
        mirror: Mirror | None = None,
        match: Match | None = None,
        sticky: Sticky | None = None,
    ) -> "Routes":
        """Routes from percents in steps of 0.1: `Routes.split({"7": 99.9, "8": 0.1})`."""
        weights = tuple((arm, to_per_mille(f"weights[{arm!r}]", percent)) for arm, percent in percents.items())
        return cls(weights, mirror, match, sticky)

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm that must run, in order: weighted, mirrored to, or matched."""
        named = [arm for arm, _ in self.weights]
        named += [rule.arm for rule in (self.mirror, self.match) if rule is not None]
        return tuple(dict.fromkeys(named))

    @property
    def serving(self) -> tuple[str, ...]:
        """The arms that answer callers by weight, in order; never empty."""
        return tuple(arm for arm, per_mille in self.weights if per_mille > 0)

    def percent(self, arm: str) -> float:
        """The share of `arm` in percent; 0.0 for an arm that is not named."""
        return dict(self.weights).get(arm, 0) / 10

    def to_json(self) -> dict[str, Any]:
        """Plain JSON with percents; `from_json` is its inverse."""
        return {
            "weights": [{"arm": arm, "percent": per_mille / 10} for arm, per_mille in self.weights],
            "mirror": self.mirror and {"arm": self.mirror.arm, "percent": self.mirror.per_mille / 10},
            "match": self.match and {"header": self.match.header, "value": self.match.value, "arm": self.match.arm},
            "sticky": self.sticky and {"by": self.sticky.by, "name": self.sticky.name, "salt": self.sticky.salt},
        }

    @classmethod
    def from_json(cls, raw: Any) -> "Routes":
        """The inverse of `to_json`; raises DeclarationError naming the field that is missing, unknown or of a wrong type."""
        fields = _mapping("routes", raw, required={"weights"}, optional=frozenset({"mirror", "match", "sticky"}))
        rows = fields["weights"]
        if not isinstance(rows, list) or not rows:
            raise DeclarationError(f"weights is {rows!r}: give a list of {{arm, percent}}.")
        weights = tuple(_weight(f"weights[{number}]", row) for number, row in enumerate(rows))
        return cls(
            weights,
            _part("mirror", fields.get("mirror"), {"arm", "percent"}, lambda m: Mirror(*_weight("mirror", m))),
            _part("match", fields.get("match"), {"header", "value", "arm"}, lambda m: Match(**m)),
            _part("sticky", fields.get("sticky"), {"by", "name", "salt"}, lambda s: Sticky(**s)),
        )


def to_per_mille(field: str, percent: Any) -> int:
    """A percent in steps of 0.1 as thousandths; raises DeclarationError naming `field` for anything else."""
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
        raise DeclarationError(f"{field} is {percent!r}: give a percent from 0 to 100.")
    per_mille = round(percent * 10)
    if abs(percent * 10 - per_mille) > 1e-6:
        raise DeclarationError(f"{field} is {percent!r}: percents go in steps of 0.1.")
    return per_mille


def assign(key: str, routes: Routes) -> str:
    """The arm that the sticky key `key` reaches under `routes`; raises DeclarationError when `routes` has no sticky rule.

    `bucket(key, salt)` falls into the weights laid end to end in their order, so while the last arm grows from 5 % to 50 % it
    keeps every key it had. A match rule comes before this one and is not considered here.
    """
    if routes.sticky is None:
        raise DeclarationError("routes.sticky is not set: without it requests are divided at random, not by key.")
    place, end = bucket(key, routes.sticky.salt), 0
    for arm, per_mille in routes.weights:
        end += per_mille
        if place < end:
            return arm
    raise AssertionError("unreachable: the weights of Routes sum to 1000 and a bucket is below that")


def bucket(key: str, salt: str) -> int:
    """A number from 0 to 999 for `key`, the same on every machine and in every process: XXH64(salt + ":" + key) mod 1000.

    XXH64 with seed 0 over UTF-8 is the hash that Envoy takes of a header in its hash policy, and the remainder by the total
    weight is how it then picks a weighted cluster (`use_hash_policy`), so gateway and analysis agree on the arm.
    """
    return xxh64(f"{salt}:{key}".encode()) % PER_MILLE


_MASK = 0xFFFFFFFFFFFFFFFF
_P1, _P2, _P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P4, _P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0 (Collet, xxHash specification 0.1.1, section "XXH64 algorithm description")."""
    at, length = 0, len(data)
    if length >= 32:
        lanes = [(_P1 + _P2) & _MASK, _P2, 0, -_P1 & _MASK]
        while at <= length - 32:
            lanes = [_lane(lane, int.from_bytes(data[at + 8 * i : at + 8 * i + 8], "little")) for i, lane in enumerate(lanes)]
            at += 32
        hashed = sum(_rotate(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
        for lane in lanes:
            hashed = ((hashed ^ _lane(0, lane)) * _P1 + _P4) & _MASK
    else:
        hashed = _P5
    return _finish((hashed + length) & _MASK, data[at:])


def _finish(hashed: int, rest: bytes) -> int:
    while len(rest) >= 8:
        hashed = (_rotate(hashed ^ _lane(0, int.from_bytes(rest[:8], "little")), 27) * _P1 + _P4) & _MASK
        rest = rest[8:]
    if len(rest) >= 4:
        hashed = (_rotate(hashed ^ int.from_bytes(rest[:4], "little") * _P1 & _MASK, 23) * _P2 + _P3) & _MASK
        rest = rest[4:]
    for byte in rest:
        hashed = _rotate(hashed ^ byte * _P5 & _MASK, 11) * _P1 & _MASK
    hashed = (hashed ^ hashed >> 33) * _P2 & _MASK
    hashed = (hashed ^ hashed >> 29) * _P3 & _MASK
    return hashed ^ hashed >> 32


def _lane(lane: int, word: int) -> int:
    return _rotate((lane + word * _P2) & _MASK, 31) * _P1 & _MASK


def _rotate(value: int, by: int) -> int:
    return (value << by | value >> (64 - by)) & _MASK


def _check_arm(field: str, arm: Any) -> None:
    if not isinstance(arm, str) or not _ARM.fullmatch(arm):
        raise DeclarationError(f"{field} names the arm {arm!r}: use a version such as '7', or '7@baseline'.")


def _check_token(field: str, name: Any) -> None:
    if not isinstance(name, str) or not _TOKEN.fullmatch(name):
        raise DeclarationError(f"{field} is {name!r}: use the name of a header or cookie (letters, digits, -, _).")


def _check_per_mille(field: str, per_mille: Any) -> None:
    if isinstance(per_mille, bool) or not isinstance(per_mille, int) or not 0 <= per_mille <= PER_MILLE:
        raise DeclarationError(f"{field} is {per_mille!r} thousandths: give a whole number from 0 to 1000.")


def _mapping(field: str, raw: Any, required: set[str], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise DeclarationError(f"{field} is {raw!r}: give an object with {', '.join(sorted(required | optional))}.")
    missing, unknown = required - raw.keys(), raw.keys() - required - optional
    if missing or unknown:
        what = f"lacks {', '.join(sorted(missing))}" if missing else f"has the unknown field {', '.join(map(str, unknown))}"
        raise DeclarationError(f"{field} {what}: the fields are {', '.join(sorted(required | optional))}.")
    return raw


def _weight(field: str, row: Any) -> tuple[str, int]:
    row = _mapping(field, row, {"arm", "percent"})
    return row["arm"], to_per_mille(f"{field}.percent", row["percent"])


def _part(field: str, raw: Any, names: set[str], make: Callable[[Any], Any]) -> Any:
    return None if raw is None else make(_mapping(field, raw, names))
