"""Declare a model in one YAML file; Dagster carries it from raw data to a watched, retrained and reversible deployment."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlops_dagster.component import ModelLifecycle

__all__ = ["ModelLifecycle"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the model server and `mlops --help` import this package without Dagster.
    if name == "ModelLifecycle":
        from mlops_dagster.component import ModelLifecycle

        return ModelLifecycle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # dg finds the component by listing this module.
    return [*globals(), *__all__]
