"""`mlops reproduce`: a version made again from the lake as it was, by the same stages, and what came out otherwise."""

import datetime as dt
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops_dagster import rerun
from mlops_dagster.assets import approvals, provenance
from mlops_dagster.assets.lake_paths import canonical
from mlops_dagster.core.errors import DataError, MlopsError, NotFoundError, TerminalError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.lineage import quarantine, training_record
from mlops_dagster.resources.data_lake.folder import FolderLake

if TYPE_CHECKING:
    import pyarrow as pa

LISTED = 10


@dataclass(frozen=True)
class Comparison:
    """One part of a version: what it was, what it is now, and, where they differ, in what."""

    was: str | None
    now: str | None
    differences: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return self.was == self.now


@dataclass(frozen=True)
class Reproduction:
    """How far a version could be made again. `identical`: its data and its metrics have the hashes that they had."""

    model: str
    version: int
    code: Comparison
    environment: Comparison
    data: Comparison
    artifact: Comparison
    metrics: Comparison

    @property
    def identical(self) -> bool:
        return self.data.same and self.metrics.same

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        parts = {k: {**asdict(v), "same": v.same} if isinstance(v, Comparison) else v for k, v in vars(self).items()}
        return {**parts, "identical": self.identical}


def reproduce(
    spec: ModelSpec, module: str, number: int, resources: Mapping[str, Any], tell: Callable[[str], None], keep: Path | None = None
) -> Reproduction:
    """Make a version again in a temporary state folder (`keep`: in this one, which stays).

    Raises NotFoundError for an unknown version, DataError for one that does not say what it was made of, StorageError where its raw
    data cannot be had any more, TerminalError where a stage fails.
    """
    version = approvals.find(resources["registry"], spec.name, number)
    evidence = version.evidence
    if missing := [name for name in ("dvc_commit", "training_set", "training_set_key", "last_day") if not evidence.get(name)]:
        raise DataError(
            f"version {number} of {spec.name} does not say its {', '.join(missing)}, so it cannot be made again; train a new one"
        )
    lake, versions = resources["data_lake"], resources["data_versions"]
    code = _listed(lake, spec, evidence.get("code"), provenance.code_listing(spec))
    environment = _listed(lake, spec, evidence.get("lock"), provenance.environment_listing())
    for name, part in (("code", code), ("environment", environment)):
        if not part.same:
            tell(f"the {name} is not the one of version {number}: {_few(part.differences)}; going on")
    commit = str(evidence["dvc_commit"])
    with _folder(keep) as root:
        order = restore(spec, module, evidence, lake, versions, commit, root)
        tell(f"restored {len(order.validated)} days of raw data as of revision {commit[:10]}; running the stages again")
        made = run(root)
        rebuilt = FolderLake(root=str(root / "lake")).read(made["training_set"]["key"])
    was = {"candidate": evidence.get("metrics"), "baseline": evidence.get("baseline")}
    now = {name: made["evaluation"][name] for name in was}
    data = Comparison(str(evidence["training_set"]), made["training_set"]["training_set"])
    if not data.same:
        original = _original(versions, str(evidence["training_set_key"]), commit)
        data = Comparison(data.was, data.now, (*_inputs(lake, spec, number, evidence, made), *_rows(original, rebuilt)))
    return Reproduction(
        spec.name,
        number,
        code,
        environment,
        data,
        Comparison(version.digest, made["trained_model"]["digest"]),
        Comparison(_hash(was), _hash(now), tuple(_metrics(was, now))),
    )


def restore(
    spec: ModelSpec, module: str, evidence: Mapping[str, Any], lake: Any, versions: Any, commit: str, root: Path
) -> rerun.Order:
    """Put the raw partitions of a revision into an empty state folder's lake, with the order of what to make of them."""
    through, fresh = dt.date.fromisoformat(str(evidence["last_day"])), FolderLake(root=str(root / "lake"))
    stages = {stage: versions.contents(f"{spec.name}/{stage}/", commit) for stage in ("raw_data", "validated_data", "features")}
    had = {
        s: sorted({d for k in keys if (d := k.rpartition("/")[2].partition(".")[0]) <= through.isoformat()})
        for s, keys in stages.items()
    }
    if not had["raw_data"] or not had["validated_data"]:
        raise NotFoundError(
            f"revision {commit[:10]} has no raw data of {spec.name} up to {through}; see `mlops data log {spec.name}`"
        )
    out, used = quarantine.manifest_key(spec.name), _used(lake, spec, evidence)
    for key in [*stages["raw_data"], *(k for k in versions.contents(out, commit) if k == out)]:
        # A correction may have been recorded before the training set was, and its validation not yet.
        corrected = key in used and used[key] != stages["raw_data"].get(key)
        revision = _revision_with(versions, key, used[key]) if corrected else commit
        fresh.write_bytes(key, versions.restore(key, revision).read_bytes())
    fresh.write_bytes(f"{spec.name}/raw_data/tables.json", lake.read_bytes(f"{spec.name}/raw_data/tables.json"))
    parameters: Any = evidence.get("parameters") or {}
    order = rerun.Order(spec.name, module, had["validated_data"], had["features"], through.isoformat(), parameters)
    (root / rerun.ORDER).write_text(json.dumps(asdict(order)))
    return order


def _used(lake: Any, spec: ModelSpec, evidence: Mapping[str, Any]) -> Mapping[str, str]:
    """Key -> MD5 of the raw partitions that a training set was made of; empty where the lake has no record of it."""
    try:
        return training_record.of_version(lake, spec.name, "", evidence).raw_data
    except NotFoundError:
        return {}


def _revision_with(versions: Any, key: str, md5: str) -> str:
    """The newest revision that gave a key this content. Raises NotFoundError."""
    found = next((r.commit for r in versions.history(key) if r.files.get(key) == md5), None)
    if found is None:
        raise NotFoundError(f"{key}: its history has no content {md5}, which the training set was made of; see `mlops data log`")
    return found


def run(root: Path) -> dict[str, Any]:
    """Run the stages in a process of their own, so that no setting of this one reaches them. Raises TerminalError."""
    from mlops_dagster.profiles import Settings

    ours = {"DAGSTER_HOME", *(f"MLOPS_{name.upper()}" for name in Settings.model_fields)}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", rerun.__name__],
        env={**kept, "MLOPS_HOME": str(root)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0 or not (root / rerun.MADE).is_file():
        raise TerminalError(f"the stages could not be run again: {done.stderr.strip()[-2000:] or f'exit code {done.returncode}'}")
    return json.loads((root / rerun.MADE).read_text())


class _folder:
    """The state folder of a reproduction: temporary, or one that stays. Raises DataError where that is not empty."""

    def __init__(self, keep: Path | None) -> None:
        self.keep = keep
        if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise DataError(f"--keep {keep}: not an empty folder; give a new one")

    def __enter__(self) -> Path:
        if self.keep is not None:
            try:
                self.keep.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"--keep {self.keep}: it cannot be made ({error.strerror}); give a new folder") from None
        self.root = self.keep.absolute() if self.keep else Path(tempfile.mkdtemp(prefix="mlops-reproduce-"))
        return self.root

    def __exit__(self, *error: object) -> None:
        if self.keep is None:
            shutil.rmtree(self.root, ignore_errors=True)


def _listed(lake: Any, spec: ModelSpec, was: Any, listing: str) -> Comparison:
    """Code or environment as a digest, with the lines of their listings that differ."""
    now = provenance.digest(listing)
    if was == now:
        return Comparison(was, now)
    try:
        before = lake.read_bytes(provenance.listing_key(spec.name, str(was))).decode().splitlines()
    except MlopsError:
        return Comparison(was, now, ("only its digest was recorded",))
    return Comparison(was, now, tuple(_lines(before, listing.splitlines())))


def _lines(before: list[str], after: list[str]) -> list[str]:
    """What differs between two listings of `name==version` or `hash  name` lines, by name."""
    old, new = ({name: value for name, value in map(_named, lines)} for lines in (before, after))
    told = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            told.append(f"{name} {old.get(name, 'absent')} → {new.get(name, 'absent')}")
    return told


def _named(line: str) -> tuple[str, str]:
    if "==" in line:
        name, _, value = line.partition("==")
        return name, value
    value, _, name = line.partition("  ")
    return name, value[:12]


def _inputs(lake: Any, spec: ModelSpec, number: int, evidence: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """The feature views whose SQL or whose values differ, and the days that one of both lacks."""
    try:
        was = training_record.of_version(lake, spec.name, str(number), evidence)
    except MlopsError as error:
        return [str(error)]
    now: dict[str, Any] = made["record"]
    told = [f"day {day}: only {'then' if day in was.days else 'now'}" for day in sorted({*was.days} ^ {*now["days"]})]
    for view in sorted({*was.views, *now["views"]}):
        before, after = was.views.get(view), now["views"].get(view)
        if before is None or after is None:
            told.append(f"feature view {view}: {'only now' if before is None else 'no longer there'}")
            continue
        for part in ("definition", "data"):
            if getattr(before, part) != after[part]:
                told.append(f"feature view {view}: another {'SQL' if part == 'definition' else 'content of its partitions'}")
    return told


def _original(versions: Any, key: str, commit: str) -> "pa.Table":
    import pyarrow.parquet as pq

    with pq.ParquetFile(versions.restore(key, commit)) as file:
        return file.read()


def _rows(was: "pa.Table", now: "pa.Table") -> list[str]:
    """In which columns, and in how many rows, two training sets differ."""
    if was.num_rows != now.num_rows or was.column_names != now.column_names:
        columns = sorted({*was.column_names} ^ {*now.column_names})
        return [
            f"{was.num_rows} rows became {now.num_rows}" + (f"; columns {', '.join(columns)} are in one only" if columns else "")
        ]
    import polars as pl

    before, after = pl.DataFrame(was), pl.DataFrame(now)
    found = {name: int(before[name].ne_missing(after[name]).sum()) for name in before.columns}
    return [f"column {name}: {rows} of {was.num_rows} rows differ" for name, rows in found.items() if rows]


def _metrics(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    told = []
    for who in was:
        before, after = was[who] or {}, now[who] or {}
        names = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
        told += [f"{who} {name}: {before.get(name)} → {after.get(name)}" for name in names]
    return told


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(content)).hexdigest()


def _few(texts: tuple[str, ...]) -> str:
    more = f" and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return "; ".join(texts[:LISTED]) + more


def show(found: Reproduction) -> str:
    """The outcome for people: a line for each part, and what differs."""
    lines = []
    for name in ("code", "environment", "data", "artifact", "metrics"):
        part: Comparison = getattr(found, name)
        lines.append(f"{name:<12}{f'identical  {part.now}' if part.same else f'DIFFERENT  {part.was} → {part.now}'}")
        lines += [f"            {text}" for text in part.differences[:LISTED]]
    verdict = "is reproduced: data and metrics have the same hashes" if found.identical else "is NOT reproduced"
    return "\n".join([*lines, f"version {found.version} of {found.model} {verdict}"])
