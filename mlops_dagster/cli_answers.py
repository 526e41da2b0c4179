"""What commands say: what answered at a moment and why, and what follows from a decision."""

from typing import Any

from mlops_dagster.core.ledger import ROLLBACK, Entry, Live


def live(found: Live) -> str:
    """Who answers what share since when and why, and what made the champion the champion."""
    shares = [f"version {version}: {percent:g} %" for version, percent in found.shares.items()]
    if (match := found.routes.match) is not None:
        shares.append(f"requests with {match.header}: {match.value} go to version {match.arm}")
    if (mirror := found.routes.mirror) is not None:
        shares.append(f"copies of {mirror.per_mille / 10:g} % go to version {mirror.arm}, whose answers nobody gets")
    lines = [f"{', '.join(shares)}; so since {_entry(found.entry)}"]
    if found.champion is None:
        lines.append("no version is the champion yet")
    elif found.crowned is not None:
        lines.append(f"version {found.champion} is the champion since {_entry(found.crowned)}")
    return "\n".join(lines)


def _entry(entry: Entry) -> str:
    back = entry.kind == ROLLBACK and entry.evidence.get("champion") == entry.subject
    what = f"{entry.kind} {'to' if back else 'of'} version {entry.subject} by {entry.actor}"
    told = f"{entry.time.isoformat()} (ledger entry {entry.sequence}, {what})"
    return f"{told}: {entry.reason}" if entry.reason else told


def decision(opened: dict[str, Any], version: Any, asked: Any) -> str:
    """What stands after a decision `asked` about a version, and what follows from it. `version`: as `approvals.decide` gave it."""
    name, stands = f"{version.model} version {version.number}", version.approval
    if (stands.by, stands.at) == (asked.by, asked.at):
        said = f"{name} {asked.decision} by {asked.by}"
    else:
        since = f" at {stands.at.isoformat(timespec='seconds')}" if stands.at else ""
        said = f"{name} was {stands.decision} before, by {stands.by or 'unknown'}{since}: that stands, nothing was changed"
    return said if asked.decision == "rejected" else f"{said}; {_follows(opened, version)}"


def _follows(opened: dict[str, Any], version: Any) -> str:
    """Whether the sensor brings an approved version in, by the same rules as `assets.rollout.waiting`."""
    from mlops_dagster.assets.rollout import champion_of, rollout_id
    from mlops_dagster.core import rollout as engine
    from mlops_dagster.resources.registry import approval_is_valid

    model, number, entries = version.model, version.number, opened["ledger"].entries(version.model)
    current, own = engine.replay(entries, model), f"rollout/{rollout_id(version)}"
    # A rollout's way back has its name, with /back, and is about the version before.
    had = engine.replay([e for e in entries if e.key.startswith(f"{own}/") and not e.key.startswith(f"{own}/back")], model)
    if had is not None and not had.phase.final:
        return f"its rollout is under way ({had.phase})"
    champion = champion_of(current)
    if champion == str(number):
        return "it is the champion already"
    newer = [v.number for v in opened["registry"].versions(model) if v.number > number and approval_is_valid(v)]
    if had is not None:
        why = f"it had its rollout ({had.phase})"
    elif champion is not None and number < int(champion):
        why = f"it is older than the champion, version {champion}"
    elif newer:
        why = f"version {newer[-1]}, which is newer, is approved too"
    else:
        return f"the sensor {model}_rollouts brings it in"
    return f"{why}, so no sensor brings it in; `mlops rollout start {model} --version {number}` does"
