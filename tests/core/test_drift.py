"""Profiles: what is counted, from what, and what is refused."""

import datetime as dt
import decimal
import json
import math

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from mlops_dagster.core.drift import CategoryColumn, NumberColumn, Profile, Source, psi, slices
from mlops_dagster.core.errors import DataError


def numeric(profile: Profile, name: str = "x") -> NumberColumn:
    column = profile.columns[name]
    assert isinstance(column, NumberColumn)
    return column


def category(profile: Profile, name: str = "x") -> CategoryColumn:
    column = profile.columns[name]
    assert isinstance(column, CategoryColumn)
    return column


@pytest.fixture
def normal():
    rng = np.random.default_rng(1)
    return pa.table(
        {"x": rng.normal(5, 2, 20_000), "y": rng.integers(0, 10**6, 20_000), "carrier": rng.choice(["AA", "UA", "DL"], 20_000)}
    )


def test_bins_are_the_quantiles_and_counts_are_those_of_numpy(normal):
    column = numeric(Profile.of(normal))
    x = normal["x"].to_numpy()
    inner = [column.edges[c] for c in column.cuts]
    assert column.bins().tolist() == [2_000] * 10 + [0]
    assert column.bins()[:-1].tolist() == np.histogram(x, [-np.inf, *inner, np.inf])[0].tolist()
    assert list(column.counts) == np.histogram(x, [-np.inf, *column.edges, np.inf])[0].tolist()
    assert column.moments.mean == pytest.approx(x.mean(), rel=1e-13)
    assert column.moments.deviation == pytest.approx(x.std(), rel=1e-12)
    assert (column.moments.least, column.moments.greatest, column.moments.count) == (x.min(), x.max(), 20_000)


@pytest.mark.parametrize("every", [1, 4])
def test_a_large_mean_costs_the_deviation_no_digits(every):
    x = np.random.default_rng(10).normal(1e9, 1, 100_000)
    assert numeric(Profile.of(pa.table({"x": x}), cells_every=every)).moments.deviation == pytest.approx(x.std(), rel=1e-9)


def test_quantile_is_within_a_cell(normal):
    x = normal["x"].to_numpy()
    for level in (0.001, 0.25, 0.5, 0.99):
        below = (x < numeric(Profile.of(normal)).quantile(level)).mean()
        assert below == pytest.approx(level, abs=0.01)


def sources(table: pa.Table):
    frame = pl.from_arrow(table)
    yield "pyarrow", table
    yield "chunked", pa.concat_tables([table.slice(0, 7_000), table.slice(7_000, 1), table.slice(7_001)])
    yield "polars", frame
    yield "pandas", table.to_pandas()
    yield "pandas, filtered", table.to_pandas().query("x > -1000").rename(index=lambda i: i + 1)
    yield "pandas, arrow types", table.to_pandas(types_mapper=pd.ArrowDtype)
    yield "duckdb", duckdb.connect().from_arrow(table)
    yield "reader", table.to_reader(max_chunksize=1_000)
    yield "list of batches", table.to_batches(max_chunksize=999)
    yield "generator of batches", iter(table.to_batches(max_chunksize=999))
    yield "generator of frames", iter([frame[:5], frame[5:]])
    yield "function", lambda: iter(table.to_batches(max_chunksize=999))
    yield "source", Source(lambda: iter(table.to_batches(max_chunksize=999)))


def test_every_kth_row_in_the_cells_leaves_psi_and_moments_exact(normal):
    rng = np.random.default_rng(4)
    noisy = normal.set_column(0, "x", pa.array(normal["x"].to_numpy(), mask=rng.random(20_000) < 0.1))
    noisy = pa.concat_tables(
        [noisy] * 8 + [noisy.set_column(0, "x", pa.array(rng.choice([math.inf, -math.inf, math.nan, 3.0], 20_000)))]
    )
    reference = Profile.of(noisy)
    for column in (Profile.of(noisy, cells_every=4).columns["x"], Profile.of(noisy, like=reference, cells_every=4).columns["x"]):
        whole = numeric(reference)
        assert column.bins().tolist() == whole.bins().tolist()
        assert (column.missing, column.infinite, column.negative_infinite) == (
            whole.missing,
            whole.infinite,
            whole.negative_infinite,
        )
        assert column.moments.count == whole.moments.count
        assert column.moments.mean == pytest.approx(whole.moments.mean, rel=1e-12)
        assert column.moments.m2 == pytest.approx(whole.moments.m2, rel=1e-12)
        assert (column.every, whole.every) == (4, 1)
        assert sum(column.counts) == pytest.approx(whole.moments.count, rel=0.02)
        assert column.quantile(0.3) == pytest.approx(whole.quantile(0.3), abs=0.05)


def test_every_source_of_arrow_gives_the_same_profile(normal):
    reference = Profile.of(normal)
    for name, source in sources(normal):
        found = Profile.of(source, columns=["x", "y", "carrier"])
        assert found.rows == 20_000, name
        assert {n: c.bins().tolist() for n, c in found.columns.items()} == {
            n: c.bins().tolist() for n, c in reference.columns.items()
        }, name
    for name, source in sources(normal):
        assert psi(reference, Profile.of(source, like=reference)) == {"x": 0.0, "y": 0.0, "carrier": 0.0}, name


def test_threads_do_not_change_the_result():
    big = pa.table({"x": np.random.default_rng(9).lognormal(size=600_000)})
    profile = Profile.of(big, threads=3)
    assert Profile.of(big, threads=1) == profile
    x = big["x"].to_numpy()
    assert numeric(profile).moments.mean == pytest.approx(x.mean(), rel=1e-13)
    assert numeric(profile).moments.deviation == pytest.approx(x.std(), rel=1e-12)
    assert numeric(profile).moments.count == len(x)
    assert sum(numeric(profile).sums) == pytest.approx(x.sum(), rel=1e-12)


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 13])
def test_nulls_nan_and_infinities(offset):
    values = [None, 1.0, math.nan, math.inf, -math.inf, 2.0, None, 3.0, 4.0] * 3
    table = pa.table({"x": pa.array(values, pa.float64())}).slice(offset)
    rest = values[offset:]
    column = numeric(Profile.of(table, edges={"x": [1.5, 3.0]}))
    present = [v for v in rest if v is not None and not math.isnan(v)]
    assert column.missing == len(rest) - len(present)
    assert column.bins().tolist() == [*np.histogram(present, [-np.inf, 1.5, 3.0, np.inf])[0], column.missing]
    assert column.infinite == sum(v == math.inf for v in rest)
    assert column.negative_infinite == sum(v == -math.inf for v in rest)
    finite = [v for v in present if math.isfinite(v)]
    assert column.moments.mean == pytest.approx(np.mean(finite))
    assert sum(column.sums) == sum(finite)
    assert column.rows == len(rest)


def test_missing_values_are_a_bin_of_their_own(normal):
    reference = Profile.of(normal)
    gone = normal.set_column(0, "x", pa.array([None] * 10_000 + normal["x"].to_pylist()[10_000:], pa.float64()))
    found = psi(reference, Profile.of(gone, like=reference))
    assert found["x"] > 0.5 * math.log(0.5 / 1e-4)
    assert found["y"] == 0.0


def test_constant_column_notices_any_other_value():
    reference = Profile.of(pa.table({"x": np.full(1_000, 7.0)}))
    assert numeric(reference).bins().tolist() == [0, 1_000, 0, 0]
    for other in (6.0, 8.0, 7.000001):
        assert psi(reference, Profile.of(pa.table({"x": np.full(1_000, other)}), like=reference))["x"] > 10
    assert psi(reference, Profile.of(pa.table({"x": np.full(10, 7.0)}), like=reference)) == {"x": 0.0}


def test_all_null_columns():
    for type_ in (pa.float64(), pa.string(), pa.null()):
        reference = Profile.of(pa.table({"x": pa.nulls(500, type_)}))
        assert reference.columns["x"].missing == 500
        assert psi(reference, Profile.of(pa.table({"x": pa.nulls(5)}), like=reference)) == {"x": 0.0}
    filled = pa.table({"x": np.arange(500.0)})
    reference = Profile.of(pa.table({"x": pa.nulls(500)}))
    assert Profile.of(filled, like=reference).columns["x"].bins().tolist() == [0, 500, 0]
    assert psi(reference, Profile.of(filled, like=reference))["x"] > 10


def test_discrete_values_have_a_bin_each():
    rng = np.random.default_rng(2)
    x = rng.integers(0, 5, 1_000)
    column = numeric(Profile.of(pa.table({"x": x})))
    assert [b for b in column.bins().tolist() if b] == np.bincount(x).tolist()


def test_repeated_value_among_others_has_its_own_bin():
    x = np.concatenate((np.zeros(5_500), np.random.default_rng(3).uniform(1, 2, 4_500)))
    column = numeric(Profile.of(pa.table({"x": x})))
    assert 5_500 in column.bins().tolist()


def test_temporal_types_count_alike_whatever_their_unit_and_zone():
    days = [dt.datetime(2013, 1, 1) + dt.timedelta(hours=7 * k) for k in range(500)]
    reference = Profile.of(pa.table({"x": pa.array(days, pa.timestamp("us"))}))
    assert numeric(reference).kind == "time"
    for type_ in (pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("ns"), pa.timestamp("us", "UTC")):
        other = Profile.of(pa.table({"x": pa.array(days, type_)}), like=reference)
        assert numeric(other).bins().tolist() == [50] * 10 + [0], type_
    dates = pa.table({"x": pa.array([d.date() for d in days], pa.date32())})
    assert numeric(Profile.of(dates, like=reference)).rows == 500
    assert numeric(Profile.of(dates)).moments.least == dt.datetime(2013, 1, 1, tzinfo=dt.UTC).timestamp() * 1e6
    assert numeric(Profile.of(pa.table({"x": pa.array([dt.timedelta(seconds=3)])}))).moments.mean == 3e6


def test_numeric_types():
    values = [1, 2, 3, None]
    for type_ in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64(), pa.float16(), pa.float32()):
        array = pa.array(values, pa.float32()).cast(type_) if pa.types.is_floating(type_) else pa.array(values, type_)
        column = numeric(Profile.of(pa.table({"x": array})))
        assert (column.moments.mean, column.missing) == (2.0, 1), type_
    column = numeric(Profile.of(pa.table({"x": pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.50")])})))
    assert column.moments.mean == 2.0


def test_text_boolean_and_dictionary_columns():
    text = ["b", "a", "a", None, "c", "a"]
    for array in (
        pa.array(text),
        pa.array(text, pa.large_string()),
        pa.array(text, pa.string_view()),
        pa.array(text).dictionary_encode(),
    ):
        column = category(Profile.of(pa.table({"x": array})))
        assert (column.kind, column.categories, column.counts, column.missing) == ("text", ("a", "b", "c"), (3, 1, 1), 1), (
            array.type
        )
    categories = pd.DataFrame({"x": pd.Categorical(text)})
    assert category(Profile.of(categories)).counts == (3, 1, 1)
    assert category(Profile.of(pl.DataFrame({"x": pl.Series(text, dtype=pl.Categorical)}))).counts == (3, 1, 1)
    column = category(Profile.of(pa.table({"x": [True, False, True, None]})))
    assert (column.kind, column.categories, column.counts, column.missing) == ("boolean", ("true", "false"), (2, 1), 1)


def test_unseen_and_rare_categories_have_their_own_bins():
    reference = Profile.of(pa.table({"x": ["a"] * 60 + ["b"] * 30 + ["c"] * 10}), top_categories=2)
    current = Profile.of(pa.table({"x": ["a"] * 6 + ["c", "new", "newer", None]}), like=reference)
    assert current.columns["x"].labels() == ("a", "b", "other known", "unlisted", "missing")
    assert reference.columns["x"].bins().tolist() == [60, 30, 10, 0, 0]
    assert current.columns["x"].bins().tolist() == [6, 0, 1, 2, 1]


def test_high_cardinality_is_bounded():
    ids = [f"id{k % 50_000}" for k in range(300_000)] + ["often"] * 1_000
    column = category(Profile.of(pa.table({"x": ids})))
    assert len(column.categories) == 1_000
    assert column.rows == 301_000
    assert column.unlisted == 301_000 - sum(column.counts)


def test_categories_that_appear_late_are_counted():
    batches = [
        pa.record_batch({"x": ["a"] * 200_000}),
        pa.record_batch({"x": ["a"] * 100_000}),
        pa.record_batch({"x": ["late"] * 400_000}),
    ]
    column = category(Profile.of(iter(batches)))
    assert dict(zip(column.categories, column.counts, strict=True)) == {"a": 300_000, "late": 400_000}
    assert column.unlisted == 0


def test_numbers_declared_categorical():
    reference = Profile.of(pa.table({"x": [7, 7, 9, 9, 9]}), categorical=["x"])
    assert category(reference).categories == ("9", "7")
    current = Profile.of(pa.table({"x": pa.array([7.0, 8.0, None])}), like=reference)
    assert current.columns["x"].bins().tolist() == [0, 1, 0, 1, 1]


def test_a_month_is_the_sum_of_its_days(normal):
    reference = Profile.of(normal.slice(0, 5_000))
    days = [Profile.of(normal.slice(k, 1_000), like=reference) for k in range(5_000, 20_000, 1_000)]
    month = Profile.of(normal.slice(5_000), like=reference)
    merged = Profile.merge(days)
    assert psi(reference, merged) == psi(reference, month)
    assert numeric(merged).counts == numeric(month).counts
    assert numeric(merged).moments.m2 == pytest.approx(numeric(month).moments.m2, rel=1e-12)
    assert reference.emptied() + month == month


def test_profiles_of_different_cells_are_not_added_or_compared(normal):
    a, b = Profile.of(normal.slice(0, 9_000)), Profile.of(normal.slice(9_000))
    with pytest.raises(DataError, match=r"'x' has cells that differ .* like=reference"):
        a + b
    with pytest.raises(DataError, match="'x' has cells that differ"):
        psi(a, b)
    with pytest.raises(DataError, match="only one has column 'y'"):
        psi(a, Profile.of(normal, like=a, columns=["x"]))
    with pytest.raises(DataError, match="only one has column 'y'"):
        a.select(["x"]) + a
    assert psi(a.select(["x"]), Profile.of(normal, like=a))["x"] < 0.01


def test_json_round_trip_is_exact(normal):
    extremes = pa.table(
        {
            "x": [1e308, 1.7976931348623157e308, -math.inf, math.nan],
            "y": [0.1, 5e-324, None, 1e22],
            "s": ["ü", '"', None, "\n"],
            "b": [True] * 4,
        }
    )
    for table in (normal, extremes, normal.slice(0, 0)):
        profile = Profile.of(table)
        text = profile.to_json()
        json.loads(text, parse_constant=pytest.fail)
        assert Profile.from_json(text) == profile
        assert Profile.from_dict(profile.to_dict()).to_json() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a profile of format 1"),
        ('{"format": 2, "rows": 1, "columns": {}}', "found 2"),
        ('{"format": 1, "rows": 1, "columns": {"x": {"kind": "number"}}}', "column 'x'.*edges"),
        ('{"format": 1, "rows": 1, "columns": {"x": {"kind": "colour"}}}', "'colour'"),
        ('{"format": 1, "columns": {}}', "its head.*rows"),
    ],
)
def test_unreadable_profiles(text, message):
    with pytest.raises(DataError, match=message):
        Profile.from_json(text)


def test_slices_add_up_to_the_whole(normal):
    parts = slices(normal, "carrier")
    assert list(parts) == ["AA", "DL", "UA"]
    assert Profile.merge(parts.values()).columns["x"].bins().tolist() == [2_000] * 10 + [0]
    whole = Profile.of(normal)
    parts = slices(normal.to_reader(max_chunksize=512), "carrier", like=whole)
    alone = Profile.of(normal.to_pandas().query("carrier == 'UA'"), like=whole)
    assert numeric(parts["UA"]).counts == numeric(alone).counts
    assert category(parts["UA"], "carrier") == category(alone, "carrier")
    assert "null" in slices(pa.table({"x": [1.0, 2.0], "carrier": ["AA", None]}), "carrier")


def test_a_stream_without_rows_and_an_empty_table(normal):
    reference = Profile.of(normal)
    assert Profile.of(normal.slice(0, 0), like=reference) == reference.emptied()
    assert Profile.of(iter(()), like=reference) == reference.emptied()
    assert psi(reference, reference.emptied())["x"] is None
    with pytest.raises(DataError, match="no record batch"):
        Profile.of(iter(()))


def test_bad_tables(normal):
    reference = Profile.of(normal)
    with pytest.raises(DataError, match=r"builtins.dict.*Arrow C stream"):
        Profile.of({"x": [1]})
    with pytest.raises(DataError, match=r"LazyFrame.*collect"):
        Profile.of(pl.LazyFrame({"x": [1]}))
    with pytest.raises(DataError, match="'y' is not in the table, which has x, carrier"):
        Profile.of(normal.drop_columns(["y"]), like=reference)
    with pytest.raises(DataError, match="'x' is in the table 2 times"):
        Profile.of(pa.Table.from_arrays([normal["x"], normal["x"]], ["x", "x"]))
    with pytest.raises(DataError, match=r"'x' is of kind text .string. here but of kind number"):
        Profile.of(pa.table({"x": ["1"], "y": [1], "carrier": ["AA"]}), like=reference)
    with pytest.raises(DataError, match=r"'x' has the type list<.*cannot be profiled"):
        Profile.of(pa.table({"x": [[1]]}))
    with pytest.raises(DataError, match="'x' is of kind text"):
        Profile.of(iter([pa.record_batch({"x": [1.0]}), pa.record_batch({"x": ["late"]})]))


def test_bad_options(normal):
    with pytest.raises(DataError, match="bins is 1"):
        Profile.of(normal, 1)
    with pytest.raises(DataError, match=r"edges of column 'x'.*ascending"):
        Profile.of(normal, edges={"x": [2.0, 1.0]})
    with pytest.raises(DataError, match="`edges` names the column 'z'"):
        Profile.of(normal, edges={"z": [1.0]})
    with pytest.raises(DataError, match="`categorical` names the column 'z'"):
        Profile.of(normal, categorical=["z"])
    with pytest.raises(DataError, match="'z' is not in the table"):
        Profile.of(normal, columns=["z"])
    with pytest.raises(DataError, match="'z' is not in the reference profile"):
        Profile.of(normal, like=Profile.of(normal), columns=["z"])
    with pytest.raises(DataError, match="cells_every is 0"):
        Profile.of(normal, cells_every=0)
    with pytest.raises(DataError, match="threads is 0"):
        Profile.of(normal, threads=0)
    with pytest.raises(DataError, match="need a reference"):
        slices(normal.to_reader(), "carrier")
    with pytest.raises(DataError, match="'z' is not in the table"):
        slices(normal, "z")
    with pytest.raises(DataError, match="more than 1000 values"):
        slices(normal, "y")


def test_a_long_stream_is_sampled_for_its_edges_over_its_whole_length(monkeypatch):
    monkeypatch.setattr("mlops_dagster.core.profile_building.SAMPLE_ROWS", 4_096)
    ordered = pa.table({"x": np.arange(100_000.0)})
    for source in (ordered, lambda: iter(ordered.to_batches(max_chunksize=777))):
        bins = Profile.of(source).columns["x"].bins()[:-1]
        assert bins.sum() == 100_000
        assert abs(bins - 10_000).max() < 100
