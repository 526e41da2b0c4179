"""The commands that follow data and bring it back, typed in the project's folder of a life."""

import contextlib
import io
import os
import sys
from pathlib import Path

from life import MODEL, Life

from mlops_dagster import cli


def run(life: Life, copy: str) -> dict:
    """What each says; `copy`: a folder for a checkout."""
    day, key = "raw_data/2024-01-20", f"{MODEL}/features/depot_record/2024-01-20.parquet"
    os.chdir(Path(os.environ["PYTHONPATH"]))
    lake, seen = life.resources["data_lake"], {}
    before = lake.read_bytes(key)
    seen["log"] = mlops("data", "log", MODEL, "--json")
    seen["trace"] = mlops("trace", "asked-d0", "--json")
    seen["trace collected"] = mlops("trace", "p1805", "--json")
    seen["affected"] = mlops("affected", day, "--json")
    seen["copy"] = mlops("data", "checkout", MODEL, "--version", "1", "--to", copy)
    seen["reproduce"] = mlops("reproduce", MODEL, "1", "--json")
    seen["quarantine"] = mlops("quarantine", MODEL, day, "--by", "ana")
    seen["out"] = key not in lake.list(f"{MODEL}/features/")
    seen["affected after"] = mlops("affected", day)
    seen["diff"] = mlops("data", "diff", MODEL, "v1")
    seen["undo"] = mlops("quarantine", MODEL, day, "--by", "ana", "--undo")
    seen["checkout"] = mlops("data", "checkout", MODEL, "--version", "1")
    seen["same"] = lake.read_bytes(key) == before
    seen["missing"] = mlops("affected", "raw_data/2031-01-01")
    return seen


def mlops(*arguments: str) -> list:
    """Exit code, output and errors of a command."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["mlops", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    return [code, out.getvalue(), err.getvalue()]
