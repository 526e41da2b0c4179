"""A person's decision about a version as a job, so that it can be taken in the Dagster UI."""

import datetime as dt
from enum import StrEnum

import dagster as dg
from pydantic import Field

from mlops_dagster.assets import approvals
from mlops_dagster.core.errors import MlopsError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.registry import APPROVED, REJECTED, Approval

RESOURCES = {"ledger", "registry"}


class Choice(StrEnum):
    """The two decisions."""

    approved = APPROVED
    rejected = REJECTED


class DecisionConfig(dg.Config):
    """Which version, what was decided, by whom and why."""

    version: int = Field(ge=1, description="The version's number in the registry.")
    by: str = Field(min_length=1, description="Who decides; stays in the registry and in the ledger.")
    decision: Choice = Field(default=Choice.approved, description="`approved`, or `rejected`, which is final.")
    reason: str = Field(default="", description="Why, in a sentence.")


def build(spec: ModelSpec, name: str) -> dg.JobDefinition:
    """The job `name`, which approves or rejects a version of the model."""

    @dg.op(
        name=f"{spec.name}_decide",
        required_resource_keys=RESOURCES,
        description="Record the decision, bound to the version's evidence.",
    )
    def decide(context: dg.OpExecutionContext, config: DecisionConfig) -> None:
        approval = Approval(config.decision.value, config.by.strip() or None, dt.datetime.now(dt.UTC), config.reason)
        registry, ledger = context.resources.registry, context.resources.ledger
        try:
            version = approvals.decide(registry, ledger, spec.name, config.version, approval)
        except MlopsError as error:
            # Trying again cannot help, and the message is all that a person needs.
            raise dg.Failure(str(error), allow_retries=False) from error
        context.log.info(f"version {version.number} of {spec.name} is {config.decision.value} by {config.by}")
        context.add_output_metadata({"version": version.number, "decision": config.decision.value, "mlflow": version.url_path})

    @dg.job(
        name=name,
        description=f"{spec.name}: approve or reject a version (version, by, decision, reason in the Launchpad).",
        tags={"mlops/model": spec.name, "mlops/part": "approve"},
        executor_def=dg.in_process_executor,
    )
    def approve() -> None:
        decide()

    return approve
