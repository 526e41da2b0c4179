"""The chain: any edit is found and named; what was live is read out of it."""

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_dagster.core import ledger
from mlops_dagster.core.errors import LedgerError
from mlops_dagster.core.ledger import Entry, NewEntry, Receipt, canonical_json, live_at, seal, verify
from mlops_dagster.core.routes import Match, Mirror, Routes

T0 = datetime(2013, 3, 1, tzinfo=UTC)


def new(number: int, **changes) -> NewEntry:
    fields = {
        "kind": ledger.APPROVAL,
        "model": "flight_delay",
        "subject": str(number),
        "actor": "ada",
        "time": T0 + timedelta(hours=number),
        "reason": "better on every slice",
        "evidence": {"accuracy": 0.911, "Größe": [1, 2.5, None, True]},
        "key": f"approval/{number}",
    }
    return NewEntry(**{**fields, **changes})


def chain(count: int) -> list[Entry]:
    entries: list[Entry] = []
    for number in range(1, count + 1):
        entries.append(seal(new(number), entries[-1].receipt if entries else None))
    return entries


def test_a_whole_chain_verifies() -> None:
    entries = chain(5)
    assert verify(entries) is None
    assert verify(entries, head=entries[-1].receipt, receipts=[entry.receipt for entry in entries]) is None
    assert verify([], head=Receipt(0, ledger.GENESIS)) is None


def test_the_hash_is_what_the_module_says() -> None:
    entry = chain(2)[1]
    fields = {
        "sequence": 2,
        "kind": "approval",
        "model": "flight_delay",
        "subject": "2",
        "actor": "ada",
        "time": "2013-03-01T02:00:00.000000+00:00",
        "reason": "better on every slice",
        "evidence": '{"Größe":[1,2.5,null,true],"accuracy":0.911}',
        "key": "approval/2",
        "previous": chain(1)[0].hash,
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert entry.hash == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("field", ["kind", "model", "subject", "actor", "time_iso", "reason", "evidence_json", "key", "hash"])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_any_changed_field_is_named(field: str, at: int) -> None:
    entries = chain(5)
    entries[at] = replace(entries[at], **{field: getattr(entries[at], field) + " "})
    broken = verify(entries)
    assert broken is not None
    assert broken.sequence == at + 1
    assert broken.entry == entries[at]


def test_a_changed_entry_with_its_own_hash_made_right_breaks_the_next_one() -> None:
    entries = chain(3)
    forged = replace(entries[1], reason="forged")
    entries[1] = replace(forged, hash=ledger.chain_hash(forged))
    assert verify(entries).sequence == 3  # type: ignore[union-attr]


@given(st.integers(2, 8), st.data())
def test_a_deleted_entry_is_named(count: int, data: st.DataObject) -> None:
    entries = chain(count)
    gone = data.draw(st.integers(0, count - 2))
    broken = verify(entries[:gone] + entries[gone + 1 :])
    assert broken is not None
    assert broken.sequence == gone + 1
    assert "deleted" in broken.reason


def test_the_cut_off_end_shows_only_against_a_head_or_a_receipt() -> None:
    entries = chain(5)
    assert verify(entries[:3]) is None
    for broken in (verify(entries[:3], head=entries[-1].receipt), verify(entries[:3], receipts=[entries[3].receipt])):
        assert broken is not None
        assert broken.sequence == 4
        assert "missing" in broken.reason


def test_a_rewritten_chain_fails_against_a_receipt() -> None:
    noted = chain(3)[1].receipt
    rewritten = [seal(new(1), None)]
    rewritten.append(seal(new(2, reason="other"), rewritten[0].receipt))
    assert verify(rewritten) is None
    assert verify(rewritten, receipts=[noted]).sequence == 2  # type: ignore[union-attr]
    assert verify(rewritten, head=Receipt(2, noted.hash)) is not None


def test_swapped_and_repeated_entries_are_found() -> None:
    entries = chain(4)
    assert verify([entries[0], entries[2], entries[1], entries[3]]).sequence == 2  # type: ignore[union-attr]
    assert verify([entries[0], entries[0]]).sequence == 1  # type: ignore[union-attr]


def test_time_is_stored_in_utc() -> None:
    local = datetime(2013, 3, 1, 1, 0, tzinfo=timezone(timedelta(hours=-5)))
    entry = seal(new(1, time=local), None)
    assert entry.time_iso == "2013-03-01T06:00:00.000000+00:00"
    assert entry.time == local


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": ""}, "kind is empty"),
        ({"key": ""}, "key is empty"),
        ({"model": 7}, "model is 7"),
        ({"reason": "a\x00b"}, "reason holds a NUL"),
        ({"reason": "\ud800"}, "reason is not valid Unicode"),
        ({"time": datetime(2013, 3, 1)}, "time is"),
        ({"evidence": [1]}, "evidence is list"),
        ({"evidence": {"a": {"b": [1.0, float("nan")]}}}, r"evidence\.a\.b\[1\] is nan"),
        ({"evidence": {"a": {1: 2}}}, r"evidence\.a has the key 1"),
        ({"evidence": {"a": object()}}, r"evidence\.a is a object"),
        ({"evidence": {"a": "\ud800"}}, r"evidence\.a is not valid Unicode"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(LedgerError, match=message):
        new(1, **changes)


@given(
    st.dictionaries(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False, allow_infinity=False))
)
def test_canonical_json_reads_back_and_ignores_order(value: dict[str, float]) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(dict(reversed(value.items()))) == text


def test_unreadable_evidence_names_the_entry() -> None:
    entry = replace(chain(1)[0], evidence_json="{")
    with pytest.raises(LedgerError, match="entry 1"):
        _ = entry.evidence
    assert verify([entry]) is not None


def test_what_was_live_at_a_time_and_why() -> None:
    steps = [Routes.all_to("1"), Routes.split({"1": 95, "2": 5}), Routes.split({"1": 95, "2": 5}), Routes.all_to("2", warm=["1"])]
    entries: list[Entry] = []
    for hour, routes in enumerate(steps):
        made = new(hour + 1, kind=ledger.ROLLOUT_STEP, evidence={"routes": routes.to_json()}, reason=f"step {hour}")
        entries.append(seal(made, entries[-1].receipt if entries else None))
    entries.append(seal(new(9, model="other", evidence={"routes": Routes.all_to("5").to_json()}), entries[-1].receipt))
    entries.append(seal(new(10), entries[-1].receipt))

    assert live_at(entries, "flight_delay", T0) is None
    assert live_at(entries, "flight_delay", T0 + timedelta(hours=1)).version == "1"  # type: ignore[union-attr]
    during = live_at(entries, "flight_delay", T0 + timedelta(hours=3, minutes=30))
    assert during is not None
    assert (during.version, during.routes.percent("2"), during.entry.reason) == ("1", 5.0, "step 1")
    assert during.since == T0 + timedelta(hours=2)
    assert live_at(entries, "flight_delay", T0 + timedelta(days=9)).version == "2"  # type: ignore[union-attr]


def routed(*steps: tuple[str, str, Routes | None, str | None]) -> list[Entry]:
    """A ledger of (kind, version, routes, champion), an hour between two entries."""
    entries: list[Entry] = []
    for hour, (kind, version, routes, champion) in enumerate(steps):
        evidence = {"routes": routes and routes.to_json(), "champion": champion}
        made = new(hour, kind=kind, subject=version, evidence=evidence, reason=f"why {hour}")
        entries.append(seal(made, entries[-1].receipt if entries else None))
    return entries


def at(entries: list[Entry], hours: float) -> ledger.Live:
    found = live_at(entries, "flight_delay", T0 + timedelta(hours=hours))
    assert found is not None
    return found


def test_what_was_live_with_every_share_and_what_made_the_champion() -> None:
    entries = routed(
        (ledger.PROMOTION, "3", Routes.all_to("3"), "3"),
        (ledger.ROLLOUT_STARTED, "4", Routes.all_to("3", warm=["4"]), "3"),
        (ledger.ROLLOUT_STEP, "4", Routes.split({"3": 50, "3@baseline": 10, "4": 40}), "3"),
        (ledger.ROLLOUT_ERROR, "4", Routes.split({"3": 50, "3@baseline": 10, "4": 40}), "3"),
        (ledger.ROLLOUT_STEP, "4", Routes.split({"3": 0, "4": 100}), "3"),
        (ledger.ROLLBACK, "4", Routes.all_to("3"), "3"),
        (ledger.ROLLOUT_STEP, "5", Routes.split({"3": 50, "5": 50}), "3"),
        (ledger.PROMOTION, "5", Routes.all_to("5", warm=["3"]), "5"),
        (ledger.ROLLBACK, "3", Routes.all_to("3"), "3"),
    )
    told = [at(entries, hour + 0.5) for hour in range(len(entries))]
    assert [t.shares for t in told[1:4]] == [{"3": 100}, {"3": 60, "4": 40}, {"3": 60, "4": 40}]
    assert [t.version for t in told] == ["3", "3", "3", "3", "4", "3", "3", "5", "3"]
    assert [t.entry.reason for t in told] == [f"why {n}" for n in (0, 0, 2, 2, 4, 5, 6, 7, 8)], (
        "an arm that only runs changes nothing"
    )
    assert [t.since for t in told] == [t.entry.time for t in told]
    assert [t.champion for t in told] == ["3", "3", "3", "3", "3", "3", "3", "5", "3"]
    assert [t.crowned and t.crowned.sequence for t in told] == [1, 1, 1, 1, 1, 1, 1, 8, 9]
    assert told[1].routes == Routes.all_to("3", warm=["4"]), "the routes are those of the moment, warm arms included"


def test_a_copy_or_a_header_changes_since_when_requests_go_as_they_do() -> None:
    entries = routed(
        (ledger.PROMOTION, "3", Routes.all_to("3"), "3"),
        (ledger.ROLLOUT_STEP, "4", Routes.split({"3": 100}, mirror=Mirror("4")), "3"),
        (ledger.ROLLOUT_STEP, "4", Routes.split({"3": 100}, match=Match("x-arm", "4", "4")), "3"),
    )
    assert [at(entries, hour).entry.sequence for hour in range(3)] == [1, 2, 3]


def test_nothing_is_live_after_a_first_deployment_that_failed() -> None:
    entries = routed(
        (ledger.ROLLOUT_STEP, "1", Routes.all_to("1"), None),
        (ledger.ROLLBACK, "1", None, None),
    )
    assert (at(entries, 0.5).champion, at(entries, 0.5).crowned) == (None, None)
    assert live_at(entries, "flight_delay", T0 + timedelta(hours=2)) is None


def test_the_later_decision_counts() -> None:
    yes = seal(new(3), None)
    no = seal(new(3, kind=ledger.REJECTION, key="rejection/3"), yes.receipt)
    assert ledger.approval_of([yes, no], "flight_delay", "3") == no
    assert ledger.approval_of([yes], "flight_delay", "3") == yes
    assert ledger.approval_of([yes, no], "flight_delay", "4") is None
