"""Hyperparameter search in this process by Optuna."""

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.search_space import SearchSpace
from mlops_dagster.resources.tuning import Best, Objective
from mlops_dagster.resources.tuning.studies import open_study


class OptunaTuner(ConfigurableResource):
    """Tuner (see the Protocol) with one trial at a time in this process."""

    folder: str = Field(description="Where the studies are kept, one SQLite file for all.")

    def search(
        self, study: str, objective: Objective, space: SearchSpace, algorithm: str, trials: int, direction: str, seed: int
    ) -> Best:
        """See Tuner.search."""
        opened = open_study(self.folder, study, space, algorithm, trials, direction, seed)
        for index in range(opened.done(), opened.wanted):
            ask = opened.ask(index)
            try:
                value = float(objective(dict(ask.parameters)))
            except BaseException as error:
                opened.drop(ask)
                error.add_note(f"while trying {ask.parameters} in the search {study!r}")
                raise
            opened.tell(ask, value)
        return opened.best()
