"""The registry in MLflow: versions with their evidence as tags, approvals as tags, artifacts checked by their digest."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.addresses import masked, masked_in
from mlops_dagster.core.errors import ApprovalError, ArtifactError, DataError, DeclarationError, NotFoundError, StorageError
from mlops_dagster.resources.registry import ALIASES, APPROVED, REJECTED, Approval, Version, evidence_hash
from mlops_dagster.resources.registry.mlflow_flavors import MLFLOW_NAMES, write_flavors
from mlops_dagster.resources.tracking.mlflow_connection import cause, connect, exclusive, translated
from mlops_dagster.resources.tracking.mlflow_tracking import MlflowTracking
from mlops_dagster.serving.artifact import digest as artifact_digest

DIGEST_TAG = "mlops.artifact_digest"
EVIDENCE_TAG = "mlops.evidence."
EVIDENCE_HASH_TAG = "mlops.evidence_hash"
APPROVAL_TAG = "mlops.approval"
APPROVED_BY_TAG = "mlops.approved_by"
REASON_TAG = "mlops.approval_reason"
APPROVED_AT_TAG = "mlops.approved_at"
BOUND_TAG = "mlops.approval_bound_to"
_PAGE = 500
_LONGEST_TAG = 100_000


class MlflowRegistry(ConfigurableResource):
    """Registry (see the Protocol) in MLflow's model registry, on an SQLite file or a server."""

    tracking_uri: str = Field(description="The same address as the tracking resource's.")
    artifacts_folder: str | None = Field(default=None, description="The same as the tracking resource's.")

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
        """See Registry.register; a crash leaves at most an upload, which the next call writes over."""
        _check_bytes(artifact_folder, digest, f"{model}: artifact_folder")
        identity = evidence_hash(digest, evidence)
        all_tags = _version_tags(digest, evidence, identity, tags)
        client = connect(self.tracking_uri)
        run_id = run_id or self._own_run(model, identity)
        with exclusive(self.tracking_uri), translated(self.tracking_uri):
            _ensure_model(client, model)
            if found := _same(self._versions(client, model), identity):
                return found
            source = _upload(client, run_id, identity, artifact_folder, native)
            made = client.create_model_version(model, source, run_id=run_id, tags=all_tags, await_creation_for=60)
            first = _same(self._versions(client, model), identity)
            if first is None:
                raise NotFoundError(
                    f"{model}: version {made.version} was deleted while it was being registered; register it again"
                )
            if first.number != int(made.version):
                client.delete_model_version(model, made.version)
            return first

    def versions(self, model: str) -> tuple[Version, ...]:
        """See Registry.versions; versions made by other tools (without a digest) are left out."""
        client = connect(self.tracking_uri)
        with translated(self.tracking_uri):
            return self._versions(client, model)

    def set_alias(self, model: str, alias: str, version: int | None) -> None:
        """See Registry.set_alias."""
        if alias not in ALIASES:
            raise DeclarationError(f"alias: {alias!r} is unknown; use one of {', '.join(ALIASES)}")
        client = connect(self.tracking_uri)
        with translated(self.tracking_uri):
            known = self._versions(client, model)
            if version is None:
                if any(alias in entry.aliases for entry in known):
                    client.delete_registered_model_alias(model, alias)
                return
            if alias not in _one(known, model, version).aliases:
                client.set_registered_model_alias(model, alias, str(version))

    def record_approval(self, model: str, version: int, approval: Approval) -> Version:
        """See Registry.record_approval. A crash half-way leaves the version undecided, never approved by halves."""
        if not approval.by or not approval.by.strip():
            raise ApprovalError(f"{model} version {version}: an approval needs the name of who decided (by)")
        if approval.at is None:
            raise ApprovalError(f"{model} version {version}: an approval needs its time (at)")
        client = connect(self.tracking_uri)
        if approval.decision == APPROVED:
            self._check_stored(client, model, version)  # before the lock: a large artifact takes its time
        with exclusive(self.tracking_uri), translated(self.tracking_uri):
            found = _one(self._versions(client, model), model, version)
            identity = evidence_hash(found.digest, found.evidence)
            if _already(found, approval, identity):
                return found
            if approval.decision == APPROVED:
                _may_approve(found, identity)
            if found.approval is not None:
                client.delete_model_version_tag(model, str(version), APPROVAL_TAG)
            for name, value in {
                APPROVED_BY_TAG: approval.by,
                APPROVED_AT_TAG: approval.at.astimezone(UTC).isoformat(),
                REASON_TAG: approval.reason,
                BOUND_TAG: _binding(approval.decision, approval.by, identity),
                APPROVAL_TAG: approval.decision,
            }.items():
                client.set_model_version_tag(model, str(version), name, value)
            return _one(self._versions(client, model), model, version)

    def fetch(self, model: str, version: int, to: Path) -> Path:
        """See Registry.fetch; a folder already there with the right bytes is kept, any other is replaced whole."""
        client = connect(self.tracking_uri)
        with translated(self.tracking_uri):
            found = _one(self._versions(client, model), model, version)
            with suppress(ArtifactError):  # what cannot be read is replaced too
                if artifact_digest(to) == found.digest:
                    return to
            to.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as scratch:
                fresh = Path(scratch, "artifact")
                self._copy_stored(client, found, fresh)
                if to.exists():
                    os.replace(to, Path(scratch, "before"))
                os.replace(fresh, to)
        return to

    def _check_stored(self, client: Any, model: str, version: int) -> None:
        """Raise ArtifactError unless the stored files are whole and the ones that were registered, if the version may be approved."""
        with translated(self.tracking_uri), tempfile.TemporaryDirectory(prefix="mlops-approval-") as scratch:
            found = _one(self._versions(client, model), model, version)
            _may_approve(found, evidence_hash(found.digest, found.evidence))
            self._copy_stored(client, found, Path(scratch, "artifact"))

    def _copy_stored(self, client: Any, version: Version, to: Path) -> None:
        """Copy a version's artifact from the store to the new folder `to`.

        Raises ArtifactError when its bytes are not the registered ones, StorageError where they cannot be had.
        """
        _download(client.get_model_version_download_uri(version.model, str(version.number)), self.tracking_uri, to, version)
        try:
            actual = artifact_digest(to)
        except ArtifactError as error:  # this machine's disk, not the registered bytes
            raise StorageError(f"{version.model} version {version.number}: its copy cannot be read ({error})") from error
        if actual != version.digest:
            raise ArtifactError(
                f"{version.model} version {version.number}: its bytes have digest {actual}, not the {version.digest} that was registered; "
                "put the registered files back, or train and register a new version"
            )

    def _own_run(self, model: str, identity: str) -> str:
        """A run that only holds the artifact, for a model that was trained without tracking."""
        tracking = MlflowTracking(tracking_uri=self.tracking_uri, artifacts_folder=self.artifacts_folder)
        return tracking.log_run(model, f"registered-{identity}", {}, {}, {}, {}).run_id

    def _versions(self, client: Any, model: str) -> tuple[Version, ...]:
        if "'" in model:
            raise DeclarationError(f"model: {model!r} may not hold an apostrophe")
        found, token = [], None
        while True:
            page = client.search_model_versions(f"name = '{model}'", max_results=_PAGE, page_token=token)
            found.extend(page)
            token = page.token
            if not token:
                break
        ours = [entry for entry in found if DIGEST_TAG in entry.tags and entry.status == "READY"]
        if not ours:
            return ()
        aliases = client.get_registered_model(model).aliases
        return tuple(sorted((_version(entry, aliases) for entry in ours), key=lambda version: version.number))


def _version(entry: Any, aliases: Mapping[str, str]) -> Version:
    tags = dict(entry.tags)
    number = int(entry.version)
    evidence = {name[len(EVIDENCE_TAG) :]: _read_json(value) for name, value in tags.items() if name.startswith(EVIDENCE_TAG)}
    return Version(
        model=entry.name,
        number=number,
        digest=tags[DIGEST_TAG],
        evidence=evidence,
        registered_hash=tags.get(EVIDENCE_HASH_TAG, ""),
        created_at=datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC),
        url_path=f"/#/models/{entry.name}/versions/{number}",
        run_id=entry.run_id or None,
        aliases=tuple(sorted(alias for alias, at in aliases.items() if int(at) == number)),
        approval=_approval(tags),
        tags={name: value for name, value in tags.items() if not name.startswith("mlops.")},
    )


def _approval(tags: Mapping[str, str]) -> Approval | None:
    """The decision as the tags hold it; bound only when the same decision by the same person was recorded here."""
    decision = tags.get(APPROVAL_TAG, "").strip().lower()
    if decision not in (APPROVED, REJECTED):
        return None
    by = tags.get(APPROVED_BY_TAG, "").strip() or None
    bound = tags.get(BOUND_TAG, "")
    bound_hash = bound.rpartition(" on ")[2] or None
    recorded = bound_hash is not None and bound == _binding(decision, by or "", bound_hash)
    at = tags.get(APPROVED_AT_TAG) if recorded else None
    return Approval(
        decision=APPROVED if decision == APPROVED else REJECTED,
        by=by,
        at=datetime.fromisoformat(at) if at else None,
        reason=tags.get(REASON_TAG, "") if recorded else "",
        evidence_hash=bound_hash if recorded else None,
    )


def _binding(decision: str, by: str, identity: str) -> str:
    return f"{decision} by {by} on {identity}"


def _already(found: Version, approval: Approval, identity: str) -> bool:
    before = found.approval
    return before is not None and before.decision == approval.decision and before.evidence_hash == identity


def _may_approve(found: Version, identity: str) -> None:
    name = f"{found.model} version {found.number}"
    if found.approval is not None and found.approval.decision == REJECTED:
        raise ApprovalError(f"{name} was rejected by {found.approval.by}; train and register a new version instead")
    if identity != found.registered_hash:
        raise ApprovalError(f"{name}: its evidence was changed after it was registered; register it again before approving")


def _version_tags(digest: str, evidence: Mapping[str, object], identity: str, tags: Mapping[str, str]) -> dict[str, str]:
    texts = {f"{EVIDENCE_TAG}{name}": json.dumps(value, sort_keys=True, allow_nan=False) for name, value in evidence.items()}
    for name, text in texts.items():
        if len(text) > _LONGEST_TAG:
            raise DataError(f"{name}: {len(text)} characters, a tag holds {_LONGEST_TAG}; give a digest of it as evidence")
    if taken := [name for name in tags if name.startswith("mlops.")]:
        raise DeclarationError(f"tags: {', '.join(taken)} begin with 'mlops.', which is kept for the platform; rename them")
    return {**{name: str(value) for name, value in tags.items()}, **texts, DIGEST_TAG: digest, EVIDENCE_HASH_TAG: identity}


def _read_json(text: str) -> object:
    """The value of an evidence tag; text that somebody typed over it stays text, so that its hash no longer fits."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _one(known: tuple[Version, ...], model: str, number: int) -> Version:
    for version in known:
        if version.number == number:
            return version
    numbers = ", ".join(str(version.number) for version in known) or "none"
    raise NotFoundError(f"{model}: version {number} does not exist; there are: {numbers}")


def _same(known: tuple[Version, ...], identity: str) -> Version | None:
    return next((version for version in known if version.registered_hash == identity), None)


def _ensure_model(client: Any, model: str) -> None:
    try:
        client.create_registered_model(model)
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise


def _check_bytes(folder: Path, expected: str, what: str) -> None:
    if not folder.is_dir():
        raise ArtifactError(f"{what}: {folder} is not a folder; give the folder that holds model.onnx and signature.json")
    if (actual := artifact_digest(folder)) != expected:
        raise ArtifactError(f"{what}: its bytes have digest {actual}, not the {expected} it is said to have; build it again")


def _upload(client: Any, run_id: str, identity: str, artifact_folder: Path, native: Path | None) -> str:
    """Upload the artifact with MLflow's own description beside it; returns the source address of the version."""
    place = f"model-{identity[:16]}"
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch, place)
        shutil.copytree(artifact_folder, staged)
        write_flavors(staged, native, run_id)
        client.log_artifacts(run_id, str(staged), place)
    return f"{client.get_run(run_id).info.artifact_uri}/{place}"


def _download(source: str, tracking_uri: str, to: Path, version: Version) -> None:
    """Copy the artifact's own files (not MLflow's beside it, nor the native model) from the store.

    Raises StorageError where that fails, and where nothing is listed: a store that is not mounted looks just like that.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    what = f"{version.model} version {version.number}"
    try:
        names = [entry.path for entry in get_artifact_repository(source, tracking_uri=tracking_uri).list_artifacts()]
        for name in names:
            if name not in MLFLOW_NAMES:
                to.mkdir(exist_ok=True)
                download_artifacts(artifact_uri=f"{source}/{name}", dst_path=str(to), tracking_uri=tracking_uri)
    except Exception as error:  # each kind of store has a client with errors of its own
        why = masked_in(str(error), source, tracking_uri)
        raise StorageError(
            f"{what}: {masked(source)} cannot be read ({why}); check that the artifact store is reachable, and its credentials"
        ) from cause(error, source, tracking_uri)
    if not to.is_dir():
        raise StorageError(
            f"{what}: nothing is found at {masked(source)}; check that the artifact store is mounted, or register the version again"
        )
