"""The parcels project up to a collected day of predictions, in a process of its own; what the tests of this folder look at."""

import datetime as dt

from mlops_dagster.replay import Replay
from tests.lifecycle.life import Life


def main() -> None:
    life = Life()
    try:
        life.run("ingest", "ingest", days=("2024-01-01", "2024-01-31"))
        life.run("train", "train", run_config={"ops": {"late_parcel__training_set": {"config": {"through": "2024-01-30"}}}})
        life.decide(1, "approved")
        life.run("deploy", "deploy")
        replay = Replay(life.spec, life.resources)
        for day in (dt.date(2024, 1, 31), dt.date(2024, 2, 1)):
            replay.day(day, lambda: None)
        life.run("collect", "monitor", day="2024-01-31")
    finally:
        life.resources["serving"].stop()


if __name__ == "__main__":
    main()
