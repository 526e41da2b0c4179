"""The study behind a search: Optuna proposes the trials and an SQLite file keeps them, whoever evaluates them."""

import hashlib
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.errors import DataError, StorageError
from mlops_dagster.core.search_space import Choices, SearchSpace, check_search
from mlops_dagster.resources.tuning import Best

if TYPE_CHECKING:
    import optuna
    import pyarrow

_CHOICE = "index of "
_NAN = "not a number"


@dataclass(frozen=True)
class Study:
    """One search and its stored trials."""

    name: str
    space: SearchSpace
    algorithm: str
    direction: str
    seed: int
    wanted: int
    points: tuple[dict[str, Any], ...]
    stored: "optuna.Study"

    def done(self) -> int:
        """How many trials ran to their end."""
        return len(_finished(self.stored))

    def ask(self, index: int) -> "Ask":
        """The trial of this index (0, 1, …), given the trials that are told."""
        point = encode(self.space, self.points[index]) if self.points else None
        self.stored.sampler = sampler(self.algorithm, self.seed, index, point)
        trial = self.stored.ask(distributions(self.space))
        return Ask(trial.number, decode(self.space, trial.params))

    def tell(self, ask: "Ask", value: float) -> None:
        """Store a trial's value; NaN makes it a failed one."""
        from optuna.trial import TrialState

        if math.isnan(value):
            self.stored.set_user_attr(f"{_NAN} {ask.number}", True)
            self.stored.tell(ask.number, state=TrialState.FAIL)
        else:
            self.stored.tell(ask.number, value)

    def drop(self, ask: "Ask") -> None:
        """Forget a trial that raised: it will be asked for again."""
        from optuna.trial import TrialState

        self.stored.tell(ask.number, state=TrialState.FAIL)

    def best(self) -> Best:
        """The winner among the finished trials, the earliest of equals; DataError when none has a value."""
        trials = _finished(self.stored)
        scored = [trial for trial in trials if trial.value is not None]
        if not scored:
            raise DataError(
                f"tuning: all {len(trials)} trials of {self.name!r} gave NaN; check the metric and the parameters' ranges"
            )
        sign = 1.0 if self.direction == "maximize" else -1.0
        winner = max(scored, key=lambda trial: (sign * trial.value, -trial.number))
        return Best(decode(self.space, winner.params), float(winner.value), _table(self.space, trials))


@dataclass(frozen=True)
class Ask:
    """A proposed trial: Optuna's number of it and what the objective shall be called with."""

    number: int
    parameters: dict[str, Any]


def open_study(folder: str, name: str, space: SearchSpace, algorithm: str, trials: int, direction: str, seed: int) -> Study:
    """Open or make the study; trials that a killed process left are closed. Raises as Tuner.search does, and StorageError."""
    import optuna

    check_search(algorithm, direction, trials)
    points = tuple(space.combinations(trials)) if algorithm == "grid" else ()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.RDBStorage(f"sqlite:///{Path(folder).absolute()}/studies.db")
        full_name = study_name(name, space, algorithm, direction, seed, trials)
        sense = optuna.study.StudyDirection.MAXIMIZE if direction == "maximize" else optuna.study.StudyDirection.MINIMIZE
        stored = optuna.create_study(storage=storage, study_name=full_name, direction=sense, load_if_exists=True)
        _close_interrupted(stored)
    except Exception as error:
        raise StorageError(f"{folder}: the study cannot be opened ({error}); check that the folder is writable") from error
    return Study(name, space, algorithm, direction, seed, len(points) or trials, points, stored)


def study_name(study: str, space: SearchSpace, algorithm: str, direction: str, seed: int, trials: int) -> str:
    """A study's own name with a digest of what it was asked, so that a changed question is another study.

    `trials` belongs to the question only for a grid, whose points depend on their number.
    """
    grid = trials if algorithm == "grid" else None
    question = json.dumps([repr(sorted(space.parameters.items())), algorithm, direction, seed, grid])
    return f"{study}-{hashlib.sha256(question.encode()).hexdigest()[:12]}"


def distributions(space: SearchSpace) -> dict[str, Any]:
    """The space in Optuna's terms; a choice is searched by its index, because choices may be of any scalar type."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for name, one in space.parameters.items():
        if isinstance(one, Choices):
            found[_CHOICE + name] = CategoricalDistribution(tuple(range(len(one.values))))
        elif one.integer:
            found[name] = IntDistribution(int(one.minimum), int(one.maximum), log=one.log)
        else:
            found[name] = FloatDistribution(one.minimum, one.maximum, log=one.log)
    return found


def decode(space: SearchSpace, values: dict[str, Any]) -> dict[str, Any]:
    """Optuna's values as the objective sees them."""
    return {
        name: one.values[values[_CHOICE + name]] if isinstance(one, Choices) else values[name]
        for name, one in space.parameters.items()
    }


def encode(space: SearchSpace, parameters: dict[str, Any]) -> dict[str, Any]:
    """The opposite of decode."""
    return {
        (_CHOICE + name if isinstance(one, Choices) else name): (
            one.values.index(parameters[name]) if isinstance(one, Choices) else parameters[name]
        )
        for name, one in space.parameters.items()
    }


def sampler(algorithm: str, seed: int, done: int, point: dict[str, Any] | None = None) -> Any:
    """The sampler of one trial. It is seeded by the number of finished trials, so that a search that was cut off goes on the same.

    `point` is the grid's next, in Optuna's terms.
    """
    from optuna import samplers

    own = int.from_bytes(hashlib.sha256(f"{seed}/{done}".encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if algorithm == "grid":
            return samplers.PartialFixedSampler(point or {}, samplers.RandomSampler(seed=own))
        if algorithm == "random":
            return samplers.RandomSampler(seed=own)
        if algorithm == "tpe":
            return samplers.TPESampler(seed=own, multivariate=True)
        if algorithm == "cmaes":
            return samplers.CmaEsSampler(
                seed=own, independent_sampler=samplers.RandomSampler(seed=own), warn_independent_sampling=False
            )
        return samplers.QMCSampler(
            qmc_type=algorithm,  # pyright: ignore[reportArgumentType]
            scramble=True,
            seed=seed,
            independent_sampler=samplers.RandomSampler(seed=own),
            warn_independent_sampling=False,
            warn_asynchronous_seeding=False,
        )


def _finished(study: "optuna.Study") -> list[Any]:
    """Trials that ran to their end; one that was cut off or raised is left out and tried again."""
    from optuna.trial import TrialState

    marked = study.user_attrs
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
    return [trial for trial in trials if trial.state == TrialState.COMPLETE or f"{_NAN} {trial.number}" in marked]


def _close_interrupted(study: "optuna.Study") -> None:
    """Close the trial of a killed process."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _table(space: SearchSpace, trials: list[Any]) -> "pyarrow.Table":
    rows = [
        (index, trial.value, _seconds(trial), json.dumps(decode(space, trial.params), sort_keys=True))
        for index, trial in enumerate(trials)
    ]
    return trials_table(rows)


def _seconds(trial: Any) -> float | None:
    return trial.duration.total_seconds() if trial.duration else None


def trials_table(rows: list[tuple[int, float | None, float | None, str]]) -> "pyarrow.Table":
    """Rows of (number, value, seconds, JSON parameters) as the table of Best."""
    import pyarrow

    return pyarrow.table(
        {
            "number": pyarrow.array([row[0] for row in rows], pyarrow.int64()),
            "value": pyarrow.array([row[1] for row in rows], pyarrow.float64()),
            "state": pyarrow.array(["failed" if row[1] is None else "complete" for row in rows], pyarrow.string()),
            "seconds": pyarrow.array([row[2] for row in rows], pyarrow.float64()),
            "parameters": pyarrow.array([row[3] for row in rows], pyarrow.string()),
        }
    )
