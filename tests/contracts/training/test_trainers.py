"""What every training backend must do."""

import pyarrow
import pytest

from mlops_dagster.core.errors import DataError, DeclarationError
from mlops_dagster.resources.training import Trainer

HERE = "tests.contracts.training.train_functions"
TABLE = pyarrow.table({"b": [1.0, 2.0, 3.0, 4.0], "minutes": [2, 4, 6, 8], "a": [0.0, 1.0, 0.0, 1.0]})


def test_satisfies_the_protocol(trainer: Trainer) -> None:
    assert isinstance(trainer, Trainer)


@pytest.mark.parametrize("address", [f"{HERE}:ridge", f"{HERE}.ridge"])
def test_the_estimator_comes_back_fitted(trainer: Trainer, address: str) -> None:
    estimator = trainer.fit(address, TABLE, "minutes", {"alpha": 1e-9})
    assert list(estimator.feature_names_in_) == ["b", "a"]
    assert estimator.alpha == 1e-9
    assert estimator.predict(TABLE.select(["b", "a"]).to_pandas()) == pytest.approx([2, 4, 6, 8])


def test_a_function_serves_as_its_own_address(trainer: Trainer) -> None:
    from sklearn.linear_model import LinearRegression

    estimator = trainer.fit(lambda features, label: LinearRegression().fit(features, label), TABLE, "minutes", {})
    assert estimator.predict(TABLE.select(["b", "a"]).to_pandas()) == pytest.approx([2, 4, 6, 8])


def test_the_functions_own_error_is_raised(trainer: Trainer) -> None:
    with pytest.raises(ArithmeticError, match=r"diverged at 0\.5") as caught:
        trainer.fit(f"{HERE}:diverges", TABLE, "minutes", {"rate": 0.5})
    assert "while training on 4 rows with {'rate': 0.5}" in caught.value.__notes__


@pytest.mark.parametrize(
    ("address", "table", "label", "error", "message"),
    [
        (f"{HERE}:missing", TABLE, "minutes", DeclarationError, "train_functions:missing' cannot be imported"),
        ("no.such.module:f", TABLE, "minutes", DeclarationError, "'no.such.module:f' cannot be imported"),
        ("ridge", TABLE, "minutes", DeclarationError, "'ridge' is no address"),
        (f"{HERE}:NOT_A_FUNCTION", TABLE, "minutes", DeclarationError, "is a int, not a function"),
        (f"{HERE}:nothing", TABLE, "minutes", DeclarationError, "returned NoneType, which cannot predict"),
        (f"{HERE}:ridge", TABLE, "late", DataError, "'late' is not in the training set; it has b, minutes, a"),
        (f"{HERE}:ridge", TABLE.slice(0, 0), "minutes", DataError, "has no rows"),
        (f"{HERE}:ridge", pyarrow.table({"a": [1.0, 2.0], "y": [None, 1.0]}), "y", DataError, "1 of 2 rows have no 'y'"),
    ],
)
def test_bad_input_is_named(
    trainer: Trainer, address: str, table: pyarrow.Table, label: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trainer.fit(address, table, label, {})
