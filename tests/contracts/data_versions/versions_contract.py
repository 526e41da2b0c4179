"""What every keeper of data versions must do. A backend's test module subclasses this and gives `lake` and `versions`."""

import datetime as dt
from collections.abc import Callable

import pyarrow as pa
import pytest

from mlops_dagster.core.errors import DataError, NotFoundError
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_versions import DataVersions

DAYS = [f"m/raw_data/flights/2013-01-{day:02}.parquet" for day in range(1, 6)]
OTHER = "n/features/weather/2013-01-01.parquet"


def table(n: int) -> pa.Table:
    return pa.table({"n": range(n, n + 10)})


class VersionsContract:
    def test_a_record_names_each_files_hash(self, lake: Lake, versions: DataVersions) -> None:
        for n, key in enumerate(DAYS):
            lake.write(key, table(n))
        made = versions.record(DAYS, "Ingest five days")
        assert list(made.files) == DAYS
        assert len({md5 for md5 in made.files.values() if md5 and len(md5) == 32}) == 5
        assert made.message == "Ingest five days"
        assert made.at.tzinfo is dt.UTC

    def test_recording_the_same_content_again_makes_no_revision(self, lake: Lake, versions: DataVersions) -> None:
        lake.write(DAYS[0], table(0))
        lake.write(OTHER, table(0))
        first = versions.record([DAYS[0]], "first")
        other = versions.record([OTHER], "other")
        lake.write(DAYS[0], table(0))
        assert versions.record([DAYS[0]], "again") == first
        assert versions.record([OTHER], "again") == other
        assert [made.message for made in versions.history("m/")] == ["first"]

    def test_the_history_of_a_prefix_is_newest_first_and_only_its_own(self, lake: Lake, versions: DataVersions) -> None:
        for n in range(3):
            lake.write(DAYS[0], table(n))
            lake.write(OTHER, table(n))
            versions.record([DAYS[0], OTHER], f"round {n}")
        lake.write(DAYS[1], table(9))
        versions.record([DAYS[1]], "a new day")
        history = versions.history("m/raw_data/flights/2013-01-01")
        assert [made.message for made in history] == ["round 2", "round 1", "round 0"]
        assert [list(made.files) for made in history] == [[DAYS[0]]] * 3
        assert [made.message for made in versions.history("m/raw", limit=2)] == ["a new day", "round 2"]
        assert len(versions.history()) == 4
        assert versions.history("nothing/") == []

    def test_before_the_first_record_there_is_no_history(self, versions: DataVersions) -> None:
        assert versions.history() == []
        assert versions.contents() == {}
        assert versions.push() == 0
        with pytest.raises(NotFoundError):
            versions.restore(DAYS[0])

    def test_every_revisions_bytes_can_be_had_again(self, lake: Lake, versions: DataVersions) -> None:
        made = []
        for n in range(3):
            lake.write(DAYS[0], table(n))
            made.append((versions.record([DAYS[0]], f"{n}"), lake.read_bytes(DAYS[0])))
        for revision, content in made:
            assert versions.restore(DAYS[0], revision.commit).read_bytes() == content
            assert versions.restore(DAYS[0], revision.commit[:10]).read_bytes() == content
        assert lake.read_bytes(DAYS[0]) == made[-1][1]

    def test_contents_are_as_of_a_revision_or_a_moment(
        self, lake: Lake, versions: DataVersions, at: Callable[[float], None]
    ) -> None:
        for n, key in enumerate(DAYS[:3]):
            at(1_000_000 + n * 60)
            lake.write(key, table(n))
            versions.record([key], key)
        moment = dt.datetime.fromtimestamp(1_000_000 + 65, dt.UTC)
        assert list(versions.contents("m/", moment)) == DAYS[:2]
        assert list(versions.contents("m/raw_data/flights/2013-01-03")) == [DAYS[2]]
        assert versions.contents("m/") == {key: versions.history(key)[0].files[key] for key in DAYS[:3]}
        with pytest.raises(NotFoundError, match="begins later"):
            versions.contents("m/", dt.datetime(1960, 1, 1, tzinfo=dt.UTC))

    def test_a_file_that_left_the_lake_is_recorded_as_removed(self, lake: Lake, versions: DataVersions) -> None:
        lake.write(DAYS[0], table(0))
        before = versions.record([DAYS[0]], "in")
        lake.delete(DAYS[0])
        assert versions.record([DAYS[0]], "out").files == {DAYS[0]: None}
        assert versions.contents() == {}
        assert versions.restore(DAYS[0], before.commit).read_bytes()
        with pytest.raises(NotFoundError, match="not tracked at revision"):
            versions.restore(DAYS[0])

    def test_an_unknown_key_is_refused_and_nothing_is_recorded(self, lake: Lake, versions: DataVersions) -> None:
        lake.write(DAYS[0], table(0))
        with pytest.raises(NotFoundError, match="2013-01-05"):
            versions.record([DAYS[0], DAYS[4]], "typo")
        assert versions.history() == []
        with pytest.raises(DataError, match="none given"):
            versions.record([], "nothing")

    def test_an_unknown_revision_is_refused(self, lake: Lake, versions: DataVersions) -> None:
        lake.write(DAYS[0], table(0))
        versions.record([DAYS[0]], "in")
        for revision in ("deadbeef", "not a commit", "0" * 40):
            with pytest.raises(NotFoundError, match="no such commit"):
                versions.restore(DAYS[0], revision)

    def test_pushing_sends_every_recorded_version_once(self, lake: Lake, versions: DataVersions) -> None:
        for n in range(3):
            lake.write(DAYS[0], table(n))
            versions.record([DAYS[0]], f"{n}")
        assert versions.push() == 3
        assert versions.push() == 0
        lake.write(DAYS[1], table(7))
        versions.record([DAYS[1]], "one more")
        assert versions.push() == 1
