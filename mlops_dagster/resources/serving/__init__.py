"""Serving: which versions of a model run, and how its requests are divided among them, whatever runs them."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from mlops_dagster.core.errors import DeclarationError, ServingError
from mlops_dagster.core.routes import BASELINE, Routes

__all__ = ["DEFAULT_OPTIONS", "Arm", "ArmState", "Observed", "Phase", "Serving", "ServingOptions", "checked_model", "wait_ready"]

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}")


@dataclass(frozen=True)
class Arm:
    """One server of one version: its artifact's folder and digest, and the part it plays (`champion`, `candidate`, `baseline`,
    `previous` …).

    `key` is what `Routes` calls it: the version, or `<version>@baseline` for the part `baseline`. Raises DeclarationError.
    """

    version: str
    artifact: str
    sha256: str
    name: str

    def __post_init__(self) -> None:
        for field_name, value, pattern, wanted in (
            ("version", self.version, _VERSION, "letters, digits, '.', '_' and '-'"),
            ("sha256", self.sha256, _SHA256, "64 lower-case hexadecimal digits"),
            ("name", self.name, _NAME, "a lower-case word such as 'champion' or 'candidate'"),
        ):
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise DeclarationError(f"arm.{field_name} is {value!r}: use {wanted}.")

    @property
    def key(self) -> str:
        return self.version + BASELINE if self.name == "baseline" else self.version


@dataclass(frozen=True)
class ServingOptions:
    """How a model is served, apart from versions and weights; every number has a unit in its name.

    `feature_repo`: the Feast repository that completes entity-key requests, or None; `time_zone`: of the inference log's days;
    `grace_seconds`: how long a version that left the desired state keeps running, for an instant way back; `start_seconds`: how
    long a server may take to become ready before it counts as failed; `requests_per_second`: more than this is answered with
    429 (None: no limit).
    """

    feature_repo: str | None = None
    time_zone: str = "UTC"
    timeout_seconds: float = 10.0
    grace_seconds: float = 300.0
    start_seconds: float = 60.0
    requests_per_second: int | None = None

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "start_seconds"):
            if not 0 < getattr(self, name) <= 86_400:
                raise DeclarationError(f"serving.{name} is {getattr(self, name)!r}: give seconds above 0 and up to a day.")
        if not 0 <= self.grace_seconds <= 30 * 86_400:
            raise DeclarationError(f"serving.grace_seconds is {self.grace_seconds!r}: give seconds from 0 to 30 days.")
        if self.requests_per_second is not None and self.requests_per_second < 1:
            raise DeclarationError(
                f"serving.requests_per_second is {self.requests_per_second!r}: give at least 1, or leave it out."
            )


DEFAULT_OPTIONS = ServingOptions()


class Phase(StrEnum):
    """What a server of an arm is doing; `stopped` only when the whole host was stopped on purpose."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class ArmState:
    """The phase of one arm and, unless it is ready, why (for a failed one with its last log lines).

    `deaths` is how often its server ended by itself since it was first started, `down_since` when a server that had been ready
    stopped being so (seconds since 1970; None: it is ready, or never was).
    """

    phase: Phase
    reason: str = ""
    deaths: int = 0
    down_since: float | None = None


@dataclass(frozen=True)
class Observed:
    """What really runs: `arms` by arm key, `routes` as the gateway follows them now (None: the model has none yet).

    `pending` says why the desired routes are not live yet ("" when they are); `warm` are arms that are no longer desired but
    still run; `problem` is a fault of the gateway or of the host itself.
    """

    model: str
    arms: Mapping[str, ArmState] = field(default_factory=dict)
    routes: Routes | None = None
    pending: str = ""
    warm: tuple[str, ...] = ()
    problem: str = ""

    @property
    def ready(self) -> bool:
        """Every desired arm is ready and the desired routes are live."""
        return not self.pending and not self.problem and all(arm.phase is Phase.READY for arm in self.arms.values())

    @property
    def failures(self) -> dict[str, str]:
        return {key: arm.reason for key, arm in self.arms.items() if arm.phase is Phase.FAILED}


class Serving(Protocol):
    """The servers of all models and the gateway in front of them; every call is safe to repeat."""

    def apply(self, model: str, arms: Sequence[Arm], routes: Routes, options: ServingOptions = DEFAULT_OPTIONS) -> None:
        """Make this the desired state, durably, and return at once; what runs is brought to it in the background.

        New routes go live when every arm that gains weight by them is ready; until then the old ones stay. Raises
        DeclarationError when `routes` names an arm that is not in `arms`, ArtifactError when an artifact is not there,
        StorageError when the state cannot be written (the old state stands), ServingError when the host cannot be started.
        """
        ...

    def observe(self, model: str) -> Observed:
        """What runs now. Raises NotFoundError for a model that was never applied or was removed."""
        ...

    def endpoint(self, model: str) -> str:
        """The base URL, without a trailing slash, below which `/v1/models/<model>:predict` and `/v2/models/<model>/infer` are
        found.
        """
        ...

    def remove(self, model: str) -> None:
        """Take the model out of service: its route first, then its servers; one that is not there is no error."""
        ...


def wait_ready(
    serving: Serving,
    model: str,
    timeout_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Observed:
    """Wait until every desired arm is ready and the desired routes are live.

    Raises ServingError as soon as an arm has failed, or after `timeout_seconds`; the message says which arm, and why.
    """
    end = clock() + timeout_seconds
    while True:
        seen = serving.observe(model)
        if seen.ready:
            return seen
        if seen.failures:
            told = "; ".join(f"version {key}: {reason}" for key, reason in seen.failures.items())
            raise ServingError(f"{model} cannot be served: {told}")
        if clock() >= end:
            phases = ", ".join(f"{key} {arm.phase}" for key, arm in seen.arms.items())
            why = seen.problem or seen.pending or "its servers are still starting"
            raise ServingError(
                f"{model} was not ready within {timeout_seconds:g} s ({phases}): {why}. `mlops status` shows its state."
            )
        sleep(0.05)


def checked_model(model: str) -> str:
    """The name itself, if it can stand in a path and in the name of a process. Raises DeclarationError otherwise."""
    if not isinstance(model, str) or not _MODEL.fullmatch(model):
        raise DeclarationError(
            f"model is {model!r}: use up to 63 letters, digits, '_', '.' and '-', beginning with a letter or digit."
        )
    return model
