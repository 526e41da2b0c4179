"""The models that a project declares, read from their YAML without loading Dagster."""

import importlib.util
import tomllib
from pathlib import Path

from mlops_dagster.core.errors import DeclarationError, NotFoundError
from mlops_dagster.core.spec import ModelSpec


def root_module(folder: Path) -> str:
    """The Python package of the dg project that a folder belongs to; this package where there is none."""
    for parent in (folder, *folder.parents):
        file = parent / "pyproject.toml"
        if file.is_file():
            settings = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {}).get("dg", {}).get("project", {})
            if "root_module" in settings:
                return str(settings["root_module"])
    return "mlops_dagster"


def spec_of(model: str, module: str) -> ModelSpec:
    """The declaration of a model in the `defs` of a package. Raises NotFoundError listing the models there are, or DeclarationError."""
    import yaml
    from pydantic import ValidationError

    found = importlib.util.find_spec(f"{module}.defs")
    if found is None or not found.submodule_search_locations:
        raise NotFoundError(f"the package {module!r} has no `defs` folder; run this inside the project that declares {model!r}")
    folder = Path(next(iter(found.submodule_search_locations)))
    file = folder / model / "defs.yaml"
    if not file.is_file():
        known = ", ".join(sorted(f.parent.name for f in folder.glob("*/defs.yaml"))) or "none"
        raise NotFoundError(f"{module} declares no model {model!r}; it declares: {known}")
    try:
        attributes = yaml.safe_load(file.read_text(encoding="utf-8"))["attributes"]
        return ModelSpec(name=model, package=f"{module}.defs.{model}", **attributes)
    except (ValidationError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DeclarationError(f"{model}/defs.yaml is wrong; `dg check yaml` says where: {error}") from error
