"""Where the stages of a model lie in the lake, and the manifests that connect the unpartitioned ones."""

import datetime as dt
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from mlops_dagster.core.errors import NotFoundError, TerminalError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.lineage import quarantine
from mlops_dagster.resources.data_lake import Lake


def day_key(spec: ModelSpec, stage: str, day: dt.date, table: str | None = None, suffix: str = "parquet") -> str:
    """The key of one day of a stage, or of one of its tables."""
    folder = f"{spec.name}/{stage}/{table}" if table else f"{spec.name}/{stage}"
    return f"{folder}/{day.isoformat()}.{suffix}"


def stored_days(lake: Lake, spec: ModelSpec, stage: str, table: str | None = None, suffix: str = "parquet") -> list[dt.date]:
    """The days of a stage that the lake has, in order; of validated data only those that are not in quarantine."""
    prefix = f"{spec.name}/{stage}/{table}/" if table else f"{spec.name}/{stage}/"
    names = (k.removeprefix(prefix) for k in lake.list(prefix))
    stored = {dt.date.fromisoformat(n.removesuffix(f".{suffix}")) for n in names if n.endswith(f".{suffix}") and "/" not in n}
    return sorted(stored - quarantine.days(lake, spec.name) if stage == "validated_data" else stored)


def tables(lake: Lake, spec: ModelSpec, stage: str = "validated_data") -> list[str]:
    """The names of a model's tables, the main one first, as the raw data stage recorded them."""
    try:
        return json.loads(lake.read_bytes(f"{spec.name}/raw_data/tables.json"))
    except NotFoundError:
        raise NotFoundError(f"{spec.name} has no raw data yet; materialize {spec.name}/raw_data for at least one day") from None


def day_range(first: dt.date, last: dt.date) -> list[dt.date]:
    """Every day from first to last, both included."""
    return [first + dt.timedelta(days=i) for i in range((last - first).days + 1)]


def digest_of(parts: Iterable[str]) -> str:
    """SHA-256 (hex) over strings, one to a line."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def canonical(content: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys, the same bytes for the same content."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str).encode()


def write_manifest(lake: Lake, spec: ModelSpec, stage: str, content: Mapping[str, Any]) -> str:
    """Store what a stage made as `<model>/<stage>/current.json`; returns its digest, the stage's data version."""
    data = canonical(content)
    lake.write_bytes(f"{spec.name}/{stage}/current.json", data)
    return hashlib.sha256(data).hexdigest()


def read_manifest(lake: Lake, spec: ModelSpec, stage: str) -> dict[str, Any]:
    """What a stage made last. Raises NotFoundError where it has not run yet."""
    try:
        return json.loads(lake.read_bytes(f"{spec.name}/{stage}/current.json"))
    except NotFoundError:
        raise NotFoundError(f"{spec.name}/{stage} has not been made yet; materialize it first") from None


def require_same(field: str, stage: str, left: Mapping[str, Any], other_stage: str, right: Mapping[str, Any]) -> None:
    """Refuse to join two stages that were made from different inputs. Raises TerminalError."""
    if left[field] != right[field]:
        raise TerminalError(
            f"{stage} belongs to {field} {str(left[field])[:12]}, {other_stage} to {str(right[field])[:12]}; materialize {stage} again"
        )
