"""A registered version keeps the features that it was trained with, until another version takes over."""

import pytest

from tests.lifecycle import foreign


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, dict]:
    """What each step of `definitions_life.py` saw."""
    return foreign.steps("definitions_life.py", foreign.make(tmp_path_factory.mktemp("elsewhere")))


def test_changed_definitions_do_not_change_what_the_live_version_answers(seen):
    assert seen["applied"]["request"] == [["weight_kg", "float64"], ["height_cm", "float64"]]
    assert isinstance(seen["before"]["answers"][0], dict), seen["before"]
    assert seen["after"]["answers"] == seen["before"]["answers"]


def test_the_definitions_leave_the_digest_of_the_artifact_reproducible(seen):
    assert seen["reproduced"]["artifact"]


def test_what_is_sent_beside_the_keys_counts_and_is_checked(seen):
    stored, sent, junk, unknown = seen["before"]["answers"]
    assert sent != stored
    assert "instances[0].weight is a string ('junk')" in junk
    assert "instances[0].height_cm is not a feature of this model" in unknown
