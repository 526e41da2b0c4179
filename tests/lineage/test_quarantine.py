import datetime as dt
import threading

import pyarrow as pa
import pytest

from mlops_dagster.assets.lake_paths import stored_days
from mlops_dagster.core.errors import DataError, NotFoundError, TransientError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.lineage import quarantine
from mlops_dagster.lineage.quarantine import Decision, impose, lift
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.data_versions.dvc import DvcVersions
from mlops_dagster.resources.ledger.sql import SqlLedger

DAYS = [dt.date(2024, 1, day) for day in range(1, 8)]
BAD = DAYS[2]
NOW = dt.datetime(2024, 2, 1, tzinfo=dt.UTC)


@pytest.fixture
def spec():
    return ModelSpec.model_validate(
        {
            "name": "m",
            "package": "tests.lineage",
            "source": {"read": ".x.x", "schema": ".x.x", "partitions": {"start": "2024-01-01"}},
            "features": {"define": ".x.x", "compute": ".x.x", "lookback_days": 2},
            "label": {"column": "late"},
            "training": {"train": ".x.x", "test_days": 1},
        }
    )


@pytest.fixture
def lake(tmp_path):
    return FolderLake(root=str(tmp_path / "lake"))


@pytest.fixture
def versions(lake):
    keys = [f"m/{stage}/rows/{day}.parquet" for stage in ("raw_data", "validated_data", "features") for day in DAYS]
    for key in keys:
        lake.write(key, pa.table({"key": [key]}))
    made = DvcVersions(root=lake.root)
    made.record(keys, "in")
    return made


@pytest.fixture
def ledger(tmp_path):
    return SqlLedger(f"sqlite:///{tmp_path / 'ledger.db'}")


def by(name: str) -> Decision:
    return Decision(name, "the scale broke", NOW)


def features(lake) -> list[int]:
    return [int(key[-10:-8]) for key in lake.list("m/features/")]


def make_features(lake, days) -> None:
    for day in days:
        lake.write(f"m/features/rows/{day}.parquet", pa.table({"made": ["again"]}))


def test_a_day_in_quarantine_is_no_validated_day_and_its_features_are_to_be_made_again(spec, lake, versions, ledger):
    change = impose(spec, lake, versions, ledger, BAD, by("ana"))
    assert BAD not in stored_days(lake, spec, "validated_data", "rows")
    assert BAD in stored_days(lake, spec, "raw_data", "rows"), "the bytes stay"
    assert change.recompute == tuple(DAYS[2:5])
    assert features(lake) == [1, 2, 6, 7]
    (entry,) = ledger.entries("m")
    assert (entry.kind, entry.subject, entry.actor, entry.reason) == ("quarantine", f"raw_data/{BAD}", "ana", "the scale broke")


def test_no_training_set_is_made_before_they_are(spec, lake, versions, ledger):
    impose(spec, lake, versions, ledger, BAD, by("ana"))
    with pytest.raises(
        DataError, match=r"2024-01-04 left the lake with a quarantine; materialize m/features for 2024-01-04 … 2024-01-04"
    ):
        quarantine.require_recomputed(lake, "m", [DAYS[0], DAYS[3], DAYS[6]])
    make_features(lake, [DAYS[3]])
    quarantine.require_recomputed(lake, "m", [DAYS[0], DAYS[3], DAYS[6]])


def test_said_twice_it_is_done_once(spec, lake, versions, ledger):
    impose(spec, lake, versions, ledger, BAD, by("ana"))
    make_features(lake, DAYS[2:5])
    again = impose(spec, lake, versions, ledger, BAD, by("bob"))
    assert (again.changed, again.recompute, again.entry.actor) == (False, (), "ana")
    assert len(ledger.entries("m")) == 1
    assert features(lake) == [1, 2, 3, 4, 5, 6, 7], "made again, so not taken out again"


def test_back_in_and_out_again(spec, lake, versions, ledger):
    impose(spec, lake, versions, ledger, BAD, by("ana"))
    make_features(lake, DAYS[2:5])
    for _ in range(2):
        change = lift(spec, lake, versions, ledger, BAD, by("bob"))
        assert change.recompute == tuple(DAYS[2:5])
    assert BAD in stored_days(lake, spec, "validated_data", "rows")
    assert impose(spec, lake, versions, ledger, BAD, by("cy")).changed
    assert [e.kind for e in ledger.entries("m")] == ["quarantine", "quarantine_lifted", "quarantine"]
    assert ledger.verify() is None


STEPS = [(FolderLake, "delete", 3), (FolderLake, "write_bytes", 2), (DvcVersions, "record", 3)]


@pytest.mark.parametrize(("owner", "step", "call"), [(o, s, n) for o, s, times in STEPS for n in range(times)])
def test_killed_half_way_it_completes(spec, lake, versions, ledger, monkeypatch, owner, step, call):
    real, calls = getattr(owner, step), []

    def killed(self, *arguments):
        calls.append(arguments)
        if len(calls) > call:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, killed)
        with pytest.raises(KeyboardInterrupt):
            impose(spec, lake, versions, ledger, BAD, by("ana"))
    change = impose(spec, lake, versions, ledger, BAD, by("bob"))
    done = (owner, step, call) == (DvcVersions, "record", 2)
    assert (change.changed, change.entry.actor, len(ledger.entries("m"))) == (not done, "ana", 1)
    assert change.recompute == tuple(DAYS[2:5])
    assert sorted(versions.contents("m/features/")) == lake.list("m/features/")
    assert quarantine.manifest_key("m") in versions.contents("m/quarantine/")
    assert (features(lake), quarantine.days(lake, "m")) == ([1, 2, 6, 7], {BAD})


def test_of_two_decisions_at_once_none_is_lost(spec, lake, versions, ledger, monkeypatch):
    read, other = quarantine.read, []

    def interrupted(*arguments):
        found = read(*arguments)
        if not other:
            other.append(threading.Thread(target=impose, args=(spec, lake, versions, ledger, DAYS[5], by("bob"))))
            other[0].start()
            other[0].join(1.0)
        return found

    monkeypatch.setattr(quarantine, "read", interrupted)
    impose(spec, lake, versions, ledger, BAD, by("ana"))
    other[0].join()
    assert quarantine.days(lake, "m") == {BAD, DAYS[5]}


def test_features_that_were_under_way_when_a_day_was_taken_out_are_not_stored(spec, lake, versions, ledger):
    known = quarantine.read(lake, "m")
    impose(spec, lake, versions, ledger, BAD, by("ana"))
    with (
        pytest.raises(TransientError, match="quarantine of raw_data/2024-01-03 of m changed while features were computed"),
        quarantine.unchanged(spec, lake, versions, [DAYS[4]], known),
    ):
        make_features(lake, [DAYS[4]])
    assert features(lake) == [1, 2, 6, 7]
    with quarantine.unchanged(spec, lake, versions, [DAYS[5], DAYS[1]], known):  # their look-back does not reach it
        make_features(lake, [DAYS[5]])


def test_a_decision_waits_for_features_that_are_being_stored(spec, lake, versions, ledger, monkeypatch):
    monkeypatch.setattr(quarantine, "WAIT_SECONDS", 0.1)
    with (
        quarantine.unchanged(spec, lake, versions, [DAYS[4]], quarantine.read(lake, "m")),
        pytest.raises(TransientError, match="held by another process"),
    ):
        impose(spec, lake, versions, ledger, BAD, by("ana"))
    assert (quarantine.days(lake, "m"), features(lake)) == (set(), [1, 2, 3, 4, 5, 6, 7])


def test_the_features_that_left_can_be_had_again(spec, lake, versions, ledger):
    impose(spec, lake, versions, ledger, BAD, by("ana"))
    before = versions.history("m/features/")[-1].commit
    assert versions.restore(f"m/features/rows/{BAD}.parquet", before).exists()


def test_a_first_day_leaves_nothing_to_compute_its_own_features_from(spec, lake, versions, ledger):
    assert impose(spec, lake, versions, ledger, DAYS[0], by("ana")).recompute == tuple(DAYS[1:3])


def test_days_that_never_were(spec, lake, versions, ledger):
    with pytest.raises(NotFoundError, match="m has no raw_data of 2030-01-01; it has 2024-01-01 … 2024-01-07"):
        impose(spec, lake, versions, ledger, dt.date(2030, 1, 1), by("ana"))
    with pytest.raises(NotFoundError, match="raw_data/2024-01-03 of m is not in quarantine; no day is"):
        lift(spec, lake, versions, ledger, BAD, by("ana"))
    assert ledger.entries("m") == []
