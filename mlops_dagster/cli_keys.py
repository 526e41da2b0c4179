"""`mlops keys`: who may ask a model for predictions."""

import time
from typing import Annotated, Any

import typer

from mlops_dagster.core.errors import ServingError

TAKEN_SECONDS = 10

app = typer.Typer(no_args_is_help=True, help="API keys: who may ask a model. A model that never had one answers everybody.")

Model = Annotated[str, typer.Argument(help="The model's name.")]
Name = Annotated[str, typer.Argument(help="The client's name; it is written to the gateway's access log.")]


@app.command()
def add(model: Model, name: Name) -> None:
    """Make a key for a client and print it, this once; from then on the model answers only clients with a key."""
    import datetime as dt
    import secrets

    from mlops_dagster.resources.serving import client_keys
    from mlops_dagster.resources.serving.start import wake

    folder = _folder(model)
    key = secrets.token_urlsafe(client_keys.KEY_BYTES)
    client_keys.add(folder, model, name, key, dt.datetime.now(dt.UTC))
    wake(folder)
    print(key)


@app.command("list")
def list_(model: Model) -> None:
    """The clients of a model and since when each has its key."""
    from mlops_dagster.resources.serving import client_keys

    found = client_keys.clients(_folder(model), model)
    if not found:
        print(f"{model} asks for no key" if found is None else f"{model} answers nobody: its last key was revoked")
        return
    for name, since in found.items():
        print(f"{name}  {since}")


@app.command()
def revoke(model: Model, name: Name) -> None:
    """Refuse a client's key from now on; without any key left the model answers nobody (see `open`)."""
    from mlops_dagster.resources.serving import client_keys
    from mlops_dagster.resources.serving.start import wake

    folder = _folder(model)
    digest = client_keys.revoke(folder, model, name)
    wake(folder)
    end = time.monotonic() + TAKEN_SECONDS
    while client_keys.is_live(folder, digest):
        if time.monotonic() > end:
            raise ServingError(
                f"the key of {name} is revoked, but the gateway has not taken that after {TAKEN_SECONDS} s and may still accept it: "
                "the serving host does not run; start it with `mlops up`"
            )
        time.sleep(0.05)
    print(f"{model} answers {name} no more")


@app.command("open")
def open_(model: Model) -> None:
    """Forget all keys of a model: it answers everybody again."""
    from mlops_dagster.resources.serving import client_keys
    from mlops_dagster.resources.serving.start import wake

    folder = _folder(model)
    client_keys.open_to_all(folder, model)
    wake(folder)
    print(f"{model} asks for no key any more")


def _folder(model: str) -> Any:
    """The serving host's folder. NotFoundError for a model that is neither registered nor served."""
    from mlops_dagster import cli
    from mlops_dagster.core.errors import NotFoundError
    from mlops_dagster.resources.serving.state import Folder

    found = cli.resources()
    folder = Folder(found["serving"].root)
    if not folder.desired_file(model).exists() and not found["registry"].versions(model):
        raise NotFoundError(f"model {model!r}: no version of it is registered or served; `mlops status` lists the models")
    return folder
