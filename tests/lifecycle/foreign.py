"""The foreign project `own_project` in a folder of its own, and scripts that live with it in processes of their own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.lifecycle import parcels_csv

HERE = Path(__file__).parent


def make(folder: Path) -> dict[str, str]:
    """Copy the project to `folder` with its CSV; the environment of processes that live with it, their state being there too."""
    shutil.copytree(HERE / "own_project", folder / "project")
    parcels_csv.write(folder / "parcels.csv")
    return {
        **os.environ,
        "PYTHONPATH": str(folder / "project"),
        "PARCELS_CSV": str(folder / "parcels.csv"),
        "MLOPS_HOME": str(folder / "state"),
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
    }


def told(script: str, environment: Mapping[str, str], *arguments: str) -> list[dict[str, Any]]:
    """Run a script of this folder to its end; what it printed after `SEEN`, line by line."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=HERE)
    lines = [json.loads(line.removeprefix("SEEN ")) for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert done.returncode == 0, f"after {[line.get('step') for line in lines]}: {done.stderr[-6000:]}"
    return lines


def steps(script: str, environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What each step of a script saw, by the step's name."""
    return {line.pop("step"): line for line in told(script, environment)}
