"""One ingestion of a foreign project's days, in a process of its own; prints how it ended and what the lake then holds as JSON."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import dagster as dg
from parcels.definitions import defs

from mlops_dagster import instance
from mlops_dagster.core.errors import MlopsError
from mlops_dagster.profiles import definitions
from mlops_dagster.runs import Runner

MODEL = "late_parcel"


def main() -> None:
    instance.prepare(Path(os.environ["MLOPS_HOME"]))
    resources = dict(definitions().resources or {})
    begun, error = time.monotonic(), ""
    try:
        Runner(defs, dg.DagsterInstance.get()).run(f"{MODEL}_ingest", days=(sys.argv[1], sys.argv[2]))
    except MlopsError as raised:
        error = str(raised)
    seen = {"error": error, "seconds": time.monotonic() - begun}
    root = Path(getattr(resources["data_lake"], "root", ""))
    if root.is_dir():
        keys = resources["data_lake"].list(f"{MODEL}/")
        for key in keys:
            if key.endswith(".parquet"):
                resources["data_lake"].read(key)  # raises for half a file
        seen |= {
            "files": {key: hashlib.sha256(resources["data_lake"].read_bytes(key)).hexdigest() for key in keys},
            "aside": len([*(root / ".incoming").iterdir()]) if (root / ".incoming").exists() else 0,
            "tracked": sorted(resources["data_versions"].contents(f"{MODEL}/")),
        }
    print("SEEN " + json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
