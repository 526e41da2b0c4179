"""`ModelLifecycle`: the Dagster component that turns a model's YAML into its asset graph."""

import os
from typing import Any

import dagster as dg
from pydantic import BaseModel

from mlops_dagster import assets, profiles, sensors
from mlops_dagster.assets import references
from mlops_dagster.core.spec import ModelDeclaration, ModelSpec
from mlops_dagster.scaffold import ModelScaffolder


@dg.scaffold_with(ModelScaffolder)
class ModelLifecycle(dg.Component, ModelDeclaration, dg.Resolvable):
    """Carries one model from raw data to a deployment that is watched, retrained and rolled back.

    The folder that holds the `defs.yaml` names the model; references that begin with a dot start in its Python package.
    """

    @classmethod
    def get_spec(cls) -> dg.ComponentTypeSpec:
        return dg.ComponentTypeSpec(
            description="One model's whole life: data, features, training, evaluation, registry, deployment, monitoring, retraining.",
            tags=["mlops"],
            produces=["asset", "asset_check", "job", "schedule", "sensor"],
        )

    @classmethod
    def model(cls) -> type[BaseModel]:
        """The YAML schema is the declaration itself, so that an error carries its line."""
        return ModelDeclaration

    @classmethod
    def resolve_from_model(cls, context: dg.ResolutionContext, model: BaseModel) -> "ModelLifecycle":
        return cls.model_validate(context.resolve_value(model.model_dump(by_alias=True, exclude_unset=True)))

    def spec(self, name: str, package: str) -> ModelSpec:
        """The declaration with its name and package. Raises DeclarationError for Python that is not there."""
        declared: dict[str, Any] = {
            field: getattr(self, field) for field in ModelDeclaration.model_fields if field in self.model_fields_set
        }
        spec = ModelSpec(name=name, package=package, **declared)
        for field, path in references.declared(spec):
            references.locate(field, path)
        return spec

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        spec = self.spec(os.path.basename(context.path), context.defs_relative_module_name(context.path))
        return dg.Definitions.merge(assets.build(spec), sensors.build(spec), profiles.definitions())
