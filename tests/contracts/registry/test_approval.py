"""What an approval is worth, judged from the version alone."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from mlops_dagster.core.errors import DataError
from mlops_dagster.resources.registry import Approval, ApprovalState, Version, approval_is_valid, approval_state, evidence_hash

EVIDENCE = {"metrics": {"accuracy": 0.91}, "data_hash": "d"}
HASH = evidence_hash("abc", EVIDENCE)
VERSION = Version("flight", 1, "abc", EVIDENCE, HASH, datetime(2013, 3, 1, tzinfo=UTC), "/")
BOUND = Approval("approved", "anna", datetime(2013, 3, 2, tzinfo=UTC), "", HASH)
BY_HAND = Approval("approved", "anna")
NOW = {"metrics": {"accuracy": 0.99}, "data_hash": "d"}


@pytest.mark.parametrize(
    ("version", "state"),
    [
        (VERSION, ApprovalState.NONE),
        (replace(VERSION, approval=BOUND), ApprovalState.APPROVED),
        (replace(VERSION, approval=BY_HAND), ApprovalState.UNBOUND),
        (replace(VERSION, approval=Approval("rejected", "ben")), ApprovalState.REJECTED),
        (replace(VERSION, approval=BOUND, evidence=NOW), ApprovalState.VOID),
        (replace(VERSION, approval=BOUND, digest="abd"), ApprovalState.VOID),
        (replace(VERSION, approval=BY_HAND, evidence=NOW), ApprovalState.VOID),
        (replace(VERSION, approval=BOUND, registered_hash="other"), ApprovalState.VOID),
        (replace(VERSION, approval=replace(BOUND, evidence_hash="other")), ApprovalState.VOID),
    ],
)
def test_the_state_follows_from_the_evidence(version: Version, state: ApprovalState) -> None:
    assert approval_state(version) is state
    assert approval_is_valid(version) == (state is ApprovalState.APPROVED)


def test_the_hash_does_not_depend_on_the_order_of_names() -> None:
    assert evidence_hash("abc", dict(reversed(EVIDENCE.items()))) == HASH
    assert evidence_hash("abc", {"metrics": {"accuracy": 0.9100000000000001}, "data_hash": "d"}) != HASH
    with pytest.raises(DataError, match="evidence: "):
        evidence_hash("abc", {"x": float("inf")})
