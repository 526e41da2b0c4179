"""Hyperparameter search by Ray Tune: several trials at once, on this machine or on a cluster."""

import base64
import math
import tempfile
from typing import Any

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import TransientError
from mlops_dagster.core.search_space import SearchSpace
from mlops_dagster.resources.training.ray_session import LOCAL, ray_session
from mlops_dagster.resources.tuning import Best, Objective
from mlops_dagster.resources.tuning.studies import Ask, Study, open_study

_VALUE = "value"
_FAILURE = "failure"


class RayTuner(ConfigurableResource):
    """Tuner (see the Protocol) with `parallel` trials at once; the stored study is the same as OptunaTuner's."""

    folder: str = Field(description="Where the studies are kept, one SQLite file for all.")
    parallel: int = Field(
        default=2, ge=1, description="Trials at once. A model-based search sees the results of whole rounds only."
    )
    address: str = Field(default=LOCAL, description="`local` starts a cluster for the call; else ray://HOST:PORT or HOST:PORT.")
    cpus: int = Field(default=2, ge=1, description="CPUs of a local cluster, shared by the trials.")
    object_store_mebibytes: int = Field(default=256, ge=80, description="Shared memory of a local cluster.")

    def search(
        self, study: str, objective: Objective, space: SearchSpace, algorithm: str, trials: int, direction: str, seed: int
    ) -> Best:
        """See Tuner.search; TransientError when a trial's process died. The objective and what it holds are pickled once."""
        opened = open_study(self.folder, study, space, algorithm, trials, direction, seed)
        rounds = Rounds(opened, self.parallel)
        if not rounds.finished():
            with ray_session(self.address, self.cpus, self.object_store_mebibytes):
                self._run(objective, rounds)
        if rounds.failure is not None:
            raise rounds.failure
        return opened.best()

    def _run(self, objective: Objective, rounds: "Rounds") -> None:
        from ray import tune
        from ray.tune.logger import JsonLoggerCallback

        share = max(1, self.cpus // self.parallel)
        trainable = tune.with_resources(tune.with_parameters(_trial, objective=objective), {"cpu": share})
        with tempfile.TemporaryDirectory(prefix="ray-tune-") as scratch:
            tuner = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    metric=_VALUE,
                    mode="max",
                    search_alg=_searcher(rounds),
                    num_samples=rounds.left(),
                    max_concurrent_trials=self.parallel,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(name="search", storage_path=scratch, verbose=0, callbacks=[JsonLoggerCallback()]),
            )
            tuner.fit()


class Rounds:
    """Hands out a study's trials in rounds of `width` and stores a round only when all of it has answered.

    So neither the order in which trials end nor a crash within a round changes what is tried next.
    """

    def __init__(self, study: Study, width: int) -> None:
        self.failure: BaseException | None = None
        self._study = study
        self._width = width
        self._waiting: list[Ask] = []
        self._running: dict[str, Ask] = {}
        self._round: dict[int, float] = {}
        self._asks: list[Ask] = []

    def left(self) -> int:
        """Trials that are still to be stored."""
        return self._study.wanted - self._study.done()

    def finished(self) -> bool:
        """Whether nothing is to be handed out any more."""
        return self.failure is not None or (not self._asks and self.left() <= 0)

    def next(self, name: str) -> dict[str, Any] | None:
        """Parameters for the trial called `name`; None while the round is under way."""
        if not self._asks:
            start = self._study.done()
            self._asks = [self._study.ask(index) for index in range(start, min(start + self._width, self._study.wanted))]
            self._waiting = list(self._asks)
        if not self._waiting:
            return None
        self._running[name] = self._waiting.pop(0)
        return dict(self._running[name].parameters)

    def answered(self, name: str, value: float, failure: BaseException | None) -> None:
        """Take a trial's answer; the last of a round stores it. After a failure the whole round is forgotten."""
        ask = self._running.pop(name)
        if failure is not None and self.failure is None:
            failure.add_note(f"while trying {ask.parameters} in the search {self._study.name!r}")
            self.failure = failure
        self._round[ask.number] = value
        if self.failure is not None:
            if not self._running:
                for one in self._asks:
                    self._study.drop(one)
            return
        if len(self._round) == len(self._asks):
            for one in self._asks:
                self._study.tell(one, self._round[one.number])
            self._asks, self._round = [], {}


def _searcher(rounds: Rounds) -> Any:
    """The rounds as Ray Tune's search algorithm; its class can only be made once Ray is imported."""
    from ray.tune.search import Searcher

    class StudySearcher(Searcher):
        def suggest(self, trial_id: str) -> Any:
            return Searcher.FINISHED if rounds.finished() else rounds.next(trial_id)

        def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
            answer = result or {}
            failure = _unpacked(answer.get(_FAILURE))
            if failure is None and (error or _VALUE not in answer):
                failure = TransientError("tuning: the trial's process died; check its memory and run the search again")
            rounds.answered(trial_id, answer.get(_VALUE, math.nan), failure)

        # The study is the state: a search is taken up from it, not from Ray's own checkpoint.
        def save(self, checkpoint_path: str) -> None:
            return None

        def restore(self, checkpoint_path: str) -> None:
            return None

    return StudySearcher(metric=_VALUE, mode="max")


def _trial(config: dict[str, Any], objective: Objective) -> dict[str, Any]:
    """What a worker runs. An exception travels as a value, so that the caller gets the very exception."""
    try:
        return {_VALUE: float(objective(dict(config)))}
    except BaseException as error:
        return {_VALUE: math.nan, _FAILURE: _packed(error)}


def _packed(error: BaseException) -> str:
    import cloudpickle

    try:
        data = cloudpickle.dumps(error)
    except Exception:
        data = cloudpickle.dumps(RuntimeError(repr(error)))
    return base64.b64encode(data).decode()


def _unpacked(text: str | None) -> BaseException | None:
    import cloudpickle

    return None if text is None else cloudpickle.loads(base64.b64decode(text))
