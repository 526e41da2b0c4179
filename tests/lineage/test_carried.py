"""A training set is judged by what the features held when it was made, not by what they ever held or hold now."""

import pytest

from mlops_dagster.resources.data_lake.folder import FolderLake
from tests.lineage.feature_life import BAD, LOOKBACK, History, feature

REACHED = range(BAD.day, BAD.day + LOOKBACK + 1)


@pytest.fixture
def history(tmp_path):
    return History(FolderLake(root=str(tmp_path / "lake")), tmp_path, None)


def quarantined(history, depots=("a", "b")) -> None:
    """The bad day is taken out and its features are made again without it."""
    history.taken_out(REACHED)
    history.made({n: [*depots] for n in REACHED}, without=[BAD.day])


@pytest.mark.parametrize("window", [(5, 7), (8, 10)])
def test_of_two_training_sets_the_one_that_was_made_after_the_quarantine_is_not_blamed(history, window):
    old = history.training_set(*window, "a", "b", name="old")
    quarantined(history)
    new = history.training_set(*window, "a", "b", name="new", without=[BAD.day])
    found = history.spread(old, new)
    assert [t["training_set"] for t in found.training_sets] == ["old"]
    assert [v["training_set"] for v in found.versions] == ["old"]


def test_a_window_that_begins_within_its_reach_is_not_blamed_for_what_was_there_before(history):
    quarantined(history)
    for first in (1, 3, 4, 5):
        history.training_set(first, 7, "a", "b", without=[BAD.day])
    assert history.carrying() == {}


@pytest.mark.parametrize(("ttl_days", "rows"), [(None, 3), (4, 1), (3, 0)])
def test_a_value_counts_up_to_its_ttl_in_a_set_that_was_made_before_it_was_taken_out(tmp_path, ttl_days, rows):
    history = History(FolderLake(root=str(tmp_path / "lake")), tmp_path, ttl_days)
    history.training_set(8, 10, "a", "b")
    quarantined(history, depots=["a"])
    history.training_set(8, 11, "a", "b")
    assert history.carrying() == ({"8-10": rows} if rows else {})


def test_taken_back_in_it_counts_again(history):
    quarantined(history)
    history.training_set(8, 9, "b")
    history.taken_out(REACHED)
    history.made({n: ["a", "b"] for n in REACHED})
    history.training_set(8, 10, "b")
    assert history.carrying() == {"8-10": 3}


def test_features_that_were_made_again_in_place_keep_its_rows(history):
    history.made({n: ["a", "b"] for n in REACHED}, without=[BAD.day])
    history.training_set(8, 10, "b")
    assert history.carrying() == {"8-10": 3}


def test_what_a_day_held_without_it_does_not_count_when_it_comes_back(history):
    quarantined(history)
    history.taken_out(REACHED)
    history.made({n: ["a", "b"] for n in REACHED})
    history.made({n: ["a", "b"] for n in REACHED}, without=[BAD.day])  # as a checkout does, in place and byte for byte
    history.training_set(8, 10, "b")
    assert history.carrying() == {}


def test_a_later_day_that_was_made_without_it_replaces_its_value(history):
    history.taken_out([4])
    history.made({4: ["b"]}, without=[BAD.day])
    history.training_set(8, 9, "b")
    history.training_set(8, 10, "a", "b")
    assert history.carrying() == {}
    history.taken_out([4])
    history.made({4: ["a"]}, without=[BAD.day])
    history.training_set(8, 11, "a", "b")
    assert history.carrying() == {"8-11": 4}


def test_a_value_that_came_later_did_not_replace_it_in_an_older_training_set(history):
    history.training_set(8, 9, "b")
    history.taken_out([6])
    history.made({6: ["a", "b"]})
    history.training_set(8, 10, "b")
    assert history.carrying() == {"8-9": 2}


def test_a_value_that_left_later_had_replaced_it_in_an_older_training_set(history):
    history.taken_out([6])
    history.made({6: ["a", "b"]})
    history.training_set(8, 9, "b")
    history.taken_out([6])
    history.made({6: ["a"]})
    history.training_set(8, 10, "b")
    assert history.carrying() == {"8-10": 3}


def test_where_nobody_can_tell_what_went_in_every_content_counts(history):
    quarantined(history)
    history.training_set(8, 10, "b", recorded=False)
    assert history.carrying() == {"8-10": 3}, "no revision says when it was made"
    history.training_set(4, 6, "a", "b", recorded=False, without=[BAD.day])
    assert history.carrying() == {"8-10": 3}, "its own record says that its features were made without the day"


def test_features_from_before_their_origins_were_kept_count(history):
    for key in history.lake.list("m/origins/features/"):
        history.lake.delete(key)
    history.versions.record([*history.versions.contents("m/origins/features/")], "none")
    history.taken_out(REACHED)
    history.made({n: ["a", "b"] for n in REACHED}, without=[BAD.day], kept=False)
    history.training_set(8, 10, "b")
    assert history.carrying() == {"8-10": 3}


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_rows_keep_the_zone_of_their_source(history, zone):
    history.training_set(8, 10, "b", zone=zone)
    assert history.carrying() == {"8-10": 3}


@pytest.mark.parametrize("recorded", [True, False])
def test_a_training_set_that_left_the_lake_is_looked_up_in_its_revision(history, recorded):
    history.training_set(8, 10, "b", recorded=recorded)
    history.lake.delete("m/training_set/8-10.parquet")
    assert history.carrying() == ({"8-10": 3} if recorded else {})


def test_a_content_that_the_lake_holds_otherwise_than_recorded_is_read_as_it_was(history):
    history.training_set(8, 10, "b")
    for number in REACHED:
        history.lake.delete(feature(number))  # by hand: no revision says so
    assert history.carrying() == {"8-10": 3}


def test_each_content_is_looked_up_once(history, monkeypatch):
    read = []
    real = type(history.lake).read_bytes
    monkeypatch.setattr(type(history.lake), "read_bytes", lambda self, key: [read.append(key), real(self, key)][1])
    for last in range(9, 14):
        history.training_set(8, last, "b")
    assert len(history.carrying()) == 5
    held = [key for key in read if key in map(feature, REACHED)]
    assert sorted(held) == [feature(n) for n in REACHED]
