"""The feature store: features of a model as of a moment, for training and for answering."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FeatureSignature", "FeatureStore"]


@dataclass(frozen=True)
class FeatureSignature:
    """What a model's feature service answers and asks for.

    `features` and `request` are (name, dtype) pairs, dtype one of float64, int64, string, bool, timestamp or Feast's own name for
    anything else; `features` in the order of the service. `entities` are the join keys, `views` the views that are stored online.
    """

    features: tuple[tuple[str, str], ...]
    entities: tuple[str, ...]
    request: tuple[tuple[str, str], ...]
    views: tuple[str, ...]


class FeatureStore(Protocol):
    """One Feast project per model. All writes may be repeated."""

    def apply(self, model: str, define: Callable[[Callable[[str], Any]], Sequence[Any]]) -> FeatureSignature:
        """Register what `define(source)` returns and a feature service named as the model; at once if nothing changed.

        Raises DeclarationError if the definitions are no Feast objects or do not fit together.
        """
        ...

    def materialize(self, model: str, start: datetime, end: datetime) -> dict[str, int]:
        """Bring the latest row of each entity in [start, end] online: how many per view. Older never replaces newer."""
        ...

    def historical(self, model: str, entity_rows: "pa.Table") -> "pa.Table":
        """Join keys, `event_timestamp`, request values, any other columns in; the same rows in the same order with all features out.

        Raises DataError for a column that is missing or a moment that is null.
        """
        ...

    def online(self, model: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Join keys and request values in, features out, as the online store has them now; None where an entity is unknown."""
        ...

    def push(self, model: str, view: str, table: "pa.Table") -> int:
        """Write rows of a view straight to the online store (a stream's update); how many were newer than what was there."""
        ...


class HasMoments(Protocol):
    """A store that can tell how fresh its online values are."""

    def stored_at(self, model: str, view: str, rows: Sequence[Mapping[str, Any]]) -> list[datetime | None]:
        """The event time of what is online of a view for each row's entity (join keys in), None where nothing is."""
        ...


class HasSignature(Protocol):
    """A store that can tell what was applied last, and what a definition asks for."""

    def signature(self, model: str) -> FeatureSignature:
        """Raises NotFoundError if the model's features were never applied."""
        ...

    def definitions(self, model: str) -> bytes:
        """What was applied last, for `serving.transformer.OnlineFeatures`; equal definitions give equal bytes. Raises NotFoundError."""
        ...

    def columns(self, model: str, define: Callable[[Callable[[str], Any]], Sequence[Any]]) -> dict[str, list[str]]:
        """View -> the columns that its rows must have, as `define` has it now; nothing is registered. Raises DeclarationError."""
        ...

    def lifetimes(self, model: str) -> dict[str, tuple[list[str], float | None]]:
        """View -> its join keys and the seconds for which a value is used that nothing replaces (None: for ever)."""
        ...
