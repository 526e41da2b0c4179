"""Drift: profiles of tables and the distances between them.

A reference profile is computed once, when a model is trained, and stored with the version. Each day's profile is made
`like` it, and is small, mergeable and exact for PSI: a month is the sum of its days, and no raw row is read twice.

>>> import polars as pl
>>> reference = Profile.of(pl.DataFrame({"delay": range(1000)}))
>>> monday = Profile.of(pl.DataFrame({"delay": range(500)}), like=reference)
>>> tuesday = Profile.of(pl.DataFrame({"delay": range(500, 1000)}), like=reference)
>>> psi(reference, monday + tuesday)
{'delay': 0.0}
>>> drifted(reference, monday).outcome
<DriftOutcome.FAIL: 'FAIL'>
"""

from mlops_dagster.core.drift_statistics import (
    EPSILON,
    Bounded,
    ChiSquare,
    KolmogorovSmirnov,
    chi_square,
    jensen_shannon,
    kolmogorov_smirnov,
    psi,
    wasserstein,
)
from mlops_dagster.core.drift_verdict import ColumnVerdict, DriftOutcome, DriftVerdict, drifted
from mlops_dagster.core.profile import Profile, slices
from mlops_dagster.core.profile_arrow import Source
from mlops_dagster.core.profile_columns import CategoryColumn, Moments, NumberColumn

__all__ = [
    "EPSILON",
    "Bounded",
    "CategoryColumn",
    "ChiSquare",
    "ColumnVerdict",
    "DriftOutcome",
    "DriftVerdict",
    "KolmogorovSmirnov",
    "Moments",
    "NumberColumn",
    "Profile",
    "Source",
    "chi_square",
    "drifted",
    "jensen_shannon",
    "kolmogorov_smirnov",
    "psi",
    "slices",
    "wasserstein",
]
