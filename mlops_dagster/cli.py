"""`mlops`: the platform from a terminal. Heavy modules are imported inside the commands, so that `--help` answers at once."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from mlops_dagster import cli_answers, cli_data, cli_keys, cli_lineage, cli_values
from mlops_dagster.core.errors import MlopsError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Carry declared models from raw data to a watched deployment.",
)

Model = Annotated[str, typer.Argument(help="The model's name (its folder under defs/).")]
VersionNumber = Annotated[int, typer.Argument(help="The version's number in the registry.", min=1)]
By = Annotated[str, typer.Option("--by", help="Who decides; stays in the registry and in the ledger.")]
Reason = Annotated[str, typer.Option("--reason", help="Why, in a sentence.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def demo(
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the summary to this file.", parser=cli_values.new_file, metavar="FILE"),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an earlier demo and begin anew.")] = False,
    through: Annotated[
        str, typer.Option("--through", help="Last day of the replay at the latest.", parser=cli_values.day, metavar="YYYY-MM-DD")
    ] = "2013-06-30",
) -> None:
    """Carry `flight_delay` through its whole life on real data: ingest, train, approve, deploy, replay, retrain, replace."""
    from mlops_dagster import demo as demonstration

    demonstration.run(home(), json_file=json_file, restart=restart, through=through)


@app.command()
def up(
    dagster_port: Annotated[int, typer.Option(help="Port of the Dagster UI.", min=1, max=65535)] = 3001,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow UI.", min=1, max=65535)] = 5000,
    evidently_port: Annotated[int, typer.Option(help="Port of the Evidently UI.", min=1, max=65535)] = 8001,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Open the Dagster UI and daemon, the MLflow and Evidently UIs and the model servers, until Ctrl-C."""
    from mlops_dagster import processes

    raise typer.Exit(processes.up(home(), host, {"dagster": dagster_port, "mlflow": mlflow_port, "evidently": evidently_port}))


@app.command()
def status(as_json: AsJson = False) -> None:
    """What is registered, approved, live and last decided, for every model."""
    from mlops_dagster import status as report

    found = report.collect(resources())
    print(json.dumps(found, indent=2, default=str)) if as_json else report.show(found)


@app.command()
def approve(model: Model, version: VersionNumber, by: By, reason: Reason = "") -> None:
    """Approve a version, bound to the evidence that it has now; the rollout sensor then brings it in."""
    decided("approved", model, version, by, reason)


@app.command()
def reject(model: Model, version: VersionNumber, by: By, reason: Reason = "") -> None:
    """Reject a version; it can never be approved afterwards."""
    decided("rejected", model, version, by, reason)


@app.command()
def predict(
    model: Model,
    instances: Annotated[str, typer.Argument(help="JSON: one row, a list of rows, or @FILE.")],
) -> None:
    """Ask the deployed version, through the gateway, as a client would."""
    from mlops_dagster.requests import client_of

    rows = cli_values.rows(instances, "instances")
    print(json.dumps(client_of(resources()["serving"], model).predict(model, rows)))


rollouts = typer.Typer(no_args_is_help=True, help="Steer the rollout of a version.")
app.add_typer(rollouts, name="rollout")
ledger_commands = typer.Typer(no_args_is_help=True, help="Every decision: read it, verify it.")
app.add_typer(ledger_commands, name="ledger")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_keys.app, name="keys")
app.registered_commands += cli_lineage.app.registered_commands


@rollouts.command()
def start(
    model: Model,
    number: Annotated[int, typer.Option("--version", help="Bring in this approved version, also once more.")] = 0,
) -> None:
    """Begin the rollout of the newest approved version (the sensor does the same), or of the one that is named."""
    import datetime as dt

    from mlops_dagster.assets import rollout
    from mlops_dagster.core.errors import RolloutError

    now, parts, spec = dt.datetime.now(dt.UTC), opened_parts(), declared_spec(model)
    version = rollout.chosen(parts, spec, number, now) if number else rollout.waiting(parts, spec, now)
    if version is None:
        raise RolloutError(
            f"{model} has no approved version that is newer than its champion and was not rolled out yet; see `mlops status`, or "
            "name the version to bring in once more: --version"
        )
    print(told(rollout.start(parts, spec, version, now, again=bool(number))))


@rollouts.command()
def pause(model: Model, by: By, reason: Reason = "") -> None:
    """Leave weights as they are until `resume`."""
    steer("pause", model, by, reason)


@rollouts.command()
def resume(model: Model, by: By, reason: Reason = "") -> None:
    """Go on after a pause or a hold."""
    steer("resume", model, by, reason)


@rollouts.command()
def promote(model: Model, by: By, reason: Reason = "") -> None:
    """Give the new version all traffic without waiting for a verdict; once more during the watch makes it champion."""
    steer("promote", model, by, reason)


@rollouts.command()
def abort(model: Model, by: By, reason: Reason = "") -> None:
    """Give up the running rollout; the champion serves on."""
    steer("abort", model, by, reason)


@app.command()
def rollback(
    model: Model,
    by: By,
    reason: Reason = "",
    leave: Annotated[str, typer.Option("--from", help="The version to be undone; needed where a rollout failed after it.")] = "",
) -> None:
    """Back to the version before: ends a running rollout, or undoes the last promotion."""
    import datetime as dt

    from mlops_dagster.assets import rollout
    from mlops_dagster.core.rollout import Command

    wanted, now = Command("rollback", by, reason), dt.datetime.now(dt.UTC)
    print(told(rollout.roll_back(opened_parts(), declared_spec(model), wanted, now, leave or None)))


@app.command()
def live(
    model: Model,
    at: Annotated[
        Any,
        typer.Option(
            "--at",
            help="Moment (ISO 8601, UTC where no zone is given); default: now.",
            parser=cli_values.moment,
            metavar="MOMENT",
        ),
    ] = None,
) -> None:
    """Which versions answered at a moment, with their shares, since when and why, and what made the champion the champion."""
    import datetime as dt

    from mlops_dagster.core.ledger import live_at

    moment = at or dt.datetime.now(dt.UTC)
    found = live_at(entries_of(model), model, moment)
    print(cli_answers.live(found) if found else f"nothing of {model} was live at {moment.isoformat()}")


@ledger_commands.command()
def show(
    model: Annotated[str, typer.Argument(help="Only this model's entries.")] = "",
    as_json: AsJson = False,
) -> None:
    """Print the entries in order."""
    entries = entries_of(model) if model else resources()["ledger"].entries()
    for e in entries:
        row = {
            "sequence": e.sequence,
            "time": e.time_iso,
            "model": e.model,
            "kind": e.kind,
            "subject": e.subject,
            "by": e.actor,
            "why": e.reason,
        }
        print(json.dumps({**row, "evidence": e.evidence, "hash": e.hash}) if as_json else "  ".join(str(v) for v in row.values()))


@ledger_commands.command()
def verify() -> None:
    """Check the chain of hashes; exit code 1 where an entry was changed, removed or inserted."""
    ledger = resources()["ledger"]
    broken = ledger.verify()
    if broken is not None:
        print(f"BROKEN at {broken}", file=sys.stderr)
        raise typer.Exit(1)
    head = ledger.head()
    print(f"{head.sequence if head else 0} entries, the chain is whole" + (f"; head {head.hash}" if head else ""))


def steer(name: str, model: str, by: str, reason: str) -> None:
    """Give a command to the running rollout. Raises RolloutError where it is refused."""
    import datetime as dt

    from mlops_dagster.assets import rollout
    from mlops_dagster.core.rollout import Command

    print(told(rollout.command(opened_parts(), declared_spec(model), Command(name, by, reason), dt.datetime.now(dt.UTC))))


def told(found: Any) -> str:
    """What a command led to. Raises RolloutError for one that was refused or that had nothing to act on."""
    from mlops_dagster.core.errors import RolloutError

    if found is None:
        raise RolloutError("there has been no rollout of this model yet; approve a version first")
    if found.action.refused:
        raise RolloutError(found.action.reason)
    weights = found.state.routes.to_json()["weights"] if found.state.routes else []
    shares = ", ".join(f"version {w['arm']}: {w['percent']:g} %" for w in weights)
    return f"{found.state.model}: {found.state.phase}: {found.state.reason} ({shares or 'no routes yet'})"


def opened_parts() -> Any:
    """The systems that a rollout touches."""
    from types import SimpleNamespace

    from mlops_dagster.assets.rollout import Parts

    return Parts.of(SimpleNamespace(**resources()))


def declared_spec(model: str) -> Any:
    """The declaration of a model of the project in this folder."""
    from mlops_dagster.declared import root_module, spec_of

    sys.path.insert(0, str(Path.cwd()))
    return spec_of(model, root_module(Path.cwd()))


def entries_of(model: str) -> Any:
    """A model's ledger entries in order. Raises NotFoundError, with the models that have some, where it has none."""
    from mlops_dagster.core.errors import NotFoundError

    ledger = resources()["ledger"]
    found = ledger.entries(model)
    if not found:
        known = ", ".join(sorted({entry.model for entry in ledger.entries()})) or "none"
        raise NotFoundError(f"the ledger has no entry of a model {model!r}; it has entries of: {known}")
    return found


def decided(decision: Any, model: str, number: int, by: str, reason: str) -> None:
    """Record a decision and say what follows from it."""
    import datetime as dt

    from mlops_dagster.assets import approvals
    from mlops_dagster.resources.registry import Approval

    asked, opened = Approval(decision, by, dt.datetime.now(dt.UTC), reason), resources()
    version = approvals.decide(opened["registry"], opened["ledger"], model, number, asked)
    print(cli_answers.decision(opened, version, asked))


def home() -> Path:
    """The state folder, as every child process must see it. Raises StorageError where it cannot be made or used; makes nothing yet."""
    from mlops_dagster.core.errors import StorageError

    root = settings().root
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = f"{there} cannot be written" if there.is_dir() else f"{there} is not a directory"
        raise StorageError(
            f"the state folder {root} cannot be made or used ({why}); set MLOPS_HOME to a folder that can be written"
        )
    os.environ["MLOPS_HOME"] = str(root)
    return root


def settings() -> Any:
    """The platform's settings. Raises DeclarationError naming the variable that is wrong."""
    from pydantic import ValidationError

    from mlops_dagster.core.addresses import masked
    from mlops_dagster.core.errors import DeclarationError
    from mlops_dagster.profiles import Settings

    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(("MLOPS", *map(str, first["loc"]))).upper()
        raise DeclarationError(f"{name} is {masked(os.environ.get(name, ''))!r}: {first['msg']}; set it so or unset it") from None


def resources() -> dict[str, Any]:
    """The profile's resources outside Dagster."""
    from mlops_dagster.profiles import embedded

    home()
    return embedded(settings())


def main() -> None:
    """The console command: an error of ours is one clear paragraph, not a traceback."""
    if not sys.warnoptions:
        # Deprecations inside the libraries that are used are nothing a user can act on.
        warnings.simplefilter("ignore")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    try:
        app()
    except MlopsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
