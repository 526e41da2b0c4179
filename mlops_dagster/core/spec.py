"""What a model's YAML declares: every field, its unit, its default and what is wrong with a wrong value."""

import datetime as dt
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, field_validator, model_validator

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.core.metrics import METRICS, PRIMARY, Task, names_for
from mlops_dagster.core.rollout_section import Rollout
from mlops_dagster.core.search_space import parse_search_space
from mlops_dagster.core.section import Section

Share = Annotated[float, Field(ge=0, le=1)]
Reference = Annotated[
    str,
    Field(
        pattern=r"^\.?[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$",
        description="Dotted path of a Python object: `.module.name` inside the model's folder, or absolute.",
    ),
]


class Partitions(Section):
    """The days that the source has."""

    start: dt.date = Field(description="First day.")
    end: dt.date | None = Field(default=None, description="Last day, itself included; absent: until today.")
    timezone: str = Field(default="UTC", description="IANA time zone that a day begins and ends in.")

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        if value not in available_timezones():
            raise ValueError(f"timezone {value!r} is not an IANA name; use one such as 'UTC' or 'America/New_York'")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> "Partitions":
        if self.end is not None and self.end < self.start:
            raise ValueError(f"partitions.end {self.end} is before partitions.start {self.start}; swap them")
        return self

    def bounds(self, day: dt.date) -> tuple[dt.datetime, dt.datetime]:
        """The moments, in UTC, at which a day begins and ends (the end belongs to the next day)."""
        zone = ZoneInfo(self.timezone)
        midnights = (dt.datetime.combine(d, dt.time(), zone) for d in (day, day + dt.timedelta(days=1)))
        begin, end = (midnight.astimezone(dt.UTC) for midnight in midnights)
        return begin, end

    def day_of(self, moment: dt.datetime) -> dt.date:
        """The day that a moment (with a time zone) falls on."""
        return moment.astimezone(ZoneInfo(self.timezone)).date()


class Source(Section):
    """Where the rows come from."""

    read: Reference = Field(description="`read_day(day) -> table | {name: table}`; the first table is the main one.")
    row_schema: Reference = Field(alias="schema", description="Pandera schema, or a mapping of table names to schemas.")
    partitions: Partitions
    known_after: dict[str, str] = Field(
        default_factory=dict,
        description="Column of the main table -> timestamp column from which on it is known; the leakage check masks by it.",
    )
    max_rejected_share: Share = Field(default=0.05, description="Largest share of a day's rows that the schema may reject.")
    recheck_days: int = Field(
        default=2, ge=0, le=60, description="The newest stored days that are read again, once a day, for late rows; 0: never."
    )


class Features(Section):
    """The feature views and how they are computed."""

    define: Reference = Field(description="`feature_views(source) -> list` of Feast entities and feature views.")
    compute: Reference = Field(description="`compute() -> {view: SQL}` over the validated tables, in DuckDB's dialect.")
    engine: Literal["duckdb", "spark", "ray"] = Field(default="duckdb", description="What runs the SQL.")
    lookback_days: int = Field(default=14, ge=0, le=3660, description="Days before a partition's day that the SQL may read.")
    max_null_share: Share = Field(default=0.5, description="Largest share of missing values in a stored feature.")
    max_online_age_hours: float | None = Field(
        default=None, gt=0, description="Greatest age of a view's newest online value; default: a day and a quarter."
    )


class Expectations(Section):
    """What a day's features are expected to be like, learned from what the deployed version was trained on."""

    enabled: bool = Field(default=True, description="Whether the check `learned_expectations` judges.")
    range_slack: float = Field(
        default=0.1, ge=0, description="How far beyond the reference's range a number may lie, as a share of the range's width."
    )
    max_outside_share: Share = Field(
        default=0.01, description="Largest share of rows outside the ranges or with unknown categories."
    )
    missing_slack: Share = Field(
        default=0.05, description="How much greater than the reference's the share of missing values may be."
    )
    exclude: list[str] = Field(default_factory=list, description="Features of which nothing is expected.")


class Label(Section):
    """What is predicted."""

    column: str = Field(min_length=1, description="Column of the main table; null until the label has landed.")
    lands_after_hours: float = Field(default=24, ge=0, description="Hours after the end of a day until its labels are final.")


class Training(Section):
    """How the estimator is made."""

    train: Reference = Field(description="`train(features, label, **parameters) -> estimator`.")
    task: Task = Field(default="classification", description="Kind of label.")
    baseline: Reference | None = Field(
        default=None, description="`naive(features) -> predictions`; default: majority class or mean."
    )
    export: Reference | None = Field(
        default=None, description="`to_onnx(estimator, signature) -> ModelProto`; default: skl2onnx."
    )
    format: Literal["onnx", "mlflow"] = Field(
        default="onnx",
        description="What is served: ONNX, or for what cannot become ONNX the pickled estimator, behind MLflow's own server (slower).",
    )
    engine: Literal["local", "ray"] = Field(default="local", description="Where `train` runs.")
    window_days: int = Field(default=60, ge=1, description="Days of rows that a training set covers, the test days included.")
    test_days: int = Field(default=14, ge=1, description="The last days of the window, held out for the evaluation.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Passed to `train`; tuning overrides them.")

    @model_validator(mode="after")
    def _room_for_training(self) -> "Training":
        if self.test_days >= self.window_days:
            raise ValueError(f"training.test_days {self.test_days} leaves nothing of window_days {self.window_days}; lower it")
        return self

    @model_validator(mode="after")
    def _one_format(self) -> "Training":
        if self.export is not None and self.format != "onnx":
            raise ValueError(f"training.export makes ONNX, but training.format is {self.format!r}; leave one of them out")
        return self


class Tuning(Section):
    """The search for parameters."""

    engine: Literal["none", "local", "ray"] = Field(default="none", description="`none` uses training.parameters as they are.")
    algorithm: Literal["random", "tpe", "grid", "cmaes", "halton", "sobol"] = Field(
        default="tpe", description="Search algorithm."
    )
    trials: int = Field(default=20, ge=1, description="How many parameter sets are tried.")
    metric: str | None = Field(default=None, description="Metric to optimise; default: the gate's.")
    parameters: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="`{name: {min, max, log?, integer?} | {choices: [...]}}`."
    )

    @model_validator(mode="after")
    def _something_to_search(self) -> "Tuning":
        if self.engine != "none" and not self.parameters:
            raise ValueError("tuning.parameters is empty; name at least one parameter or set tuning.engine to none")
        try:
            if self.parameters:
                parse_search_space(self.parameters)
        except DeclarationError as error:
            raise ValueError(str(error)) from None
        return self


class Evaluation(Section):
    """What is looked at on the held-out rows beside the gate."""

    slices: list[str] = Field(default_factory=list, description="Columns whose values are evaluated one by one.")


class Gate(Section):
    """What a version must reach on the held-out rows before it is registered."""

    metric: str = Field(default="accuracy", description="One of core.metrics.METRICS.")
    minimum: float | None = Field(default=None, description="Least value; 0.9 where the metric is accuracy and nothing is said.")
    maximum: float | None = Field(default=None, description="Largest value, for metrics where less is better.")
    tolerance_to_champion: float = Field(
        default=0.0, ge=0, description="How much worse than the champion, on the same rows, is allowed."
    )
    gain_over_baseline: float | None = Field(
        default=None, description="How much better than the naive baseline, on the same rows, is needed."
    )

    @model_validator(mode="after")
    def _metric_and_limit_fit(self) -> "Gate":
        metric = METRICS.get(self.metric)
        if metric is None:
            raise ValueError(f"gate.metric {self.metric!r} is unknown; use one of {', '.join(sorted(METRICS))}")
        wrong = "maximum" if metric.greater_is_better else "minimum"
        if getattr(self, wrong) is not None:
            better = "minimum" if wrong == "maximum" else "maximum"
            raise ValueError(f"gate.{wrong} does not fit the metric {self.metric!r}; use gate.{better}")
        return self

    @property
    def limit(self) -> float | None:
        """The absolute limit on the metric, None where only relative ones are declared."""
        if METRICS[self.metric].greater_is_better:
            default = 0.9 if self.metric == "accuracy" and self.gain_over_baseline is None else None
            return self.minimum if self.minimum is not None else default
        return self.maximum


class Serving(Section):
    """What the gateway does with the model's requests."""

    timeout_seconds: float = Field(
        default=10, gt=0, le=100, description="A request that is not answered within this many seconds, 100 at most, gets 504."
    )
    requests_per_second: int | None = Field(
        default=None, ge=1, description="Requests beyond this many a second get 429; absent: no limit."
    )


class Monitoring(Section):
    """The limits that a deployed version is watched by."""

    max_psi: float = Field(default=0.3, gt=0, description="Largest population stability index of a feature or of the prediction.")
    max_p99_latency_ms: float = Field(default=100, gt=0, description="Largest 99th percentile of the answer time, milliseconds.")
    max_accuracy_drop: float = Field(
        default=0.05,
        ge=0,
        description="How far the primary metric may fall behind its held-out value (regression: as a share of it).",
    )
    max_requests_per_second: float = Field(default=10_000, gt=0, description="Request volume that raises an alert.")
    window_days: int = Field(default=7, ge=1, description="Days that one drift or accuracy figure covers.")
    minimum_rows: int = Field(default=500, ge=1, description="Below this many rows in the window the answer is INCONCLUSIVE.")
    exclude: list[str] = Field(default_factory=list, description="Features that are reported but not judged for drift.")


class Retraining(Section):
    """When a new version is trained without being asked for."""

    triggers: list[Literal["drift", "accuracy", "age", "new_labels"]] = Field(
        default=["drift", "accuracy", "age"], description="The triggers."
    )
    violations: int = Field(
        default=2, ge=1, description="Violated evaluations needed among the last `of_last`, the newest included."
    )
    of_last: int = Field(default=5, ge=1, description="Evaluations that are looked at.")
    max_age_days: int = Field(default=90, ge=1, description="Days after which a version counts as old.")
    new_labels: int = Field(
        default=100_000, ge=1, description="Labelled rows since the last training that count as enough new ones."
    )
    cooldown_days: int = Field(default=7, ge=0, description="Days between two retrainings.")
    runs_per_month: int = Field(default=8, ge=0, description="Most retrainings in any 30 days.")

    @model_validator(mode="after")
    def _reachable(self) -> "Retraining":
        if self.violations > self.of_last:
            raise ValueError(f"retraining.violations {self.violations} can never be reached in of_last {self.of_last}; lower it")
        return self


class ModelDeclaration(Section):
    """The attributes of one model, as its `defs.yaml` states them."""

    description: str = Field(default="", description="What the model answers, in a sentence.")
    owners: list[str] = Field(default_factory=list, description="E-mail addresses or `team:name`.")
    source: Source
    features: Features
    expectations: Expectations = Expectations()
    label: Label
    training: Training
    tuning: Tuning = Tuning()
    evaluation: Evaluation = Evaluation()
    gate: Gate | None = Field(default=None, description="Default: accuracy >= 0.9; regression: better than the baseline.")
    approval: Literal["manual", "automatic", "four_eyes"] = Field(
        default="manual", description="Who approves a version: a person, the gate alone, or a person other than its author."
    )
    serving: Serving = Serving()
    rollout: Rollout = Rollout()
    monitoring: Monitoring = Monitoring()
    retraining: Retraining = Retraining()

    @model_validator(mode="after")
    def _parts_fit(self) -> "ModelDeclaration":
        task = self.training.task
        for field, name in (("gate.metric", self.gate and self.gate.metric), ("tuning.metric", self.tuning.metric)):
            if name is not None and (name not in METRICS or METRICS[name].task != task):
                raise ValueError(f"{field} {name!r} does not fit training.task {task!r}; use one of {', '.join(names_for(task))}")
        return self


class ModelSpec(ModelDeclaration):
    """A declaration with the name of its folder and the package its relative references start from."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Lower-case letters, digits and underscores.")
    package: str = Field(description="Dotted name of the model's Python package.")

    @property
    def active_gate(self) -> Gate:
        """The declared gate, or the default of the task."""
        if self.gate is not None:
            return self.gate
        if self.training.task == "classification":
            return Gate()
        return Gate(metric=PRIMARY["regression"], gain_over_baseline=0.0)

    def absolute(self, reference: str) -> str:
        """The absolute dotted path of a reference in this declaration."""
        return f"{self.package}{reference}" if reference.startswith(".") else reference
