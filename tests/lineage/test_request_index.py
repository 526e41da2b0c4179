import datetime as dt
import os

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_dagster.core.errors import DataError
from mlops_dagster.lineage import request_index
from mlops_dagster.lineage.request_index import build, hash_of, hashed, opened

MOMENT = dt.datetime(2024, 1, 1, 6, tzinfo=dt.UTC)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def rows(ids, versions=None, moments=None) -> pa.Table:
    return pa.table(
        {
            "request_id": pa.array(ids, pa.string()),
            "version": pa.array(versions or ["1"] * len(ids), pa.string()),
            "logged_at": pa.array(moments or [MOMENT] * len(ids), pa.timestamp("us", "UTC")),
        }
    )


@given(st.lists(TEXT, max_size=60))
def test_every_row_of_an_id_is_found_and_hardly_any_other(ids):
    index = opened(build(rows(ids), "s"))
    for text in {*ids, "never logged"}:
        assert index.rows(text) == [n for n, other in enumerate(ids) if other == text]


@given(st.lists(TEXT, min_size=1, max_size=40), st.data())
def test_a_hash_depends_on_the_text_alone(ids, data):
    cut = data.draw(st.integers(0, len(ids) - 1))
    whole = pa.array(ids, pa.string())
    expected = [int(hash_of(text)) for text in ids]
    assert hashed(whole).tolist() == expected
    assert hashed(whole.slice(cut)).tolist() == expected[cut:]
    assert hashed(pa.chunked_array([whole.slice(0, cut), whole.slice(cut)], pa.string())).tolist() == expected
    assert hashed(whole.cast(pa.large_string())).tolist() == expected


def test_padding_does_not_make_different_texts_alike():
    ids = ["", "\0", "\0\0", "a", "a\0", "abcdefgh", "abcdefgh\0", "hgfedcba"]
    assert len({int(hash_of(text)) for text in ids}) == len(ids)


def test_chunks_of_a_long_log_are_hashed_as_one(monkeypatch):
    ids = pa.array([f"r{n}" for n in range(1000)])
    expected = hashed(ids)
    monkeypatch.setattr(request_index, "CHUNK_ROWS", 7)
    assert (hashed(ids) == expected).all()
    assert len(np.unique(expected)) == 1000


def test_a_missing_id_counts_as_empty_text():
    assert hashed(pa.array([None, "x"], pa.string())).tolist() == [int(hash_of("")), int(hash_of("x"))]


def test_an_index_says_what_its_file_holds():
    later = MOMENT + dt.timedelta(hours=3)
    found = opened(build(rows(["a", "b", "c"], ["2", "1", "2"], [later, MOMENT, later]), "stamp")).summary
    assert (found.stamp, found.rows, dict(found.versions)) == ("stamp", 3, {"2": 2, "1": 1})
    assert (found.first_logged, found.last_logged) == (MOMENT.isoformat(), later.isoformat())
    assert opened(build(rows([]), "none")).summary.first_logged is None


def test_twelve_bytes_a_row():
    few, many = (len(build(rows([f"r{i}" for i in range(n)]), "s")) for n in (1_000, 2_000))
    assert many - few == pytest.approx(12_000, abs=16)


@given(st.binary(max_size=40))
def test_anything_else_is_no_index(content):
    with pytest.raises(DataError, match="not a whole request index"):
        opened(content)


def test_a_file_that_was_cut_off_anywhere_is_no_index(tmp_path):
    content = build(rows(["a", "b"]), "s")
    file = tmp_path / "x.index"
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(DataError, match="not a whole request index"):
            opened(file)
    file.write_bytes(content)
    assert opened(file).rows("b") == [1]
    os.unlink(file)
