"""The verdict: what chance alone may not do, and what drift must."""

import numpy as np
import pyarrow as pa
import pytest

from mlops_dagster.core.drift import CategoryColumn, DriftOutcome, Profile, drifted, psi
from mlops_dagster.core.errors import DataError


def table(rng: np.random.Generator, rows: int, columns: int, shift: float = 0.0) -> pa.Table:
    values = {f"f{k}": rng.normal(size=rows) for k in range(columns)}
    return pa.table({**values, "f0": values["f0"] + shift, "carrier": rng.choice(list("abcdefghij"), rows)})


def test_drift_is_found_and_named():
    rng = np.random.default_rng(1)
    reference = Profile.of(table(rng, 20_000, 5))
    verdict = drifted(reference, Profile.of(table(rng, 1_000, 5, shift=1.0), like=reference))
    assert verdict.outcome is DriftOutcome.FAIL
    assert verdict.drifted_columns == ("f0",)
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("f0: PSI 0.")
    assert verdict.columns["f1"].outcome is DriftOutcome.PASS
    assert (verdict.reference_rows, verdict.current_rows) == (20_000, 1_000)


@pytest.mark.parametrize("rows", [0, 1, 99])
def test_too_few_rows_are_inconclusive_whatever_they_say(rows):
    rng = np.random.default_rng(2)
    reference = Profile.of(table(rng, 20_000, 2))
    for a, b in ((reference, table(rng, rows, 2, shift=9.0)), (Profile.of(table(rng, rows, 2)), table(rng, 500, 2, shift=9.0))):
        verdict = drifted(a, Profile.of(b, like=a), minimum_rows=100)
        assert verdict.outcome is DriftOutcome.INCONCLUSIVE
        assert f"{rows} rows; 100 are needed" in verdict.reasons[0]


def test_no_rows_are_never_a_pass():
    reference = Profile.of(table(np.random.default_rng(3), 500, 1))
    assert drifted(reference, reference.emptied(), minimum_rows=0).outcome is DriftOutcome.INCONCLUSIVE


def test_a_sample_too_small_for_the_limit_is_inconclusive_and_says_what_suffices():
    rng = np.random.default_rng(4)
    reference = Profile.of(table(rng, 20_000, 1))
    verdict = drifted(reference, Profile.of(table(rng, 200, 1), like=reference), max_psi=0.05)
    assert verdict.outcome is DriftOutcome.INCONCLUSIVE
    assert "suffice" in verdict.reasons[0]


@pytest.mark.parametrize(("rows", "columns"), [(200, 20), (200, 200), (5_000, 20), (5_000, 200)])
def test_neither_more_columns_nor_more_rows_are_drift(rows, columns):
    """Columns that did not change, looked at again and again with a limit far below what so few rows can show."""
    rng = np.random.default_rng(5)
    reference = Profile.of(table(rng, rows, columns), threads=1)
    looks = 50 if rows * columns < 100_000 else 20
    alarms = naive = 0
    for _ in range(looks):
        current = Profile.of(table(rng, rows, columns), like=reference, threads=1)
        naive += max(psi(reference, current).values()) > 0.02
        alarms += drifted(reference, current, max_psi=0.02).outcome is DriftOutcome.FAIL
    assert alarms <= 0.01 * looks + 2 * (0.01 * looks) ** 0.5
    assert naive == looks or rows == 5_000


@pytest.mark.parametrize(
    "shares", [[0.1] * 10, [1 / k for k in range(1, 23)], [k**-2.5 for k in range(1, 23)]], ids=["equal", "zipf", "rare"]
)
@pytest.mark.parametrize("rows", [(200, 200), (100_000, 100), (100_000, 1_000)], ids=str)
def test_chance_raises_no_more_alarms_than_declared(shares, rows):
    """One column that did not change, at 1 % false alarms: in 3,000 looks at most 30 and chance."""
    rng = np.random.default_rng(8)
    names = tuple(f"c{k:02}" for k in range(len(shares)))
    alarms = 0
    for _ in range(3_000):
        counts = [rng.multinomial(n, np.array(shares) / sum(shares)) for n in rows]
        a, b = (Profile(int(c.sum()), {"x": CategoryColumn("text", names, len(names), tuple(c.tolist()))}) for c in counts)
        alarms += drifted(a, b, max_psi=1e-9).outcome is DriftOutcome.FAIL
    assert alarms <= 30 + 3 * 30**0.5


def test_psi_without_drift_follows_the_chi_square_distribution():
    """The bias that is taken off is the mean of what chance alone gives (Yurdakul 2018)."""
    rng = np.random.default_rng(6)
    found = []
    for _ in range(400):
        reference = Profile.of(pa.table({"x": rng.normal(size=1_000)}), threads=1)
        column = drifted(reference, Profile.of(pa.table({"x": rng.normal(size=500)}), like=reference, threads=1)).columns["x"]
        found.append((column.psi, column.effect))
    psi_mean, effect_mean = np.mean(found, axis=0)
    assert psi_mean == pytest.approx(9 * (1 / 1_000 + 1 / 500), rel=0.06)
    assert effect_mean < 0.3 * psi_mean


def test_limits_by_column():
    rng = np.random.default_rng(7)
    reference = Profile.of(table(rng, 20_000, 2))
    current = Profile.of(table(rng, 2_000, 2, shift=1.0), like=reference)
    assert drifted(reference, current, max_psi_by_column={"f0": 5.0}).outcome is DriftOutcome.PASS
    assert drifted(reference, current, max_psi=5.0, max_psi_by_column={"f0": 0.2}).drifted_columns == ("f0",)


def test_bad_limits():
    reference = Profile.of(pa.table({"x": [1.0]}))
    with pytest.raises(DataError, match="limit of column 'x' is 0"):
        drifted(reference, reference, max_psi=0)
    with pytest.raises(DataError, match="names 'z'"):
        drifted(reference, reference, max_psi_by_column={"z": 1.0})
    with pytest.raises(DataError, match="false_alarms is 1"):
        drifted(reference, reference, false_alarms=1)
    with pytest.raises(DataError, match="only one has column 'x'"):
        drifted(reference, Profile(1, {}))
