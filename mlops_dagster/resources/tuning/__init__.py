"""Who looks for the best hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mlops_dagster.core.search_space import SearchSpace

if TYPE_CHECKING:
    import pyarrow

Parameters = Mapping[str, Any]
Objective = Callable[[dict[str, Any]], float]


@dataclass(frozen=True)
class Best:
    """The winner of a search.

    `trials` has one row a finished trial, in order: number int64, value float64 (null when the trial gave no number), state string
    (complete or failed), seconds float64, parameters string (JSON).
    """

    parameters: Parameters
    value: float
    trials: pyarrow.Table


@runtime_checkable
class Tuner(Protocol):
    """Runs a hyperparameter search."""

    def search(
        self, study: str, objective: Objective, space: SearchSpace, algorithm: str, trials: int, direction: str, seed: int
    ) -> Best:
        """Evaluate `objective` on up to `trials` points of the space and return the best.

        `study` names the search (model and training set): a search that was cut off goes on where it stopped, a finished one answers
        from what it stored; one asked for differently (space, algorithm, direction, seed) starts anew. The same seed gives the same
        trials. A trial whose value is NaN counts as failed; an exception of the objective ends the search and is raised.
        DeclarationError for an unknown algorithm or direction; DataError when every trial failed.
        """
        ...
