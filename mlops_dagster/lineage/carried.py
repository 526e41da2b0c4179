"""Feature values that nothing replaced yet: how long those of a raw day stay in use, and whether rows of later days use them.

A row takes an entity's newest value that is not older than the view's TTL (Feast's point-in-time join), however many days ago it was made.
"""

import datetime as dt
import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.errors import NotFoundError
from mlops_dagster.core.late_data import day_of
from mlops_dagster.lineage.feature_history import Content, FeatureHistory
from mlops_dagster.lineage.origins import READ_AT_ONCE
from mlops_dagster.lineage.training_record import FeatureView, TrainingRecord
from mlops_dagster.resources.data_lake.parquet import from_parquet

if TYPE_CHECKING:
    import polars as pl

LOOKED_AT_ONCE = 32  # partitions; values are mostly replaced by the next one
DAY = dt.timedelta(days=1)


@dataclass(frozen=True)
class Carried:
    """The newest value of each entity of a view among some days. `values`: the join `keys`, `since`, `replaced` (null: never) and `expires`
    (null: never), in UTC; a value is in use from `since`, before `replaced` and up to `expires`."""

    keys: Sequence[str]
    values: "pl.DataFrame"

    @property
    def until(self) -> dt.datetime | None:
        """The last moment at which one of them is in use; None where one is still. Only for `values` with rows."""
        import polars as pl

        ends = self.values.select(pl.min_horizontal(pl.col("replaced") - pl.duration(microseconds=1), "expires"))
        return None if ends.to_series().null_count() else ends.to_series().max()  # type: ignore[return-value]

    def used_by(self, rows: "pl.DataFrame") -> int:
        """How many rows (join keys, `event_timestamp`) use one of them."""
        import polars as pl

        moment = pl.col("event_timestamp")
        met = rows.join(self.values, on=[*self.keys], how="inner") if self.keys else rows.join(self.values, how="cross")
        in_use = (moment >= pl.col("since")) & (moment < pl.col("replaced")).fill_null(True)
        return met.filter(in_use & (moment <= pl.col("expires")).fill_null(True)).height


@dataclass
class CarriedValues:
    """The feature values that came from a raw day; each is looked up once for all training sets that were made of the same contents."""

    history: FeatureHistory
    _known: dict[Any, "pl.DataFrame"] = field(init=False, default_factory=dict)

    def by_training_set(self, records: Mapping[str, TrainingRecord]) -> dict[str, int]:
        """How many rows of each training set use such values; `records`, by their keys: of sets that do not touch the raw day."""
        found: dict[str, int] = {}
        for key, record in records.items():  # rows that were made twice have one name
            found[record.training_set] = max(found.get(record.training_set, 0), self._rows_carrying(record, key))
        return found

    def _rows_carrying(self, record: TrainingRecord, inputs_key: str) -> int:
        """The most of any view. The contents are those of the revision that recorded the set; for one that none did, every content counts
        that the days ever had. From the day before its rows on, its record says that its features were made without the raw day."""
        first, last = (dt.date.fromisoformat(record.days[at]) for at in (0, -1))
        position = self.history.recorded(inputs_key)
        found = self.of(record.views, position, first - 2 * DAY, last)
        rows = ((one, self._rows_of(record, position, one.keys)) for one in found)
        return max((one.used_by(own) for one, own in rows if own is not None), default=0)

    def of(
        self,
        views: Mapping[str, FeatureView],
        position: int | None = None,
        last: dt.date = dt.date.max,
        through: dt.date = dt.date.max,
    ) -> list[Carried]:
        """By view, the values that the raw day's features up to `last` held at a position (None: ever held), and the values up to
        `through` that replaced them; without views whose join keys were not recorded."""
        found, last = [], min(last, self.history.feature_days[1])
        for view, life in views.items():
            contents = () if life.keys is None else self._held(view, position, last)
            if not contents:
                continue
            mark = (view, (*(life.keys or ()),), life.ttl_seconds, *((c.key, c.md5) for c in contents))
            if mark not in self._known:
                self._known[mark] = self._newest(life, contents)
            if self._known[mark].height:
                begin = last if position is None else day_of(contents[0].key)
                at = (self.history.at(key, position) for key in self.history.keys(view, begin + DAY, through))
                later = (c for c in at if c is not None and c not in contents)
                found.append(Carried(life.keys or (), self._replaced(life.keys or (), mark, later)))
        return found

    def _held(self, view: str, position: int | None, last: dt.date) -> Sequence[Content]:
        keys = self.history.keys(view, self.history.feature_days[0], last)
        if position is None:
            return [content for key in keys for content in self.history.ever_of_day(key)]
        return [c for key in keys if (c := self.history.at(key, position)) is not None and c.of_day]

    def _newest(self, life: FeatureView, contents: Sequence[Content]) -> "pl.DataFrame":
        import polars as pl

        keys, never = life.keys or (), pl.lit(None, pl.Datetime("us", "UTC"))
        own = _grouped(self._read(contents, [*keys, "event_timestamp"]), keys, pl.col("event_timestamp").max().alias("since"))
        ttl = never if life.ttl_seconds is None else pl.col("since") + pl.duration(seconds=life.ttl_seconds)
        return own.drop_nulls("since").with_columns(expires=ttl, replaced=never)

    def _replaced(self, keys: Sequence[str], mark: Any, later: Iterable[Content]) -> "pl.DataFrame":
        """With when the next value of each entity was there and known: later contents are read until all are replaced."""
        import polars as pl

        own, rest = self._known[mark], iter(later)
        while own["replaced"].null_count() and (some := [*islice(rest, LOOKED_AT_ONCE)]):
            mark = (mark, *((c.key, c.md5) for c in some))
            if mark not in self._known:
                rows = self._read(some, [*keys, "event_timestamp", "created_timestamp"])
                since = own.filter(pl.col("replaced").is_null()).select([*keys, "since"])
                met = rows.join(since, on=[*keys]) if keys else rows.join(since, how="cross")
                after = met.filter(pl.col("event_timestamp") > pl.col("since"))
                following = _grouped(after, keys, pl.max_horizontal("event_timestamp", "created_timestamp").min().alias("next"))
                joined = own.join(following, on=[*keys], how="left") if keys else own.join(following, how="cross")
                self._known[mark] = joined.with_columns(replaced=pl.coalesce("replaced", "next")).drop("next")
            own = self._known[mark]
        return own

    def _rows_of(self, record: TrainingRecord, position: int | None, keys: Sequence[str]) -> "pl.DataFrame | None":
        """Join keys and moments (UTC) of a training set's rows; None where it is neither in the lake nor recorded."""
        columns = [*keys, "event_timestamp"]
        try:
            return _utc(self.history.lake.read(record.key, columns))
        except NotFoundError:
            content = self.history.at(record.key, position)
            return self._read([content], columns) if content else None

    def _read(self, contents: Sequence[Content], columns: Sequence[str]) -> "pl.DataFrame":
        import polars as pl

        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            found = pool.map(lambda c: from_parquet(c.key, io.BytesIO(self.history.read_bytes(c)), columns), contents)
            return pl.concat([_utc(table) for table in found], how="vertical_relaxed")


def _utc(table: Any) -> "pl.DataFrame":
    """Moments in microseconds UTC: a training set keeps the zone of its source."""
    import polars as pl
    import pyarrow as pa

    at, moments = table.column_names.index("event_timestamp"), table["event_timestamp"].cast(pa.timestamp("us", "UTC"))
    return pl.DataFrame(table.set_column(at, "event_timestamp", moments))


def _grouped(rows: "pl.DataFrame", keys: Sequence[str], value: "pl.Expr") -> "pl.DataFrame":
    return rows.group_by([*keys]).agg(value) if keys else rows.select(value)
