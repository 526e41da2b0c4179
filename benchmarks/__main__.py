"""Run the benchmarks: `python -m benchmarks [name …]`; prints a table and writes `benchmarks/results.json`."""

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import benchmarks
from benchmarks.measure import Measurement

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"__main__", "measure"}


def names() -> list[str]:
    """Every module here that defines `run()`: one benchmark each."""
    return sorted(
        m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in NOT_BENCHMARKS and not m.name.startswith("_")
    )


def main(wanted: list[str]) -> int:
    unknown = set(wanted) - set(names())
    if unknown:
        print(f"No benchmark named {', '.join(sorted(unknown))}. There are: {', '.join(names())}.", file=sys.stderr)
        return 2
    rows: list[Measurement] = []
    for name in wanted or names():
        print(f"{name} …", file=sys.stderr, flush=True)
        for row in importlib.import_module(f"benchmarks.{name}").run():
            rows.append(row)
            print(line(row), flush=True)
            (HERE / "results.json").write_text(json.dumps([r.as_row() for r in rows], indent=2) + "\n")
    return 0 if all(r.met for r in rows) else 1


def line(row: Measurement) -> str:
    peer = (
        f"{row.peer_name} {row.peer:.4g} {row.unit}, {row.ratio:.3g} x"
        if row.peer is not None and row.ratio is not None
        else "no peer"
    )
    return f"{row.name:34} {row.ours:.4g} {row.unit:8} {peer:52} goal {row.goal:10} {'met' if row.met else 'NOT met'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
