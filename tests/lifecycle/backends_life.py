"""The shortest useful part of a foreign project's life on the servers that the environment names, in a process of its own."""

import datetime as dt
import os
import re
from pathlib import Path

import lineage_commands
from life import MODEL, Life

from mlops_dagster.replay import Replay
from mlops_dagster.requests import Client

DEPOTS = ("d0", "d5", "nowhere")


def main() -> None:
    life = Life()
    try:
        life.run("ingest", "ingest", days=("2024-01-01", "2024-01-30"))
        life.run("train", "train")
        life.run("study", "study")
        life.decide(1, "approved")
        life.run("deploy", "deploy")
        store = life.resources["feature_store"]
        asked = [{"depot": depot, "weight_kg": 6.0, "event_timestamp": "2024-01-31T06:00:00+00:00"} for depot in DEPOTS]
        client = Client(life.resources["serving"].endpoint(MODEL))
        answers = [client.predict(MODEL, [row], {"x-request-id": f"asked-{row['depot']}"}) for row in asked]
        life.tell("asked", online=store.online(MODEL, asked), answers=answers)
        life.tell("replayed", sent=life.monitor(Replay(life.spec, life.resources), dt.date(2024, 1, 31)))
        life.tell("stored", **stored(life))
        if os.environ.get("COMMANDS"):
            life.tell("commands", **lineage_commands.run(life, os.environ["COMMANDS"]))
    finally:
        life.resources["serving"].stop()


def stored(life: Life) -> dict:
    """Where things lie at the end, and in which files of the state folder a password is found."""
    home = Path(os.environ["MLOPS_HOME"])
    secret = re.compile(os.environ["SECRET"].encode())
    leaked = [str(f.relative_to(home)) for f in home.rglob("*") if f.is_file() and secret.search(f.read_bytes())]
    lake, versions = life.resources["data_lake"], life.resources["data_versions"]
    return {
        "lake": lake.locate("x"),
        "days": len(lake.list(f"{MODEL}/raw_data/rows/")),
        "local_lake": (home / "lake").exists(),
        "tracked": len(versions.contents(f"{MODEL}/raw_data/rows/")),
        "unsent": versions.push(),
        "ledger": [entry.kind for entry in life.resources["ledger"].entries(MODEL)],
        "ledger_url": life.resources["ledger"].url.partition("@")[2],
        "broken": str(life.resources["ledger"].verify()),
        "mirrored": len([*home.glob("wandb/wandb/offline-run-*")]),
        "leaked": leaked,
        "local_mlflow": (home / "mlflow").exists(),
    }


if __name__ == "__main__":
    main()
