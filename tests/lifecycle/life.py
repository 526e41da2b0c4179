"""A foreign project's model through its whole life, in a process of its own; prints what was seen as JSON, a line a step."""

import datetime as dt
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
from parcels.definitions import defs

from mlops_dagster import instance
from mlops_dagster.assets import approvals, rollout
from mlops_dagster.core.errors import MlopsError
from mlops_dagster.core.rollout import Command
from mlops_dagster.declared import spec_of
from mlops_dagster.profiles import definitions
from mlops_dagster.replay import Replay
from mlops_dagster.resources.registry import Approval
from mlops_dagster.runs import Runner

MODEL = "late_parcel"


class Life:
    def __init__(self) -> None:
        instance.prepare(Path(os.environ["MLOPS_HOME"]))
        self.runner = Runner(defs, dg.DagsterInstance.get())
        self.resources = dict(definitions().resources or {})
        self.parts = rollout.Parts.of(SimpleNamespace(**self.resources))
        self.spec = spec_of(MODEL, "parcels")

    def run(self, step: str, part: str, **how) -> None:
        result = self.runner.run(f"{MODEL}_{part}", **how)
        checks = {
            f"{c.asset_key.path[-1]}.{c.check_name}": [c.passed, c.description] for c in result.get_asset_check_evaluations()
        }
        self.tell(step, checks=checks, made=sorted({e.asset_key.path[-1] for e in result.get_asset_materialization_events()}))

    def tell(self, step: str, **seen) -> None:
        print("SEEN " + json.dumps({"step": step, **seen}, default=str), flush=True)

    def versions(self):
        return self.resources["registry"].versions(MODEL)

    def decide(self, number: int, decision: str) -> None:
        approval = Approval(decision, "tester", dt.datetime.now(dt.UTC), "seen")
        approvals.decide(self.resources["registry"], self.resources["ledger"], MODEL, number, approval)

    def monitor(self, replay: Replay, day: dt.date) -> int:
        sent = replay.day(day, lambda: None)
        self.run(f"ingest {day}", "ingest", day=str(day))
        self.run(f"monitor {day}", "monitor", day=str(day))
        return sent


def first_version(life: Life) -> None:
    life.run("ingest", "ingest", days=("2024-01-01", "2024-01-30"))
    life.run("train", "train")
    try:
        life.run("deploy unapproved", "deploy")
    except MlopsError as error:
        life.tell("deploy unapproved", error=str(error))
    life.decide(1, "approved")
    life.run("deploy", "deploy")
    life.tell("live", aliases=life.versions()[0].aliases, serving=str(life.resources["serving"].observe(MODEL).routes))


def second_version(life: Life) -> None:
    life.run("ingest the days between", "ingest", days=("2024-01-31", "2024-02-13"))
    replay = Replay(life.spec, life.resources)
    life.tell("replayed", sent=[life.monitor(replay, dt.date(2024, 2, day)) for day in (14, 15, 16)])
    asked = life.runner.evaluate(f"{MODEL}_retraining")
    again = life.runner.evaluate(f"{MODEL}_retraining")
    life.tell(
        "retrained",
        runs=len(asked),
        again=len(again),
        why=[e.reason for e in life.resources["ledger"].entries(MODEL, "retraining")],
    )
    life.decide(2, "approved")
    deployed = life.runner.evaluate(f"{MODEL}_rollouts")
    deadline = time.monotonic() + 120
    day = dt.date(2024, 2, 17)
    while (state := rollout.current(life.parts, MODEL)) and not state.phase.final:
        replay.day(day, lambda: None)
        life.runner.evaluate(f"{MODEL}_rollouts")
        if time.monotonic() > deadline:
            break
    phases = [e.kind for e in life.resources["ledger"].entries(MODEL)]
    aliases = {v.number: sorted(v.aliases) for v in life.versions()}
    life.tell(
        "second live", deployed=len(deployed), phases=phases, aliases=aliases, broken=str(life.resources["ledger"].verify())
    )


def way_back(life: Life) -> None:
    now = dt.datetime.now(dt.UTC)
    rollout.roll_back(life.parts, life.spec, Command("rollback", "tester", "seen enough"), now)
    begun = time.monotonic()
    while not rollout.tick(life.parts, life.spec, dt.datetime.now(dt.UTC)).state.phase.final:
        time.sleep(0.1)
    state = rollout.current(life.parts, MODEL)
    # The routes are set at once and live when the gateway has taken them.
    while (routes := life.resources["serving"].observe(MODEL).routes) != state.routes and time.monotonic() - begun < 60:
        time.sleep(0.05)
    aliases = {v.number: sorted(v.aliases) for v in life.versions()}
    life.tell("back", phase=str(state.phase), version=state.candidate, aliases=aliases, routes=str(routes))


def main() -> None:
    life = Life()
    try:
        first_version(life)
        second_version(life)
        way_back(life)
    finally:
        life.resources["serving"].stop()


if __name__ == "__main__":
    main()
