"""What every serving backend must do. A backend's test module subclasses this and gives the fixtures `serving` and `model`."""

import collections
from pathlib import Path

import httpx
import pytest

from mlops_dagster.core.errors import ArtifactError, DeclarationError, NotFoundError, ServingError
from mlops_dagster.core.routes import Match, Mirror, Routes, Sticky, assign
from mlops_dagster.resources.serving import Arm, Phase, Serving, ServingOptions, wait_ready
from tests.contracts.serving.artifacts import ROW, make_arm

READY_SECONDS = 30.0
QUICK = ServingOptions(grace_seconds=0.0)


class ServingContract:
    @pytest.fixture
    def arms(self, tmp_path: Path) -> tuple[Arm, Arm]:
        """A champion that answers 0 and a candidate that answers 1."""
        return make_arm(tmp_path, "1", "champion", answer=0), make_arm(tmp_path, "2", "candidate", answer=1)

    def test_one_version_answers_on_both_protocols(self, serving: Serving, model: str, arms: tuple[Arm, Arm]) -> None:
        serving.apply(model, arms[:1], Routes.all_to("1"), QUICK)
        seen = wait_ready(serving, model, READY_SECONDS)
        assert seen.arms["1"].phase is Phase.READY
        assert seen.routes == Routes.all_to("1")
        answer = httpx.post(predict_url(serving, model), json=ROW)
        assert (answer.status_code, answer.json()["predictions"], answer.headers["x-model-version"]) == (200, [0], "1")
        metadata = httpx.get(f"{serving.endpoint(model)}/v2/models/{model}")
        assert metadata.json()["name"] == model

    def test_applying_the_same_again_changes_nothing(self, serving: Serving, model: str, arms: tuple[Arm, Arm]) -> None:
        for _ in range(2):
            serving.apply(model, arms[:1], Routes.all_to("1"), QUICK)
            seen = wait_ready(serving, model, READY_SECONDS)
        serving.apply(model, arms[:1], Routes.all_to("1"), QUICK)
        assert serving.observe(model) == seen

    def test_weights_divide_the_requests(self, serving: Serving, model: str, arms: tuple[Arm, Arm]) -> None:
        serving.apply(model, arms, Routes.split({"1": 70, "2": 30}), QUICK)
        wait_ready(serving, model, READY_SECONDS)
        counts = asked(serving, model, 1000)
        assert set(counts) == {"1", "2"}
        assert 230 <= counts["2"] <= 370  # 300 expected; five standard deviations are 72

    def test_sticky_keys_reach_the_arm_that_the_analysis_computes(
        self, serving: Serving, model: str, arms: tuple[Arm, Arm]
    ) -> None:
        routes = Routes.split({"1": 60, "2": 40}, sticky=Sticky("header", "x-user", "salt-1"))
        serving.apply(model, arms, routes, QUICK)
        wait_ready(serving, model, READY_SECONDS)
        with httpx.Client() as client:
            for number in range(200):
                key = f"user {number} é" if number % 2 else f"u{number}"
                answer = client.post(predict_url(serving, model), json=ROW, headers={"x-user": key.encode()})
                assert answer.headers["x-model-version"] == assign(key, routes), key

    def test_sticky_cookies_reach_the_arm_that_the_analysis_computes(
        self, serving: Serving, model: str, arms: tuple[Arm, Arm]
    ) -> None:
        routes = Routes.split({"1": 50, "2": 50}, sticky=Sticky("cookie", "visitor", "salt-2"))
        serving.apply(model, arms, routes, QUICK)
        wait_ready(serving, model, READY_SECONDS)
        for number in range(60):
            cookie = [f"visitor=v{number}", f"a=b; visitor=v{number}; c=d", f"notvisitor=x; visitor=v{number}"][number % 3]
            answer = httpx.post(predict_url(serving, model), json=ROW, headers={"cookie": cookie})
            assert answer.headers["x-model-version"] == assign(f"v{number}", routes), cookie

    def test_a_match_rule_wins_over_weights(self, serving: Serving, model: str, arms: tuple[Arm, Arm]) -> None:
        serving.apply(model, arms, Routes.split({"1": 100, "2": 0}, match=Match("x-team", "testers", "2")), QUICK)
        wait_ready(serving, model, READY_SECONDS)
        assert asked(serving, model, 20) == {"1": 20}
        assert asked(serving, model, 20, {"x-team": "testers"}) == {"2": 20}
        assert asked(serving, model, 20, {"x-team": "others"}) == {"1": 20}

    def test_a_mirror_gets_copies_and_callers_never_see_its_answers(
        self, serving: Serving, model: str, arms: tuple[Arm, Arm]
    ) -> None:
        serving.apply(model, arms, Routes.split({"1": 100, "2": 0}, mirror=Mirror("2")), QUICK)
        wait_ready(serving, model, READY_SECONDS)
        assert asked(serving, model, 50) == {"1": 50}

    def test_new_routes_wait_for_the_version_that_gains_weight(self, serving: Serving, model: str, arms: tuple[Arm, Arm]) -> None:
        serving.apply(model, arms[:1], Routes.all_to("1"), QUICK)
        wait_ready(serving, model, READY_SECONDS)
        serving.apply(model, arms, Routes.all_to("2", warm=["1"]), QUICK)
        before = serving.observe(model)
        assert before.arms["2"].phase is Phase.STARTING
        assert before.routes == Routes.all_to("1")
        assert before.pending
        assert asked(serving, model, 5) == {"1": 5}
        wait_ready(serving, model, READY_SECONDS)
        assert asked(serving, model, 5) == {"2": 5}

    def test_a_version_that_cannot_start_fails_and_the_champion_serves_on(
        self, serving: Serving, model: str, arms: tuple[Arm, Arm]
    ) -> None:
        serving.apply(model, arms[:1], Routes.all_to("1"), QUICK)
        wait_ready(serving, model, READY_SECONDS)
        changed = Arm("2", arms[1].artifact, "0" * 64, "candidate")
        serving.apply(model, (arms[0], changed), Routes.split({"1": 50, "2": 50}), QUICK)
        with pytest.raises(ServingError, match=r"version 2: .*artifact.*0000"):
            wait_ready(serving, model, READY_SECONDS)
        seen = serving.observe(model)
        assert seen.routes == Routes.all_to("1")
        assert seen.failures.keys() == {"2"}
        assert asked(serving, model, 20) == {"1": 20}

    def test_a_removed_model_is_gone(self, serving: Serving, model: str, arms: tuple[Arm, Arm]) -> None:
        serving.apply(model, arms[:1], Routes.all_to("1"), QUICK)
        wait_ready(serving, model, READY_SECONDS)
        url = predict_url(serving, model)
        serving.remove(model)
        serving.remove(model)
        with pytest.raises(NotFoundError, match=model):
            serving.observe(model)
        assert eventually(lambda: httpx.post(url, json=ROW).status_code == 404)

    def test_what_cannot_be_served_is_refused(self, serving: Serving, model: str, arms: tuple[Arm, Arm]) -> None:
        with pytest.raises(DeclarationError, match="lead to 9"):
            serving.apply(model, arms, Routes.all_to("9"))
        with pytest.raises(DeclarationError, match="version twice"):
            serving.apply(model, (arms[0], arms[0]), Routes.all_to("1"))
        with pytest.raises(DeclarationError, match="model is 'a/b'"):
            serving.apply("a/b", arms, Routes.all_to("1"))
        with pytest.raises(ArtifactError, match="no such folder"):
            serving.apply(model, (Arm("1", arms[0].artifact + "-gone", "0" * 64, "champion"),), Routes.all_to("1"))
        with pytest.raises(NotFoundError, match="not served"):
            serving.observe("never-" + model)


def predict_url(serving: Serving, model: str) -> str:
    return f"{serving.endpoint(model)}/v1/models/{model}:predict"


def asked(serving: Serving, model: str, times: int, headers: dict[str, str] | None = None) -> dict[str, int]:
    """How often each version answered; every answer must be a good one."""
    counts: collections.Counter[str] = collections.Counter()
    with httpx.Client(headers=headers) as client:
        for _ in range(times):
            answer = client.post(predict_url(serving, model), json=ROW)
            assert answer.status_code == 200, answer.text
            counts[answer.headers["x-model-version"]] += 1
    return dict(counts)


def eventually(holds, seconds: float = 10.0) -> bool:
    """Whether `holds()` becomes true within so many seconds."""
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return False
