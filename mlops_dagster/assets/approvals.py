"""Approving and rejecting versions: in the registry, bound to the evidence, and in the ledger."""

import datetime as dt
import logging
from typing import Any

from mlops_dagster.core.errors import ApprovalError, ArtifactError, NotFoundError, StorageError
from mlops_dagster.core.ledger import APPROVAL, REJECTION, NewEntry, chain_hash
from mlops_dagster.resources.ledger import Ledger
from mlops_dagster.resources.registry import Approval, ApprovalState, Registry, Version, approval_state, evidence_hash

UNNAMED = "registry UI"
"""Who decided, where a decision set in the registry's UI has no name."""
LOOK_AGAIN = dt.timedelta(minutes=1)
"""How long the refusal of an approval set in the registry stands before its reason, the stored bytes among others, is looked at again."""

_log = logging.getLogger(__name__)
_REFUSED: dict[tuple[str, int, dt.datetime, str | None], tuple[dt.datetime, str]] = {}
"""By model, number, creation and who approved: until when the refusal stands, and why. A sensor asks every few seconds."""


def find(registry: Registry, model: str, number: int) -> Version:
    """A version of a model. Raises NotFoundError listing those that exist."""
    versions = registry.versions(model)
    for version in versions:
        if version.number == number:
            return version
    known = ", ".join(str(v.number) for v in versions) or "none"
    raise NotFoundError(f"{model} has no version {number}; it has: {known}")


def decide(registry: Registry, ledger: Ledger, model: str, number: int, approval: Approval) -> Version:
    """Record a person's decision about a version; a repeated one changes nothing.

    Raises NotFoundError, ApprovalError where the decision is not allowed (already rejected, four eyes, changed evidence),
    ArtifactError where an approved version's stored bytes are not those that were registered, or StorageError where they cannot
    be read now.
    """
    version = find(registry, model, number)
    if approval.decision == "approved" and version.tags.get("four_eyes") == "true":
        _require_four_eyes(version, approval.by)
    decided = registry.record_approval(model, number, approval)
    record(ledger, decided)
    return decided


def _require_four_eyes(version: Version, by: str | None) -> None:
    author = version.tags.get("author", "")
    if (by or "").strip().casefold() in (author.strip().casefold(), UNNAMED.casefold()):
        raise ApprovalError(
            f"{version.model} asks for four eyes: {author!r} made version {version.number}, so somebody else must approve it, and by "
            f"name ({by!r} is given): --by, or the tag mlops.approved_by"
        )


def record(ledger: Ledger, version: Version) -> None:
    """The ledger's entry of a version's present decision; one for each decision on each evidence."""
    approval = version.approval
    if approval is None:
        return
    kind = APPROVAL if approval.decision == "approved" else REJECTION
    evidence: dict[str, Any] = {"evidence_hash": approval.evidence_hash, "artifact": version.digest, **dict(version.evidence)}
    ledger.append(
        NewEntry(
            kind=kind,
            model=version.model,
            subject=str(version.number),
            actor=approval.by or "unknown",
            time=approval.at or dt.datetime.now(dt.UTC),
            reason=approval.reason,
            evidence=evidence,
            key=f"{version.model}:{version.number}:{kind}:{approval.evidence_hash}",
        )
    )


def recorded(ledger: Ledger, model: str) -> dict[str, Version]:
    """The versions that were approved, by number, with the digest and evidence that their entries have: what is left of a version
    that the registry lost or cannot tell of. An entry that was changed after it was written counts for nothing.
    """
    found = {}
    for entry in ledger.entries(model, APPROVAL):
        if chain_hash(entry) != entry.hash:
            continue
        evidence = entry.evidence
        bound, digest = evidence.pop("evidence_hash", None), evidence.pop("artifact", "")
        if evidence_hash(digest, evidence) == bound:
            found[entry.subject] = Version(model, int(entry.subject), digest, evidence, bound, entry.time, url_path="")
    return found


def adopt(registry: Registry, ledger: Ledger, model: str, now: dt.datetime) -> list[Version]:
    """Bind the approvals that were set by hand in the registry's own UI, and make sure that every decision is in the ledger.

    Returns the versions whose approval is valid, oldest first.
    """
    valid = []
    for version in registry.versions(model):
        state = approval_state(version)
        if state is ApprovalState.UNBOUND:
            version = _bound(registry, ledger, version, now)
        elif state in (ApprovalState.APPROVED, ApprovalState.REJECTED):
            record(ledger, version)
        if approval_state(version) is ApprovalState.APPROVED:
            valid.append(version)
    return valid


def refusals(model: str, now: dt.datetime) -> list[str]:
    """Why approvals of this model that were set in the registry's UI do not count, as `adopt` found last in this process."""
    return [why for (name, *_), (until, why) in _REFUSED.items() if name == model and now < until]


def _bound(registry: Registry, ledger: Ledger, version: Version, now: dt.datetime) -> Version:
    """The version with its approval set by hand bound to the evidence, or as it is where that is refused (see `refusals`)."""
    assert version.approval is not None
    key = (version.model, version.number, version.created_at, version.approval.by)
    until, _ = _REFUSED.get(key, (now, ""))
    if now < until:
        return version
    by = version.approval.by or UNNAMED
    try:
        decided = decide(registry, ledger, version.model, version.number, Approval("approved", by, now, version.approval.reason))
    except (ApprovalError, ArtifactError, StorageError) as error:
        why = f"the approval of version {version.number} set in the registry does not count: {error}"
        _log.warning(why)
        _REFUSED[key] = (now + LOOK_AGAIN, why)
        return version
    _REFUSED.pop(key, None)
    return decided
