"""Stage 3: the feature views of a day, computed by SQL, registered in Feast and materialized into the online store."""

import datetime as dt
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import dagster as dg
import pyarrow as pa

from mlops_dagster.assets import learned_expectations, online_freshness
from mlops_dagster.assets.lake_paths import day_key, digest_of, stored_days, tables
from mlops_dagster.assets.references import load_callable
from mlops_dagster.assets.stage import check_result, days, key, stage
from mlops_dagster.core.errors import DataError, DeclarationError
from mlops_dagster.core.late_data import day_of
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.lineage import origins, quarantine
from mlops_dagster.resources.data_lake import Lake, StoredFile
from mlops_dagster.resources.data_versions import DataVersions

STAGE = "features"
SAMPLED_ENTITIES = 50
FETCHED_AT_ONCE = 8
CHECKS = {
    "null_share": ("No stored feature misses more of its values than features.max_null_share.", False),
    "online_equals_offline": ("The online store answers what the offline store does, for sampled entities.", False),
    online_freshness.NAME: ("The newest online value of every view is not older than features.max_online_age_hours.", False),
    learned_expectations.NAME: (
        "Ranges, categories and missing shares are those of the deployed version's training data.",
        False,
    ),
}


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, features]`."""

    @stage(
        spec,
        STAGE,
        description="Feature views of the day: Parquet for point-in-time joins, the newest values online.",
        kinds={spec.features.engine, "feast"},
        needs=[looking_back(spec)],
        resources={"data_lake", "data_versions", f"feature_engine_{spec.features.engine}", "feature_store", "registry"},
        partitioned=True,
        checks=CHECKS,
        code=["features.define", "features.compute"],
    )
    def features(context: dg.AssetExecutionContext):
        lake, store = context.resources.data_lake, context.resources.feature_store
        engine = getattr(context.resources, f"feature_engine_{spec.features.engine}")
        queries, made = load_callable(spec, "features.compute")(), days(context)
        versions, decided = context.resources.data_versions, quarantine.read(lake, spec.name)
        with reading(spec, lake, versions, made, decided["days"]) as made_of:
            new = compute_days(spec, lake, engine, queries, made)
        require_columns(new, store.columns(spec.name, load_callable(spec, "features.define")))
        with quarantine.unchanged(spec, lake, versions, made, decided):
            stored = keep(spec, lake, versions, new, made_of)
        store.apply(spec.name, load_callable(spec, "features.define"))
        begin, end = spec.source.partitions.bounds(min(made))[0], spec.source.partitions.bounds(max(made))[1]
        written = store.materialize(spec.name, begin, end)
        for day, views in new.items():
            rows = {view: table.num_rows for view, table in views.items()}
            counted = {"rows": rows, "dagster/partition_row_count": sum(rows.values())}
            context.add_asset_metadata(counted, partition_key=day.isoformat())
        return dg.MaterializeResult(
            metadata={"online_rows": written, "newest_online_value": newest_event(new)},
            data_version=dg.DataVersion(digest_of(f.sha256 for f in stored)),
            check_results=[
                _null_share(spec, new),
                online_check(spec, store, new[max(made)], newest_stored(spec, lake, new[max(made)])),
                online_freshness.check(spec, lake, store, new, dt.datetime.now(dt.UTC)),
                learned_expectations.check(spec, lake, context.resources.registry, new),
            ],
        )

    return features


def looking_back(spec: ModelSpec) -> dg.AssetDep:
    """A day's features are made of the validated rows of that day and of the features.lookback_days before it."""
    mapping = dg.TimeWindowPartitionMapping(start_offset=-spec.features.lookback_days, allow_nonexistent_upstream_partitions=True)
    return dg.AssetDep(key(spec, "validated_data"), partition_mapping=mapping)


@contextmanager
def reading(
    spec: ModelSpec, lake: Lake, versions: DataVersions, made: list[dt.date], out: Collection[str]
) -> Iterator[dict[dt.date, dict[str, str]]]:
    """While features of the days `made` are computed; gives the raw partitions (key -> MD5) behind each. `out`: days in quarantine.

    Raises TransientError at its end where the validated rows are not those of the beginning: nobody can tell then which were read.
    """
    back, stage = dt.timedelta(days=spec.features.lookback_days), "validated_data"
    span = (min(made) - back, max(made), [dt.date.fromisoformat(day) for day in out])
    before = origins.recorded(versions, spec.name, stage, *span)
    rows = origins.load(lake, versions, spec.name, stage, {day_of(key) for key in before})
    yield {day: {k: md5 for d, raw in rows.items() if day - back <= d <= day for k, md5 in raw.items()} for day in made}
    origins.require_recorded(lake, versions, spec.name, stage, before, span, f"{spec.name}/{STAGE}")


def compute_day(spec: ModelSpec, lake: Lake, engine: Any, queries: dict[str, str], day: dt.date) -> dict[str, pa.Table]:
    """Every view's rows that became known during a day, sorted. Raises DataError for SQL that returns the wrong columns."""
    return compute_days(spec, lake, engine, queries, [day])[day]


def compute_days(
    spec: ModelSpec, lake: Lake, engine: Any, queries: dict[str, str], made: list[dt.date]
) -> dict[dt.date, dict[str, pa.Table]]:
    """As `compute_day` for several days; the engine makes them in one pass where that is cheaper."""
    bounds = {day: spec.source.partitions.bounds(day) for day in made}
    sources = {name: _inputs(spec, lake, name, made) for name in tables(lake, spec)}
    cases = [
        ({name: days_of[day] for name, days_of in sources.items()}, {"day_start": begin, "day_end": end})
        for day, (begin, end) in bounds.items()
    ]
    answers = engine.run_each(queries, cases)
    return {
        day: {view: _within(view, rows, *bounds[day]) for view, rows in answer.items()}
        for day, answer in zip(made, answers, strict=True)
    }


def _inputs(spec: ModelSpec, lake: Lake, table: str, made: list[dt.date]) -> dict[dt.date, Any]:
    """What the SQL reads for each day: the files of the days it may look back on, or, where they are not files of this machine,
    their rows, each file fetched once."""
    back = dt.timedelta(days=spec.features.lookback_days)
    stored = stored_days(lake, spec, "validated_data", table)
    wanted = {day: [day_key(spec, "validated_data", d, table) for d in stored if day - back <= d <= day] for day in made}
    if bare := ", ".join(str(day) for day, several in wanted.items() if not several):
        raise DataError(
            f"features of {spec.name} for {bare}: there are no validated rows of {table!r} that they may look back on (days in quarantine "
            f"do not count); leave these days out"
        )
    keys = list(dict.fromkeys(key for several in wanted.values() for key in several))
    if not any("://" in lake.locate(key) for key in keys[:1]):
        return {day: [lake.locate(key) for key in several] for day, several in wanted.items()}
    with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
        rows = dict(zip(keys, pool.map(lake.read, keys), strict=True))
    return {day: pa.concat_tables([rows[k] for k in several], promote_options="permissive") for day, several in wanted.items()}


def _within(view: str, rows: pa.Table, begin: dt.datetime, end: dt.datetime) -> pa.Table:
    """The rows with `begin < event_timestamp <= end`, in microseconds UTC, in a fixed order."""
    from mlops_dagster.assets.arrow import pc

    if "event_timestamp" not in rows.column_names:
        raise DataError(
            f"features.compute: the SQL of view {view!r} returns {rows.column_names}; it must return 'event_timestamp' too"
        )
    moment = rows["event_timestamp"].cast(pa.timestamp("us", "UTC"))
    rows = rows.set_column(rows.column_names.index("event_timestamp"), "event_timestamp", moment)
    bounds = [pa.scalar(b, pa.timestamp("us", "UTC")) for b in (begin, end)]
    kept = rows.filter(pc.and_(pc.greater(moment, bounds[0]), pc.less_equal(moment, bounds[1])))
    return kept.sort_by(
        [(name, "ascending") for name in ["event_timestamp", *(c for c in kept.column_names if c != "event_timestamp")]]
    )


def keep(
    spec: ModelSpec,
    lake: Lake,
    versions: DataVersions,
    new: dict[dt.date, dict[str, pa.Table]],
    made_of: dict[dt.date, dict[str, str]],
) -> list[StoredFile]:
    """Store the views of each day and what it was made of, as one revision."""
    stored = [write_versions(lake, day_key(spec, STAGE, day, v), t) for day, views in new.items() for v, t in views.items()]
    beside = [origins.store(lake, spec.name, STAGE, day, raw) for day, raw in made_of.items()]
    versions.record([*(f.key for f in stored), *beside], f"{spec.name}: features")
    return stored


def write_versions(lake: Lake, key: str, rows: pa.Table, now: dt.datetime | None = None) -> Any:
    """Store a view's day with `created_timestamp`, so that a later correction never changes what was known before it.

    The first time, a row counts as created when it became known (`event_timestamp`); when the day is made again, rows that are new or
    differ are added with the present moment, and the old ones stay.
    """
    import polars as pl

    fresh = pl.DataFrame(rows)
    if not lake.list(key):
        return lake.write(key, fresh.with_columns(created_timestamp=pl.col("event_timestamp")))
    stored = pl.DataFrame(lake.read(key))
    known = stored.drop("created_timestamp")
    if known.columns != fresh.columns or known.dtypes != fresh.dtypes:
        return lake.write(key, fresh.with_columns(created_timestamp=pl.col("event_timestamp")))
    changed = fresh.join(known, on=fresh.columns, how="anti", nulls_equal=True)
    moment = now or dt.datetime.now(dt.UTC)
    return lake.write(key, pl.concat([stored, changed.with_columns(created_timestamp=pl.lit(moment, pl.Datetime("us", "UTC")))]))


def newest_event(new: dict[dt.date, dict[str, pa.Table]]) -> str:
    """The newest moment of any stored value: how fresh the online store is."""
    from mlops_dagster.assets.arrow import pc

    moments = [pc.max(t["event_timestamp"]).as_py() for views in new.values() for t in views.values() if t.num_rows]
    return max(moments).isoformat() if moments else "none"


def _null_share(spec: ModelSpec, new: dict[dt.date, dict[str, pa.Table]]) -> dg.AssetCheckResult:
    shares: dict[str, float] = {}
    for view in next(iter(new.values())):
        table = pa.concat_tables(views[view] for views in new.values())
        shares |= {f"{view}.{c}": table[c].null_count / table.num_rows for c in table.column_names if table.num_rows}
    over = {name: share for name, share in shares.items() if share > spec.features.max_null_share}
    because = ", ".join(f"{n} {s:.0%}" for n, s in over.items()) or f"at most {max(shares.values(), default=0):.0%} missing"
    return check_result("null_share", not over, because, {"limit": spec.features.max_null_share, "over": over})


def newest_stored(spec: ModelSpec, lake: Lake, views: Collection[str]) -> dt.datetime:
    """The end of the newest day that has features: as of then the online store answers, also after older days were made again."""
    return spec.source.partitions.bounds(max(day for view in views for day in stored_days(lake, spec, STAGE, view)))[1]


def online_check(spec: ModelSpec, store: Any, views: dict[str, pa.Table], moment: dt.datetime) -> dg.AssetCheckResult:
    """Ask both stores for the values of sampled entities as of `moment` and compare."""
    rows = sampled_entities(spec, store, views)
    if not rows:
        return check_result("online_equals_offline", True, "no entity has a value on this day")
    offline = store.historical(spec.name, pa.Table.from_pylist([{**row, "event_timestamp": moment} for row in rows])).to_pylist()
    # As of the same moment: a value's time to live counts from there, not from the wall clock.
    online = store.online(spec.name, [{**row, "event_timestamp": moment} for row in rows])
    names = [name for name, _ in store.signature(spec.name).features]
    pairs = [(f"{row} {n}", a.get(n), b.get(n)) for row, a, b in zip(rows, offline, online, strict=True) for n in names]
    different = [f"{what}: offline {a}, online {b}" for what, a, b in pairs if not same_value(a, b)]
    because = "; ".join(different[:3]) or f"{len(rows)} entities, {len(names)} features equal"
    return check_result("online_equals_offline", not different, because, {"different": different[:50]})


def sampled_entities(spec: ModelSpec, store: Any, views: dict[str, pa.Table]) -> list[dict[str, Any]]:
    """Up to SAMPLED_ENTITIES rows of join keys (each view's keys taken from its own rows) with request-time values of zero."""
    signature = store.signature(spec.name)
    keys: dict[str, list[Any]] = {}
    for table in views.values():
        found = [e for e in signature.entities if e in table.column_names]
        for entity in found:
            keys.setdefault(entity, table[entity].unique().sort().to_pylist())
    missing = [e for e in signature.entities if not keys.get(e)]
    if missing:
        return []
    zero = {"float64": 0.0, "int64": 0, "string": "", "bool": False}
    request = {name: zero[kind] for name, kind in signature.request}
    size = min(SAMPLED_ENTITIES, max(len(v) for v in keys.values()))
    return [{e: keys[e][i * len(keys[e]) // size] for e in signature.entities} | request for i in range(size)]


def same_value(left: Any, right: Any) -> bool:
    """Equal, or both missing, or equal to the float32 precision that a model sees."""
    if left is None or right is None or left != left or right != right:
        return (left is None or left != left) and (right is None or right != right)
    return abs(left - right) <= 1e-6 * max(1.0, abs(left)) if isinstance(left, float | int) else left == right


def require_columns(new: dict[dt.date, dict[str, pa.Table]], wanted: dict[str, list[str]]) -> None:
    """The SQL makes the views that are defined, with their columns. Raises DeclarationError."""
    views = next(iter(new.values()))
    if views.keys() != wanted.keys():
        raise DeclarationError(
            f"features.compute makes {sorted(views)}, features.define defines {sorted(wanted)}; make them the same"
        )
    for view, columns in wanted.items():
        if missing := [c for c in columns if c not in views[view].column_names]:
            raise DeclarationError(
                f"features.compute: the SQL of view {view!r} lacks {', '.join(missing)}, which features.define asks for; it returns "
                f"{', '.join(views[view].column_names)}"
            )
