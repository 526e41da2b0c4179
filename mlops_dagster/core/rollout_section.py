"""The part of a declaration that says how an approved version comes in; its limits and defaults are those of `RolloutPolicy`."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.core.section import Section
from mlops_dagster.core.strategies import RolloutPolicy

OpenShare = Annotated[float, Field(gt=0, lt=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0)]
Duration = Annotated[float, Field(gt=0)]
POLICY = RolloutPolicy()
DERIVED_FIELDS = ("accuracy_drop", "max_p99_latency_ms", "sticky_salt")
"""Fields of a rollout's policy that a declaration states in other sections, or not at all."""


class Rollout(Section):
    """How an approved version replaces the one that serves."""

    strategy: Literal["blue_green", "canary", "shadow", "ab_test"] = Field(default="canary", description="Deployment strategy.")

    alpha: OpenShare = Field(
        default=POLICY.alpha,
        description="Chance that a version as good as the champion is ever rolled back, over the whole rollout.",
    )
    beta: OpenShare = Field(
        default=POLICY.beta, description="Chance that a version worse by a declared effect passes a step that compares."
    )
    minimum_requests: Count = Field(
        default=POLICY.minimum_requests, description="Requests that an arm must answer in a step before it can pass."
    )
    minimum_requests_to_fail: Count = Field(
        default=POLICY.minimum_requests_to_fail,
        description="Requests that an arm must answer before errors or latency can fail it.",
    )
    error_rate_increase: OpenShare = Field(
        default=POLICY.error_rate_increase,
        description="Increase in the share of failed requests, and of refused ones (4xx), that matters.",
    )
    slow_share_increase: OpenShare = Field(
        default=POLICY.slow_share_increase,
        description="Increase in the share of answers slower than the champion's 95th percentile that matters.",
    )
    max_error_rate: OpenShare = Field(default=POLICY.max_error_rate, description="Largest share of failed requests.")
    max_down_seconds: Seconds = Field(
        default=POLICY.max_down_seconds, description="Once ready, the new version's server may be away for less than this."
    )
    max_restarts: Count = Field(
        default=POLICY.max_restarts, description="The death of the new version's server, by number, that fails the rollout."
    )

    step_seconds: Duration = Field(default=POLICY.step_seconds, description="Least time on a step.")
    watch_seconds: Duration = Field(
        default=POLICY.watch_seconds, description="How long the new version is watched with all traffic before it is champion."
    )
    start_seconds: Duration = Field(
        default=POLICY.start_seconds, description="Time to become ready and answer the smoke predictions."
    )
    keep_warm_seconds: Seconds = Field(
        default=POLICY.keep_warm_seconds, description="How long the old version runs on for an instant way back."
    )
    max_metric_age_seconds: Duration = Field(
        default=POLICY.max_metric_age_seconds, description="Older metrics are none: an ERROR."
    )
    max_consecutive_errors: Count = Field(
        default=POLICY.max_consecutive_errors, description="The ERROR in a row that holds the rollout for a person."
    )
    max_inconclusive_seconds: Seconds = Field(
        default=POLICY.max_inconclusive_seconds,
        description="Without a verdict for so long after a step could have been left, the rollout is held for a person.",
    )

    steps_percent: list[Percent] = Field(default=list(POLICY.steps_percent), description="Canary weights, rising.")
    pauses: list[Percent] = Field(default=list(POLICY.pauses), description="The canary weights after which a person must resume.")
    baseline_arm: bool = Field(
        default=POLICY.baseline_arm, description="Compare the canary with a fresh server of the champion of equal weight."
    )

    preview_header: str = Field(
        default=POLICY.preview_header, description="Blue-green: requests with this header and the version reach the preview."
    )
    preview_requests: Count = Field(
        default=POLICY.preview_requests, description="Requests that the preview must answer before the switch."
    )
    preview_mirror_percent: Percent = Field(
        default=POLICY.preview_mirror_percent,
        description="Share of the traffic that is copied to the preview, which is then compared with the champion.",
    )
    pause_before_switch: bool = Field(
        default=POLICY.pause_before_switch, description="A person must resume before the preview gets the traffic."
    )

    mirror_percent: Percent = Field(default=POLICY.mirror_percent, description="Share of the traffic that is copied to a shadow.")
    shadow_seconds: Duration = Field(default=POLICY.shadow_seconds, description="How long a shadow answers copies.")
    shadow_ends: Literal["hold", "promote"] = Field(
        default=POLICY.shadow_ends, description="What a shadow that passed does: wait for a person, or go on."
    )
    max_disagreement: OpenShare = Field(
        default=POLICY.max_disagreement, description="Largest share of mirrored rows whose two answers differ."
    )
    max_score_shift: OpenShare = Field(
        default=POLICY.max_score_shift,
        description="Largest share of mirrored rows whose scores (without scores: answers) are more than `score_tolerance` apart.",
    )
    score_tolerance: OpenShare = Field(
        default=POLICY.score_tolerance,
        description="How far two scores may be apart; of values (regression), as a share of the larger one, also from the label.",
    )

    ab_percent: Percent = Field(default=POLICY.ab_percent, description="Share of the new version in an A/B test.")
    ab_metric: str = Field(
        default=POLICY.ab_metric,
        description="What an A/B test counts as a success, a trial being a sticky key's first request (its first row): `accuracy` "
        "(the prediction is the label), `answered` (no 5xx), `score` (at least `ab_score_threshold`), or a dotted path of "
        "`metric(rows) -> values`: a table of logged rows with their `label`, and for each 1, 0, or none while not known.",
    )
    ab_score_threshold: float = Field(default=POLICY.ab_score_threshold, ge=0, description="Least score that is a success.")
    ab_minimum_effect: OpenShare = Field(
        default=POLICY.ab_minimum_effect, description="Least gain in the share of successes that is worth a change."
    )
    ab_maximum_seconds: Duration = Field(
        default=POLICY.ab_maximum_seconds, description="Longest A/B test; then the champion stays."
    )
    sticky_by: Literal["header", "cookie"] = Field(
        default=POLICY.sticky_by, description="Where a request of an A/B test carries the key that chooses its version."
    )
    sticky_name: str = Field(default=POLICY.sticky_name, description="Name of that header or cookie.")
    sample_ratio_alpha: OpenShare = Field(
        default=POLICY.sample_ratio_alpha, description="Chance that an A/B test whose keys are divided rightly is said not to be."
    )

    @field_validator("steps_percent")
    @classmethod
    def _rising(cls, value: list[float]) -> list[float]:
        if not value or value != sorted(set(value)):
            raise ValueError(f"rollout.steps_percent {value} must rise from step to step, such as [5, 25, 50]")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "Rollout":
        try:
            self.policy()
        except DeclarationError as error:
            raise ValueError(str(error)) from None
        return self

    def policy(self, **derived: Any) -> RolloutPolicy:
        """What this declares as a policy, with the fields that come from elsewhere (see DERIVED_FIELDS)."""
        declared = {name: tuple(v) if isinstance(v, list) else v for name, v in self.model_dump().items()}
        return RolloutPolicy(**declared, **derived)
