"""What every stage has in common: its key, group, owners, partitions, checks and code references."""

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from mlops_dagster.assets import references
from mlops_dagster.core.spec import ModelSpec


def key(spec: ModelSpec, stage: str) -> dg.AssetKey:
    """The asset key of a stage: `[<model>, <stage>]`."""
    return dg.AssetKey([spec.name, stage])


def partitions(spec: ModelSpec) -> dg.DailyPartitionsDefinition:
    """The days of a model's source."""
    declared = spec.source.partitions
    after_end = declared.end + dt.timedelta(days=1) if declared.end else None
    return dg.DailyPartitionsDefinition(
        start_date=declared.start.isoformat(), end_date=after_end.isoformat() if after_end else None, timezone=declared.timezone
    )


def days(context: dg.AssetExecutionContext) -> list[dt.date]:
    """The days that this run makes: one, or a range in one run."""
    return [dt.date.fromisoformat(k) for k in context.partition_keys]


def check_spec(spec: ModelSpec, stage: str, name: str, description: str, blocking: bool = False) -> dg.AssetCheckSpec:
    """An asset check of a stage; a blocking one stops the stages after it when it fails."""
    return dg.AssetCheckSpec(name, asset=key(spec, stage), description=description, blocking=blocking)


def code_references(spec: ModelSpec, fields: Iterable[str]) -> dict[str, Any]:
    """Metadata that links a stage to the model's own Python."""
    known = dict(references.declared(spec))
    places = [(field, references.locate(field, known[field])) for field in fields if field in known]
    links: list[Any] = [dg.LocalFileCodeReference(file_path=str(p.file), line_number=p.line, label=field) for field, p in places]
    return {"dagster/code_references": dg.CodeReferencesMetadataValue(code_references=links)} if links else {}


def stage(
    spec: ModelSpec,
    name: str,
    *,
    description: str,
    kinds: set[str],
    needs: Sequence[str | dg.AssetDep] = (),
    resources: set[str] = frozenset(),  # type: ignore[assignment]
    partitioned: bool = False,
    checks: Mapping[str, tuple[str, bool]] | None = None,
    code: Sequence[str] = (),
    optional: bool = False,
) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """The decorator of one stage's asset. `checks`: name -> (description, blocking); `needs`: stages of the same model, or
    dependencies with a partition mapping; `code`: fields of the declaration whose Python the stage runs; `optional`: the stage
    may decide to make nothing."""
    return dg.asset(
        key=key(spec, name),
        description=description,
        group_name=spec.name,
        owners=list(spec.owners),
        kinds=kinds,
        tags={"mlops/model": spec.name},
        deps=[need if isinstance(need, dg.AssetDep) else key(spec, need) for need in needs],
        partitions_def=partitions(spec) if partitioned else None,
        backfill_policy=dg.BackfillPolicy.single_run() if partitioned else None,
        check_specs=[check_spec(spec, name, check, text, blocking) for check, (text, blocking) in (checks or {}).items()],
        required_resource_keys=set(resources),
        metadata=code_references(spec, code),
        output_required=not optional,
    )


def check_result(
    name: str, passed: bool, because: str, metadata: Mapping[str, Any] | None = None, warn: bool = False
) -> dg.AssetCheckResult:
    """A check's result with its reason in words; `warn` makes a failure a warning."""
    severity = dg.AssetCheckSeverity.WARN if warn else dg.AssetCheckSeverity.ERROR
    return dg.AssetCheckResult(
        check_name=name, passed=passed, description=because, severity=severity, metadata=dict(metadata or {})
    )
