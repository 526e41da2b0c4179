import datetime as dt
import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from mlops_dagster.core.errors import DataError, NotFoundError, StorageError, TransientError
from mlops_dagster.lineage import checkout, origins, quarantine
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.data_lake.s3 import S3Lake
from mlops_dagster.resources.data_versions.dvc import DvcVersions
from mlops_dagster.resources.data_versions.dvc_bucket import BucketVersions
from tests.contracts.data_lake.s3_server import Server, s3_server

ONE, TWO, LATER = "m/raw_data/rows/2024-01-01.parquet", "m/features/v/2024-01-01.parquet", "m/raw_data/rows/2024-01-02.parquet"
MANIFEST = "m/training_set/current.json"


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture(params=["folder", "s3"])
def lake(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return FolderLake(root=str(tmp_path / "lake"))
    running: Server = request.getfixturevalue("server")
    for name, value in running.environment().items():
        monkeypatch.setenv(name, value)
    bucket = f"lineage-{uuid.uuid4().hex}"
    running.resource().get_client().create_bucket(Bucket=bucket)
    return S3Lake(s3=running.resource(), bucket=bucket, prefix="lake")


@pytest.fixture
def versions(lake, tmp_path):
    remote = str(tmp_path / "remote")
    if isinstance(lake, FolderLake):
        return DvcVersions(root=lake.root, remote=remote)
    return BucketVersions(root=str(tmp_path / "repository"), lake=lake, remote=remote)


@pytest.fixture
def first(lake, versions) -> str:
    """The commit of two files; afterwards one is changed, one removed and one added."""
    lake.write_bytes(ONE, b"one")
    lake.write_bytes(TWO, b"two")
    commit = versions.record([ONE, TWO], "first").commit
    lake.write_bytes(ONE, b"one, corrected")
    lake.write_bytes(LATER, b"later")
    lake.delete(TWO)
    versions.record([ONE, TWO, LATER], "second")
    lake.write_bytes(MANIFEST, b"{}")
    return commit


def held(lake) -> dict[str, bytes]:
    return {key: lake.read_bytes(key) for key in lake.list("m/")}


def test_the_lake_becomes_equal_to_the_revision_and_back_again(lake, versions, first):
    second = versions.history("m/")[0].commit
    done = checkout.in_lake(lake, versions, "m", first)
    assert (set(done.written), done.removed) == ({ONE, TWO}, (LATER,))
    assert held(lake) == {ONE: b"one", TWO: b"two", MANIFEST: b"{}"}
    checkout.in_lake(lake, versions, "m", second)
    assert held(lake) == {ONE: b"one, corrected", LATER: b"later", MANIFEST: b"{}"}


def test_a_checkout_is_a_revision_and_a_second_one_changes_nothing(lake, versions, first):
    done = checkout.in_lake(lake, versions, "m", first)
    assert versions.history("m/")[0].commit == done.commit
    again = checkout.in_lake(lake, versions, "m", first)
    assert (again.written, again.removed, again.equal, again.commit) == ((), (), 2, None)


def test_content_that_was_not_recorded_is_recorded_before_it_is_replaced(lake, versions, first):
    lake.write_bytes(ONE, b"not recorded")
    checkout.in_lake(lake, versions, "m", first)
    before = versions.history("m/")[1]
    assert before.message == "m: before a checkout"
    assert versions.restore(ONE, before.commit).read_bytes() == b"not recorded"


def test_a_checkout_that_was_killed_completes_when_it_is_run_again(lake, versions, first, monkeypatch):
    write, wrote = type(lake).write_bytes, []

    def killed(self, key, content):
        if wrote:
            raise KeyboardInterrupt
        wrote.append(key)
        return write(self, key, content)

    with monkeypatch.context() as patch:
        patch.setattr(type(lake), "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            checkout.in_lake(lake, versions, "m", first)
    checkout.in_lake(lake, versions, "m", first)
    assert held(lake) == {ONE: b"one", TWO: b"two", MANIFEST: b"{}"}


@pytest.mark.parametrize("record", [1, 2])
def test_one_that_was_killed_at_a_record_is_recorded_when_it_is_run_again(lake, versions, first, monkeypatch, record):
    lake.write_bytes(ONE, b"not recorded")
    real, calls = DvcVersions.record, []

    def killed(self, keys, message, **how):
        calls.append(message)
        if len(calls) == record:
            raise KeyboardInterrupt
        return real(self, keys, message, **how)

    with monkeypatch.context() as patch:
        patch.setattr(DvcVersions, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            checkout.in_lake(lake, versions, "m", first)
    checkout.in_lake(lake, versions, "m", first)
    assert versions.contents("m/") == versions.contents("m/", first)
    assert checkout.in_lake(lake, versions, "m", first).commit is None


def test_a_removal_whose_recorder_was_killed_after_the_dvc_file_had_gone_is_recorded(lake, versions, first):
    lake.delete(ONE)
    (Path(versions.root) / f"{ONE}.dvc").unlink()
    assert versions.record([ONE], "removed").files == {ONE: None}
    assert ONE not in versions.contents("m/")


STEPS = [("write_bytes", 0), ("write_bytes", 1), ("delete", 0), ("record", 0), ("record", 1), ("nothing", 0)]


@pytest.mark.parametrize(("step", "call"), STEPS)
def test_the_training_set_that_the_manifest_names_is_there_wherever_a_checkout_ends(
    lake, versions, first, monkeypatch, step, call
):
    rows, inputs = "m/training_set/0123456789abcdef.parquet", "m/training_set/inputs/0123456789abcdef.json"
    for key in (rows, inputs):
        lake.write_bytes(key, key.encode())
    versions.record([rows, inputs], "a training set")
    lake.write_bytes(MANIFEST, json.dumps({"key": rows, "inputs": {"key": inputs}}).encode())
    before, calls, newest = held(lake), [], versions.history("m/")[0].commit
    owner = DvcVersions if step == "record" else type(lake)

    def killed(self, *arguments):
        calls.append(arguments)
        if len(calls) > call:
            raise KeyboardInterrupt
        return real(self, *arguments)

    if step != "nothing":
        real = getattr(owner, step)
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, killed)
            with pytest.raises(KeyboardInterrupt):
                checkout.in_lake(lake, versions, "m", first)
        assert held(lake).keys() >= {rows, inputs, MANIFEST}
    checkout.in_lake(lake, versions, "m", first)
    kept = {key: before[key] for key in (rows, inputs, MANIFEST)}
    assert held(lake) == {ONE: b"one", TWO: b"two", **kept}
    assert versions.contents("m/").keys() == {ONE, TWO, rows, inputs}
    checkout.in_lake(lake, versions, "m", newest)
    assert held(lake) == before


def test_nothing_changes_where_the_bytes_of_the_revision_are_lost(lake, versions, first, monkeypatch):
    before = held(lake)

    def lost(self, key, revision=None):
        raise StorageError("neither here nor at the remote")

    monkeypatch.setattr(DvcVersions, "restore", lost)
    with pytest.raises(StorageError):
        checkout.in_lake(lake, versions, "m", first)
    assert held(lake) == before


def test_two_at_once_leave_one_of_their_revisions_and_not_a_mixture(lake, versions, first, monkeypatch):
    second, meet, write = versions.history("m/")[0].commit, threading.Barrier(2), type(lake).write_bytes
    for key in (ONE, LATER):
        lake.write_bytes(key, b"third")
    versions.record([ONE, LATER], "third")

    def met(self, key, content):
        with suppress(threading.BrokenBarrierError):
            meet.wait(1)  # each at its first file while the other is, if they are let
        return write(self, key, content)

    monkeypatch.setattr(type(lake), "write_bytes", met)
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(checkout.in_lake, lake, versions, "m", commit) for commit in (first, second)]
        assert all(one.result() for one in done)
    assert meet.broken
    states = [versions.contents("m/", commit) for commit in (first, second)]
    assert versions.contents("m/") in states
    assert held(lake) in [{ONE: b"one", TWO: b"two", MANIFEST: b"{}"}, {ONE: b"one, corrected", LATER: b"later", MANIFEST: b"{}"}]


def test_one_waits_for_a_decision_on_quarantine_and_says_so_when_it_does_not_end(lake, versions, first, monkeypatch):
    before = held(lake)
    monkeypatch.setattr(quarantine, "WAIT_SECONDS", 0.1)
    with quarantine.undecided(versions, "m"), pytest.raises(TransientError, match="held by another process"):
        checkout.in_lake(lake, versions, "m", first)
    assert held(lake) == before


def test_a_moment_is_a_revision(lake, versions):
    for seconds, content in ((1_000, b"then"), (2_000, b"now")):
        lake.write_bytes(ONE, content)
        versions.record([ONE], "m", clock=lambda at=seconds: at)
    checkout.in_lake(lake, versions, "m", dt.datetime.fromtimestamp(1_500, dt.UTC))
    assert lake.read_bytes(ONE) == b"then"


def test_a_copy_leaves_the_lake_alone_and_refuses_a_folder_of_other_files(lake, versions, first, tmp_path):
    before, copy = held(lake), FolderLake(root=str(tmp_path / "copy"))
    assert set(checkout.in_folder(copy, versions, "m", first).written) == {ONE, TWO}
    assert checkout.in_folder(copy, versions, "m", first).equal == 2
    assert (held(copy), held(lake)) == ({ONE: b"one", TWO: b"two"}, before)
    with pytest.raises(DataError, match=f"--to holds 2 files that are not of this revision, for example {TWO}; give an empty"):
        checkout.in_folder(copy, versions, "m", versions.history("m/")[0].commit)


def test_features_that_a_day_in_quarantine_went_into_do_not_come_back(lake, versions):
    files = {}
    for day in (1, 2, 3):
        made_of = {f"m/raw_data/rows/2024-01-0{d}.parquet": "md5" for d in (day, max(day - 1, 1))}
        files[day] = [
            f"m/features/v/2024-01-0{day}.parquet",
            origins.store(lake, "m", "features", dt.date(2024, 1, day), made_of),
        ]
        lake.write_bytes(files[day][0], b"with all")
    keys = [key for two in files.values() for key in two]
    commit = versions.record(keys, "features").commit
    decided = {"days": {"2024-01-01": {}}, "recompute": ["2024-01-01", "2024-01-02"]}
    lake.write_bytes("m/quarantine/raw_data.json", json.dumps(decided).encode())
    lake.delete(files[1][0])
    lake.write_bytes(files[2][0], b"made again without it")
    lake.delete(files[3][0])
    versions.record([two[0] for two in files.values()], "out")
    done = checkout.in_lake(lake, versions, "m", commit)
    assert (done.written, done.removed) == ((files[3][0],), ())
    assert files[1][0] not in held(lake)
    assert (held(lake)[files[2][0]], held(lake)[files[3][0]]) == (b"made again without it", b"with all")
    assert checkout.in_lake(lake, versions, "m", commit).commit is None


def test_what_is_in_quarantine_stays_there(lake, versions, first):
    lake.write_bytes("m/quarantine/raw_data.json", b'{"days": {}, "recompute": []}')
    versions.record(["m/quarantine/raw_data.json"], "out")
    checkout.in_lake(lake, versions, "m", first)
    assert lake.list("m/quarantine/") == ["m/quarantine/raw_data.json"]


def test_a_difference_names_each_key_once():
    assert checkout.diff({"a": "1", "b": "1", "c": "1"}, {"b": "2", "c": "1", "d": "1"}) == [
        ("removed", "a"),
        ("changed", "b"),
        ("added", "d"),
    ]


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("v3", "commit of 3"),
        ("3449705", "3449705"),
        ("2013-02-17", dt.datetime(2013, 2, 17, tzinfo=dt.UTC)),
        ("2013-02-17T12:00+01:00", dt.datetime(2013, 2, 17, 11, tzinfo=dt.UTC)),
    ],
)
def test_what_a_person_types_is_a_version_a_moment_or_a_commit(text, revision):
    assert checkout.revision_named(text, lambda number: f"commit of {number}") == revision


def test_what_is_none_of_them_is_told(versions, first):
    with pytest.raises(NotFoundError, match=r"revision '2013-02-30': neither a moment .*, nor v and a version"):
        checkout.revision_named("2013-02-30", str)
    with pytest.raises(NotFoundError, match="other has no tracked data at revision"):
        checkout.contents(versions, "other", first)
