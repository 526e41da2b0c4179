"""Request rows against the signature: what is wrong is said by instance and field, what is right passes in a microsecond."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any

from mlops_dagster.core.errors import DataError
from mlops_dagster.serving.artifact import RESERVED, Feature, Signature

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
FIRST_YEAR, LAST_YEAR = 1900, 2200
MAXIMUM_DAYS = 366  # of the rows of one request: the log has a file for each day
MAXIMUM_ID = 1024  # characters
KNOWN_TYPES_LIMIT = 4096
ACCEPTED: dict[str, tuple[type, ...]] = {"float64": (float, int), "int64": (int,), "bool": (bool,), "string": (str,)}
EXPECTED = {"float64": "a number", "int64": "a whole number", "bool": "true or false", "string": "a string"}
Row = tuple[Any, ...]


class InputError(DataError):
    """A request that the caller must change; `status` is the HTTP status (4xx) of the answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class RowReader:
    """Turns instances (dicts by feature name, or lists in signature order) into tuples in signature order.

    A number for a float64 feature stays an int or a float; null stays None and passes only where the feature is nullable.
    """

    def __init__(self, signature: Signature, completes: bool = False) -> None:
        self.features = signature.features
        self.names = tuple(f.name for f in signature.features)
        self.completes = completes
        self.width = len(self.names)
        self._named = frozenset(self.names)
        self._get: Callable[[Mapping[str, Any]], Row] = _getter(self.names)
        self._allowed = frozenset((*self.names, *RESERVED, *signature.entities, *(r.name for r in signature.request)))
        self._whole = tuple(i for i, f in enumerate(self.features) if f.dtype == "int64")
        # Tuples of Python types that were found to be in order: the check of an ordinary row is one look-up.
        self._known: set[tuple[type, ...]] = set()

    def lacks_features(self, instance: object) -> bool:
        """Whether a dict instance leaves out a feature, so that an online store could complete it."""
        return type(instance) is dict and not self._named <= instance.keys()

    def read(self, instance: object, number: int) -> Row:
        """The row's values in signature order; raises InputError naming instance `number` and the field."""
        if type(instance) is dict:
            try:
                row = self._get(instance)
            except KeyError:
                raise self._missing(instance, number) from None
            if len(instance) != self.width and not instance.keys() <= self._allowed:
                raise self._unknown(instance, number)
        elif type(instance) is list:
            if len(instance) != self.width:
                raise InputError(
                    f"instances[{number}] has {len(instance)} values; the model has {self.width} features: {', '.join(self.names)}."
                )
            row = tuple(instance)
        else:
            raise InputError(
                f"instances[{number}] is {_json_type(instance)}; give an object of feature values, or a list in signature order."
            )
        return self.check(row, number)

    def sent(self, instance: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The features that an incomplete instance brings itself, of the signature's types; raises InputError, also for unknown names."""
        if not instance.keys() <= self._allowed:
            raise self._unknown(instance, number)
        found = {f.name: _value(instance[f.name], f, number) for f in self.features if f.name in instance}
        for name in (self.names[i] for i in self._whole if self.names[i] in found):
            _check_range(found[name], name, number)
        return found

    def check(self, row: Row, number: int) -> Row:
        """`row` with its types as the signature has them; raises InputError."""
        types = tuple(map(type, row))
        if types not in self._known:
            row, types = self._convert(row, number)
            if len(self._known) < KNOWN_TYPES_LIMIT:
                self._known.add(types)
        for i in self._whole:
            _check_range(row[i], self.names[i], number)
        return row

    def _convert(self, row: Row, number: int) -> tuple[Row, tuple[type, ...]]:
        values = tuple(_value(v, f, number) for v, f in zip(row, self.features, strict=True))
        return values, tuple(map(type, values))

    def _missing(self, instance: Mapping[str, Any], number: int) -> InputError:
        if unknown := instance.keys() - self._allowed:
            return self._unknown(dict.fromkeys(unknown), number)
        absent = [n for n in self.names if n not in instance]
        hint = (
            ""
            if self.completes
            else "; this server completes nothing from a feature store (it was started without --feature-repo)"
        )
        return InputError(f"instances[{number}].{absent[0]} is missing{hint}. Missing in all: {', '.join(absent)}.")

    def _unknown(self, instance: Mapping[str, Any], number: int) -> InputError:
        unknown = sorted(map(str, instance.keys() - self._allowed))
        return InputError(
            f"instances[{number}].{unknown[0][:200]} is not a feature of this model. Known: {', '.join(sorted(self._allowed))}."
        )


def _check_range(value: Any, name: str, number: int) -> None:
    if value is not None and not INT64_MIN <= value <= INT64_MAX:
        raise InputError(f"instances[{number}].{name} is {value}, outside the range of a 64-bit integer.")


def _value(value: object, feature: Feature, number: int) -> object:
    """`value` as the feature's type; only a float without a fraction is converted (JSON has one number type)."""
    if value is None:
        if feature.nullable:
            return None
        raise InputError(f"instances[{number}].{feature.name} is null (NaN); it must be {EXPECTED[feature.dtype]}.")
    if type(value) in ACCEPTED[feature.dtype]:
        return value
    if feature.dtype == "int64" and type(value) is float and value.is_integer():
        return int(value)
    raise InputError(
        f"instances[{number}].{feature.name} is {_json_type(value)} ({short(value)}); it must be {EXPECTED[feature.dtype]}."
    )


def row_id(instance: object, number: int) -> str:
    """The row's reserved `id` as a string, or `#` and its position when it has none.

    Raises InputError for anything but a short string or an integer.
    """
    if type(instance) is not dict or (value := instance.get("id")) is None:
        return f"#{number}"
    if type(value) is str:
        return short_id(value, number)
    if type(value) is int:
        return str(value)
    raise InputError(f"instances[{number}].id is {_json_type(value)} ({short(value)}); it must be a string or an integer.")


def short_id(value: str, number: int) -> str:
    """`value`, the id of row `number`, which every row of the log repeats; raises InputError where it is long."""
    if len(value) > MAXIMUM_ID:
        raise InputError(f"instances[{number}].id has {len(value)} characters; at most {MAXIMUM_ID} are taken.")
    return value


def event_times(values: Iterable[object]) -> list[datetime | None]:
    """`event_time` of each row of a request; raises InputError also where they lie on more than `MAXIMUM_DAYS` days (in UTC)."""
    moments = [None if value is None else event_time(value, number) for number, value in enumerate(values)]
    if len(moments) > MAXIMUM_DAYS and (days := len({m.toordinal() for m in moments if m})) > MAXIMUM_DAYS:
        raise InputError(
            f"The event_timestamp values of the rows lie on {days} days; at most {MAXIMUM_DAYS} are taken. Send the rows of each year in "
            "a request of their own."
        )
    return moments


def event_time(value: object, number: int) -> datetime | None:
    """The row's reserved `event_timestamp` (ISO 8601; UTC where it names no zone); raises InputError."""
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)  # type: ignore[arg-type]
        # In UTC, because Arrow drops any other offset where PYARROW_IGNORE_TIMEZONE is set (as importing pyspark.pandas does).
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"instances[{number}].event_timestamp is {short(value)}; it must be an ISO 8601 time such as 2013-02-17T08:30:00Z."
        ) from None
    if not FIRST_YEAR <= moment.year < LAST_YEAR:
        raise InputError(
            f"instances[{number}].event_timestamp is {short(value)}; it must lie between {FIRST_YEAR} and {LAST_YEAR}."
        )
    return moment


def check_distinct(ids: list[str]) -> None:
    """Rows of one request need ids of their own: the log tells them apart by request id and row id. Raises InputError."""
    if len(set(ids)) != len(ids):
        first: dict[str, int] = {}
        for number, one in enumerate(ids):
            if one in first:
                raise InputError(
                    f"instances[{number}].id is {one[:200]!r}, which is also instances[{first[one]}].id; ids must differ within a request."
                )
            first[one] = number


def _getter(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], Row]:
    if len(names) == 1:
        only = names[0]
        return lambda instance: (instance[only],)
    return itemgetter(*names)


def _json_type(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def short(value: object) -> str:
    """What a caller sent, in at most 80 characters, however long or deep it is (JSON may nest deeper than `repr` goes)."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
