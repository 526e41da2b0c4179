"""Routes: what is valid, the JSON round trip, and sticky assignment."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.core.routes import Match, Mirror, Routes, Sticky, assign, bucket, to_per_mille, version_of, xxh64

arms = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,6}(@baseline)?", fullmatch=True)
tokens = st.from_regex(r"[a-z][a-z0-9-]{0,10}", fullmatch=True)


@st.composite
def all_routes(draw: st.DrawFn) -> Routes:
    names = draw(st.lists(arms, min_size=1, max_size=4, unique=True))
    cuts = sorted(draw(st.lists(st.integers(0, 1000), min_size=len(names) - 1, max_size=len(names) - 1)))
    edges = [0, *cuts, 1000]
    weights = tuple((name, edges[i + 1] - edges[i]) for i, name in enumerate(names))
    idle = [name for name, weight in weights if weight == 0]
    mirror = draw(st.one_of(st.none(), st.builds(Mirror, st.sampled_from(idle), st.integers(0, 1000)))) if idle else None
    match = draw(st.one_of(st.none(), st.builds(Match, tokens, st.text("abc é", min_size=1), st.sampled_from(names))))
    sticky = draw(st.one_of(st.none(), st.builds(Sticky, st.sampled_from(["header", "cookie"]), tokens, tokens)))
    return Routes(weights, mirror, match, sticky)


@given(all_routes())
def test_json_round_trip_through_text(routes: Routes) -> None:
    assert Routes.from_json(json.loads(json.dumps(routes.to_json()))) == routes


@given(all_routes())
def test_weights_sum_to_100_and_someone_serves(routes: Routes) -> None:
    assert sum(routes.percent(arm) for arm, _ in routes.weights) == pytest.approx(100)
    assert routes.serving
    assert set(routes.serving) <= set(routes.arms)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Routes.split({"7": 90, "8": 9.9}), "weights sum to 99.9 %"),
        (lambda: Routes.split({"7": 99.95, "8": 0.05}), r"weights\['7'\] is 99.95: percents go in steps of 0.1"),
        (lambda: Routes.split({"7": 110, "8": -10}), r"weights\['7'\] is 110"),
        (lambda: Routes.split({"7": True}), r"weights\['7'\] is True"),
        (lambda: Routes.split({"7": float("nan")}), r"weights\['7'\] is nan"),
        (lambda: Routes.split({}), "weights sum to 0 %"),
        (lambda: Routes.split({"": 100}), "weights names the arm ''"),
        (lambda: Routes.split({"7 or 8": 100}), "weights names the arm '7 or 8'"),
        (lambda: Routes((("7", 500), ("7", 500))), "names an arm twice"),
        (lambda: Routes((("7", 1000.0),)), r"weights\['7'\] is 1000.0 thousandths"),  # type: ignore[arg-type]
        (lambda: Routes.split({"7": 100}, mirror=Mirror("7")), "mirror.arm is '7'"),
        (lambda: Mirror("7", 1001), "mirror.percent is 1001"),
        (lambda: Match("x arm", "8", "8"), "match.header is 'x arm'"),
        (lambda: Match("x-arm", "a\nb", "8"), "match.value"),
        (lambda: Sticky("query", "x", "s"), "sticky.by is 'query'"),  # type: ignore[arg-type]
        (lambda: Sticky("header", "", "s"), "sticky.name is ''"),
        (lambda: Sticky("header", "x", "a\\1"), "sticky.salt"),
        (lambda: Routes.from_json([]), "routes is"),
        (lambda: Routes.from_json({"weights": []}), "weights is"),
        (lambda: Routes.from_json({}), "routes lacks weights"),
        (lambda: Routes.from_json({"weights": [{"arm": "7"}]}), r"weights\[0\] lacks percent"),
        (lambda: Routes.from_json({"weights": [{"arm": "7", "percent": "100"}]}), r"weights\[0\].percent is '100'"),
        (lambda: Routes.from_json({"weights": [], "wieght": 1}), "unknown field wieght"),
        (
            lambda: Routes.from_json({"weights": [{"arm": "7", "percent": 100}], "match": {"header": "x"}}),
            "match lacks arm, value",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(make, message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        make()


def test_a_tenth_of_a_percent_is_exact() -> None:
    assert [to_per_mille("p", i / 10) for i in range(1001)] == list(range(1001))


def test_arms_that_must_run() -> None:
    routes = Routes.split({"7": 100, "8": 0}, mirror=Mirror("9"), match=Match("x-arm", "8", "8"))
    assert routes.arms == ("7", "8", "9")
    assert routes.serving == ("7",)
    assert Routes.all_to("8", warm=["7"]) == Routes.split({"8": 100, "7": 0})
    assert version_of("7@baseline") == version_of("7") == "7"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_xxh64_published_vectors(data: bytes, expected: int) -> None:
    assert xxh64(data) == expected


@given(st.binary(max_size=200))
def test_xxh64_is_what_the_reference_library_computes(data: bytes) -> None:
    assert xxh64(data) == pytest.importorskip("xxhash").xxh64_intdigest(data)


def test_assignment_is_the_same_in_another_process() -> None:
    code = "from mlops_dagster.core.routes import bucket; print([bucket(f'user-{i}é', 'flight_delay/3') for i in range(20)])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert json.loads(out.stdout) == [bucket(f"user-{i}é", "flight_delay/3") for i in range(20)]


def test_shares_follow_the_weights() -> None:
    routes = Routes.split({"7": 89.5, "8": 10.5}, sticky=Sticky("header", "x-user", "m/1"))
    seen = Counter(assign(f"user-{i}", routes) for i in range(20_000))
    assert seen["8"] / 20_000 == pytest.approx(0.105, abs=0.01)


def test_the_arm_is_where_the_bucket_falls_among_the_weights() -> None:
    routes = Routes.split({"6": 0, "7": 0.3, "8": 99.7}, sticky=Sticky("header", "x-user", "m/1"))
    keys = [f"user-{i}" for i in range(4000)]
    assert {bucket(key, "m/1") for key in keys} >= {0, 2, 3, 999}
    assert all(assign(key, routes) == ("7" if bucket(key, "m/1") < 3 else "8") for key in keys)


def test_a_growing_last_arm_keeps_its_keys() -> None:
    before, after = (Routes.split({"7": 100 - p, "8": p}, sticky=Sticky("cookie", "uid", "m/1")) for p in (5, 25))
    for key in (f"user-{i}" for i in range(2000)):
        if assign(key, before) == "8":
            assert assign(key, after) == "8"


def test_another_salt_divides_independently() -> None:
    first, second = (Routes.split({"7": 50, "8": 50}, sticky=Sticky("header", "x", salt)) for salt in ("a", "b"))
    agree = sum(assign(f"u{i}", first) == assign(f"u{i}", second) for i in range(5000))
    assert agree / 5000 == pytest.approx(0.5, abs=0.04)


def test_assignment_without_a_key_is_refused() -> None:
    with pytest.raises(DeclarationError, match=r"routes\.sticky"):
        assign("user", Routes.all_to("7"))
