"""A lock between processes that the kernel frees when its holder dies."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlops_dagster.core.errors import TransientError


@contextmanager
def held(
    path: Path, wait_seconds: float, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Hold `flock` on a file, made if need be. Raises TransientError when another process keeps it longer than `wait_seconds`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = clock() + wait_seconds
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if clock() >= deadline:
                    raise TransientError(
                        f"lock {path}: held by another process for more than {wait_seconds:g} s. Wait until that run or command "
                        f"has finished, then run it again."
                    ) from None
                sleep(0.02)
        yield
