"""`mlops`: the platform from a terminal. Heavy modules are imported inside the commands, so that `--help` answers at once."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

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
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the summary to this file.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an earlier demo and begin anew.")] = False,
    through: Annotated[str, typer.Option("--through", help="Last day of the replay at the latest (YYYY-MM-DD).")] = "2013-06-30",
) -> None:
    """Carry `flight_delay` through its whole life on real data: ingest, train, approve, deploy, replay, retrain, replace."""
    from mlops_dagster import demo as demonstration

    demonstration.run(home(), json_file=json_file, restart=restart, through=through)


@app.command()
def up(
    dagster_port: Annotated[int, typer.Option(help="Port of the Dagster UI.")] = 3001,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow UI.")] = 5000,
    evidently_port: Annotated[int, typer.Option(help="Port of the Evidently UI.")] = 8001,
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
    from mlops_dagster.requests import ask

    text = Path(instances[1:]).read_text() if instances.startswith("@") else instances
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f'not JSON ({error}); give one row such as {{"origin": "JFK", …}} or a list of rows') from None
    print(json.dumps(ask(resources()["serving"].endpoint(model), model, rows if isinstance(rows, list) else [rows])))


def decided(decision: Any, model: str, number: int, by: str, reason: str) -> None:
    """Record a decision and say what follows from it."""
    import datetime as dt

    from mlops_dagster.assets import approvals
    from mlops_dagster.resources.registry import Approval

    at, opened = dt.datetime.now(dt.UTC), resources()
    version = approvals.decide(opened["registry"], opened["ledger"], model, number, Approval(decision, by, at, reason))
    then = f"; the sensor {model}_rollouts brings it in" if decision == "approved" else ""
    print(f"{model} version {version.number} {decision} by {by}{then}")


def home() -> Path:
    """The state folder, as every child process must see it."""
    from mlops_dagster.profiles import Settings

    root = Settings().root
    os.environ["MLOPS_HOME"] = str(root)
    return root


def resources() -> dict[str, Any]:
    """The profile's resources outside Dagster."""
    from mlops_dagster.profiles import Settings, embedded

    home()
    return embedded(Settings())


def main() -> None:
    """The console command: an error of ours is one clear paragraph, not a traceback."""
    try:
        app()
    except MlopsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
