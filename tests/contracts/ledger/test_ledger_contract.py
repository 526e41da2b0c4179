"""What every ledger backend promises, on the real databases."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from mlops_dagster.core.errors import DeclarationError, LedgerError, StorageError
from mlops_dagster.core.ledger import NewEntry, Receipt, seal
from mlops_dagster.resources.ledger.sql import SqlLedger

T0 = datetime(2013, 3, 1, tzinfo=UTC)
ODD = {
    "é": 'Zürich ✈ 日本\u2028\t\x00"\\',
    "floats": [0.1, 1e-7, 1e22, -0.0, 3.0, 5e-324],
    "big": 2**70,
    "none": None,
    "yes": True,
}

WRITER = """
import sys
from datetime import UTC, datetime
from mlops_dagster.core.ledger import NewEntry
from mlops_dagster.resources.ledger.sql import SqlLedger
url, writer, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
ledger = SqlLedger(url)
for number in range(count):
    for key in (f"own/{writer}/{number}", f"shared/{number}"):
        entry = ledger.append(NewEntry("approval", "m", "1", writer, datetime.now(UTC), "", {"n": number}, key))
        print(entry.sequence, entry.hash, flush=True)
"""


def new(number: int, **changes) -> NewEntry:
    fields = {
        "kind": "approval",
        "model": "flight_delay",
        "subject": str(number),
        "actor": "ada",
        "time": T0 + timedelta(hours=number),
        "reason": "gut",
        "evidence": ODD,
        "key": f"approval/{number}",
    }
    return NewEntry(**{**fields, **changes})


def writer(url: str, name: str, count: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url, name, str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def execute(url: str, *statements: str) -> None:
    """What a person with the database's own client can do."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def unguard(url: str) -> None:
    if url.startswith("sqlite"):
        execute(url, "DROP TRIGGER ledger_no_update", "DROP TRIGGER ledger_no_delete")
    else:
        execute(url, "DROP TRIGGER ledger_no_change ON ledger_entries")


@pytest.fixture
def tampered(url: str, ledger: SqlLedger) -> Callable[..., None]:
    """Five entries whose guards have been removed by hand."""
    for number in range(1, 6):
        ledger.append(new(number))
    unguard(url)
    return lambda *statements: execute(url, *statements)


def test_an_empty_ledger(ledger: SqlLedger) -> None:
    assert ledger.entries() == []
    assert ledger.head() is None
    assert ledger.find("approval/1") is None
    assert ledger.verify() is None


def test_what_is_appended_is_read_back_the_same(ledger: SqlLedger, url: str) -> None:
    appended = [ledger.append(new(number)) for number in range(1, 4)]
    other = SqlLedger(url)
    assert other.entries() == appended
    assert other.head() == appended[-1].receipt
    assert other.find("approval/2") == appended[1]
    assert appended[0].evidence == ODD
    assert other.verify(entry.receipt for entry in appended) is None
    other.close()


def test_the_hash_does_not_depend_on_the_database(ledger: SqlLedger) -> None:
    first = ledger.append(new(1))
    assert first == seal(new(1), None)
    assert ledger.append(new(2)) == seal(new(2), first.receipt)
    assert first.hash == "c489267a7af678a710f0d6f3e587ea0001ee9480dfaaea2cc2ec8b7371c021e4"


def test_the_same_key_again_changes_nothing(ledger: SqlLedger) -> None:
    first = ledger.append(new(1))
    ledger.append(new(2))
    assert ledger.append(new(1, reason="another", time=T0 + timedelta(days=3))) == first
    assert len(ledger.entries()) == 2
    assert ledger.verify() is None


def test_entries_are_filtered_and_ordered(ledger: SqlLedger) -> None:
    for number, (model, kind) in enumerate([("a", "x"), ("b", "x"), ("a", "y"), ("a", "x")], start=1):
        ledger.append(new(number, model=model, kind=kind))
    assert [e.sequence for e in ledger.entries(model="a")] == [1, 3, 4]
    assert [e.sequence for e in ledger.entries(model="a", kind="x")] == [1, 4]
    assert [e.sequence for e in ledger.entries(after=2)] == [3, 4]
    assert [e.sequence for e in ledger.entries(model="a", kind="x", after=1)] == [4]
    assert ledger.entries(model="nobody") == []


def test_eight_processes_lose_nothing(url: str) -> None:
    """Nobody has opened the ledger before: making the tables is part of the race."""
    count = 12
    running = [writer(url, str(number), count) for number in range(8)]
    answers = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * 8, answers
    ledger = SqlLedger(url)
    entries = ledger.entries()
    keys = [entry.key for entry in entries]
    assert sorted(keys) == sorted(
        [f"own/{w}/{n}" for w in range(8) for n in range(count)] + [f"shared/{n}" for n in range(count)]
    )
    assert ledger.verify() is None
    told = {tuple(line.split()) for out, _ in answers for line in out.splitlines()}
    assert told == {(str(entry.sequence), entry.hash) for entry in entries}
    ledger.close()


def test_threads_of_one_process_lose_nothing(ledger: SqlLedger) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: ledger.append(new(number % 20)), range(60)))
    assert len(ledger.entries()) == 20
    assert ledger.verify() is None


def test_a_killed_writer_leaves_a_whole_chain(url: str, ledger: SqlLedger) -> None:
    process = writer(url, "victim", 100_000)
    assert process.stdout is not None
    told = [process.stdout.readline().split() for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    assert ledger.verify() is None
    kept = {(str(entry.sequence), entry.hash) for entry in ledger.entries()}
    assert {tuple(line) for line in told} <= kept
    ledger.append(new(1))
    assert ledger.verify() is None


@pytest.mark.parametrize(
    "statement",
    ["UPDATE ledger_entries SET reason = 'forged' WHERE sequence = 1", "DELETE FROM ledger_entries WHERE sequence = 1"],
)
def test_a_slip_of_the_hand_is_stopped(url: str, ledger: SqlLedger, statement: str) -> None:
    ledger.append(new(1))
    with pytest.raises(DBAPIError, match="append-only"):
        execute(url, statement)
    assert ledger.verify() is None


def test_emptying_the_table_is_stopped(url: str, ledger: SqlLedger) -> None:
    ledger.append(new(1))
    with pytest.raises(DBAPIError, match="append-only"):
        execute(url, "DELETE FROM ledger_entries" if url.startswith("sqlite") else "TRUNCATE ledger_entries")


@pytest.mark.parametrize(
    ("statement", "sequence", "reason"),
    [
        ("UPDATE ledger_entries SET reason = 'forged' WHERE sequence = 3", 3, "changed"),
        ("UPDATE ledger_entries SET evidence = '{\"accuracy\":1.0}' WHERE sequence = 2", 2, "changed"),
        ("UPDATE ledger_entries SET evidence = 'no json' WHERE sequence = 2", 2, "changed"),
        ("UPDATE ledger_entries SET time = 'yesterday' WHERE sequence = 5", 5, "changed"),
        ("DELETE FROM ledger_entries WHERE sequence = 2", 2, "deleted"),
        ("DELETE FROM ledger_entries WHERE sequence = 1", 1, "deleted"),
        ("DELETE FROM ledger_entries WHERE sequence > 3", 4, "missing"),
        ("DELETE FROM ledger_entries", 1, "missing"),
        ("UPDATE ledger_entries SET sequence = 9 WHERE sequence = 4", 4, "deleted"),
        ("DELETE FROM ledger_head", 5, "head"),
        ("UPDATE ledger_head SET sequence = 4", 5, "head"),
    ],
)
def test_what_was_done_by_hand_is_found_and_named(
    ledger: SqlLedger, tampered, statement: str, sequence: int, reason: str
) -> None:
    assert ledger.verify() is None
    tampered(statement)
    broken = ledger.verify()
    assert broken is not None
    assert broken.sequence == sequence
    assert reason in broken.reason


def test_an_end_cut_off_with_its_head_shows_against_a_receipt_only(ledger: SqlLedger, tampered) -> None:
    kept, third = ledger.head(), ledger.entries()[2].receipt
    assert kept is not None
    tampered("DELETE FROM ledger_entries WHERE sequence > 3", f"UPDATE ledger_head SET sequence = 3, hash = '{third.hash}'")
    assert ledger.verify() is None
    broken = ledger.verify([kept])
    assert broken is not None
    assert broken.sequence == 4


def test_appending_to_a_cut_off_end_keeps_the_gap(ledger: SqlLedger, tampered) -> None:
    tampered("DELETE FROM ledger_entries WHERE sequence = 5")
    assert ledger.append(new(6)).sequence == 6
    broken = ledger.verify()
    assert broken is not None
    assert broken.sequence == 5


def test_entries_stay_readable_when_one_was_edited(ledger: SqlLedger, tampered) -> None:
    tampered("UPDATE ledger_entries SET evidence = 'no json' WHERE sequence = 2")
    entries = ledger.entries()
    assert len(entries) == 5
    with pytest.raises(LedgerError, match="entry 2"):
        _ = entries[1].evidence


@pytest.mark.parametrize("url", ["mysql://u@h/d", "sqlite://", "nonsense", "postgresql+nodriver://u@h/d"])
def test_a_wrong_url_says_what_is_right(url: str) -> None:
    with pytest.raises(DeclarationError, match="sqlite:////path"):
        SqlLedger(url)


def test_a_password_is_not_told() -> None:
    with pytest.raises(DeclarationError) as caught:
        SqlLedger("mysql://user:hunter2@host/database")
    assert "hunter2" not in str(caught.value)


def test_an_unreachable_server_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="refused"):
        SqlLedger("postgresql+psycopg://nobody@127.0.0.1:1/none?connect_timeout=2")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="folder"):
        SqlLedger(f"sqlite:///{tmp_path}/file/ledger.db")


def test_a_full_disk_writes_nothing(tmp_path: Path) -> None:
    ledger = SqlLedger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.append(new(1))

    def small(connection: object, _record: object) -> None:
        connection.execute("PRAGMA max_page_count = 20")  # type: ignore[attr-defined]

    event.listen(ledger._engine, "connect", small)
    with pytest.raises(StorageError, match="full"):
        ledger.append(new(2, evidence={"text": "x" * 1_000_000}))
    assert len(ledger.entries()) == 1
    assert ledger.verify() is None
    ledger.append(new(3))
    assert ledger.head() == Receipt(2, ledger.entries()[-1].hash)


def test_reading_does_not_wait_for_a_writer(url: str, ledger: SqlLedger) -> None:
    ledger.append(new(1))
    with ledger._writing():
        begin = time.monotonic()
        assert len(SqlLedger(url).entries()) == 1
        assert time.monotonic() - begin < 2
