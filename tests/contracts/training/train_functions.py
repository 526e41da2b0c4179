"""Train functions as a model's author writes them."""

from typing import Any

import pandas
from sklearn.linear_model import Ridge

NOT_A_FUNCTION = 3


def ridge(features: pandas.DataFrame, label: pandas.Series, alpha: float = 1.0) -> Any:
    assert isinstance(features, pandas.DataFrame)
    assert isinstance(label, pandas.Series)
    return Ridge(alpha=alpha).fit(features, label)


def nothing(features: pandas.DataFrame, label: pandas.Series) -> Any:
    return None


def diverges(features: pandas.DataFrame, label: pandas.Series, rate: float) -> Any:
    raise ArithmeticError(f"diverged at {rate}")
