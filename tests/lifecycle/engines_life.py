"""A range of days of a foreign project ingested in one run; prints the stored features of every day and the checks as JSON."""

import json
import os
from pathlib import Path

import dagster as dg
from parcels.definitions import defs

from mlops_dagster import instance
from mlops_dagster.profiles import definitions
from mlops_dagster.runs import Runner

MODEL, DAYS = "late_parcel", ("2024-01-01", "2024-01-12")


def main() -> None:
    instance.prepare(Path(os.environ["MLOPS_HOME"]))
    result = Runner(defs, dg.DagsterInstance.get()).run(f"{MODEL}_ingest", days=DAYS)
    failed = [c.check_name for c in result.get_asset_check_evaluations() if not c.passed]
    lake = dict(definitions().resources or {})["data_lake"]
    rows = {key: lake.read(key).to_pydict() for key in lake.list(f"{MODEL}/features/") if key.endswith(".parquet")}
    for table in rows.values():
        table.pop("created_timestamp")  # when it was computed
    print("SEEN " + json.dumps({"failed": failed, "rows": rows}, default=str))


if __name__ == "__main__":
    main()
