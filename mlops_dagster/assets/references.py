"""The Python that a declaration names: checked at load without importing it, imported when a stage runs."""

import ast
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.core.spec import ModelSpec

REFERENCES = (
    ("source", "read"),
    ("source", "row_schema"),
    ("features", "define"),
    ("features", "compute"),
    ("training", "train"),
    ("training", "baseline"),
    ("training", "export"),
    ("rollout", "ab_metric"),
)


@dataclass(frozen=True)
class Place:
    """Where a named object is defined."""

    file: Path
    line: int


def declared(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Every reference of a declaration as (field, absolute dotted path)."""
    for section, field in REFERENCES:
        reference = getattr(getattr(spec, section), field)
        if reference is not None and "." in reference:  # without a dot it is one of the platform's own names
            yield f"{section}.{'schema' if field == 'row_schema' else field}", spec.absolute(reference)


def locate(field: str, path: str) -> Place:
    """Find the definition that a dotted path names, without running its module. Raises DeclarationError."""
    module, _, name = path.rpartition(".")
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        raise DeclarationError(
            f"{field}: there is no module {error.name!r} (from {path!r}); create it or correct the path"
        ) from None
    except ImportError as error:
        raise DeclarationError(f"{field}: the package of {module!r} cannot be imported: {error}") from error
    if found is None or not found.origin:
        raise DeclarationError(f"{field}: there is no module {module!r} (from {path!r}); create it or correct the path")
    file = Path(found.origin)
    if file.suffix != ".py":
        return Place(file, 1)
    try:
        names = _defined(ast.parse(file.read_text(encoding="utf-8"), filename=file.name))
    except SyntaxError as error:
        raise DeclarationError(f"{field}: {file.name}, line {error.lineno}: {error.msg}") from None
    if name not in names and "*" not in names:
        public = ", ".join(sorted(n for n in names if not n.startswith("_"))) or "nothing"
        raise DeclarationError(f"{field}: module {module!r} does not define {name!r}; it defines: {public}")
    return Place(file, names.get(name, 1))


def _defined(tree: ast.AST) -> dict[str, int]:
    """Names that a module binds at its top level (also under `if` and `try`), with their lines."""
    names: dict[str, int] = {}
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.setdefault(name, node.lineno)
            case ast.Assign() | ast.AnnAssign():
                bound = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
                names.update({n.id: node.lineno for n in bound if n.id not in names})
            case ast.ImportFrom(names=aliases) | ast.Import(names=aliases):
                names.update({a.asname or a.name: node.lineno for a in aliases})
            case ast.If() | ast.Try() | ast.ExceptHandler() | ast.With():
                names.update({name: line for name, line in _defined(node).items() if name not in names})
    return names


def load(spec: ModelSpec, field: str) -> Any:
    """Import what `section.field` of a declaration names. Raises DeclarationError naming field and cause."""
    path = dict(declared(spec))[field]
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except DeclarationError:
        raise
    except Exception as error:
        raise DeclarationError(f"{field}: {path!r} cannot be imported: {type(error).__name__}: {error}") from error


def load_callable(spec: ModelSpec, field: str) -> Callable[..., Any]:
    """As `load`, for a function. Raises DeclarationError where it cannot be called."""
    found = load(spec, field)
    if not callable(found):
        raise DeclarationError(f"{field}: {dict(declared(spec))[field]!r} is a {type(found).__name__}, not a function")
    return found
