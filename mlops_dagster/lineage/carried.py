"""Feature values that nothing replaced yet: how long those of some days stay in use, and whether rows of later days use them.

A row takes an entity's newest value that is not older than the view's TTL (Feast's point-in-time join), however many days ago it was made.
"""

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlops_dagster.core.errors import NotFoundError
from mlops_dagster.lineage import origins
from mlops_dagster.lineage.training_record import FeatureView, TrainingRecord
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_lake.parquet import from_parquet
from mlops_dagster.resources.data_versions import DataVersions

if TYPE_CHECKING:
    import polars as pl

LOOKED_AT_ONCE = 32  # partitions; values are mostly replaced by the next one


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


def carried(
    lake: Lake, versions: DataVersions, model: str, views: Mapping[str, FeatureView], first: dt.date, last: dt.date
) -> list[Carried]:
    """The values that the features of first … last hold or ever held, by view; without views whose join keys were not recorded."""
    import polars as pl

    found = []
    for view, life in views.items():
        tables = [] if life.keys is None else [*_held(versions, f"{model}/features/{view}/", life.keys, first, last)]
        if not any(table.height for table in tables):
            continue
        own = _grouped(pl.concat(tables, how="vertical_relaxed"), life.keys or (), pl.col("event_timestamp").max().alias("since"))
        ttl = None if life.ttl_seconds is None else pl.col("since") + pl.duration(seconds=life.ttl_seconds)
        expires = pl.lit(None, pl.Datetime("us", "UTC")) if ttl is None else ttl
        found.append(Carried(life.keys or (), _replaced(lake, model, view, life, own.with_columns(expires=expires), last)))
    return found


def rows_of(lake: Lake, record: TrainingRecord, keys: Sequence[str]) -> "pl.DataFrame":
    """Join keys and moments of a training set's rows; none where it is no longer in the lake."""
    import polars as pl

    try:
        return pl.DataFrame(lake.read(record.key, [*keys, "event_timestamp"]))
    except NotFoundError:
        return pl.DataFrame(schema={**dict.fromkeys(keys, pl.String), "event_timestamp": pl.Datetime("us", "UTC")})


def _held(versions: DataVersions, prefix: str, keys: Sequence[str], first: dt.date, last: dt.date) -> Iterator["pl.DataFrame"]:
    """Every content that the days' partitions had, in quarantine or corrected since though they may be."""
    import polars as pl

    seen: set[tuple[str, str]] = set()
    for revision in versions.history(prefix):
        for key in origins.between(revision.files, first, last):
            md5 = revision.files[key]
            if md5 is not None and (key, md5) not in seen:
                seen.add((key, md5))
                yield pl.DataFrame(from_parquet(key, str(versions.restore(key, revision.commit)), [*keys, "event_timestamp"]))


def _replaced(lake: Lake, model: str, view: str, life: FeatureView, own: "pl.DataFrame", last: dt.date) -> "pl.DataFrame":
    """With when the next value of each entity was there and known: later partitions are read until all are replaced."""
    import polars as pl

    keys = list(life.keys or ())
    own = own.with_columns(replaced=pl.lit(None, pl.Datetime("us", "UTC")))
    later = list(origins.between(lake.list(f"{model}/features/{view}/"), last + dt.timedelta(days=1), dt.date.max))
    for begin in range(0, len(later), LOOKED_AT_ONCE):
        if not own["replaced"].null_count():
            break
        rows = pl.DataFrame(lake.read(later[begin : begin + LOOKED_AT_ONCE], [*keys, "event_timestamp", "created_timestamp"]))
        known = pl.max_horizontal("event_timestamp", "created_timestamp").min().alias("next")
        following = _grouped(rows, keys, known)
        joined = own.join(following, on=keys, how="left") if keys else own.join(following, how="cross")
        own = joined.with_columns(replaced=pl.coalesce("replaced", "next")).drop("next")
    return own


def _grouped(rows: "pl.DataFrame", keys: Sequence[str], value: "pl.Expr") -> "pl.DataFrame":
    return rows.group_by([*keys]).agg(value) if keys else rows.select(value)
