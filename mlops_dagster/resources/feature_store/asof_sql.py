"""The point-in-time join as DuckDB SQL, on relations whose times are integers: what works on disk runs, and what `to_sql` shows.

The relation `entities` has `e_row` and, for view i, the keys `v{i}_k{j}` and the time `v{i}_t`. The relation `view_{i}` has the keys `k{j}`, the
time `t`, the created time `c` (null: never known), the row number `p` and the features `f{m}`. A null key or time joins nothing.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ViewShape:
    """What the SQL of one view depends on: numbers of keys and features, whether rows have a created time, the TTL in the view's time unit."""

    keys: int
    features: int
    created: bool
    ttl: int | None
    as_known: bool


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def history_sql(shapes: Sequence[ViewShape], entity_columns: Sequence[str], names: Sequence[Sequence[str]]) -> str:
    """All entity rows in their order with the features of every view; `names[i][m]` is what feature m of view i is called."""
    steps = [step for i, shape in enumerate(shapes) for step in view_steps(i, shape)]
    columns = [f"entities.{quoted(c)}" for c in entity_columns]
    joins = []
    for i, shape in enumerate(shapes):
        columns += [f"matched_{i}.f{m} AS {quoted(name)}" for m, name in enumerate(names[i])]
        if shape.features:
            joins.append(f"JOIN matched_{i} ON matched_{i}.e_row = entities.e_row")
    selected = ",\n  ".join(columns)
    return f"WITH {','.join(steps)}\nSELECT\n  {selected}\nFROM entities\n" + "\n".join(joins) + "\nORDER BY entities.e_row"


def view_steps(i: int, shape: ViewShape) -> list[str]:
    keys = [f"k{j}" for j in range(shape.keys)]
    if shape.as_known and shape.created:
        return [*known_steps(i, shape, keys), matched_known(i, shape)]
    partition = ", ".join([*keys, "t"])
    created = "c DESC NULLS LAST, " if shape.created else ""
    return [
        f"\nlatest_{i} AS (SELECT * FROM view_{i} WHERE {present(keys)}\n"
        f"  QUALIFY row_number() OVER (PARTITION BY {partition} ORDER BY {created}p DESC) = 1)",
        f"\nmatched_{i} AS (SELECT entities.e_row{features(i, shape, f'latest_{i}')}\n"
        f"  FROM entities ASOF LEFT JOIN latest_{i} ON {on_keys(i, shape, f'latest_{i}')}entities.v{i}_t >= latest_{i}.t)",
    ]


def known_steps(i: int, shape: ViewShape, keys: list[str]) -> list[str]:
    """A row is known from greatest(t, c) on; the running maximum of its rank in time order is the latest row known at each moment."""
    by_key = f"PARTITION BY {', '.join(keys)} " if keys else ""
    listed = "".join(f"{k}, " for k in keys)
    return [
        f"\nranked_{i} AS MATERIALIZED (SELECT *, row_number() OVER ({by_key}ORDER BY t, c, p) AS r\n"
        f"  FROM view_{i} WHERE {present(keys)} AND c IS NOT NULL)",
        f"\nrunning_{i} AS (SELECT {listed}greatest(t, c) AS known, r,\n"
        f"  max(r) OVER ({by_key}ORDER BY greatest(t, c), r ROWS UNBOUNDED PRECEDING) AS newest FROM ranked_{i})",
        f"\nknown_{i} AS (SELECT * FROM running_{i}\n"
        f"  QUALIFY row_number() OVER (PARTITION BY {listed}known ORDER BY r DESC) = 1)",
    ]


def matched_known(i: int, shape: ViewShape) -> str:
    equal = "".join(f" AND ranked_{i}.k{j} = known_{i}.k{j}" for j in range(shape.keys))
    return (
        f"\nmatched_{i} AS (SELECT entities.e_row{features(i, shape, f'ranked_{i}')}\n"
        f"  FROM entities ASOF LEFT JOIN known_{i} ON {on_keys(i, shape, f'known_{i}')}entities.v{i}_t >= known_{i}.known\n"
        f"  LEFT JOIN ranked_{i} ON ranked_{i}.r = known_{i}.newest{equal})"
    )


def on_keys(i: int, shape: ViewShape, relation: str) -> str:
    return "".join(f"entities.v{i}_k{j} = {relation}.k{j} AND " for j in range(shape.keys))


def present(keys: list[str]) -> str:
    return " AND ".join(f"{column} IS NOT NULL" for column in [*keys, "t"])


def features(i: int, shape: ViewShape, relation: str) -> str:
    columns = (f"{relation}.f{m}" for m in range(shape.features))
    if shape.ttl is None:
        return "".join(f", {c}" for c in columns)
    fresh = f"{relation}.t >= entities.v{i}_t - {shape.ttl}"
    return "".join(f", CASE WHEN {fresh} THEN {c} END AS f{m}" for m, c in enumerate(columns))


def microseconds(column: str, zoned: bool) -> str:
    """A time column of any unit as an integer in microseconds."""
    return f"epoch_us(CAST({quoted(column)} AS {'TIMESTAMPTZ' if zoned else 'TIMESTAMP'}))"


def text_microseconds(column: str) -> str:
    """As `microseconds`, of ISO 8601 text; without an offset it is UTC, whatever the session's zone is."""
    offset = f"regexp_matches({quoted(column)}, ':.*([Zz]|[+-][0-9:]+)$')"
    return f"CASE WHEN {offset} THEN {microseconds(column, zoned=True)} ELSE {microseconds(column, zoned=False)} END"


def literal(value: str | int | None) -> str:
    return "NULL" if value is None else str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"


def files_sql(paths: Sequence[str], hive_types: Mapping[str, str]) -> str:
    """DuckDB's reading of these Parquet files; every one lies below a folder for each key of `hive_types`."""
    hive = ", hive_partitioning = false"
    if hive_types:
        types = ", ".join(f"{literal(key)}: {kind}" for key, kind in hive_types.items())
        hive = f", hive_partitioning = true, hive_types = {{{types}}}"
    return f"read_parquet([{', '.join(map(literal, paths))}], union_by_name = true{hive})"


def uneven_files_sql(
    paths: Sequence[str], hive_types: Mapping[str, str], values: Sequence[Mapping[str, str | int | None]], held: Collection[str]
) -> str:
    """As `files_sql`, for files that lie below different keys or hold (`held`) columns of the keys' names, which DuckDB refuses.

    `values` are what each file's folders say.
    """
    columns = []
    for key, kind in hive_types.items():
        pairs = (f"{literal(p)}: CAST({literal(v[key])} AS {kind})" for p, v in zip(paths, values, strict=True) if key in v)
        of_folder = f"MAP {{{', '.join(pairs)}}}[filename]"
        columns.append(
            f"coalesce({quoted(key)}, {of_folder}) AS {quoted(key)}" if key in held else f"{of_folder} AS {quoted(key)}"
        )
    left_out = ", ".join(["filename", *(quoted(key) for key in hive_types if key in held)])
    files = f"read_parquet([{', '.join(map(literal, paths))}], union_by_name = true, hive_partitioning = false, filename = true)"
    return f"(SELECT * EXCLUDE ({left_out}), {', '.join(columns)} FROM {files})"
