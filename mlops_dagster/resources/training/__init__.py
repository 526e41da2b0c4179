"""Where the author's train function runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mlops_dagster.core.errors import DataError, DeclarationError

if TYPE_CHECKING:
    import pandas
    import pyarrow

Train = Callable[..., Any] | str


@runtime_checkable
class Trainer(Protocol):
    """Runs a train function somewhere and brings back what it made."""

    def fit(self, train: Train, features: pyarrow.Table, label: str, parameters: Mapping[str, object]) -> Any:
        """Call `train(features: DataFrame, label: Series, **parameters)` and return its fitted estimator.

        `features` holds the model's input columns in signature order and the column `label`, without nulls in the latter. `train`
        is a function, or its address `package.module:name`. Raises DeclarationError when the address or the result is wrong, DataError
        when the table is; an exception of the function itself is raised as it is.
        """
        ...


def imported(train: Train) -> Callable[..., Any]:
    """The function of an address `package.module:name` (or `package.module.name`); DeclarationError when there is none."""
    if callable(train):
        return train
    module, _, name = train.partition(":") if ":" in train else train.rpartition(".")
    if not module or not name:
        raise DeclarationError(f"training.train: {train!r} is no address; write package.module:function")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DeclarationError(f"training.train: {train!r} cannot be imported ({error}); correct the address") from error
    if not callable(found):
        raise DeclarationError(f"training.train: {train!r} is a {type(found).__name__}, not a function")
    return found


def fitted(train: Train, features: pyarrow.Table, label: str, parameters: Mapping[str, object]) -> Any:
    """Convert, train and check the result, in this process. Numeric columns without nulls are not copied on the way to pandas."""
    function = imported(train)
    inputs, target = _frames(features, label)
    try:
        estimator = function(inputs, target, **parameters)
    except Exception as error:
        error.add_note(f"while training on {features.num_rows} rows with {dict(parameters)}")
        raise
    if not hasattr(estimator, "predict"):
        raise DeclarationError(
            f"training.train: returned {type(estimator).__name__}, which cannot predict; return the fitted scikit-learn compatible estimator"
        )
    return estimator


def _frames(features: pyarrow.Table, label: str) -> tuple[pandas.DataFrame, pandas.Series]:
    if label not in features.column_names:
        raise DataError(f"label.column: {label!r} is not in the training set; it has {', '.join(features.column_names)}")
    if features.num_rows == 0:
        raise DataError("training set: has no rows; widen training.window_days or materialize more partitions")
    target = features.column(label)
    if target.null_count:
        raise DataError(f"label.column: {target.null_count} of {features.num_rows} rows have no {label!r}; leave them out")
    inputs = features.drop_columns([label]).to_pandas(split_blocks=True)
    return inputs, target.to_pandas().rename(label)
