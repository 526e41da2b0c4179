"""Stand between the supervisor and one program: `python -m mlops_dagster.resources.serving.adopt --record FILE -- COMMAND …`.

A supervisor that was killed leaves its children running, and the next one cannot be their parent. So every program is started
through this module. If the same command still runs from before, this process stands in for it: it waits, passes signals on, and
ends when it ends, so the survivor goes on serving and is still watched. Otherwise it waits out a back-off and *becomes* the
command (`exec`), so that in the normal case nothing stands between the supervisor and the program.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from mlops_dagster.resources.serving.state import read_json, write_json

SETTLED_SECONDS = 10.0  # a program that lived this long had started properly
LONGEST_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Record:
    """Which process a program is: `started` (the process's own start time) tells it from a later process with the same id.

    `quick` counts the starts in a row, this one included, of which none before it lived for SETTLED_SECONDS; `deaths` how often
    it ended under the same supervisor (`keeper`), which is its own doing, and not because all was stopped or the machine was.
    """

    pid: int
    started: float
    command: tuple[str, ...]
    launched: float
    quick: int = 0
    deaths: int = 0
    keeper: int = 0

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        raw = read_json(path)
        try:
            return cls(**{**raw, "command": tuple(raw["command"])})
        except (TypeError, KeyError):
            return None

    def process(self) -> psutil.Process | None:
        """The process itself, if it still runs."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


def wait_before(quick: int) -> float:
    """Seconds to wait before a start when `quick` starts in a row have failed: none, 0.5, 1, 2 … at most 30."""
    return 0.0 if quick == 0 else min(0.5 * 2 ** (quick - 1), LONGEST_WAIT_SECONDS)


def end(process: psutil.Process, stop_seconds: float) -> None:
    """End a process: politely, then after `stop_seconds` for good, with all that it started."""
    family = [process]
    with suppress(psutil.Error):
        family += process.children(recursive=True)
    with suppress(psutil.Error):
        process.terminate()
    _, left = psutil.wait_procs(family, timeout=stop_seconds)
    for survivor in left:
        with suppress(psutil.Error):
            survivor.kill()
    psutil.wait_procs(left, timeout=2)


def end_left_behind(record: Record) -> None:
    """End what a dead program left in its process group (a server's workers outlive a killed main process)."""
    if record.process() is not None or _leader_is_new(record.pid):
        return
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if (
                os.getpgid(process.pid) == record.pid
                and process.pid != os.getpid()
                and process.create_time() >= record.started - 1.0
            ):
                process.kill()


def _leader_is_new(pid: int) -> bool:
    """Whether the process id was given to somebody else since: then a group of that number is theirs."""
    return psutil.pid_exists(pid)


def stand_in(process: psutil.Process, stop_seconds: float) -> int:
    """Wait until an adopted process ends; a stop request ends it first. Returns the exit code that makes the supervisor restart
    it, or 0.
    """
    asked = False

    def stop(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not asked and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.1)
    if asked:
        end(process, stop_seconds)
        return 0
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="file that remembers the process")
    parser.add_argument("--stop-seconds", type=float, default=10.0, help="how long a stop may take before it is forced")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    given = parser.parse_args(arguments)
    command = tuple(given.command[1:] if given.command[:1] == ["--"] else given.command)
    if not command:
        parser.error("no command: give it after --")
    return launch(given.record, command, given.stop_seconds)


def launch(path: Path, command: tuple[str, ...], stop_seconds: float) -> int:
    """Adopt the program that `path` remembers, or become it. Returns only when an adopted program has ended."""
    before = Record.read(path)
    quick = deaths = 0
    keeper = os.getppid()
    if before is not None and (survivor := before.process()) is not None and before.pid != os.getpid():
        if before.command == command:
            write_json(path, asdict(replace(before, keeper=keeper)))
            return stand_in(survivor, stop_seconds)
        end(survivor, stop_seconds)
    elif before is not None:
        end_left_behind(before)
        if before.command == command:
            quick = before.quick + 1 if time.time() - before.launched < SETTLED_SECONDS else 0
            deaths = before.deaths + (before.keeper == keeper)
    time.sleep(wait_before(quick))
    mine = psutil.Process()
    write_json(path, asdict(Record(mine.pid, mine.create_time(), command, time.time(), quick, deaths, keeper)))
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
