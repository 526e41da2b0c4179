import pytest

from mlops_dagster.lineage import origins
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.data_versions import dvc_files
from tests.lineage.feature_life import History, day, feature, raw


@pytest.fixture
def history(tmp_path):
    return History(FolderLake(root=str(tmp_path / "lake")), tmp_path, None)


@pytest.fixture
def read(monkeypatch):
    """The `.dvc` files that were read, one text each."""
    texts, real = [], dvc_files.md5_in
    monkeypatch.setattr(dvc_files, "md5_in", lambda text: [texts.append(text), real(text)][1])
    return texts


def test_what_a_stage_holds_of_some_days_is_read_of_these_days_alone(history, read):
    found = origins.recorded(history.versions, "m", "features", day(4), day(6), without=[day(5)])
    keys = [feature(4), feature(6), *(f"m/origins/features/{day(n)}.json" for n in (4, 6))]
    assert (sorted(found), len(read)) == (sorted(keys), 4)
    assert found.items() <= history.versions.contents().items()


def test_what_a_training_set_was_made_of_is_read_of_its_days_alone(history, read):
    used, other = origins.raw_used(history.lake, history.versions, "m", [day(8), day(9)], 1, ())
    # Features of 7 … 9, and the raw days of the rows, 8 and 9, whose validation left no origins.
    assert len(read) == 3 + 2
    assert sorted(used) == [raw(n) for n in range(6, 10)]
    assert sorted(other) == [raw(8), raw(9)], "the rows are of what is recorded, the features of what they were made of"


@pytest.mark.parametrize(
    ("prefix", "wanted"),
    [
        (("m/features/", "m/raw_data/"), lambda key: key.startswith(("m/features/", "m/raw_data/"))),
        (
            ("m/features/v/2024-01-0", "m/training_set/"),
            lambda key: key.startswith(("m/features/v/2024-01-0", "m/training_set/")),
        ),
        (("m/features/", "other/"), lambda key: key.startswith("m/features/")),
        ((), lambda key: False),
    ],
)
def test_a_history_of_several_prefixes_is_that_of_all_without_the_rest(history, prefix, wanted):
    history.training_set(5, 6, "a")
    history.taken_out([3, 12])
    whole = [(r.commit, {key: md5 for key, md5 in r.files.items() if wanted(key)}) for r in history.versions.history()]
    assert [(r.commit, r.files) for r in history.versions.history(prefix)] == [(c, files) for c, files in whole if files]


def test_a_history_of_some_keys_leaves_out_revisions_without_them(history):
    history.taken_out([3])
    found = history.versions.history("m/", only=lambda key: key == feature(3))
    assert next([*r.files.items()] for r in found) == [(feature(3), None)]
    assert [[*r.files] for r in found] == [[feature(3)], [feature(3)]]
