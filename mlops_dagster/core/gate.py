"""The gate: whether a trained version may be registered."""

from collections.abc import Mapping
from dataclasses import dataclass

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.core.metrics import METRICS
from mlops_dagster.core.spec import Gate


@dataclass(frozen=True)
class GateRule:
    """One rule of a gate, what it compared and whether it holds."""

    name: str
    value: float
    limit: float
    passed: bool

    def sentence(self) -> str:
        return f"{self.name}: {self.value:.4f} against {self.limit:.4f}: {'passed' if self.passed else 'FAILED'}"


@dataclass(frozen=True)
class GateResult:
    """The gate's answer with every rule it rests on."""

    metric: str
    passed: bool
    rules: tuple[GateRule, ...]

    def sentence(self) -> str:
        return "; ".join(rule.sentence() for rule in self.rules) or f"no rule is declared for {self.metric}"


def judge(
    gate: Gate, candidate: Mapping[str, float], baseline: Mapping[str, float], champion: Mapping[str, float] | None
) -> GateResult:
    """Judge a candidate's metrics on the held-out rows against the limit, the naive baseline and the champion on the same rows.

    A value that is not a number fails its rule. Raises DeclarationError where the metric was not computed.
    """
    if gate.metric not in candidate:
        raise DeclarationError(f"gate.metric {gate.metric!r} was not computed; there are: {', '.join(sorted(candidate))}")
    metric, value = METRICS[gate.metric], candidate[gate.metric]
    rules = []
    if gate.limit is not None:
        rules.append(GateRule(f"{gate.metric} limit", value, gate.limit, metric.gain(value, gate.limit) >= 0))
    if gate.gain_over_baseline is not None:
        least = baseline[gate.metric] + gate.gain_over_baseline * (1 if metric.greater_is_better else -1)
        rules.append(GateRule(f"{gate.metric} over the naive baseline", value, least, metric.gain(value, least) >= 0))
    if champion is not None:
        least = champion[gate.metric] - gate.tolerance_to_champion * (1 if metric.greater_is_better else -1)
        rules.append(GateRule(f"{gate.metric} beside the champion", value, least, metric.gain(value, least) >= 0))
    return GateResult(gate.metric, all(rule.passed for rule in rules), tuple(rules))
