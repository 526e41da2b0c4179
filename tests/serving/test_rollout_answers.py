"""What rollouts read of answers: the gateway's unit log, rows by their time of logging, and a tally that counts once."""

import datetime as dt
import itertools
import json
import os
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest

from mlops_dagster.assets import rollout, rollout_evidence, rollout_versions
from mlops_dagster.core import rollout as engine
from mlops_dagster.core.analysis import Verdict
from mlops_dagster.core.answers import Agreement
from mlops_dagster.core.errors import MlopsError, StorageError
from mlops_dagster.core.measurements import Counters, Measurements
from mlops_dagster.core.rollout_gates import Outcome
from mlops_dagster.core.routes import Routes, Sticky
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.inference_segments import FolderSegments
from mlops_dagster.resources.live_metrics import Reading
from mlops_dagster.resources.live_metrics.tally import SPREAD, Tally, Unit
from mlops_dagster.resources.live_metrics.units import read_units
from mlops_dagster.resources.serving import ArmState, Observed, Phase, ServingOptions
from mlops_dagster.resources.serving.adopt import Record
from mlops_dagster.resources.serving.envoy_config import Published, route_configuration
from mlops_dagster.resources.serving.gateway import UNITS_KEPT_SECONDS, EnvoyFiles
from mlops_dagster.resources.serving.state import Folder, write_json
from mlops_dagster.serving import artifact
from mlops_dagster.serving.segments import SegmentWriter, schema
from tests.lifecycle.rollout_site import spec_of

T0 = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)


def at(seconds: float) -> dt.datetime:
    return T0 + dt.timedelta(seconds=seconds)


def line(seconds: float, number: int, model: str = "m", arm: str = "m/2|1") -> str:
    moment = f"{at(seconds).timestamp():.6f}"
    said = {"at": moment, "model": model, "request_id": f"r{number}", "key": f"k {number}", "arm": arm, "status": 200}
    return json.dumps(said) + "\n"


def test_the_unit_log_is_read_by_time_over_two_files_without_what_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "units.jsonl"
    path.with_suffix(".1.jsonl").write_text("".join(line(number / 10, number) for number in range(20_000)))
    later = "".join(line(2000 + number / 10, 20_000 + number) for number in range(20_000))
    path.write_text(later + line(2000.5, 1, model="other") + "{damaged\n" + line(2000.05, 99_999)[:40])
    found = read_units(path, "m", at(1990), at(2010))
    assert found["request_id"].to_pylist() == [f"r{number}" for number in range(19_901, 20_101)]
    assert set(found["arm"].to_pylist()) == {"2"}
    assert read_units(path, "m", at(5000), at(6000)).num_rows == 0
    assert read_units(tmp_path / "none.jsonl", "m", at(0), at(1)).num_rows == 0


def test_rows_are_read_by_when_they_were_logged_whatever_day_they_stand_for(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, "m", "1-1-", ZoneInfo("UTC"), fan_in=4)
    for number in range(9):
        row = {name: None for name in schema().names}
        days = dt.timedelta(days=number)
        row |= {"request_id": f"r{number}", "row_id": "#0", "logged_at": at(number), "event_timestamp": T0 - days, "version": "1"}
        writer.write(pa.Table.from_pylist([row, row | {"event_timestamp": T0}], schema()))
    writer.merge()
    segments = FolderSegments(root=str(tmp_path))
    found = segments.read_logged("m", at(2), at(6), ["version"])
    assert found["request_id"].to_pylist() == ["r3", "r4", "r5", "r6"]
    assert segments.read_logged("m", at(20), at(30), ["version"]).num_rows == 0
    assert segments.read_logged("nobody", at(0), at(9), ["version"]).num_rows == 0
    (tmp_path / "m" / "day=2024-01-01" / "broken.parquet").write_text("not a segment")
    with pytest.raises(StorageError, match="Move the broken file away"):
        segments.read_logged("m", at(0), at(9), ["version"])


def test_a_window_is_counted_by_one_of_many(tmp_path: Path) -> None:
    def count(_: int) -> bool:
        return Tally(tmp_path / "tally.db").count_agreement(None, at(10), Agreement(5, 1, 1, 5, 0.5))

    Tally(tmp_path / "tally.db").units()  # makes the file
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(count, range(8))) == [False] * 7 + [True]
    tally = Tally(tmp_path / "tally.db")
    assert (tally.until(), tally.agreement()) == (at(10), Agreement(5, 1, 1, 5, 0.5))
    assert tally.count_agreement(at(10), at(20), Agreement(1, 0, 0, 0, 0.0))
    assert not tally.count_agreement(at(10), at(20), Agreement(1, 0, 0, 0, 0.0)), "a window that is over"
    assert tally.agreement().compared == 6


def test_a_key_is_one_unit_and_one_trial_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    tally = Tally(tmp_path / "tally.db")
    assert tally.count_units(None, at(1), [Unit("eve@example.org", "1", "r1", False, 1), Unit("bob", "2", "r2", True)])
    assert tally.count_units(
        at(1), at(2), [Unit("eve@example.org", "1", "r3", False, 0), Unit("eve@example.org", "2", "r4", True, 0)]
    )
    one = {"units": 1, "misassigned": 0, "trials": 1, "successes": 1}
    assert tally.units() == {"1": one, "2": {"units": 1, "misassigned": 1, "trials": 0, "successes": 0}}
    assert tally.open_requests() == ["r2"]
    assert b"eve@example" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_what_lands_together_is_shown_over_many_looks_and_no_later_than_that(tmp_path: Path) -> None:
    tally = Tally(tmp_path / "tally.db")
    assert tally.count_units(None, at(1), [Unit(f"key {n}", "1", f"r{n}", False) for n in range(1000)])
    labels = {f"2024-01-01/1/{part}": (10, part % 2) for part in range(SPREAD)}
    outcomes = {f"r{n}": n % 2 for n in range(1000)}
    tally.count_labels(at(2), {"2024-01-01": "digest"}, labels, outcomes)
    trials = []
    for look in range(SPREAD + 3):
        trials.append(tally.units()["1"]["trials"])
        assert len(tally.labels()) == min(look + 1, SPREAD)
        tally.look()
    assert trials == sorted(trials)
    assert (trials[SPREAD - 1], max(b - a for a, b in itertools.pairwise(trials)) < 120) == (1000, True)
    tally.count_labels(at(3), {}, tally.labels(everything=True), {"r1": 0})
    assert tally.units()["1"] == {"units": 1000, "misassigned": 0, "trials": 1000, "successes": 500}


def test_what_was_said_first_stays(tmp_path: Path) -> None:
    tally = Tally(tmp_path / "tally.db")
    assert [tally.first("deaths", deaths) for deaths in (2, 2, 5)] == [2, 2, 2]


def test_a_record_of_before_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"pid": 1, "started": 1.0, "command": ["a"], "launched": 1.0, "quick": 0}))
    found = Record.read(path)
    assert found is not None
    assert (found.deaths, found.keeper) == (0, 0)


# The unit log while it is put aside -------------------------------------------------------------------------------------


def envoy_files(root: Path) -> tuple[EnvoyFiles, Path]:
    """The gateway's files with an Envoy that opens its unit log again when it is asked to."""
    folder = Folder(root)
    folder.make()
    return EnvoyFiles(folder, SimpleNamespace(reopen_logs=folder.unit_log.touch)), folder.unit_log  # type: ignore[arg-type]


def test_a_log_put_aside_while_it_is_read_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, path = envoy_files(tmp_path)
    path.write_text(line(10, 1))
    opened = Path.open

    def put_aside_first(self: Path, *arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(Path, "open", opened)
        try:
            return opened(self, *arguments, **named)
        finally:
            files.keep_logs_small(limit_bytes=1)

    monkeypatch.setattr(Path, "open", put_aside_first)
    assert read_units(path, "m", at(0), at(20))["request_id"].to_pylist() == ["r1"]
    assert path.read_text() == ""


def test_keys_that_were_put_aside_twice_are_told_not_missed(tmp_path: Path) -> None:
    files, path = envoy_files(tmp_path)
    for number in range(1, 4):
        path.write_text(line(number * 10, number))
        moment = at(number * 10).timestamp()
        os.utime(path, (moment, moment))
        assert read_units(path, "m", at(number * 10 - 1), at(99)).num_rows == 1, "who looks in time has it"
        if number == 2:
            assert read_units(path, "m", at(0), at(99))["request_id"].to_pylist() == ["r1", "r2"], "one rotation loses nothing"
        files.keep_logs_small(limit_bytes=1)
    assert read_units(path, "m", at(20), at(99))["request_id"].to_pylist() == ["r3"]
    with pytest.raises(StorageError, match=r"written until 2024-01-01T00:00:20\+00:00 is gone.*Abort the rollout"):
        read_units(path, "m", at(15), at(99))


@pytest.mark.parametrize("sticky", [Sticky("cookie", "uid", "salt"), None], ids=["test_runs", "test_is_over"])
def test_keys_are_kept_while_a_test_runs_and_no_longer(tmp_path: Path, sticky: Sticky | None) -> None:
    files, path = envoy_files(tmp_path)
    routes = Routes.split({"1": 50, "2": 50}, sticky=sticky)
    table = route_configuration({"m": Published("m", (), routes, {"1": ("1",), "2": ("2",)}, ServingOptions())})
    write_json(files.folder.envoy / "rds.json", {"version_info": "1", "resources": [table]})
    path.write_text(line(1, 1))
    long_ago = path.stat().st_mtime - UNITS_KEPT_SECONDS - 1
    os.utime(path, (long_ago, long_ago))
    files.keep_logs_small()
    assert path.read_text() == (line(1, 1) if sticky else "")


# Ticks of a rollout whose evidence is damaged -----------------------------------------------------------------------------


class Stepping:
    """A rollout in its first step over a real tally, lake and folder; what servers and gateway say is set by the test."""

    def __init__(self, root: Path, spec: ModelSpec) -> None:
        self.spec, self.seconds = spec, 0.0
        self.arms: Mapping[str, Counters] = {}
        self.candidate = ArmState(Phase.READY)
        policy = rollout.policy_of(spec)
        state, _ = engine.begin("r", spec.name, "1", "2", policy, T0)
        self.state, _ = engine.advance(state, Verdict(Outcome.PASS), policy, T0)
        self.lake = FolderLake(root=str(root / "lake"))
        self.parts: Any = rollout.Parts(
            None,  # type: ignore[arg-type]
            SimpleNamespace(find=lambda _: None),  # type: ignore[arg-type]
            SimpleNamespace(observe=lambda model: Observed(model, {"2": self.candidate})),  # type: ignore[arg-type]
            SimpleNamespace(totals=lambda _: Reading(at(self.seconds), self.arms), measure=self._nothing),  # type: ignore[arg-type]
            self.lake,
            None,
            root,
            FolderSegments(root=str(root / "log")),
        )
        self.tally = rollout_evidence.tally_of(self.parts, spec, self.state)

    def _nothing(self, *_: Any) -> Reading:
        return Reading(T0, {})

    def look(self, requests: int, errors: int, seconds: float) -> Verdict:
        """A tick at which both arms have had so many requests, and the candidate so many failures."""
        self.seconds = seconds
        latency = (requests, *[0] * 24)
        self.arms = {"1": Counters(requests, 0, latency), "2": Counters(requests, errors, latency)}
        return rollout._verdict(self.parts, self.spec, self.state, at(seconds))

    def measured(self) -> Measurements:
        return Measurements.from_json(json.loads((self.tally.path.with_suffix(".json")).read_bytes()))


def tear(path: Path) -> None:
    path.write_bytes(b"torn" * 2000)


def lock(path: Path) -> sqlite3.Connection:
    held = sqlite3.connect(path, isolation_level=None)
    held.execute("PRAGMA locking_mode = EXCLUSIVE")
    held.execute("BEGIN EXCLUSIVE")
    return held


@pytest.mark.parametrize("damage", [tear, lock])
def test_a_candidate_that_only_fails_is_rolled_back_whatever_became_of_the_tally(
    tmp_path: Path, damage: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Stepping(tmp_path, spec_of("m"))
    assert site.look(0, 0, 1).outcome is not Outcome.FAIL
    monkeypatch.setattr("mlops_dagster.resources.live_metrics.tally.LOCK_SECONDS", 0.05)
    held = damage(site.tally.path)
    failed = site.look(500, 500, 6)
    assert (failed.outcome, "failed requests" in failed.reasons[0]) == (Outcome.FAIL, True), failed
    site.candidate = ArmState(Phase.STARTING, deaths=1, down_since=at(0).timestamp())
    assert site.look(500, 500, 600).reasons[0].startswith("the server of arm 2")
    del held


def test_a_sound_candidate_waits_for_its_tally_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    site = Stepping(tmp_path, spec_of("m"))
    site.look(0, 0, 1)
    assert site.tally.count_agreement(site.tally.until(), at(1), Agreement(40, 1, 1, 40, 0.5))
    site.look(100, 0, 6)
    whole = site.tally.path.read_bytes()
    tear(site.tally.path)
    told = site.look(200, 0, 11)
    assert (told.outcome, "r.db cannot be used" in told.reasons[0]) == (Outcome.ERROR, True), told
    site.tally.path.write_bytes(whole)
    assert site.look(300, 0, 16).outcome is not Outcome.ERROR
    counted = [(tick.arms["2"].requests, tick.arms["2"].compared) for tick in site.measured().ticks]
    assert counted == [(100, 40), (100, 0), (100, 0)]


# Labels -------------------------------------------------------------------------------------------------------------------


def land(site: Stepping, day: dt.date, requests: list[str]) -> None:
    """A day's inference log, labels and figures, in which every answer is right."""
    rows = {name: [f"{name} {r}" for r in requests] for name in rollout_evidence.COLUMNS}
    rows |= {"request_id": requests, "row_id": requests, "version": ["2"] * len(requests)}
    moment = dt.datetime.combine(day, dt.time(1), dt.UTC)
    table = pa.table(
        rows
        | {name: [1.0] * len(requests) for name in ("prediction", "score")}
        | {"shadow": [False] * len(requests), "logged_at": [moment] * len(requests), "carrier": ["AA"] * len(requests)}
    )
    site.lake.write(f"m/inference_log/{day}.parquet", table)
    site.lake.write(f"m/validated_data/requests/{day}.parquet", pa.table({"id": requests, "late": [1.0] * len(requests)}))
    site.lake.write_bytes("m/raw_data/tables.json", b'["requests"]')
    site.lake.write_bytes(f"m/live_performance/{day}.json", json.dumps({"requests": len(requests)}).encode())


def days_labelled(site: Stepping) -> set[str]:
    return {name.partition("/")[0] for name in site.tally.labels(everything=True)}


def test_a_day_that_is_damaged_is_told_holds_up_no_other_and_is_not_read_at_every_tick(tmp_path: Path) -> None:
    site = Stepping(tmp_path, spec_of("m"))
    for number in (1, 2, 3):
        land(site, dt.date(2024, 1, number), [f"r{number}"])
    broken = tmp_path / "lake/m/inference_log/2024-01-01.parquet"
    whole = broken.read_bytes()
    broken.write_bytes(b"not parquet")
    damaged = tmp_path / "lake/m/live_performance/2024-01-03.json"
    damaged.write_text("{")
    collect = lambda seconds: rollout_evidence.collect(site.parts, site.spec, site.state, at(seconds))  # noqa: E731
    with pytest.raises(MlopsError, match=r"labels of 2024-01-01: .*not a whole Parquet.*labels of 2024-01-03: .*damaged"):
        collect(0)
    assert days_labelled(site) == {"2024-01-02"}
    broken.write_bytes(whole)
    damaged.write_text('{"requests": 1}')
    with pytest.raises(MlopsError, match="labels of 2024-01-01"):
        collect(site.parts.label_seconds - 1)
    collect(site.parts.label_seconds + 1)
    assert days_labelled(site) == {"2024-01-01", "2024-01-02", "2024-01-03"}


def test_a_metric_that_is_wrong_is_asked_once_in_a_while_and_spares_other_days(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong_metric").mkdir()
    (tmp_path / "wrong_metric/__init__.py").write_text(
        "asked = []\n\n\ndef metric(rows):\n    asked.append(rows['carrier'].to_pylist())\n"
        "    return [1 / (r != 'r1') for r in rows['request_id'].to_pylist()] and [1] * rows.num_rows\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = spec_of("m", "ab_test", ab_metric="wrong_metric.metric", sticky_by="cookie", sticky_name="uid", ab_minimum_effect=0.2)
    site = Stepping(tmp_path, spec)
    for number in (1, 2):
        land(site, dt.date(2024, 1, number), [f"r{number}"])
    assert site.tally.count_units(None, at(0), [Unit(f"key {n}", "2", f"r{n}", False) for n in (1, 2)])
    for _ in range(3):
        with pytest.raises(
            MlopsError, match=r"labels of 2024-01-01: rollout\.ab_metric: wrong_metric\.metric failed: ZeroDivision"
        ):
            rollout_evidence.collect(site.parts, spec, site.state, at(0))
    import wrong_metric  # type: ignore[import-not-found]

    assert wrong_metric.asked == [["AA"], ["AA"]], "each day once, with every column"
    assert site.tally.open_requests() == ["r1"]


# Artifacts ----------------------------------------------------------------------------------------------------------------


def test_the_bytes_of_an_artifact_are_hashed_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "model.onnx").write_bytes(b"model")
    sha256, hashed, whole = artifact.digest(made), [], artifact.digest
    monkeypatch.setattr(artifact, "digest", lambda folder: hashed.append(folder) or whole(folder))
    folder = tmp_path / "m" / sha256
    folder.parent.mkdir()
    made.rename(folder)
    fetched: list[Path] = []

    def fetch(model: str, number: int, place: Path) -> Path:
        fetched.append(place)
        return place

    parts: Any = SimpleNamespace(cache=tmp_path, registry=SimpleNamespace(fetch=fetch))
    version: Any = SimpleNamespace(digest=sha256, number=1)
    for _ in range(3):
        assert rollout_versions.artifact_of(parts, spec_of("m"), version) == folder
    assert (hashed, fetched) == ([folder], [])
    before = folder.joinpath("model.onnx").stat()
    folder.joinpath("model.onnx").write_bytes(b"m0del")
    os.utime(folder / "model.onnx", ns=(before.st_atime_ns, before.st_mtime_ns))
    rollout_versions.artifact_of(parts, spec_of("m"), version)
    assert (hashed, fetched) == ([folder] * 2, [folder]), "one byte, though size and time of modification are the same"
