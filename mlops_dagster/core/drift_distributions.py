"""Tail probabilities of the chi-square and the Kolmogorov distribution, without scipy."""

import math
from functools import lru_cache

MOST_TERMS = 10_000
SMALLEST = 1e-300


def chi_square_tail(statistic: float, degrees_of_freedom: int) -> float:
    """P(X >= statistic) of a chi-square variable; 1.0 with no degree of freedom.

    The regularized incomplete gamma function Q(k/2, x/2): its power series below k/2 + 1, Lentz's continued fraction above
    (Press et al., "Numerical Recipes", 3rd ed., section 6.2). Relative error below 1e-10.
    """
    if degrees_of_freedom < 1 or statistic <= 0:
        return 1.0
    a, x = degrees_of_freedom / 2, statistic / 2
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    return 1 - scale * _series(a, x) if x < a + 1 else scale * _fraction(a, x)


def _series(a: float, x: float) -> float:
    term = total = 1 / a
    for k in range(1, MOST_TERMS):
        term *= x / (a + k)
        total += term
        if term < total * 1e-16:
            break
    return total


def _fraction(a: float, x: float) -> float:
    b = x + 1 - a
    c, d = 1 / SMALLEST, 1 / b
    result = d
    for k in range(1, MOST_TERMS):
        weight = -k * (k - a)
        b += 2
        d = 1 / _not_zero(weight * d + b)
        c = _not_zero(b + weight / c)
        result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return result


def _not_zero(value: float) -> float:
    return value if abs(value) > SMALLEST else SMALLEST


@lru_cache(maxsize=1024)
def chi_square_quantile(tail: float, degrees_of_freedom: int) -> float:
    """The value that a chi-square variable exceeds with probability `tail` (0 < tail < 1), by bisection; 0.0 with no
    degree of freedom.
    """
    if degrees_of_freedom < 1:
        return 0.0
    low, high = 0.0, float(degrees_of_freedom)
    while chi_square_tail(high, degrees_of_freedom) > tail:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if chi_square_tail(middle, degrees_of_freedom) > tail else (low, middle)
    return high


def kolmogorov_tail(statistic: float) -> float:
    """P(K >= statistic) of Kolmogorov's limit distribution (Kolmogorov 1933); absolute error below 1e-12.

    2 x sum over k >= 1 of (-1)^(k-1) exp(-2 k^2 x^2); for small x the theta-transformed series of its complement, which
    converges where that does not.
    """
    if statistic <= 0:
        return 1.0
    if statistic < 1:
        factor = math.pi**2 / (8 * statistic**2)
        return 1 - math.sqrt(2 * math.pi) / statistic * sum(math.exp(-factor * (2 * k - 1) ** 2) for k in range(1, 8))
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * statistic) ** 2) for k in range(1, 20))
