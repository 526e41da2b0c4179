"""A version's stages once more, in a state folder of their own, by the same code; run as a process with MLOPS_HOME set to that folder.

The folder's lake holds the raw data. `order.json` says what to make; what was made is written to `made.json`.
"""

import datetime as dt
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ORDER, MADE = "order.json", "made.json"


@dataclass(frozen=True)
class Order:
    """What to make again: `validated` and `features` are the days (YYYY-MM-DD) that had them, `through` the training set's last day."""

    model: str
    module: str
    validated: list[str]
    features: list[str]
    through: str
    parameters: dict[str, Any]


def stretches(days: Iterable[str]) -> list[tuple[str, str]]:
    """The first and last day of each run of days without a gap."""
    found: list[tuple[dt.date, dt.date]] = []
    for day in sorted(map(dt.date.fromisoformat, days)):
        if found and day - found[-1][1] == dt.timedelta(days=1):
            found[-1] = (found[-1][0], day)
        else:
            found.append((day, day))
    return [(first.isoformat(), last.isoformat()) for first, last in found]


def make(order: Order, root: Path) -> dict[str, Any]:
    """Run the stages; returns their manifests. Raises TerminalError with the failed stage's own message."""
    import dagster as dg

    from mlops_dagster import assets, profiles
    from mlops_dagster.assets.jobs import name
    from mlops_dagster.assets.lake_paths import read_manifest, write_manifest
    from mlops_dagster.assets.stage import key
    from mlops_dagster.declared import spec_of
    from mlops_dagster.lineage import training_record
    from mlops_dagster.runs import Runner

    spec = spec_of(order.model, order.module)
    lake: Any = profiles.embedded(profiles.Settings(home=root))["data_lake"]
    definitions = dg.Definitions.merge(assets.build(spec), profiles.definitions())
    with dg.DagsterInstance.ephemeral() as instance:
        runner = Runner(definitions, instance)
        for stage, days in (("validated_data", order.validated), ("features", order.features)):
            for stretch in stretches(days):
                runner.run(name(spec.name, "ingest"), days=stretch, only=[key(spec, stage)])
        through = {"ops": {f"{spec.name}__training_set": {"config": {"through": order.through}}}}
        runner.run(name(spec.name, "train"), only=[key(spec, "training_set")], run_config=through)
        training_set = read_manifest(lake, spec, "training_set")
        # As the version had them: a search would find others.
        found = {"parameters": order.parameters, "trials": [], "training_set": training_set["training_set"]}
        write_manifest(lake, spec, "best_parameters", found)
        runner.run(name(spec.name, "train"), only=[key(spec, "trained_model"), key(spec, "evaluation")])
    record = training_record.load(lake, training_set["inputs"]["key"], training_set["inputs"]["sha256"])
    return {
        "training_set": training_set,
        "record": asdict(record),
        "trained_model": read_manifest(lake, spec, "trained_model"),
        "evaluation": read_manifest(lake, spec, "evaluation"),
    }


def main() -> int:
    """Follow the order in the state folder; an error of ours is told in one paragraph."""
    from mlops_dagster import instance
    from mlops_dagster.core.errors import MlopsError
    from mlops_dagster.profiles import Settings

    root = Settings().root
    instance.prepare(root)
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = make(Order(**json.loads((root / ORDER).read_text())), root)
    except MlopsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    (root / MADE).write_text(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
