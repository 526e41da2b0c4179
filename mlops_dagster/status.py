"""`mlops status`: what is registered, approved, live and last decided."""

from typing import Any

from mlops_dagster.core.errors import MlopsError
from mlops_dagster.core.rollout import replay
from mlops_dagster.resources.registry import approval_state


def collect(resources: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each model that has a version or a ledger entry, in alphabetical order."""
    ledger = resources["ledger"]
    models = sorted(
        {e.model for e in ledger.entries()} | {key.split("/")[0] for key in resources["data_lake"].list() if "/" in key}
    )
    return [_model(resources, model) for model in models]


def _model(resources: dict[str, Any], model: str) -> dict[str, Any]:
    entries = resources["ledger"].entries(model)
    rollout = replay(entries, model)
    versions = resources["registry"].versions(model)
    return {
        "model": model,
        "versions": [
            {
                "version": v.number,
                "approval": str(approval_state(v)),
                "aliases": list(v.aliases),
                "metrics": v.evidence.get("metrics"),
                "trained_on": f"{v.evidence.get('first_day')} … {v.evidence.get('last_day')}",
            }
            for v in versions
        ],
        "rollout": rollout and {"phase": str(rollout.phase), "candidate": rollout.candidate, "reason": rollout.reason},
        "serving": _serving(resources["serving"], model),
        "last_decision": entries
        and {"kind": entries[-1].kind, "by": entries[-1].actor, "why": entries[-1].reason, "at": entries[-1].time_iso},
    }


def _serving(serving: Any, model: str) -> dict[str, Any]:
    try:
        seen = serving.observe(model)
    except MlopsError as error:
        return {"problem": str(error)}
    return {
        "arms": {key: f"{arm.phase} {arm.reason}".strip() for key, arm in seen.arms.items()},
        "weights_percent": {w["arm"]: w["percent"] for w in seen.routes.to_json()["weights"]} if seen.routes else {},
        "problem": seen.problem or seen.pending,
    }


def show(found: list[dict[str, Any]]) -> None:
    """Print the entries as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not found:
        console.print("No model has any data yet. `mlops demo` shows one; docs/your_first_model.md says how to declare your own.")
    for entry in found:
        table = Table("version", "approval", "aliases", "trained on", "metrics", title=entry["model"], title_justify="left")
        for v in entry["versions"]:
            metrics = ", ".join(f"{k} {x:.4f}" for k, x in (v["metrics"] or {}).items())
            table.add_row(str(v["version"]), v["approval"], ", ".join(v["aliases"]), v["trained_on"], metrics)
        console.print(table)
        weights = entry["serving"].get("weights_percent") or {}
        serves = ", ".join(f"version {arm}: {percent:g} %" for arm, percent in weights.items()) or entry["serving"]["problem"]
        console.print(f"serving: {serves}")
        if entry["last_decision"]:
            last = entry["last_decision"]
            console.print(f"last decision: {last['kind']} by {last['by']} at {last['at']}: {last['why']}\n")
