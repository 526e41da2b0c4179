"""`mlops data`: what the lake held when, and that state again."""

import datetime as dt
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Versions of a model's data: list them, compare them, bring one back.")

Model = Annotated[str, typer.Argument(help="The model's name (its folder under defs/).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
REVISION = (
    "a commit of `mlops data log`, a moment (ISO 8601, UTC where no zone is given), or v3 for the training set of version 3"
)


@app.command()
def log(
    model: Model,
    limit: Annotated[int, typer.Option("--limit", help="How many revisions at most, newest first.", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """The revisions of a model's data, newest first: commit, moment, message, how many files of which stage it changed."""
    revisions = opened()["data_versions"].history(f"{model}/", limit)
    if not revisions:
        raise missing(model)
    rows = [
        {
            "commit": r.commit,
            "at": r.at.isoformat(),
            "message": r.message,
            "files": len(r.files),
            "stages": dict(Counter(key.split("/")[1] for key in r.files)),
        }
        for r in revisions
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        stages = ", ".join(f"{stage} {count}" for stage, count in row["stages"].items())
        print(f"{row['commit'][:10]}  {row['at']}  {row['message']}  ({stages})")


@app.command()
def diff(
    model: Model,
    a: Annotated[str, typer.Argument(metavar="A", help=f"The older revision: {REVISION}.")],
    b: Annotated[str, typer.Argument(metavar="[B]", help="The newer one; default: the newest that is recorded.")] = "",
    as_json: AsJson = False,
) -> None:
    """The files that differ between two revisions."""
    from mlops_dagster.lineage import checkout

    resources = opened()
    old, new = (_contents(resources, model, text) for text in (a, b))
    found = checkout.diff(old, new)
    if as_json:
        rows = [{"change": change, "key": key, "from": old.get(key), "to": new.get(key)} for change, key in found]
        print(json.dumps(rows, indent=2))
        return
    for change, key in found:
        print(f"{change:<8} {key}")
    counted = Counter(change for change, _ in found)
    print(", ".join(f"{count} {change}" for change, count in sorted(counted.items())) or "no difference")


@app.command("checkout")
def check_out(
    model: Model,
    at: Annotated[str, typer.Option("--at", help=f"Which revision: {REVISION}.")] = "",
    version: Annotated[
        int | None, typer.Option("--version", help="The lake as it was for the training set of this version.", min=1)
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Write a copy into this folder; the lake stays as it is.")] = None,
) -> None:
    """Make the lake's tracked files of a model equal to a revision, or copy them into a folder.

    What is replaced is recorded first, so that it can be brought back in the same way. Repeating it changes nothing.
    """
    from mlops_dagster.lineage import checkout

    if bool(at) == (version is not None):
        raise typer.BadParameter("give either --at REVISION or --version V")
    resources = opened()
    revision = named(resources, model, at or f"v{version}")
    if to is not None:
        from mlops_dagster.resources.data_lake.folder import FolderLake

        done = checkout.in_folder(FolderLake(root=str(to.absolute())), resources["data_versions"], model, revision)
        print(f"{to}: {len(done.written)} files written, {done.equal} were there already")
        return
    done = checkout.in_lake(resources["data_lake"], resources["data_versions"], model, revision)
    recorded = f"; recorded as revision {done.commit[:10]}" if done.commit else ""
    print(f"{model}: {len(done.written)} files replaced, {len(done.removed)} removed, {done.equal} were equal already{recorded}")


def opened() -> dict[str, Any]:
    """The profile's resources."""
    from mlops_dagster.cli import resources

    return resources()


def named(resources: dict[str, Any], model: str, text: str) -> str | dt.datetime:
    """The revision that a text names. Raises NotFoundError, or DataError for a version that does not say its revision."""
    from mlops_dagster.core.errors import DataError
    from mlops_dagster.lineage.checkout import revision_named

    def commit_of(number: int) -> str:
        from mlops_dagster.assets.approvals import find

        commit = find(resources["registry"], model, number).evidence.get("dvc_commit")
        if not commit:
            raise DataError(
                f"version {number} of {model} does not say the revision of its training set (evidence dvc_commit); name a commit of "
                f"`mlops data log {model}` or a moment instead"
            )
        return str(commit)

    return revision_named(text, commit_of)


def missing(model: str) -> Exception:
    """The error for a model without recorded data."""
    from mlops_dagster.core.errors import NotFoundError

    return NotFoundError(f"{model} has no recorded data here; materialize {model}/raw_data, or set MLOPS_HOME to where it was")


def _contents(resources: dict[str, Any], model: str, text: str) -> dict[str, str]:
    versions = resources["data_versions"]
    if not versions.history(f"{model}/", 1):
        raise missing(model)
    return versions.contents(f"{model}/", named(resources, model, text) if text else None)
