"""Counters of one predictor in Prometheus' text format, with the names that KServe's Python runtime uses for its stages.

prometheus_client's histograms cost about a microsecond each on the answer's path, so finished requests are only listed there and
counted later, many at a time. Names: kserve/metrics.py (`request_preprocess_seconds`, `request_predict_seconds`, …).
"""

import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest

STAGES = ("request_preprocess_seconds", "request_predict_seconds", "request_postprocess_seconds", "request_explain_seconds")
STAGE_HELP = {
    "request_preprocess_seconds": "pre-process request latency",
    "request_predict_seconds": "predict request latency",
    "request_postprocess_seconds": "post-process request latency",
    "request_explain_seconds": "explain request latency",
}
STAGE_BUCKETS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
)
REQUEST_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts by upper bound, and the sum; seconds."""

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._bounds = np.array(buckets)
        self._counts = np.zeros(len(buckets) + 1, dtype=np.int64)
        self._sum = 0.0

    def observe(self, seconds: np.ndarray) -> None:
        if len(seconds):
            self._counts += np.bincount(self._bounds.searchsorted(seconds), minlength=len(self._counts))
            self._sum += float(seconds.sum())

    def lines(self, name: str, labels: str) -> list[str]:
        running = np.cumsum(self._counts)
        bounds = [f"{b:g}" if b != int(b) else f"{b:.1f}" for b in self._bounds] + ["+Inf"]
        made = [f'{name}_bucket{{{labels},le="{b}"}} {int(c)}' for b, c in zip(bounds, running, strict=True)]
        return [*made, f"{name}_count{{{labels}}} {int(running[-1])}", f"{name}_sum{{{labels}}} {self._sum!r}"]


class Metrics:
    """All counters of the process; every method may be called from any thread."""

    def __init__(self, model: str, version: str, arm: str) -> None:
        self._model = f'model_name="{_escape(model)}"'
        self._labels = f'{self._model},model_version="{_escape(version)}",arm="{_escape(arm)}"'
        self._lock = threading.Lock()
        self._stages = {name: Histogram(STAGE_BUCKETS) for name in STAGES}
        self._request = Histogram(REQUEST_BUCKETS)
        self._answers: Counter[tuple[str, int, bool]] = Counter()
        self._rows: Counter[bool] = Counter()
        self.gauges: dict[str, tuple[str, str, float]] = {}
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    def answered(self, times: np.ndarray, protocols: Sequence[str], shadows: Sequence[bool], rows: Sequence[int]) -> None:
        """Successful predictions: `times` [n, 5] are perf_counter nanoseconds at arrival, body read, rows checked, scored, answered."""
        seconds = np.diff(times, axis=1) / 1e9
        with self._lock:
            for i, name in enumerate(STAGES[:3]):
                self._stages[name].observe(seconds[:, i + 1])
            self._request.observe((times[:, 4] - times[:, 0]) / 1e9)
            for (protocol, shadow, count), times_seen in Counter(zip(protocols, shadows, rows, strict=True)).items():
                self._answers[(protocol, 200, shadow)] += times_seen
                self._rows[shadow] += times_seen * count

    def failed(self, protocol: str, code: int, shadow: bool, seconds: float) -> None:
        """One prediction request that was answered with an error."""
        with self._lock:
            self._answers[(protocol, code, shadow)] += 1
            self._request.observe(np.array([seconds]))

    def gauge(self, name: str, kind: str, meaning: str, value: float) -> None:
        """Set a value that another part keeps (kind: gauge or counter)."""
        with self._lock:
            self.gauges[name] = (kind, meaning, value)

    def render(self) -> bytes:
        """The exposition text."""
        with self._lock:
            lines = []
            for name, histogram in self._stages.items():
                lines += [f"# HELP {name} {STAGE_HELP[name]}", f"# TYPE {name} histogram", *histogram.lines(name, self._model)]
            lines += [
                "# HELP mlops_request_seconds prediction requests from their arrival to their answer",
                "# TYPE mlops_request_seconds histogram",
            ]
            lines += self._request.lines("mlops_request_seconds", self._labels)
            lines += [
                "# HELP mlops_requests_total prediction requests by protocol and answer",
                "# TYPE mlops_requests_total counter",
            ]
            for (protocol, code, shadow), count in sorted(self._answers.items()):
                lines.append(
                    f'mlops_requests_total{{{self._labels},protocol="{protocol}",code="{code}",shadow="{_bool(shadow)}"}} {count}'
                )
            lines += [
                "# HELP mlops_predicted_rows_total rows answered with a prediction",
                "# TYPE mlops_predicted_rows_total counter",
            ]
            lines += [
                f'mlops_predicted_rows_total{{{self._labels},shadow="{_bool(s)}"}} {c}' for s, c in sorted(self._rows.items())
            ]
            for name, (kind, meaning, value) in sorted(self.gauges.items()):
                lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", f"{name}{{{self._labels}}} {value:g}"]
        return ("\n".join(lines) + "\n").encode() + generate_latest(self._registry)


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
