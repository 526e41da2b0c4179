"""`mlops demo`: one model's whole life on real data, on the instance that `mlops up` then shows."""

import datetime as dt
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mlops_dagster import instance
from mlops_dagster.core.errors import StorageError, TerminalError
from mlops_dagster.core.rollout import Phase, replay

MODEL = "flight_delay"
FIRST, LAST_BEFORE_REPLAY = dt.date(2013, 1, 1), dt.date(2013, 2, 28)
DAYS_AFTER = 2
"""Days that are replayed after the new version is live, so that its own figures are seen."""
TICK_SECONDS = 1.0


def run(root: Path, json_file: Path | None, restart: bool, through: str) -> None:
    """Run or resume the demo; prints what happens and, at the end, what happened, when and why."""
    last = dt.date.fromisoformat(through)
    if restart:
        forget(root)
    instance.prepare(root)
    from mlops_dagster.demo_report import Progress, show, summary

    with only_one(root), Progress() as progress:
        demo = Demo(root, progress)
        demo.run(last)
        found = summary(demo)
    if json_file:
        json_file.write_text(json.dumps(found, indent=2, default=str) + "\n")
    show(found, root)


def forget(root: Path) -> None:
    """Remove the state of an earlier demo, servers first. Raises TerminalError where the folder holds no demo's state."""
    if not root.exists():
        return
    if not (root / "demo.json").exists():
        raise TerminalError(f"{root} was not made by a demo, so --restart leaves it alone; remove it yourself or set MLOPS_HOME")
    from mlops_dagster.profiles import Settings, embedded

    embedded(Settings())["serving"].stop()  # type: ignore[attr-defined]
    shutil.rmtree(root)
    print(f"restarting: {root} was removed")


@contextmanager
def only_one(root: Path):
    """Two demos on one state folder would replay the same days twice."""
    from mlops_dagster.core.errors import TransientError
    from mlops_dagster.resources import file_lock

    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock.held(root / "demo.lock", 0.1))
        except TransientError:
            raise TerminalError(f"another demo is running on {root}; wait for it, or set MLOPS_HOME to another folder") from None
        yield


class Demo:
    """The steps; each looks at what is there already, so that a second run resumes where the first one ended."""

    def __init__(self, root: Path, progress: Any) -> None:
        import dagster as dg

        from mlops_dagster.declared import spec_of
        from mlops_dagster.definitions import defs
        from mlops_dagster.profiles import definitions
        from mlops_dagster.runs import Runner

        self.root, self.progress = root, progress
        self.resources: dict[str, Any] = dict(definitions().resources or {})
        self.runner = Runner(defs, dg.DagsterInstance.get())
        self.spec = spec_of(MODEL, "mlops_dagster")
        self.state = self._load()
        self._last_tick = 0.0

    def run(self, last: dt.date) -> None:
        """All steps in order, up to the last day of the replay."""
        if self.state["finished"]:
            self.progress.say("the demo is complete already; `mlops demo --restart` begins anew")
            return
        if self.state["seconds"]:
            self.progress.say(f"resuming; the replay has reached {self.state['replayed_through'] or 'no day yet'}")
        else:
            self.progress.say("starting anew")
        self.timed("ingest", self._ingest)
        self.timed("train", self._train_first)
        self.timed("deploy", self._deploy_first)
        self.timed("replay", lambda: self._replay(last))

    def timed(self, stage: str, work: Callable[[], None]) -> None:
        """Run a step and add its seconds to the summary."""
        begin = time.monotonic()
        try:
            work()
        finally:
            self.state["seconds"][stage] = round(self.state["seconds"].get(stage, 0.0) + time.monotonic() - begin, 1)
            self._save()

    def versions(self) -> Any:
        """The registered versions."""
        return self.resources["registry"].versions(MODEL)

    def _ingest(self) -> None:
        from mlops_dagster.assets.lake_paths import stored_days

        done = stored_days(self.resources["data_lake"], self.spec, "features", self._any_view())
        if done and done[-1] >= LAST_BEFORE_REPLAY:
            return
        self.progress.step("ingest", f"{FIRST} … {LAST_BEFORE_REPLAY}: raw data, validation, features")
        self.runner.run(f"{MODEL}_ingest", days=(str(FIRST), str(LAST_BEFORE_REPLAY)), tags={"mlops/trigger": "demo"})

    def _any_view(self) -> str:
        from mlops_dagster.assets.references import load_callable

        return next(iter(load_callable(self.spec, "features.compute")()))

    def _train_first(self) -> None:
        if not self.versions():
            self.progress.step("train", "point-in-time join, tuning, training, evaluation, registration")
            config = {"ops": {f"{MODEL}__training_set": {"config": {"through": str(LAST_BEFORE_REPLAY)}}}}
            self.runner.run(f"{MODEL}_train", run_config=config, tags={"mlops/trigger": "demo"})
        if not self.versions():
            raise TerminalError("the first version did not pass its gate; see the check `gate` of flight_delay/evaluation")

    def _deploy_first(self) -> None:
        if self._rollout() is None or self.resources["serving"].observe(MODEL).routes is None:
            self._approve(self.versions()[0])
            self.progress.step("deploy", "the approved version is brought onto its servers")
            self.runner.run(f"{MODEL}_deploy", tags={"mlops/trigger": "demo"})
            self._note_live()

    def _approve(self, version: Any) -> None:
        from mlops_dagster.assets import approvals
        from mlops_dagster.resources.registry import Approval

        if version.approval is None:
            decision = Approval("approved", "demo", dt.datetime.now(dt.UTC), "the demo approves what passed its gate")
            approvals.decide(self.resources["registry"], self.resources["ledger"], MODEL, version.number, decision)
            self.progress.say(f"version {version.number} approved by demo")

    def _replay(self, last: dt.date) -> None:
        from mlops_dagster.replay import Replay

        traffic = Replay(self.spec, self.resources)
        reached = self.state["replayed_through"]
        day = dt.date.fromisoformat(reached) + dt.timedelta(days=1) if reached else LAST_BEFORE_REPLAY + dt.timedelta(days=1)
        while day <= last and not self.state["finished"]:
            self.progress.step("replay", f"{day}: requests, then the day's data, live performance and drift")
            self.state["predictions"][str(day)] = traffic.day(day, self._tick)
            self.runner.run(f"{MODEL}_ingest", day=str(day), tags={"mlops/trigger": "demo"})
            self.runner.run(f"{MODEL}_monitor", day=str(day), tags={"mlops/trigger": "demo"})
            self._retrain(day)
            self._tick(force=True)
            self.state["replayed_through"] = str(day)
            self.state["finished"] = self._finished(day)
            self._save()
            day += dt.timedelta(days=1)
        if not self.state["finished"]:
            self.progress.say(f"the replay ended on {last} without a second version being live")

    def _retrain(self, day: dt.date) -> None:
        """Evaluate the retraining sensor; what it asks for is run, and a version that passes its gate is approved."""
        before = len(self.versions())
        if len(self.state["live_from"]) > 1:
            return
        runs = self.runner.evaluate(f"{MODEL}_retraining")
        if runs:
            self.progress.say(f"{day}: retrained: {self.resources['ledger'].entries(MODEL, 'retraining')[-1].reason}")
        if len(self.versions()) > before:
            self._approve(self.versions()[-1])

    def _tick(self, force: bool = False) -> None:
        """Evaluate the rollout sensor, at most once a second."""
        if not force and time.monotonic() - self._last_tick < TICK_SECONDS:
            return
        self._last_tick = time.monotonic()
        before = self._rollout()
        self.runner.evaluate(f"{MODEL}_rollouts")
        after = self._rollout()
        if after is not None and after != before:
            self.progress.say(f"rollout of version {after.candidate}: {after.phase}: {after.reason}")
            self._note_live()

    def _rollout(self) -> Any:
        return replay(self.resources["ledger"].entries(MODEL), MODEL)

    def _note_live(self) -> None:
        """Remember on which replayed day a version became champion."""
        rollout = self._rollout()
        if rollout is not None and rollout.phase is Phase.PROMOTED:
            reached = self.state["replayed_through"]
            today = (
                dt.date.fromisoformat(reached) + dt.timedelta(days=1) if reached else LAST_BEFORE_REPLAY + dt.timedelta(days=1)
            )
            self.state["live_from"].setdefault(rollout.candidate, str(today))
            self._save()

    def _finished(self, day: dt.date) -> bool:
        live = self.state["live_from"]
        return len(live) > 1 and (day - dt.date.fromisoformat(max(live.values()))).days >= DAYS_AFTER

    def _load(self) -> dict[str, Any]:
        file = self.root / "demo.json"
        empty = {"replayed_through": None, "predictions": {}, "live_from": {}, "seconds": {}, "finished": False}
        if not file.exists():
            return empty
        return {**empty, **json.loads(file.read_text())}

    def _save(self) -> None:
        aside = self.root / f".demo.json.{os.getpid()}"
        try:
            aside.write_text(json.dumps(self.state))
            aside.replace(self.root / "demo.json")
        except OSError as error:
            raise StorageError(
                f"{self.root} cannot be written ({error.strerror}); free some space and run the demo again"
            ) from error
