"""What the model servers logged, read back a day at a time."""

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dagster import ConfigurableResource
from pydantic import Field

if TYPE_CHECKING:
    import pyarrow as pa


class InferenceSegments(Protocol):
    """Every answered row of a model, by the day it stands for."""

    def read(self, model: str, day: dt.date) -> "pa.Table":
        """The rows of a day, each once, in the columns of the inference log; an empty table where there are none."""
        ...

    def read_logged(self, model: str, after: dt.datetime, until: dt.datetime, columns: Sequence[str]) -> "pa.Table":
        """At least these columns of the rows logged after `after` and not after `until`, each once, whatever day they stand for."""
        ...


class FolderSegments(ConfigurableResource):
    """Parquet segments in a folder that the predictors write to."""

    root: str = Field(description="Folder of the segments: `<model>/day=YYYY-MM-DD/*.parquet`.")

    def read(self, model: str, day: dt.date) -> "pa.Table":
        """See InferenceSegments.read."""
        from mlops_dagster.serving.segments import read_segments

        return read_segments(Path(self.root), model, day)

    def read_logged(self, model: str, after: dt.datetime, until: dt.datetime, columns: Sequence[str]) -> "pa.Table":
        """See InferenceSegments.read_logged."""
        from mlops_dagster.serving.segments import read_logged

        return read_logged(self.root, model, after, until, columns)
