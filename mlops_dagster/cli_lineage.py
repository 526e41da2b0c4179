"""`mlops trace`, `affected`, `quarantine` and `reproduce`: from a prediction back to its bytes, and from bytes to what they touched."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()

Model = Annotated[str, typer.Argument(help="The model's name (its folder under defs/).")]
OneModel = Annotated[str | None, typer.Option("--model", help="Look only at this model.")]
Partition = Annotated[str, typer.Argument(metavar="raw_data/DAY", help="A raw partition, such as raw_data/2013-02-17.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def trace(
    request_id: Annotated[str, typer.Argument(help="The request's x-request-id, or the `id` of its answer.")],
    model: OneModel = None,
    as_json: AsJson = False,
) -> None:
    """What is behind a prediction: version, approval, evaluation, training set, raw partitions, code, environment."""
    from mlops_dagster.lineage import trace as tracing

    found = tracing.trace(places(), request_id, model)
    print(tracing.as_json(found) if as_json else tracing.show(found))


@app.command()
def affected(partition: Partition, model: OneModel = None, as_json: AsJson = False) -> None:
    """What a raw partition touched: training sets, versions, deployments, predictions; and what to do if it was bad."""
    from mlops_dagster.lineage import affected as effects

    day, resources = effects.day_of(partition), _resources()
    looked_at = [model] if model else places().models()
    found = [s for name in looked_at if (s := _spread(resources, name, day)) is not None]
    if not found:
        raise effects.unknown(looked_at, f"raw_data/{day}")
    if as_json:
        print(json.dumps([s.to_json() for s in found], indent=2, default=str))
        return
    for one in found:
        _show(one)


@app.command()
def quarantine(
    model: Model,
    partition: Partition,
    by: Annotated[str, typer.Option("--by", help="Who decides; stays in the ledger.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, in a sentence.")] = "",
    undo: Annotated[bool, typer.Option("--undo", help="Take the partition back in.")] = False,
) -> None:
    """Take a raw partition out: training sets skip it and features are made without it. Says what is to be done then."""
    import datetime as dt

    from mlops_dagster.cli import declared_spec
    from mlops_dagster.lineage import quarantine as decisions
    from mlops_dagster.lineage.affected import day_of

    day, spec, resources = day_of(partition), declared_spec(model), _resources()
    decide = decisions.lift if undo else decisions.impose
    decision = decisions.Decision(by, reason, dt.datetime.now(dt.UTC))
    change = decide(spec, resources["data_lake"], resources["data_versions"], resources["ledger"], day, decision)
    state = "back in" if undo else "in quarantine"
    already = "" if change.changed else " already"
    print(f"raw_data/{day} of {model} is {state}{already} (ledger entry {change.entry.sequence}, by {change.entry.actor})")
    if change.recompute:
        first, last = change.recompute[0], change.recompute[-1]
        print(f"materialize {model}/features again for {len(change.recompute)} days, {first} … {last}")
    found = None if undo else _spread(resources, model, day)
    for text in found.advice if found else ():
        print(text)


@app.command()
def reproduce(
    model: Model,
    version: Annotated[int, typer.Argument(help="The version's number in the registry.", min=1)],
    as_json: AsJson = False,
    keep: Annotated[Path | None, typer.Option("--keep", help="Make it in this new folder and leave it there.")] = None,
) -> None:
    """Make a version again from the lake as it was; exit code 1 where data or metrics come out otherwise."""
    import sys

    from mlops_dagster import reproduce as again
    from mlops_dagster.cli import declared_spec
    from mlops_dagster.declared import root_module

    spec = declared_spec(model)
    found = again.reproduce(
        spec, root_module(Path.cwd()), version, _resources(), lambda text: print(text, file=sys.stderr, flush=True), keep
    )
    print(json.dumps(found.to_json(), indent=2) if as_json else again.show(found))
    if not found.identical:
        raise typer.Exit(1)


def places() -> Any:
    """Where a trace looks; of the embedded profile without loading what writes it."""
    from mlops_dagster import cli
    from mlops_dagster.lineage.places import Places

    settings = cli.settings()
    if settings.profile == "embedded" and settings.lake_url is None:
        return Places.embedded(settings.root, settings.ledger_url, lambda: _resources()["data_lake"])
    return Places.of(_resources())


def _resources() -> dict[str, Any]:
    from mlops_dagster.cli import resources

    return resources()


def _spread(resources: dict[str, Any], model: str, day: Any) -> Any:
    """What a day touched; the look-back is the declaration's where the model is declared here, else the newest training set's."""
    from mlops_dagster.cli import declared_spec
    from mlops_dagster.core.errors import MlopsError
    from mlops_dagster.core.spec import Features
    from mlops_dagster.lineage import affected as effects
    from mlops_dagster.lineage import training_record

    lake = resources["data_lake"]
    try:
        lookback = declared_spec(model).features.lookback_days
    except MlopsError:
        known = [training_record.load(lake, key) for key in lake.list(f"{model}/{training_record.FOLDER}/")]
        lookback = max((r.lookback_days for r in known), default=Features.model_fields["lookback_days"].default)
    registered = resources["registry"].versions(model)
    return effects.spread(places(), lake, resources["data_versions"], registered, model, day, lookback)


def _show(found: Any) -> None:
    out = f"IN QUARANTINE (by {found.quarantined['by']}: {found.quarantined['reason']})" if found.quarantined else ""
    print(f"{found.model}: {found.partition} {out}".rstrip())
    for p in found.partitions:
        changes = f", {len(p['revisions'])} revisions" if len(p["revisions"]) > 1 else ""
        print(f"  {'raw data':<13}{p['md5'] or 'no longer in the lake'}  {p['key']}{changes}")
    first, last = found.row_days
    print(
        f"  {'features':<13}computed from it: days {' … '.join(found.feature_days)}; carried by rows of {first} … {last or 'now'}"
    )
    for t in found.training_sets:
        stale = ", with other content than it has now" if t["same_as_now"] is False else ""
        kept = f", {t['rows_carrying_it']} rows with features that nothing had replaced" if t["rows_carrying_it"] else ""
        print(f"  {'training set':<13}{t['training_set']}, {t['first_day']} … {t['last_day']}{stale}{kept}")
    for v in found.versions:
        print(
            f"  {'version':<13}{v['version']}, {v['decision'] or 'not decided'}{', ' + ', '.join(v['aliases']) if v['aliases'] else ''}"
        )
    for d in found.deployments:
        print(
            f"  {'deployment':<13}version {d['version']}, {d['since']} … {d['until'] or 'now'} (ledger entry {d['entry']}, {d['kind']})"
        )
    for p in found.predictions:
        kept = f", at most {p['may_carry_it']} with such that nothing had replaced" if p["may_carry_it"] else ""
        print(
            f"  {'predictions':<13}{p['day']}: {p['trained_on_it']} by a version trained on it, {p['featured_by_it']} with features of its "
            f"days{kept}"
        )
    for text in found.advice:
        print(f"  {'to do':<13}{text}")
