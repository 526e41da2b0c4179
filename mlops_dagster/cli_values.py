"""What is typed for an option or an argument as the value that it stands for; a wrong one is refused by name, before anything runs."""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import typer


def moment(text: str) -> dt.datetime:
    """A moment (ISO 8601; UTC where it names no zone)."""
    try:
        found = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} ({error}); give a moment such as 2013-02-17T12:00 or 2013-02-17T12:00+01:00"
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=dt.UTC)


def day(text: str) -> str:
    """A day, YYYY-MM-DD."""
    try:
        return dt.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} ({error}); give a day such as 2013-06-30") from None


def new_file(text: str) -> Path:
    """A file to be written: the folder that it goes into must be there, because writing comes after all the work."""
    found = Path(text)
    if found.is_dir() or not found.absolute().parent.is_dir():
        raise typer.BadParameter(f"{text!r} cannot be written; name a file in a folder that exists")
    return found


def rows(text: str, name: str) -> list[Any]:
    """Rows to be predicted: JSON of one row or of a list of rows, or @FILE with such JSON; `name` is the argument's."""
    where = ""
    if text.startswith("@"):
        where = f" in {text[1:]!r}"
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(
                f"{text!r}: the file cannot be read ({error.strerror}); give @ and a file of JSON", param_hint=name
            ) from None
        except UnicodeDecodeError:
            raise typer.BadParameter(
                f"{text!r}: the file is not UTF-8 text; give @ and a file of JSON", param_hint=name
            ) from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(
            f'not JSON{where} ({error}); give one row such as {{"origin": "JFK", …}}, a list of rows, or @FILE', param_hint=name
        ) from None
    return found if isinstance(found, list) else [found]
