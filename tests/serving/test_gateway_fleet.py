"""The host's decisions without any process: which servers run, which routes may go live, who stands in for whom."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.core.routes import Match, Mirror, Routes
from mlops_dagster.resources.serving import Arm, ServingOptions
from mlops_dagster.resources.serving.adopt import wait_before
from mlops_dagster.resources.serving.fleet import Member, answering_order, next_fleet, next_routes
from mlops_dagster.resources.serving.state import Desired, Folder

SHA = "a" * 64
OPTIONS = ServingOptions(grace_seconds=100)


def arm(version: str, name: str = "champion", sha256: str = SHA) -> Arm:
    return Arm(version, "/artifact", sha256, name)


def desired(routes: Routes, *arms: Arm, options: ServingOptions = OPTIONS) -> dict[str, Desired]:
    return {"m": Desired("m", arms, routes, options)}


def fleet_after(wanted: dict[str, Desired], before: dict[str, Member], live: dict[str, Routes], now: float) -> dict[str, Member]:
    return next_fleet(wanted, frozenset(), before, live, now, lambda: f"127.0.0.1:{8000 + int(now)}")


def keys(fleet: dict[str, Member]) -> dict[str, bool]:
    """Arm key to whether it is on its way out."""
    return {member.arm.key: member.left is not None for member in fleet.values()}


def test_an_arm_keeps_its_address_while_it_is_desired() -> None:
    first = fleet_after(desired(Routes.all_to("1"), arm("1")), {}, {}, 1)
    again = fleet_after(desired(Routes.all_to("1"), arm("1")), first, {}, 2)
    assert [member.address for member in again.values()] == ["127.0.0.1:8001"]


def test_an_arm_that_is_no_longer_desired_runs_on_for_its_grace_time() -> None:
    both = fleet_after(desired(Routes.all_to("2"), arm("1"), arm("2")), {}, {}, 1)
    only = desired(Routes.all_to("2"), arm("2"))
    live = {"m": Routes.all_to("2")}
    leaving = fleet_after(only, both, live, 10)
    assert keys(leaving) == {"2": False, "1": True}
    assert keys(fleet_after(only, leaving, live, 109)) == {"2": False, "1": True}
    assert keys(fleet_after(only, leaving, live, 110)) == {"2": False}


def test_an_arm_that_requests_still_reach_does_not_go() -> None:
    both = fleet_after(desired(Routes.all_to("1"), arm("1"), arm("2")), {}, {}, 1)
    only = desired(Routes.all_to("2"), arm("2"), options=ServingOptions(grace_seconds=0))
    assert keys(fleet_after(only, both, {"m": Routes.all_to("1")}, 10)) == {"2": False, "1": False}
    assert keys(fleet_after(only, both, {"m": Routes.all_to("2")}, 10)) == {"2": False}


def test_the_servers_of_a_removed_model_go_once_no_route_leads_to_them() -> None:
    running = fleet_after(desired(Routes.all_to("1"), arm("1")), {}, {}, 1)
    assert keys(fleet_after({}, running, {"m": Routes.all_to("1")}, 2)) == {"1": False}
    assert fleet_after({}, running, {}, 2) == {}


def test_the_servers_of_a_damaged_declaration_stay() -> None:
    running = fleet_after(desired(Routes.all_to("1"), arm("1")), {}, {}, 1)
    assert keys(next_fleet({}, {"m"}, running, {}, 1000, lambda: "")) == {"1": False}


def test_another_artifact_under_the_same_version_is_another_server() -> None:
    first = fleet_after(desired(Routes.all_to("1"), arm("1")), {}, {}, 1)
    second = fleet_after(desired(Routes.all_to("1"), arm("1", sha256="b" * 64)), first, {"m": Routes.all_to("1")}, 2)
    assert {member.arm.sha256[0]: member.left is not None for member in second.values()} == {"a": True, "b": False}


@pytest.mark.parametrize(
    ("live", "wanted", "ready", "goes_live"),
    [
        (None, Routes.all_to("2"), set(), True),
        (Routes.all_to("1"), Routes.all_to("2"), {"1"}, False),
        (Routes.all_to("1"), Routes.all_to("2"), {"2"}, True),
        (Routes.split({"1": 95, "2": 5}), Routes.all_to("1"), {"1"}, True),
        (Routes.split({"1": 95, "2": 5}), Routes.all_to("1"), {"2"}, False),
        (Routes.all_to("1", warm=["2"]), Routes.split({"1": 100, "2": 0}, mirror=Mirror("2")), {"1"}, True),
        (Routes.all_to("1"), Routes.split({"1": 100}, match=Match("x", "y", "2")), {"1"}, False),
        (Routes.all_to("1"), Routes.split({"1": 100}, match=Match("x", "y", "2")), {"1", "2"}, True),
    ],
)
def test_routes_go_live_when_every_arm_that_gains_by_them_is_ready(
    live: Routes | None, wanted: Routes, ready: set[str], goes_live: bool
) -> None:
    spec = Desired("m", (arm("1"), arm("2")), wanted)
    routes, why = next_routes(spec, live, ready)
    assert routes == (wanted if goes_live else live)
    assert bool(why) != goes_live


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(0, 10), min_size=1, max_size=5).filter(any),
    parts=st.lists(st.sampled_from(["champion", "previous", "candidate", "shadow"]), min_size=5, max_size=5),
    mirror=st.integers(0, 4),
)
def test_who_stands_in(weights: list[int], parts: list[str], mirror: int) -> None:
    total = sum(weights)
    thousandths = [1000 * weight // total for weight in weights]
    thousandths[weights.index(max(weights))] += 1000 - sum(thousandths)
    names = {str(number): parts[number] for number in range(len(weights))}
    copied = str(mirror) if mirror < len(weights) and thousandths[mirror] == 0 else None
    routes = Routes(tuple(zip(names, thousandths, strict=True)), mirror=Mirror(copied) if copied else None)
    for key in routes.serving:
        order = answering_order(key, routes, names)
        assert order[0] == key
        assert len(set(order)) == len(order)
        assert set(routes.serving) <= set(order), "an arm that answers callers can stand in"
        assert copied not in order, "a shadow's answers never reach a caller"
        for other in set(order) - set(routes.serving):
            assert names[other] in ("champion", "previous"), "nobody stands in who was not approved to answer"


def test_a_server_that_keeps_ending_is_started_ever_more_slowly() -> None:
    waits = [wait_before(quick) for quick in range(12)]
    assert waits[:4] == [0.0, 0.5, 1.0, 2.0]
    assert waits == sorted(waits)
    assert waits[-1] == 30.0


def test_the_desired_state_survives_a_write_and_a_read(tmp_path: Path) -> None:
    routes = Routes.split({"1": 99.9, "2": 0.1}, match=Match("x", "y", "2"))
    wanted = Desired(
        "m", (arm("1"), arm("2", "candidate")), routes, ServingOptions(time_zone="Asia/Tokyo", requests_per_second=7)
    )
    assert Desired.from_json(wanted.to_json()) == wanted


def test_sockets_have_short_paths_wherever_the_state_is(tmp_path: Path) -> None:
    deep = Folder(tmp_path / ("d" * 120))
    deep.make()
    assert len(str(deep.socket("supervisor"))) < 100
    assert deep.sockets.stat().st_mode & 0o777 == 0o700


def test_wrong_values_are_named() -> None:
    for wrong, named in (({"version": "7/8"}, "version"), ({"sha256": "AB"}, "sha256"), ({"name": "Champion!"}, "name")):
        with pytest.raises(DeclarationError, match=f"arm.{named}"):
            Arm(**{"version": "7", "artifact": "/a", "sha256": SHA, "name": "champion", **wrong})
    for field in ("timeout_seconds", "start_seconds", "requests_per_second"):
        with pytest.raises(DeclarationError, match=field):
            ServingOptions(**{field: 0})
