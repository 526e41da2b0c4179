"""Which numbers count as one value: those that are one float32.

The same table arrives as float64 and as float32, or 0.3 once as 3 x 0.1. An edge is therefore put just below the value it is made of, and
a value with a bin of its own is enclosed, half-way to the float32 before it and to the one after it, and everything between counts as that
value. Where the data have finer steps than float32, and for integers that float32 does not hold, a value is one float64.
"""

import numpy as np

GREATEST = float(np.finfo(np.float64).max)

NOISE = 2.0**-48
"""Of a value: so far apart are the results of some sums and products that would be equal without rounding."""

GREATEST_INTEGER = 2.0**24
"""Up to here float32 holds every integer."""


def enclosing(ordered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of the `values` (from `ordered`: float64, ascending, finite) begins and where it has ended, half-open."""
    low, high = _float32_cells(values)
    inside = np.searchsorted(ordered, high) - np.searchsorted(ordered, low)
    with np.errstate(over="ignore"):
        near = np.abs(values) * NOISE
        same = np.searchsorted(ordered, values + near, "right") - np.searchsorted(ordered, values - near)
    held = np.isfinite(low) & np.isfinite(high) & ((values == 0) | (low > 0) | (high < 0))
    integer = (np.abs(values) > GREATEST_INTEGER) & (values == np.rint(values))
    wide = held & ~integer & (inside <= same)
    with np.errstate(over="ignore"):
        return np.where(wide, low, values), np.where(wide, high, np.nextafter(values, np.inf))


def single(edges: np.ndarray) -> np.ndarray:
    """Which of the cells between the edges hold one value only: one float64, or all that are one float32."""
    low, high = edges[:-1], edges[1:]
    own = _float32_cells(low / 2 + high / 2)
    return (high == np.nextafter(low, np.inf)) | ((low == own[0]) & (high == own[1]))


def _float32_cells(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half-way from the float32 nearest to each value to the one before it and to the one after it; infinite or NaN beyond float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        middle = near.astype(np.float64)
        before, after = (np.nextafter(near, np.float32(bound)).astype(np.float64) for bound in (-np.inf, np.inf))
        return (before + middle) / 2, (middle + after) / 2
