"""How a new version comes in: each strategy is a function from two versions and a policy to a list of steps.

A step is a `Routes` and what must hold to leave it, so strategies and servers add up instead of multiplying: whoever can set
`Routes` can do all four. The last step of each strategy gives the candidate every request while the champion stays warm at
weight 0 (the *watch*): the way back is one change of weights. Leaving the watch is the promotion. A first deployment has nobody
to be compared with and no steps: it goes live once it is ready and its smoke predictions are right.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from mlops_dagster.core.errors import DeclarationError, NotFoundError
from mlops_dagster.core.routes import BASELINE, Match, Mirror, Routes, Sticky, to_per_mille

LIMITS = ("error_limit", "latency_limit")
COMPARISONS = ("errors", "refusals", "latency")
AB_METRICS = ("accuracy", "answered", "score")


@dataclass(frozen=True)
class RolloutPolicy:
    """What a model's declaration says about rollouts; shares are between 0 and 1, percents between 0 and 100.

    Raises DeclarationError naming the field. Where a limit counts, it says what the limit-th time does: the
    `max_consecutive_errors`-th ERROR in a row holds the rollout.
    """

    strategy: str = "canary"

    # Evidence
    alpha: float = 0.01  # chance that a version as good as the champion is ever rolled back, over the whole rollout
    beta: float = 0.05  # chance that a version worse by a declared effect passes a comparing step
    minimum_requests: int = 500  # per arm and step; below it nothing passes
    minimum_requests_to_fail: int = 20  # below it nothing fails either: one bad answer among three is no evidence
    error_rate_increase: float = 0.02  # declared effect: share of failed (and of refused) requests, candidate minus champion
    slow_share_increase: float = 0.05  # declared effect: share of requests slower than the champion's 95th percentile
    accuracy_drop: float = 0.05  # declared effect: share of wrong predictions among labelled ones, candidate minus champion

    # Absolute limits, from the model's monitoring
    max_p99_latency_ms: float = 100.0
    max_error_rate: float = 0.05
    max_down_seconds: float = 15.0  # the candidate's server may be away for less than this during a step
    max_restarts: int = 3  # the third death of the candidate's server in a rollout fails it

    # Time
    step_seconds: float = 60.0
    watch_seconds: float = 300.0
    start_seconds: float = 300.0  # to become ready and answer the smoke predictions
    keep_warm_seconds: float = 3600.0  # how long the old version runs on after the promotion
    max_metric_age_seconds: float = 60.0  # older metrics are none
    max_consecutive_errors: int = 5
    max_inconclusive_seconds: float = 3600.0  # after a step could first have been left; then it is held for a human

    # Canary
    steps_percent: tuple[float, ...] = (5.0, 25.0, 50.0)
    pauses: tuple[float, ...] = ()  # the steps (by percent) after which a human must resume
    baseline_arm: bool = False  # compare with a fresh server of the champion that gets as many requests as the candidate

    # Blue-green
    preview_header: str = "x-mlops-arm"  # requests with this header and the candidate's version reach the preview
    preview_requests: int = 50  # what the preview must answer (by smoke predictions or testers) before the switch
    preview_mirror_percent: float = (
        0.0  # a copy of so much traffic goes to the preview; off, as a major version may differ in input
    )
    pause_before_switch: bool = False

    # Shadow
    mirror_percent: float = 100.0
    shadow_seconds: float = 3600.0
    max_disagreement: float = 0.1  # share of mirrored requests whose two answers differ
    max_score_shift: float = 0.1  # share of mirrored requests whose scores differ by more than `score_tolerance`
    score_tolerance: float = 0.1
    shadow_ends: Literal["hold", "promote"] = "hold"

    # A/B
    ab_percent: float = 50.0
    # What counts as a success, declared before the first trial. One trial is one sticky key: the first row of its first request.
    ab_metric: str = "accuracy"  # `accuracy`, `answered`, `score`, or a function of the model's own by its dotted path
    ab_score_threshold: float = 0.5  # the metric `score` counts scores of at least this
    ab_minimum_effect: float = 0.01  # least gain in the share of successes that is worth a change
    ab_maximum_seconds: float = 14 * 86_400.0
    sticky_by: Literal["header", "cookie"] = "header"
    sticky_name: str = "x-mlops-key"
    sticky_salt: str = "mlops"
    sample_ratio_alpha: float = 0.001

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise DeclarationError(f"rollout.strategy is {self.strategy!r}: use one of {', '.join(STRATEGIES)}.")
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), field.default)
            _check_number(field.name, getattr(self, field.name))
        steps = self.steps_percent
        if not steps or list(steps) != sorted(set(steps)) or steps[0] <= 0:
            raise DeclarationError(
                f"rollout.steps_percent is {list(steps)}: percents must rise from step to step, as [5, 25, 50]."
            )
        if most := [percent for percent in steps if percent > (50 if self.baseline_arm else 100)]:
            raise DeclarationError(f"rollout.steps_percent has {most[0]:g}: with a baseline_arm of equal size 50 is the most.")
        if unknown := set(self.pauses) - set(steps):
            raise DeclarationError(f"rollout.pauses names {min(unknown):g}, which is not among steps_percent {list(steps)}.")
        if self.shadow_ends not in ("hold", "promote"):
            raise DeclarationError(f"rollout.shadow_ends is {self.shadow_ends!r}: use 'hold' (for a human) or 'promote'.")
        if not 0 < self.ab_percent < 100:
            raise DeclarationError(f"rollout.ab_percent is {self.ab_percent:g}: both arms need requests, so use 0.1 to 99.9.")
        if self.ab_metric not in AB_METRICS and "." not in self.ab_metric:
            raise DeclarationError(
                f"rollout.ab_metric is {self.ab_metric!r}: use {', '.join(AB_METRICS)}, or the dotted path of a function."
            )
        Sticky(self.sticky_by, self.sticky_name, self.sticky_salt)
        Match(self.preview_header, "version", "version")


@dataclass(frozen=True)
class Step:
    """Routes, and what must hold to leave them.

    `gates` must all PASS; `guardrails` can only FAIL (or tell an ERROR), never pass a step. Both are names in `analysis.GATES`.
    `compare_with` is the arm that the candidate is compared with, None where only absolute limits apply. After
    `maximum_seconds` without a PASS the champion stays; where it is None the rollout is held for a human instead (see
    `RolloutPolicy.max_inconclusive_seconds`). With `pause` a human must resume after the gates have passed.
    """

    name: str
    routes: Routes
    candidate: str
    compare_with: str | None
    gates: tuple[str, ...]
    guardrails: tuple[str, ...] = ()
    minimum_seconds: float = 0.0
    minimum_requests: int = 1
    maximum_seconds: float | None = None
    pause: bool = False
    watch: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` is its inverse."""
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "routes": self.routes.to_json()} | {
            "gates": list(self.gates),
            "guardrails": list(self.guardrails),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Step":
        """The inverse of `to_json`; raises DeclarationError for an unknown or missing field."""
        try:
            return cls(
                **raw
                | {
                    "routes": Routes.from_json(raw["routes"]),
                    "gates": tuple(raw["gates"]),
                    "guardrails": tuple(raw["guardrails"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise DeclarationError(f"step: {error}. Its fields are {', '.join(field.name for field in fields(cls))}.") from error


def plan(champion: str | None, candidate: str, policy: RolloutPolicy) -> tuple[Step, ...]:
    """The steps by which `candidate` replaces `champion`; none where there is no champion (the first deployment)."""
    if champion is None:
        return ()
    return strategy(policy.strategy)(champion, candidate, policy)


def strategy(name: str) -> "Strategy":
    """The strategy of that name; raises NotFoundError listing those that there are."""
    if name not in STRATEGIES:
        raise NotFoundError(f"rollout.strategy is {name!r}: use one of {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]


def count_tests(steps: tuple[Step, ...]) -> int:
    """How many different tests can fail a rollout; alpha is split evenly over them, for the whole rollout."""
    named = {gate for step in steps for gate in (*step.gates, *step.guardrails)}
    return max(1, len(named - {"sample_ratio"}))


def canary(champion: str, candidate: str, policy: RolloutPolicy) -> tuple[Step, ...]:
    """Rising shares, each left when the candidate is shown not to be worse by a declared effect; then the watch."""
    steps = []
    control = champion + BASELINE if policy.baseline_arm else champion
    for percent in policy.steps_percent:
        share = {candidate: percent} if control == champion else {control: percent, candidate: percent}
        rest = round(100 - sum(share.values()), 1)
        # At 100 % nobody is left to be compared with: that step is one more watch.
        compared = rest > 0 or control != champion
        step = Step(
            f"canary {percent:g} %",
            Routes.split({champion: rest, **share}),
            candidate,
            control if compared else None,
            (*COMPARISONS, *LIMITS) if compared else LIMITS,
            ("quality",),
            policy.step_seconds,
            policy.minimum_requests,
            pause=percent in policy.pauses,
        )
        steps.append(step)
    return (*steps, _watch(champion, candidate, policy))


def blue_green(champion: str, candidate: str, policy: RolloutPolicy) -> tuple[Step, ...]:
    """A preview that only a header reaches, smoke predictions and limits on it; then the switch, which is the watch.

    The preview is judged on `preview_requests` answers; comparing the two versions needs traffic on both at once, which
    `preview_mirror_percent` gives (as a copy, without touching a caller).
    """
    mirror = to_per_mille("rollout.preview_mirror_percent", policy.preview_mirror_percent)
    routes = Routes(
        ((champion, 1000), (candidate, 0)),
        Mirror(candidate, mirror) if mirror else None,
        Match(policy.preview_header, candidate, candidate),
    )
    preview = Step(
        "preview",
        routes,
        candidate,
        champion if mirror else None,
        (*COMPARISONS, *LIMITS) if mirror else LIMITS,
        (),
        policy.step_seconds,
        policy.minimum_requests if mirror else policy.preview_requests,
        pause=policy.pause_before_switch,
    )
    return (preview, _watch(champion, candidate, policy))


def shadow(champion: str, candidate: str, policy: RolloutPolicy) -> tuple[Step, ...]:
    """A copy of the traffic, whose answers reach nobody, compared answer by answer with the champion's.

    Gates: how often the answers disagree, how often the scores are far apart, errors and added latency. It then waits for a human
    by default (as SageMaker's shadow tests do: agreeing with the champion shows that a version is sound, not that it is better);
    `shadow_ends: promote` goes on to the watch by itself.
    """
    routes = Routes(
        ((champion, 1000), (candidate, 0)), Mirror(candidate, to_per_mille("rollout.mirror_percent", policy.mirror_percent))
    )
    mirrored = Step(
        "shadow",
        routes,
        candidate,
        champion,
        ("disagreement", "score_shift", *COMPARISONS, *LIMITS),
        ("quality",),
        policy.shadow_seconds,
        policy.minimum_requests,
        pause=policy.shadow_ends == "hold",
    )
    return (mirrored, _watch(champion, candidate, policy))


def ab_test(champion: str, candidate: str, policy: RolloutPolicy) -> tuple[Step, ...]:
    """Sticky halves, one metric and a minimum effect declared beforehand; without a proven gain in time the champion stays."""
    sticky = Sticky(policy.sticky_by, policy.sticky_name, f"{policy.sticky_salt}/{candidate}")
    split = Step(
        "A/B",
        Routes.split({champion: round(100 - policy.ab_percent, 1), candidate: policy.ab_percent}, sticky=sticky),
        candidate,
        champion,
        ("metric", "sample_ratio"),
        # Not `refusals`: all mistakes of one caller fall on one arm here. Keys that an arm refuses are missing from the sample ratio.
        ("errors", "latency", *LIMITS, "quality"),
        policy.step_seconds,
        policy.minimum_requests,
        maximum_seconds=policy.ab_maximum_seconds,
    )
    return (split, _watch(champion, candidate, policy))


Strategy = Callable[[str, str, RolloutPolicy], tuple[Step, ...]]

STRATEGIES: dict[str, Strategy] = {"blue_green": blue_green, "canary": canary, "shadow": shadow, "ab_test": ab_test}


def _watch(champion: str, candidate: str, policy: RolloutPolicy) -> Step:
    return Step(
        "watch",
        Routes.all_to(candidate, warm=[champion]),
        candidate,
        None,
        LIMITS,
        ("quality",),
        policy.watch_seconds,
        policy.minimum_requests,
        watch=True,
    )


_OPEN_SHARES = {  # strictly between 0 and 1: as 0 or 1 the test would be decided beforehand
    "alpha",
    "beta",
    "error_rate_increase",
    "slow_share_increase",
    "accuracy_drop",
    "max_error_rate",
    "max_disagreement",
    "max_score_shift",
    "score_tolerance",
    "ab_minimum_effect",
    "sample_ratio_alpha",
}


_KINDS = {int: "whole number", str: "text", bool: "true or false", tuple: "tuple of numbers"}


def _check_type(name: str, value: Any, default: Any) -> None:
    """Each field has the type of its default, where a whole number may stand for a float."""
    wanted = (int, float) if isinstance(default, float) else type(default)
    right = isinstance(value, wanted) and isinstance(value, bool) == isinstance(default, bool)
    if right and isinstance(value, tuple):
        right = all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
    if not right:
        kind = "number" if isinstance(default, float) else _KINDS[type(default)]
        raise DeclarationError(f"rollout.{name} is {value!r}: give a {kind}.")


def _check_number(name: str, value: Any) -> None:
    """Each number by its name: shares, percents, counts (at least 1) and durations (not negative)."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool | str):
            continue
        if name in _OPEN_SHARES and not 0 < number < 1:
            raise DeclarationError(f"rollout.{name} is {number!r}: use a share above 0 and below 1.")
        if name.endswith("percent") or name == "pauses":
            to_per_mille(f"rollout.{name}", number)
        elif isinstance(number, int) and not name.endswith("seconds") and number < 1:
            raise DeclarationError(f"rollout.{name} is {number!r}: use a whole number of at least 1.")
        elif not 0 <= number < float("inf") or (name == "max_p99_latency_ms" and number == 0):
            raise DeclarationError(f"rollout.{name} is {number!r}: use a number that is not negative and not infinite.")
