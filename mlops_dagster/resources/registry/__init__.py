"""Where model versions wait for approval: what each rests on, who decided, and its verified bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from mlops_dagster.core.errors import DataError

ALIASES = ("candidate", "challenger", "champion", "previous")
APPROVED: Literal["approved"] = "approved"
REJECTED: Literal["rejected"] = "rejected"


@dataclass(frozen=True)
class Approval:
    """A person's (or a rule's) decision about one version; `at` is None when it was set by hand in the registry's UI."""

    decision: Literal["approved", "rejected"]
    by: str | None
    at: datetime | None = None
    reason: str = ""
    evidence_hash: str | None = None


class ApprovalState(StrEnum):
    """What a version's approval is worth now."""

    NONE = "none"
    APPROVED = "approved"
    REJECTED = "rejected"
    UNBOUND = "unbound"
    """Set by hand: seen, but not yet bound to the evidence by `record_approval`."""
    VOID = "void"
    """Metrics, data or artifact are no longer those that were approved."""


@dataclass(frozen=True)
class Version:
    """One registered version; `evidence` maps a name to a JSON value, `registered_hash` is its hash when it was registered."""

    model: str
    number: int
    digest: str
    evidence: Mapping[str, object]
    registered_hash: str
    created_at: datetime
    url_path: str
    run_id: str | None = None
    aliases: tuple[str, ...] = ()
    approval: Approval | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def evidence_hash(digest: str, evidence: Mapping[str, object]) -> str:
    """SHA-256 (hex) of the canonical JSON (sorted keys, no spaces) of the artifact digest and the evidence; DataError when not JSON."""
    try:
        text = json.dumps(
            {"artifact": digest, "evidence": dict(evidence)}, sort_keys=True, separators=(",", ":"), allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"evidence: {error}; give finite numbers, text, lists and mappings only") from error
    return hashlib.sha256(text.encode()).hexdigest()


def approval_state(version: Version) -> ApprovalState:
    """Judge a version's approval against the evidence that it has now."""
    approval = version.approval
    if approval is None:
        return ApprovalState.NONE
    if approval.decision == REJECTED:
        return ApprovalState.REJECTED
    now = evidence_hash(version.digest, version.evidence)
    if now != version.registered_hash or approval.evidence_hash not in (None, now):
        return ApprovalState.VOID
    return ApprovalState.UNBOUND if approval.evidence_hash is None else ApprovalState.APPROVED


def approval_is_valid(version: Version) -> bool:
    """Whether the version is approved, by a decision bound to exactly the evidence and artifact that it has now."""
    return approval_state(version) is ApprovalState.APPROVED


@runtime_checkable
class Registry(Protocol):
    """Keeps model versions; every write may be repeated."""

    def register(
        self,
        model: str,
        artifact_folder: Path,
        digest: str,
        evidence: Mapping[str, object],
        tags: Mapping[str, str],
        native: Path | None = None,
        run_id: str | None = None,
    ) -> Version:
        """Store the artifact as a new version, or return the one that already has this digest and evidence.

        `digest` must be `serving.artifact.digest(artifact_folder)`, else ArtifactError. `native` is a pickled estimator kept beside
        the artifact for people (never read by serving). `run_id` is the tracked run it came from.
        """
        ...

    def versions(self, model: str) -> tuple[Version, ...]:
        """All versions, oldest first; empty for an unknown model."""
        ...

    def set_alias(self, model: str, alias: str, version: int | None) -> None:
        """Move one of ALIASES to a version, or take it away with None."""
        ...

    def record_approval(self, model: str, version: int, approval: Approval) -> Version:
        """Bind a decision to the version's present evidence and return the version.

        The first of two equal decisions stays. Raises ApprovalError when a rejected version is approved, when nobody is named, or when
        the evidence is not what was registered; ArtifactError when an approved version's stored bytes are not those that were
        registered, StorageError when they cannot be read now; NotFoundError for an unknown version.
        """
        ...

    def fetch(self, model: str, version: int, to: Path) -> Path:
        """Put the version's artifact folder at `to`, whose parent is made, and return it.

        Raises ArtifactError when its bytes are not the registered ones, StorageError when they cannot be read or written now.
        """
        ...
