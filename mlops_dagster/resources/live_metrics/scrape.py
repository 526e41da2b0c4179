"""Envoy's counters as raw series of arms.

An arm's own cluster has one server, whose counts are its attempts: 2xx–4xx as success; 5xx, resets, time-outs and refused
connections as errors, also those that a caller never saw because a stand-in answered. Which answers are 4xx only the counts by
code say, and those are taken as the latency is. Latency is Envoy's `upstream_rq_time` in
whole milliseconds: what a caller waited for the server, queueing included. It is charged to the cluster that the route names,
so an arm's latencies are those of its own cluster (mirrored, or a preview) and of the answering clusters that begin with it.
Requests of callers that named the arm are in a cluster beside it, and are left out.
"""

from collections.abc import Iterator, Mapping, Sequence

from mlops_dagster.core.measurements import DEFAULT_BOUNDS_MS, Counters
from mlops_dagster.resources.live_metrics.samples import Raw
from mlops_dagster.resources.serving.envoy_admin import EnvoyAdmin, Host
from mlops_dagster.resources.serving.envoy_config import NAMED


def counters(admin: EnvoyAdmin) -> list[Raw]:
    """Every series of every arm as it stands now. Raises ServingError when Envoy does not answer."""
    return [*_requests(admin.hosts()), *_answers(admin.answers()), *_latencies(admin.latencies())]


def _requests(hosts: Mapping[str, Host]) -> Iterator[Raw]:
    for name, host in hosts.items():
        model, _, arm = name.partition("/")
        if not arm.endswith(NAMED):
            yield Raw(f"requests {name}", model, arm, Counters(requests=host.success + host.error, errors=host.error))


def _answers(counts: Mapping[str, tuple[int, int]]) -> Iterator[Raw]:
    for name, (answers, refused) in counts.items():
        model, _, rest = name.partition("/")
        if rest and not rest.endswith(NAMED):  # and not the listener's own counts
            yield Raw(f"answers {name}", model, rest.partition("|")[0], Counters(answers=answers, refused=refused))


def _latencies(histograms: Mapping[str, Sequence[tuple[float, int]]]) -> Iterator[Raw]:
    for name, cumulative in histograms.items():
        model, _, rest = name.partition("/")
        if not rest.endswith(NAMED):
            yield Raw(f"latency {name}", model, rest.partition("|")[0], Counters(latency=_buckets(cumulative)))


def _buckets(cumulative: Sequence[tuple[float, int]]) -> tuple[int, ...]:
    """Counts per bucket of DEFAULT_BOUNDS_MS and above, from Envoy's cumulative ones (its last bound is infinite in effect)."""
    counts = [count for _, count in cumulative]
    steps = [now - before for before, now in zip([0, *counts], counts, strict=False)]
    wanted = len(DEFAULT_BOUNDS_MS)
    return (*steps[:wanted], sum(steps[wanted:]))
