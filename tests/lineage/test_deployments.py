import datetime as dt

import pytest

from mlops_dagster.core.ledger import NewEntry, seal
from mlops_dagster.core.routes import Mirror, Routes
from mlops_dagster.lineage.deployments import spells

BEGIN = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)


def at(hour: int) -> dt.datetime:
    return BEGIN + dt.timedelta(hours=hour)


@pytest.fixture
def entries():
    told = [
        {"routes": None},
        {"routes": Routes.all_to("1").to_json()},
        {"routes": Routes.split({"1": 90, "2": 10}).to_json()},
        {"gate": "passed"},
        {"routes": Routes.all_to("2", warm=["1"]).to_json()},
        {"routes": Routes.split({"2": 100}, mirror=Mirror("3")).to_json()},
        {"routes": Routes.all_to("1").to_json()},
    ]
    made, head = [], None
    for hour, evidence in enumerate(told):
        made.append(seal(NewEntry("step", "m", "1", "rollout", at(hour), "", evidence, f"k{hour}"), head))
        head = made[-1].receipt
    return made


def test_a_spell_lasts_from_the_first_to_the_last_routes_that_name_a_version(entries):
    found = [(s.version, s.since, s.until, s.began.sequence) for s in spells(entries, "m")]
    assert found == [
        ("1", at(1), at(5), 2),
        ("2", at(2), at(6), 3),
        ("3", at(5), at(6), 6),
        ("1", at(6), None, 7),
    ]


def test_a_spell_covers_its_beginning_but_not_its_end(entries):
    one = spells(entries, "m")[0]
    assert [one.covers(at(h)) for h in (0, 1, 4, 5)] == [False, True, True, False]


def test_another_models_entries_are_none_of_ours(entries):
    assert spells(entries, "other") == []


def test_a_first_deployment_that_failed_serves_no_more(entries):
    failed = seal(NewEntry("rollback", "m", "1", "rollout", at(9), "", {"routes": None}, "failed"), entries[-1].receipt)
    assert [s.until for s in spells([*entries, failed], "m")][-1] == at(9)
