"""The persistent Dagster instance under the state folder: the one that the demo fills and `mlops up` shows."""

import os
from pathlib import Path

DAGSTER_YAML = """\
# Written by mlops; edit freely, it is not overwritten.
telemetry:
  enabled: false
nux:
  enabled: false
concurrency:
  runs:
    max_concurrent_runs: 2
    tag_concurrency_limits:
      # Two runs of one part of one model (say, two trainings) would write the same manifests.
      - key: mlops/exclusive
        value:
          applyLimitPerUniqueValue: true
        limit: 1
sensors:
  use_threads: true
  num_workers: 4
"""


def prepare(root: Path) -> Path:
    """Make `<root>/dagster` with its configuration and point this process and its children at it; returns the folder.

    Raises StorageError where the folder cannot be written.
    """
    from mlops_dagster.core.errors import StorageError

    home = root / "dagster"
    try:
        home.mkdir(parents=True, exist_ok=True)
        config = home / "dagster.yaml"
        if not config.exists():
            aside = home / f".dagster.yaml.{os.getpid()}"
            aside.write_text(DAGSTER_YAML)
            aside.replace(config)
    except OSError as error:
        raise StorageError(
            f"the state folder {root} cannot be written ({error.strerror}); free some space, correct its permissions or set MLOPS_HOME"
        ) from error
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ["MLOPS_HOME"] = str(root)
    # Child processes must not send anything anywhere by default.
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "true")
    os.environ.setdefault("FEAST_USAGE", "False")
    return home
