"""The search for row numbers against the definition, on thousands of small random histories and every way to count time."""

import numpy as np
import pyarrow as pa
import pytest

from mlops_dagster.resources.feature_store.asof_index import Clock, SourceRows, key_codes, latest_rows
from tests.contracts.feature_store.asof_reference import reference_join

# How a small number becomes a time: as it is; so far apart that key and time only fit as steps; the same but of no common step.
CLOCKS = {"offsets": lambda t: t, "steps": lambda t: t * 10**17, "ranks": lambda t: t * 10**17 + t % 3}


@pytest.mark.parametrize("as_known", [False, True], ids=["feast", "as known"])
@pytest.mark.parametrize("clock", list(CLOCKS))
def test_row_numbers_are_those_of_the_definition(clock: str, as_known: bool) -> None:
    for seed in range(400):
        random = np.random.default_rng(seed)
        rows, entities, keys = int(random.integers(1, 16)), int(random.integers(1, 9)), int(random.integers(1, 4))
        codes, wanted = random.integers(-1, keys, rows), random.integers(-1, keys, entities)
        times, created, moments = (CLOCKS[clock](random.integers(0, 9, n)) for n in (rows, rows, entities))
        found = latest_rows(wanted, moments, keys * 1000, SourceRows(codes, times, created), as_known)
        history = [
            {"k": key(c), "t": t, "created": d, "value": i} for i, (c, t, d) in enumerate(zip(codes, times, created, strict=True))
        ]
        asked = [{"k": key(c), "t": t} for c, t in zip(wanted, moments, strict=True)]
        assert [key(row) for row in found] == reference_join(asked, history, ["k"], None, as_known), seed


def key(code: int) -> int | None:
    return None if code < 0 else int(code)


def test_each_clock_is_really_used() -> None:
    kinds = {name: Clock.of(scale(np.arange(9)), 1000) for name, scale in CLOCKS.items()}
    assert [(name, c.step > 1, c.ranks is not None) for name, c in kinds.items()] == [
        ("offsets", False, False),
        ("steps", True, False),
        ("ranks", False, True),
    ]


def test_many_wide_keys_together_stay_exact() -> None:
    random = np.random.default_rng(1)
    columns = [random.integers(-(2**62), 2**62, 50) for _ in range(4)]
    arrays = [pa.chunked_array([c]) for c in columns]
    codes = key_codes(arrays, [a.take(pa.array(range(49, -1, -1))) for a in arrays], list("abcd"), (50, 50))
    assert codes.entity.tolist() == codes.source.tolist()[::-1]
    assert len(set(codes.entity.tolist())) == 50
    assert codes.size < 2**31
