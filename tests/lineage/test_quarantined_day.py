"""Through the stages: training sets of before and after a day was taken out, and a decision that arrives while one is recorded."""

import datetime as dt
import threading

import pytest

from mlops_dagster.assets import training_set
from mlops_dagster.assets.lake_paths import read_manifest
from mlops_dagster.lineage.affected import spread
from mlops_dagster.lineage.places import Places
from mlops_dagster.lineage.quarantine import Decision, impose
from tests.lifecycle.data_site import FIRST, Site

BAD = dt.date(2024, 1, 4)
BY = Decision("ana", "the scale broke", dt.datetime(2024, 2, 1, tzinfo=dt.UTC))


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("PARCELS_CSV", str(tmp_path / "parcels.csv"))
    made = Site(tmp_path)
    with made.instance:
        made.in_sync(FIRST)
        yield made


def affected(site) -> list[str]:
    places = Places(site.lake, lambda: site.lake, site.csv.parent / "segments", lambda model: [], lambda: ["late_parcel"])
    found = spread(places, site.lake, site.versions, [], "late_parcel", BAD, site.spec.features.lookback_days)
    return [t["training_set"] for t in found.training_sets] if found else []


def test_only_the_training_set_of_before_is_affected_and_a_decision_waits_for_its_record(site, monkeypatch):
    real, waited, changes = training_set._inputs, [], []

    def quarantine() -> None:
        changes.append(impose(site.spec, site.lake, site.versions, site.resources["ledger"], BAD, BY))

    decision = threading.Thread(target=quarantine)

    def interrupted(*arguments):
        decision.start()
        decision.join(1.0)
        waited.append(decision.is_alive())
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training_set, "_inputs", interrupted)
        site.train()
    decision.join()
    assert waited == [True]
    old = read_manifest(site.lake, site.spec, "training_set")["training_set"]
    assert affected(site) == [old]

    remade = changes[0].recompute
    assert remade[-1] == BAD + dt.timedelta(days=2)
    site.make("features", first=remade[0], last=remade[-1])
    site.train()
    new = read_manifest(site.lake, site.spec, "training_set")["training_set"]
    assert new != old
    assert affected(site) == [old]
