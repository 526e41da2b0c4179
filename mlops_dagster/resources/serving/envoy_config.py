"""Envoy's configuration as plain values: a bootstrap that never changes while Envoy runs, and the three resources that do.

Envoy v3 API (listener, cluster, route). Every arm is a cluster `<model>/<arm>` of one server, health-checked actively and
passively. Callers reach it through an *aggregate* cluster `<model>/<arm>|<stand-ins>`: while the arm is alive it answers, and
when it is dead the stand-ins do, so that a dead version costs no caller an error. A caller that names a version reaches the same
server by the cluster `<model>/<arm>@named`, whose counts are no evidence: whoever names an arm chooses what it meets.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mlops_dagster.core.routes import PER_MILLE, Mirror, Routes, Sticky, version_of
from mlops_dagster.resources.serving import ServingOptions

Json = dict[str, Any]

ROUTES_NAME = "gateway"
VERSION_HEADER = "x-mlops-version"  # a caller names the arm that must answer
SHADOW_HEADER = "x-mlops-shadow"  # only the gateway sets it: this request is a copy, its answer goes nowhere
METADATA = "mlops"
UNIT = "unit"  # the sticky key that chose the arm, for the log of an A/B test
UNIT_HEADER = "x-mlops-unit"  # salt and sticky key, from the gateway to itself: what is hashed
UNIT_FILTER = "sticky_key"
CLIENT_HEADER = "x-mlops-client"  # only the gateway sets it: whose API key it was
NAMED = "@named"
KEY_FILTER = "envoy.filters.http.lua"
_TYPE = "type.googleapis.com/envoy."
_LUA_CONTEXT = f"{_TYPE}extensions.filters.http.lua.v3.LuaPerRoute"
_HASHED_UNIT = {"header": {"header_name": UNIT_HEADER}, "terminal": True}
"""XXH64(salt + ":" + key), as `core.routes.bucket` computes it."""


@dataclass(frozen=True)
class Backend:
    """Where one arm listens, `host:port`."""

    key: str
    address: str


@dataclass(frozen=True)
class Published:
    """What the gateway needs to know of one model: its servers, the routes to follow, and who stands in for whom.

    `clients`: the names of those that may ask it, by the SHA-256 of their API keys; None: everybody may.
    """

    model: str
    backends: tuple[Backend, ...]
    routes: Routes
    order: Mapping[str, tuple[str, ...]]
    options: ServingOptions
    clients: Mapping[str, str] | None = None


def cluster_name(model: str, arm: str) -> str:
    return f"{model}/{arm}"


def named_cluster_name(model: str, arm: str) -> str:
    """The cluster of the callers that name the arm."""
    return f"{model}/{arm}{NAMED}"


def answering_cluster_name(model: str, order: Sequence[str]) -> str:
    """The cluster that answers for `order[0]`; its members are part of the name, so a live one is never changed in place."""
    return f"{model}/{order[0]}|{','.join(order[1:])}"


def clusters(published: Mapping[str, Published], also: Mapping[str, Sequence[Sequence[str]]] | None = None) -> list[Json]:
    """Every cluster; `also` names orders of stand-ins that routes still live refer to."""
    found: list[Json] = []
    for model in published.values():
        found += [_arm_cluster(model, backend) for backend in model.backends]
        found += [_static_cluster(named_cluster_name(model.model, backend.key), backend) for backend in model.backends]
        orders = dict.fromkeys([*model.order.values(), *(tuple(order) for order in (also or {}).get(model.model, ()))])
        known = {backend.key for backend in model.backends}
        found += [_answering_cluster(model.model, order) for order in orders if set(order) <= known]
    return found


def _arm_cluster(model: Published, backend: Backend) -> Json:
    check = {
        "timeout": "2s",
        "interval": "1s",
        "no_traffic_interval": "1s",
        "unhealthy_interval": "0.25s",
        "no_traffic_healthy_interval": "2s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "http_health_check": {"path": "/v2/health/ready"},
    }
    return {
        **_static_cluster(cluster_name(model.model, backend.key), backend),
        "health_checks": [check],
        "close_connections_on_host_health_failure": True,
        "outlier_detection": _outlier_detection(),
    }


def _static_cluster(name: str, backend: Backend) -> Json:
    """One server that is asked whatever its health: nobody stands in for it."""
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "0.5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(backend.address)}}]}],
        },
        "circuit_breakers": _circuit_breakers(),
    }


def _outlier_detection() -> Json:
    """Passive checks: an arm that refuses connections, or of whose answers most are errors, is left out for seconds, and tried
    again.
    """
    return {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 2,
        "enforcing_consecutive_local_origin_failure": 100,
        "consecutive_5xx": 10,
        "consecutive_gateway_failure": 5,
        "enforcing_consecutive_gateway_failure": 100,
        "interval": "0.5s",
        "base_ejection_time": "2s",
        "max_ejection_time": "30s",
        "max_ejection_percent": 100,
        "enforcing_success_rate": 0,
    }


def _circuit_breakers() -> Json:
    """Retries may be as many as requests: when an arm dies, all that it was answering are repeated at once."""
    limits = {"max_connections": 1024, "max_pending_requests": 1024, "max_requests": 1024, "max_retries": 1024}
    return {"thresholds": [{"priority": "DEFAULT", **limits}]}


def _answering_cluster(model: str, order: Sequence[str]) -> Json:
    members = [cluster_name(model, key) for key in order]
    return {
        "name": answering_cluster_name(model, order),
        "connect_timeout": "0.5s",
        "lb_policy": "CLUSTER_PROVIDED",
        "cluster_type": _typed("clusters.aggregate", "extensions.clusters.aggregate.v3.ClusterConfig", clusters=members),
        "circuit_breakers": _circuit_breakers(),
    }


def route_configuration(published: Mapping[str, Published]) -> Json:
    """The whole route table: each model's routes, then health, the list of models, and 404 for anything else."""
    rows = [row for model in published.values() for row in model_routes(model)]
    nothing = "no model is served at this path; GET /v1/models lists those that are"
    rows += [
        _json_row("/v1/models", {"models": sorted(published)}),
        _json_row("/v2", {"name": "mlops-gateway", "version": _software(), "extensions": ["binary_tensor_data"]}),
        _json_row("/v2/health/live", {"live": True}),
        _json_row("/v2/health/ready", {"ready": True}),
        {"match": {"prefix": "/"}, "direct_response": _error(404, nothing)},
    ]
    noted = {model.model: json.dumps(model.routes.to_json(), sort_keys=True) for model in published.values()}
    metadata = {"filter_metadata": {METADATA: noted}}
    host = {
        "metadata": metadata,
        "name": ROUTES_NAME,
        "domains": ["*"],
        "routes": rows,
        "request_headers_to_remove": [SHADOW_HEADER, UNIT_HEADER],
    }
    return {"name": ROUTES_NAME, "virtual_hosts": [host], "max_direct_response_body_size_bytes": 1 << 20}


def model_routes(model: Published) -> list[Json]:
    """A model's rows, most specific first: a version by its path, an arm by its name, a match rule, sticky weights, weights."""
    paths = (
        {"prefix": f"/v1/models/{model.model}:"},
        {"path_separated_prefix": f"/v1/models/{model.model}"},
        {"path_separated_prefix": f"/v2/models/{model.model}"},
    )
    return _version_rows(model) + [_row(model, path, rule, action) for path in paths for rule, action in _rules(model)]


def _version_rows(model: Published) -> list[Json]:
    """The Open Inference Protocol's paths with a version; one that does not run is for the predictors to refuse."""
    arms = {version_of(backend.key): backend.key for backend in model.backends}
    arms |= {backend.key: backend.key for backend in model.backends if version_of(backend.key) == backend.key}
    return [
        _row(model, {"path_separated_prefix": f"/v2/models/{model.model}/versions/{number}"}, {}, _named(model, arm))
        for number, arm in arms.items()
    ]


def _named(model: Published, arm: str) -> Json:
    """To the arm that a caller names, beside the counts that are evidence; a preview that only its testers ask is judged by them."""
    match, mirror = model.routes.match, model.routes.mirror
    is_tested = match is not None and match.arm == arm and mirror is None
    name = (cluster_name if is_tested else named_cluster_name)(model.model, arm)
    return {"route": _action(model, {"cluster": name}, stand_ins=False)}


def _rules(model: Published) -> list[tuple[Json, Json]]:
    rules: list[tuple[Json, Json]] = []
    for backend in model.backends:
        rules.append((_header(VERSION_HEADER, {"string_match": {"exact": backend.key}}), _named(model, backend.key)))
    keys = ", ".join(sorted(backend.key for backend in model.backends))
    rules.append(
        (
            _header(VERSION_HEADER, {"present_match": True}),
            {"direct_response": _error(404, f"{VERSION_HEADER}: no such version runs; there are: {keys}")},
        )
    )
    routes = model.routes
    if routes.match is not None:
        target = {"cluster": answering_cluster_name(model.model, model.order[routes.match.arm])}
        rules.append(
            (_header(routes.match.header, {"string_match": {"exact": routes.match.value}}), {"route": _action(model, target)})
        )
    by_weight: Json = {"route": _action(model, _weights(model, by_hash=False))}
    if routes.sticky is not None and len(routes.serving) > 1:
        action = _action(model, _weights(model, by_hash=True))
        rules.append((_header(UNIT_HEADER, {"present_match": True}), {"route": {**action, "hash_policy": [_HASHED_UNIT]}}))
        by_weight["typed_per_filter_config"] = {UNIT_FILTER: _takes_unit(routes.sticky)}
    rules.append(({}, by_weight))
    return rules


def _row(model: Published, path: Json, rule: Json, action: Json) -> Json:
    row = {"name": model.model, "match": {**path, **rule}, **action}
    limit = model.options.requests_per_second
    if limit is not None:
        own = row.get("typed_per_filter_config", {})
        row["typed_per_filter_config"] = {**own, "envoy.filters.http.local_ratelimit": _rate_limit(limit)}
    if model.clients is not None:
        own = row.get("typed_per_filter_config", {})
        row["typed_per_filter_config"] = {**own, KEY_FILTER: _asks_for_keys(model.clients)}
    return row


def _asks_for_keys(clients: Mapping[str, str]) -> Json:
    """Hands a model's clients to the API key filter: part of the routes, so that a change holds for open connections too."""
    return {"@type": _LUA_CONTEXT, "filter_context": {"clients": dict(sorted(clients.items()))}}


def _takes_unit(sticky: Sticky) -> Json:
    """Has the filter of sticky keys take the key out; a request that has one is then routed again, by its `UNIT_HEADER`."""
    return {"@type": _LUA_CONTEXT, "filter_context": {"by": sticky.by, "name": sticky.name, "salt": sticky.salt}}


def _weights(model: Published, by_hash: bool) -> Json:
    """Weighted clusters in the order of the weights, which is also the order in which `core.routes.assign` lays them end to
    end.
    """
    shares = [
        {"name": answering_cluster_name(model.model, model.order[arm]), "weight": weight}
        for arm, weight in model.routes.weights
        if weight > 0
    ]
    weighted: Json = {"clusters": shares}
    if by_hash:
        weighted["use_hash_policy"] = True
    return {"weighted_clusters": weighted}


def _action(model: Published, target: Json, stand_ins: bool = True) -> Json:
    action = {**target, "timeout": f"{model.options.timeout_seconds:g}s", "retry_policy": _retry_policy(model, stand_ins)}
    mirror = model.routes.mirror
    if mirror is not None and mirror.per_mille > 0 and stand_ins:
        action["request_mirror_policies"] = [_mirror(model.model, mirror)]
    return action


def _mirror(model: str, mirror: Mirror) -> Json:
    share = {"default_value": {"numerator": mirror.per_mille * 10_000 // PER_MILLE, "denominator": "TEN_THOUSAND"}}
    told = {"append": {"header": {"key": SHADOW_HEADER, "value": "1"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}
    return {
        "cluster": cluster_name(model, mirror.arm),
        "runtime_fraction": share,
        "trace_sampled": False,
        "disable_shadow_host_suffix_append": True,
        "request_headers_mutations": [told],
    }


def _retry_policy(model: Published, stand_ins: bool) -> Json:
    """When a request is asked again: after a refused or broken connection, and after 503 (a server that is ending).

    A prediction changes nothing but the log, so repeating one is safe even if the first server may have begun it. An answer 500
    is the model's own fault and is passed on, or it would be hidden. Where another arm can stand in, half of the time-out is
    the first arm's (it may hang) and the rest the stand-in's; else a time-out is not repeated, for a slow server would get
    double the load.
    """
    policy: Json = {
        "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes",
        "retriable_status_codes": [503],
        "num_retries": 3,
        "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"},
    }
    if stand_ins and any(len(order) > 1 for order in model.order.values()):
        previous = "extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig"
        policy["retry_priority"] = _typed("retry_priorities.previous_priorities", previous, update_frequency=1)
        policy["per_try_timeout"] = f"{model.options.timeout_seconds / 2:g}s"
    return policy


def _header(name: str, how: Json) -> Json:
    return {"headers": [{"name": name, **how}]}


def _rate_limit(per_second: int) -> Json:
    """A token bucket of one second, filled ten times a second."""
    per_fill = max(1, per_second // 10)
    everywhere = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    return {
        "@type": f"{_TYPE}extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "rate",
        "token_bucket": {
            "max_tokens": max(per_second, 1),
            "tokens_per_fill": per_fill,
            "fill_interval": f"{per_fill / per_second:.6f}s",
        },
        "filter_enabled": everywhere,
        "filter_enforced": everywhere,
    }


def _json_row(path: str, body: Json) -> Json:
    kind = {"header": {"key": "content-type", "value": "application/json"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
    answer = {"status": 200, "body": {"inline_string": json.dumps(body)}}
    return {"name": "gateway", "match": {"path": path}, "direct_response": answer, "response_headers_to_add": [kind]}


def _software() -> str:
    try:
        return version("mlops_dagster")
    except PackageNotFoundError:
        return "0"


def _error(status: int, message: str) -> Json:
    """An error; the listener puts the message into JSON."""
    return {"status": status, "body": {"inline_string": message}}


def _address(address: str) -> Json:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def _typed(name: str, kind: str, **fields: Any) -> Json:
    return {"name": f"envoy.{name}", "typed_config": {"@type": _TYPE + kind, **fields}}


def resource_file(kind: str, resources: Sequence[Json]) -> Json:
    """An xDS file (DiscoveryResponse) of resources of one kind; its version is their hash, so equal content is equal bytes."""
    digest = hashlib.sha256(json.dumps(resources, sort_keys=True).encode()).hexdigest()[:16]
    return {"version_info": digest, "resources": [{"@type": _TYPE + kind, **resource} for resource in resources]}
