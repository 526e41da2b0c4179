"""Feast, imported in half the time."""

import sys
from collections.abc import Callable
from typing import Any


def import_feast() -> None:
    """Import Feast without its argument checks, where it is not imported yet and only what is registered already will be read.

    Feast decorates its classes with `typeguard.typechecked`, which parses and compiles the source of each again in every process: 3 of
    6 seconds of processor time. The checks help the author of feature views, so nothing that imports those calls this.
    """
    if "feast" in sys.modules:
        return
    import typeguard

    checked = typeguard.typechecked
    typeguard.typechecked = _unchecked  # pyright: ignore[reportAttributeAccessIssue]
    try:
        import feast  # noqa: F401
    finally:
        typeguard.typechecked = checked


def _unchecked(target: Any = None, **options: Any) -> Callable[[Any], Any] | Any:
    return target if target is not None else lambda made: made
