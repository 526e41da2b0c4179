"""Stage 8: a version in the registry, only if the gate passed; it then waits for approval."""

import datetime as dt
import tempfile
from pathlib import Path
from typing import Any

import dagster as dg

from mlops_dagster.assets.artifact_files import local_copy
from mlops_dagster.assets.lake_paths import read_manifest, require_same, write_manifest
from mlops_dagster.assets.stage import check_result, stage
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.registry import Approval, Version
from mlops_dagster.serving import artifact

STAGE = "model_version"
CHECKS = {"artifact_digest": ("The registered artifact has the digest of the evaluated one.", True)}


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, model_version]`."""

    @stage(
        spec,
        STAGE,
        description="The evaluated version in the registry as `candidate`; skipped where the gate did not pass.",
        kinds={"mlflow"},
        needs=["evaluation", "trained_model"],
        resources={"data_lake", "registry"},
        checks=CHECKS,
        optional=True,
    )
    def model_version(context: dg.AssetExecutionContext):
        lake: Lake = context.resources.data_lake
        evaluated, model = read_manifest(lake, spec, "evaluation"), read_manifest(lake, spec, "trained_model")
        require_same("digest", f"{spec.name}/evaluation", evaluated, f"{spec.name}/trained_model", model)
        if not evaluated["gate"]["passed"]:
            why = f"nothing was registered, the gate did not pass: {failed_rules(evaluated)}"
            context.log.warning(why)
            yield check_result("artifact_digest", True, why)
            return
        version = register(spec, lake, context.resources.registry, evaluated, model, author=author_of(context))
        with tempfile.TemporaryDirectory() as folder:
            found = artifact.digest(context.resources.registry.fetch(spec.name, version.number, Path(folder) / "model"))
        write_manifest(lake, spec, STAGE, {"version": version.number, "digest": version.digest})
        same = check_result(
            "artifact_digest", found == evaluated["digest"], f"registered {found[:12]}, evaluated {evaluated['digest'][:12]}"
        )
        yield dg.MaterializeResult(
            metadata=_metadata(version), data_version=dg.DataVersion(version.registered_hash), check_results=[same]
        )

    return model_version


def failed_rules(evaluated: dict[str, Any]) -> str:
    """The gate's failed rules in words."""
    rules = [r for r in evaluated["gate"]["rules"] if not r["passed"]]
    return "; ".join(f"{r['name']}: {r['value']:.4f} against {r['limit']:.4f}" for r in rules)


def author_of(context: dg.AssetExecutionContext) -> str:
    """Who or what asked for the run."""
    return context.run.tags.get("mlops/author") or context.run.tags.get("mlops/trigger") or "dagster"


def register(
    spec: ModelSpec, lake: Lake, registry: Any, evaluated: dict[str, Any], model: dict[str, Any], author: str
) -> Version:
    """Register the evaluated artifact with its evidence (the same evidence gives the same version) as `candidate`."""
    training_set = read_manifest(lake, spec, "training_set")
    evidence = {
        "metrics": evaluated["candidate"],
        "baseline": evaluated["baseline"],
        "champion": evaluated["champion"],
        "gate": evaluated["gate"],
        "training_set": evaluated["training_set"],
        "training_set_key": training_set["key"],
        "first_day": training_set["first_day"],
        "last_day": training_set["last_day"],
        "rows": training_set["train_rows"],
        "dvc_commit": training_set["dvc_commit"],
        "inputs": training_set.get("inputs"),
        "parameters": model["parameters"],
        "code": model["code"],
        "revision": model.get("revision"),
        "lock": model["lock"],
    }
    with local_copy(lake, spec, evaluated["digest"]) as folder, tempfile.TemporaryDirectory() as temporary:
        native = Path(temporary) / "estimator.pkl"
        native.write_bytes(lake.read_bytes(model["native"]))
        version = registry.register(
            spec.name,
            folder,
            evaluated["digest"],
            evidence,
            {"author": author, "four_eyes": str(spec.approval == "four_eyes").lower()},
            native=native,
            run_id=model["run_id"],
        )
    registry.set_alias(spec.name, "candidate", version.number)
    if spec.approval == "automatic":
        at = dt.datetime.now(dt.UTC)
        version = registry.record_approval(
            spec.name, version.number, Approval("approved", "approval:automatic", at, "the gate passed")
        )
    return version


def _metadata(version: Version) -> dict[str, Any]:
    metrics = version.evidence["metrics"]
    return {
        "version": version.number,
        "digest": version.digest,
        "evidence_hash": version.registered_hash,
        "approval": version.approval.decision
        if version.approval
        else f"awaited: mlops approve {version.model} {version.number} --by NAME",
        "mlflow": version.url_path,
        **{str(k): v for k, v in (metrics.items() if isinstance(metrics, dict) else [])},
    }
