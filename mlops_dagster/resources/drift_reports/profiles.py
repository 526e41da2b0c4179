"""Profiles of Parquet files of any size, read in bounded memory."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, FileType, LocalFileSystem

from mlops_dagster.core.drift import Profile, Source, slices
from mlops_dagster.core.errors import DataError, NotFoundError, StorageError

BATCH_ROWS = 131_072
READ_BYTES = 1 << 20
"""How much of a column chunk is read at once."""

MOST_BATCH_VALUES = 16_777_216
"""At most so many values (128 MiB of float64) are decoded at once; wide tables get fewer rows per batch."""

CELL_ROWS = 1_048_576
MOST_SKIPPED = 8
MOST_SAMPLED_GROUPS = 64
FEWEST_BATCH_ROWS = 8_192


def profile_parquet(
    paths: str | Sequence[str],
    bins: int = 10,
    *,
    like: Profile | None = None,
    columns: Collection[str] | None = None,
    edges: Mapping[str, Sequence[float]] | None = None,
    categorical: Collection[str] = (),
    top_categories: int = 20,
    filesystem: FileSystem | None = None,
    cells_every: int | None = None,
    threads: int | None = None,
) -> Profile:
    """The profile of all rows of Parquet files: `paths` of files, or of folders with `*.parquet` in them, in that order.

    PSI, Jensen-Shannon, chi-square and moments are exact, of all rows. `cells_every` is by default 1 below two million
    rows; beyond, every k-th row is counted in the cells that Kolmogorov-Smirnov and Wasserstein use, so that a million
    are left, but no more than seven of eight left out.

    Only the profiled columns are read, once, a few row groups' pages at a time. Without `like` the first rows of up to
    64 row groups, evenly spread over all files, are read beforehand to choose the cells (not the counts, which are of
    all rows). `filesystem` is pyarrow's (S3FileSystem ...), by default the local one; the rest as in `Profile.of`.

    Raises NotFoundError for a path that is not there or a folder without Parquet files, DataError naming the file that
    is truncated, is not Parquet or lacks a column, StorageError where the storage fails.
    """
    files = parquet_files(paths, filesystem)
    every = max(1, min(MOST_SKIPPED, _row_count(files) // CELL_ROWS)) if cells_every is None else cells_every
    source = parquet_source(files, list(like.columns) if columns is None and like is not None else columns)
    return Profile.of(
        source,
        bins,
        like=like,
        columns=columns,
        edges=edges,
        categorical=categorical,
        top_categories=top_categories,
        cells_every=every,
        threads=threads,
    )


def slice_parquet(
    paths: str | Sequence[str], by: str, *, like: Profile, filesystem: FileSystem | None = None, threads: int | None = None
) -> dict[str, Profile]:
    """A profile for each value of the column `by`, in the cells of `like`; files and errors as in `profile_parquet`,
    slices as in `slices`.
    """
    names = [*like.columns, *(() if by in like.columns else (by,))]
    return slices(parquet_source(parquet_files(paths, filesystem), names), by, like=like, threads=threads)


@dataclass(frozen=True)
class ParquetPath:
    """Where a Parquet file is."""

    filesystem: FileSystem
    path: str


def parquet_files(paths: str | Sequence[str], filesystem: FileSystem | None = None) -> list[ParquetPath]:
    """The files that `paths` name, those of a folder in the order of their names; NotFoundError naming a path that is not
    there or holds none.
    """
    from pyarrow.fs import FileSelector

    storage = filesystem or LocalFileSystem()
    found: list[ParquetPath] = []
    for path in [paths] if isinstance(paths, str) else paths:
        with _named(path):
            info = storage.get_file_info(str(path))
            inside = storage.get_file_info(FileSelector(str(path), recursive=True)) if info.type == FileType.Directory else [info]
        names = sorted(i.path for i in inside if i.type == FileType.File and (i.path.endswith(".parquet") or inside == [info]))
        if not names:
            raise NotFoundError(
                f"There is no Parquet file at {str(path)!r}. Give the path of a file, or of a folder with *.parquet in it."
            )
        found += [ParquetPath(storage, name) for name in names]
    if not found:
        raise NotFoundError("`paths` names no file. Give at least one Parquet file or folder.")
    return found


def parquet_source(files: Sequence[ParquetPath], columns: Collection[str] | None = None) -> Source:
    """The rows of the files as a source that `Profile.of` accepts: streamed, sampled cheaply."""
    wanted = list(columns) if columns is not None else None
    return Source(lambda: _rows(files, wanted), sample=lambda values: _sample(files, wanted, values))


def _row_count(files: Sequence[ParquetPath]) -> int:
    rows = 0
    for file in files:
        with _named(file.path), _opened(file) as reader:
            rows += reader.metadata.num_rows
    return rows


def _rows(files: Sequence[ParquetPath], columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    for file in files:
        with _named(file.path), _opened(file) as reader:
            yield from reader.iter_batches(_batch_rows(reader, columns), columns=_there(reader, columns), use_threads=True)
            if not reader.metadata.num_rows:
                yield _empty(reader, columns)


def _sample(files: Sequence[ParquetPath], columns: list[str] | None, values: int) -> Iterator[pa.RecordBatch]:
    """The first rows of evenly spread row groups, at most `values` values together."""
    groups: list[tuple[ParquetPath, int]] = []
    for file in files:
        with _named(file.path), _opened(file) as reader:
            groups += [(file, g) for g in range(reader.num_row_groups)]
            width = len(_there(reader, columns) or reader.schema_arrow.names)
            empty = _empty(reader, columns)
    count = min(len(groups), MOST_SAMPLED_GROUPS)
    if not count:
        yield empty
    for at in range(count):
        file, group = groups[at * len(groups) // count]
        with _named(file.path), _opened(file) as reader:
            rows = max(1, min(1_048_576, values // width) // count)
            taken = next(reader.iter_batches(rows, row_groups=[group], columns=_there(reader, columns)), None)
            yield empty if taken is None else taken


def _empty(reader: pq.ParquetFile, columns: list[str] | None) -> pa.RecordBatch:
    schema = reader.schema_arrow
    return pa.RecordBatch.from_pylist([], schema if columns is None else pa.schema([schema.field(c) for c in columns]))


def _batch_rows(reader: pq.ParquetFile, columns: list[str] | None) -> int:
    width = max(1, len(columns) if columns is not None else len(reader.schema_arrow.names))
    return max(FEWEST_BATCH_ROWS, min(BATCH_ROWS, MOST_BATCH_VALUES // width))


def _there(reader: pq.ParquetFile, columns: list[str] | None) -> list[str] | None:
    names = reader.schema_arrow.names
    for column in columns or ():
        if column not in names:
            raise DataError(f"column {column!r} is not there; there are {', '.join(names)}. Add it, or profile other columns.")
    return columns


@contextmanager
def _opened(file: ParquetPath) -> Iterator[pq.ParquetFile]:
    # Left to its default, pre_buffer keeps every row group that was read: all of the file at the end.
    with pq.ParquetFile(file.path, filesystem=file.filesystem, pre_buffer=False, buffer_size=READ_BYTES) as reader:
        yield reader


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Every error says which file it is about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise NotFoundError(f"There is no file at {path!r}. Give the path of a Parquet file.") from error
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}. It may be truncated: write it again.") from error
    except OSError as error:
        corrupt = error.errno is None  # The storage gives a number; the decoder of the format does not.
        raise (DataError if corrupt else StorageError)(
            f"{path} cannot be read: {error}. Check the file and its storage."
        ) from error
