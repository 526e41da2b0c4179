"""Where a request lies in a Parquet file of the inference log: its file's request ids as sorted 64-bit hashes, each with its row number.

An index is 12 bytes a row and says of itself which file it was made of (`stamp`), how many rows of which version that holds, and
when they were logged. It is derived: lost or stale, it is made again. Two ids of one hash cost a look at both rows, never a wrong answer.
"""

import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mlops_dagster.core.errors import DataError

MAGIC = b"MLOPSRI1"
COLUMNS = ("request_id", "version", "logged_at")
HASH, ROW = np.dtype("<u8"), np.dtype("<u4")
CHUNK_ROWS = 1 << 18  # the byte matrix of a chunk stays within some tens of megabytes
_SEED, _GOLDEN = np.uint64(0x243F6A8885A308D3), np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_PREFIX = len(MAGIC) + 4


@dataclass(frozen=True)
class Summary:
    """What an index says of its file; moments are ISO 8601 in UTC, None for a file without rows. `collected_at`: a moment before the
    servers' segments were read for it; None where nobody knows it any more."""

    stamp: str
    rows: int
    versions: Mapping[str, int]
    first_logged: str | None = None
    last_logged: str | None = None
    collected_at: str | None = None


@dataclass(frozen=True)
class Index:
    """An opened index: `hashes` [rows] sorted, `numbers` [rows] the row of each."""

    summary: Summary
    hashes: np.ndarray
    numbers: np.ndarray

    def rows(self, request_id: str) -> list[int]:
        """The rows that may be this request's, ascending: compare their ids before use."""
        wanted = hash_of(request_id)
        first, end = (int(np.searchsorted(self.hashes, wanted, side=side)) for side in ("left", "right"))
        return sorted(int(n) for n in self.numbers[first:end])


def hash_of(request_id: str) -> np.uint64:
    """The hash of one text, the same as `hashed` gives it. Arrow's own look at a Python list would import pandas, a tenth of a second."""
    data = np.frombuffer(request_id.encode(), np.uint8)
    return _folded(_words(data, np.zeros(1, np.int64), len(data)), len(data))[0]


def hashed(ids: "pa.Array | pa.ChunkedArray") -> np.ndarray:
    """A 64-bit hash of each text, the same on every machine [rows, uint64]: its zero-padded bytes as 8-byte words, each folded in by
    the finalizer of SplitMix64 (Steele, Lea and Flood 2014), begun with the length. A missing id counts as the empty text."""
    chunks = ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
    pieces = [c.slice(at, CHUNK_ROWS) for c in chunks for at in range(0, len(c), CHUNK_ROWS)]
    return np.concatenate([_hashed(piece) for piece in pieces]) if pieces else np.empty(0, np.uint64)


def _hashed(ids: pa.Array) -> np.ndarray:
    plain: Any = ids if ids.type == pa.string() and not ids.null_count else ids.cast(pa.string()).fill_null("")
    _, offset_bytes, data_bytes = plain.buffers()
    offsets = np.frombuffer(offset_bytes, np.int32)[plain.offset : plain.offset + len(plain) + 1].astype(np.int64)
    data = np.frombuffer(data_bytes, np.uint8) if data_bytes is not None else np.empty(0, np.uint8)
    lengths = np.diff(offsets)
    made = np.empty(len(plain), np.uint64)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        made[rows] = _folded(_words(data, offsets[rows], int(length)), int(length))
    return made


def _words(data: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The texts of one length as rows of 8-byte words, the last one padded with zeros."""
    bytes_ = np.zeros((len(starts), -(-length // 8) * 8), np.uint8)
    adjacent = length > 0 and int(starts[-1] - starts[0]) == (len(starts) - 1) * length
    if adjacent:  # the usual case, ids of one length: no gathering
        bytes_[:, :length] = data[starts[0] : starts[0] + len(starts) * length].reshape(-1, length)
    else:
        bytes_[:, :length] = data[starts[:, None] + np.arange(length)]
    return bytes_.view(HASH)


def _folded(words: np.ndarray, length: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        h = np.full(len(words), _SEED ^ (np.uint64(length) * _GOLDEN), np.uint64)
        for column in words.T:
            h = h ^ column
            h = (h ^ (h >> np.uint64(30))) * _MIX_1
            h = (h ^ (h >> np.uint64(27))) * _MIX_2
            h = h ^ (h >> np.uint64(31))
    return h


def build(rows: pa.Table, stamp: str, collected_at: dt.datetime | None = None) -> bytes:
    """The index of a file's rows (columns COLUMNS, in the file's order) as bytes."""
    hashes = hashed(rows["request_id"])
    order = np.argsort(hashes, kind="stable")
    header = json.dumps(asdict(_summary(rows, stamp, collected_at))).encode()
    header += b" " * (-(_PREFIX + len(header)) % HASH.itemsize)  # so that the arrays can be mapped
    parts = (MAGIC, len(header).to_bytes(4, "little"), header, hashes[order].astype(HASH).tobytes(), order.astype(ROW).tobytes())
    return b"".join(parts)


def _summary(rows: pa.Table, stamp: str, collected_at: dt.datetime | None) -> Summary:
    import pyarrow.compute

    pc: Any = pyarrow.compute
    counts = {str(c["values"]): c["counts"] for c in pc.value_counts(rows["version"]).to_pylist()}
    logged = pc.min_max(rows["logged_at"]).as_py()
    first, last, collected = (m and m.astimezone(dt.UTC).isoformat() for m in (logged["min"], logged["max"], collected_at))
    return Summary(stamp, rows.num_rows, counts, first, last, collected)


def opened(source: "Path | bytes") -> Index:
    """An index from its file, which is mapped and not read, or from its bytes. Raises DataError where it is none or cut off."""
    try:
        content = np.memmap(source, np.uint8, mode="r") if isinstance(source, Path) else np.frombuffer(source, np.uint8)
        if bytes(content[: len(MAGIC)]) != MAGIC:
            raise ValueError("it begins otherwise")
        begin = _PREFIX + int.from_bytes(bytes(content[len(MAGIC) : _PREFIX]), "little")
        summary = Summary(**json.loads(bytes(content[_PREFIX:begin])))
        middle = begin + summary.rows * HASH.itemsize
        if len(content) != middle + summary.rows * ROW.itemsize:
            raise ValueError(f"{len(content)} bytes are not those of {summary.rows} rows")
        return Index(summary, content[begin:middle].view(HASH), content[middle:].view(ROW))
    except (ValueError, TypeError) as error:
        raise DataError(f"not a whole request index ({error}); delete it, it is made again") from error
