"""The versions of a rollout: what is known of them, whether a candidate may go live, and their artifacts on this machine."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlops_dagster.assets import approvals
from mlops_dagster.core.analysis import Verdict
from mlops_dagster.core.errors import ApprovalError, ArtifactError, MlopsError, NotFoundError
from mlops_dagster.core.rollout import WAY_BACK, Phase, RolloutState
from mlops_dagster.core.rollout_gates import Outcome
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.registry import ApprovalState, Version, approval_state
from mlops_dagster.serving import artifact

if TYPE_CHECKING:
    from mlops_dagster.assets.rollout import Parts

_UNAPPROVED = {
    ApprovalState.NONE: "is not approved any more",
    ApprovalState.REJECTED: "was rejected",
    ApprovalState.VOID: "is not approved any more: its metrics, data or artifact are not those that were approved",
}
_KNOWN: dict[tuple[str, str], dict[str, Version]] = {}
"""A model's versions as the registry had them last, by their number."""
_VERIFIED: dict[Path, artifact.Stamps] = {}
"""The files of the artifacts that had the right digest; the folder's name is that digest."""


def known(parts: "Parts", model: str) -> dict[str, Version]:
    """The model's versions by number, as the registry has them now.

    Where it cannot be asked, those that it had last, or else those that the ledger says were approved: what serves, and a way
    back, must not wait for it. Raises the registry's error only when neither knows any.
    """
    name = (str(parts.cache), model)
    try:
        _KNOWN[name] = {str(v.number): v for v in parts.registry.versions(model)}
    except MlopsError:
        if found := _KNOWN.get(name) or approvals.recorded(parts.ledger, model):
            return found
        raise
    return _KNOWN[name]


def one(parts: "Parts", model: str, number: str, among: dict[str, Version]) -> Version:
    """The version of this number, `among` those of the registry; one that was deleted there, as the ledger has its approval.

    So a version that serves goes on serving. Raises NotFoundError for one that neither has.
    """
    found = among.get(number) or approvals.recorded(parts.ledger, model).get(number)
    if found is None:
        raise NotFoundError(
            f"version {number} of {model} is neither in the registry nor approved in the ledger; register it again"
        )
    return found


def inadmissible(parts: "Parts", spec: ModelSpec, state: RolloutState) -> Verdict | None:
    """FAIL where the candidate may not go live (any more): it is gone, was rejected, its evidence changed or, before its server
    starts, its stored bytes did. None for what it goes back to, which served before and needs neither approval nor registry.

    Raises ApprovalError while an approval is not bound yet, and MlopsError where the registry cannot be asked.
    """
    if state.strategy == WAY_BACK:
        return None
    version = next((v for v in parts.registry.versions(spec.name) if str(v.number) == state.candidate), None)
    if version is None:
        return Verdict(Outcome.FAIL, (f"version {state.candidate} is no longer in the registry",))
    approval = approval_state(version)
    if approval is ApprovalState.UNBOUND:
        # Tags that somebody is setting in the registry's UI: the next look of `waiting` binds them, or says why not.
        raise ApprovalError(f"the approval of version {state.candidate} was set by hand and is not bound to its evidence yet")
    if approval is not ApprovalState.APPROVED:
        return Verdict(Outcome.FAIL, (f"version {state.candidate} {_UNAPPROVED[approval]}",))
    if state.phase is Phase.PENDING:
        try:
            artifact_of(parts, spec, version)
        except ArtifactError as error:
            return Verdict(Outcome.FAIL, (str(error),))
    return None


def artifact_of(parts: "Parts", spec: ModelSpec, version: Version) -> Path:
    """The version's artifact on this machine, fetched once; its files are hashed once a process, and again when they change.

    The predictor compares the bytes that it loads with the digest itself. Raises ArtifactError where the registry has other bytes
    than were registered, StorageError where they cannot be had now.
    """
    folder = parts.cache / spec.name / version.digest
    with suppress(ArtifactError):  # what cannot be read here is fetched again
        found = artifact.stamps(folder)  # before the bytes, so that a change in between is seen next time
        if _VERIFIED.get(folder) == found:
            return folder
        if artifact.digest(folder) == version.digest:
            _VERIFIED[folder] = found
            return folder
    return parts.registry.fetch(spec.name, version.number, folder)
