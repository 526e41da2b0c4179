"""Reads a run's `.wandb` file, W&B's append-only log of protobuf records, to know that a run is wholly on disk."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import StorageError

# LevelDB's log format (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind a header of W&B's own.
_FILE_HEADER = 7
_CHUNK_HEADER = 7
_BLOCK = 32768
_FULL, _LAST = 1, 4


def records(file: Path) -> Iterator[Any]:
    """The whole records (wandb_internal_pb2.Record) of a `.wandb` file in order; a torn end is left out."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    at, parts = _FILE_HEADER, b""
    while at + _CHUNK_HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _CHUNK_HEADER:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += _CHUNK_HEADER
        parts += data[at : at + length]
        at += length
        if kind in (_FULL, _LAST) and at <= len(data):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(parts)
            parts = b""
            yield record


def wait_until_written(folder: Path, sleep: Callable[[float], None] = time.sleep, tries: int = 400) -> None:
    """Return when the run's exit record is on disk: W&B's own process writes on after `finish` has returned.

    StorageError after 400 tries, 25 ms apart.
    """
    for _ in range(tries):
        if any(record.WhichOneof("record_type") == "exit" for file in folder.glob("*.wandb") for record in records(file)):
            return
        sleep(0.025)
    raise StorageError(f"{folder}: W&B did not finish writing the run; see its logs in {folder / 'logs'}")
