"""Envoy's bootstrap and its one listener: what is the same for all models (filters, limits, API keys, access log)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from mlops_dagster.core.measurements import DEFAULT_BOUNDS_MS
from mlops_dagster.resources.serving.envoy_config import (
    CLIENT_HEADER,
    METADATA,
    ROUTES_NAME,
    UNIT,
    UNIT_FILTER,
    UNIT_HEADER,
    VERSION_HEADER,
)

Json = dict[str, Any]

_TYPE = "type.googleapis.com/envoy."
_HCM = "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
API_KEY_HEADER = "x-api-key"


@dataclass(frozen=True)
class Gateway:
    """How the gateway itself is set up. `api_keys`: client name to the SHA-256 (hex) of its key; none means that no key is
    asked for.
    """

    host: str
    port: int
    max_body_bytes: int = 16 << 20
    access_log: bool = True
    api_keys: Mapping[str, str] = field(default_factory=dict)


def bootstrap(admin_socket: str, folder: str) -> Json:
    """What Envoy is started with: its admin socket, and where the files of listeners, clusters and routes are (xDS by path)."""
    buckets = {"match": {"suffix": "upstream_rq_time"}, "buckets": [*DEFAULT_BOUNDS_MS, 1e7]}
    split = {
        "safe_regex": {"regex": r"cluster\..*\.(external|internal)\..*"}
    }  # every count a second time, by where a request came from
    return {
        "node": {"id": "gateway", "cluster": "mlops"},
        "admin": {"address": {"pipe": {"path": admin_socket, "mode": 0o600}}},
        "dynamic_resources": {"lds_config": _source(folder, "lds"), "cds_config": _source(folder, "cds")},
        # Histograms show what was merged last: with the default of 5 s a version that is slow would be found out that much later.
        "stats_flush_interval": "1s",
        "stats_config": {"histogram_bucket_settings": [buckets], "stats_matcher": {"exclusion_list": {"patterns": [split]}}},
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": _TYPE + "extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": 20_000,
                    },
                }
            ]
        },
    }


def for_validation(bootstrap_file: Json, listeners: list[Json], clusters: list[Json], routes: Json) -> Json:
    """The same resources as one static configuration, for `--mode validate` does not read xDS files."""
    whole = {key: value for key, value in bootstrap_file.items() if key != "dynamic_resources"}
    inline = [_with_routes(listener, routes) for listener in listeners]
    return {**whole, "static_resources": {"listeners": inline, "clusters": clusters}}


def _with_routes(listener: Json, routes: Json) -> Json:
    chain = listener["filter_chains"][0]
    manager = {key: value for key, value in chain["filters"][0]["typed_config"].items() if key != "rds"}
    manager["route_config"] = routes
    return {**listener, "filter_chains": [{**chain, "filters": [{**chain["filters"][0], "typed_config": manager}]}]}


def listener(gateway: Gateway, folder: str, access_log: str, unit_log: str) -> Json:
    """The one listener, for plain HTTP/1.1 and HTTP/2 without TLS."""
    manager: Json = {
        "@type": _TYPE + _HCM,
        "stat_prefix": "gateway",
        "rds": {"route_config_name": ROUTES_NAME, "config_source": _source(folder, "rds")},
        "http_filters": _filters(gateway),
        "early_header_mutation_extensions": [_own_headers_removed()],
        "use_remote_address": True,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "server_header_transformation": "PASS_THROUGH",
        "local_reply_config": {"mappers": [_errors_as_json()]},
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "request_timeout": "60s",
        "request_headers_timeout": "10s",
        "stream_idle_timeout": "120s",
        "common_http_protocol_options": {"idle_timeout": "300s", "headers_with_underscores_action": "REJECT_REQUEST"},
    }
    manager["access_log"] = [*([_access_log(access_log)] if gateway.access_log else []), _unit_log(unit_log)]
    http = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {
        "name": "gateway",
        "address": {"socket_address": {"address": gateway.host, "port_value": gateway.port}},
        "enable_reuse_port": False,  # with it, two gateways on one port would silently share it
        "per_connection_buffer_limit_bytes": 1 << 20,  # a longer body is passed on as it comes: neither repeated nor mirrored
        "filter_chains": [{"filters": [http]}],
    }


def _own_headers_removed() -> Json:
    """What only the gateway may say is taken out of a request before anything looks at it."""
    kind = f"{_TYPE}extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"
    removed = [{"remove": name} for name in (CLIENT_HEADER, UNIT_HEADER)]
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {"@type": kind, "mutations": removed},
    }


def _errors_as_json() -> Json:
    """Every error that the gateway itself answers has the predictors' form: an object with `error`."""
    failed = {"status_code_filter": {"comparison": {"op": "GE", "value": {"default_value": 400, "runtime_key": "unused"}}}}
    return {"filter": failed, "body_format_override": {"json_format": {"error": "%LOCAL_REPLY_BODY%"}}}


def _filters(gateway: Gateway) -> list[Json]:
    chosen = [_filter("body_size_limit", "body_size_limit.v3.BodySizeLimit", max_request_bytes=gateway.max_body_bytes)]
    keys = _filter("lua", "lua.v3.Lua", default_source_code={"inline_string": api_key_script(gateway.api_keys)})
    # Without keys of the whole gateway only the routes of models with clients of their own turn it on (see `envoy_config`).
    chosen.insert(0, keys if gateway.api_keys else {**keys, "disabled": True})
    units = _filter("lua", "lua.v3.Lua", default_source_code={"inline_string": _sticky_key_script()})
    chosen.append({**units, "name": UNIT_FILTER, "disabled": True})  # the routes of an A/B test turn it on
    chosen.append(_filter("local_ratelimit", "local_ratelimit.v3.LocalRateLimit", stat_prefix="rate"))
    chosen.append(_filter("router", "router.v3.Router"))
    return chosen


def _filter(name: str, kind: str, **fields: Any) -> Json:
    return {"name": f"envoy.filters.http.{name}", "typed_config": {"@type": f"{_TYPE}extensions.filters.http.{kind}", **fields}}


def api_key_script(api_keys: Mapping[str, str]) -> str:
    """The Lua of the API key filter: it knows only digests, hashes the key that a request carries, and looks the digest up."""
    source = resources.files("mlops_dagster.resources.serving").joinpath("api_keys.lua").read_text()
    known = "\n".join(f'  ["{digest}"] = "{client}",' for client, digest in sorted(api_keys.items()))
    return source.replace("--CLIENTS--", known)


def _sticky_key_script() -> str:
    source = resources.files("mlops_dagster.resources.serving").joinpath("sticky_key.lua").read_text()
    for name, value in (("METADATA", METADATA), ("UNIT", UNIT), ("UNIT_HEADER", UNIT_HEADER)):
        source = source.replace(f"--{name}--", value)
    return source


def _access_log(path: str) -> Json:
    """One JSON line a request: which arm was asked for (`arm`), which version answered (`version`), how, and how long it took."""
    line = {
        "time": "%START_TIME(%Y-%m-%dT%H:%M:%S.%3fZ)%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
        "status": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "model": "%ROUTE_NAME%",
        "arm": "%UPSTREAM_CLUSTER%",
        "version": "%RESP(X-MODEL-VERSION)%",
        "asked_for": f"%REQ({VERSION_HEADER})%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "milliseconds": "%DURATION%",
        "bytes_received": "%BYTES_RECEIVED%",
        "bytes_sent": "%BYTES_SENT%",
        "client": f"%REQ({CLIENT_HEADER})%",
    }
    return _log_file(path, line)


def _unit_log(path: str) -> Json:
    """One JSON line a request whose sticky key chose the arm; the evidence of an A/B test is counted from it."""
    line = {
        "at": "%START_TIME(%s.%6f)%",
        "model": "%ROUTE_NAME%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "key": f"%DYNAMIC_METADATA({METADATA}:{UNIT})%",
        "arm": "%UPSTREAM_CLUSTER%",
        "status": "%RESPONSE_CODE%",
    }
    present = {"filter": METADATA, "path": [{"key": UNIT}], "value": {"present_match": True}}
    return {**_log_file(path, line), "filter": {"metadata_filter": {"matcher": present, "match_if_key_not_found": False}}}


def _log_file(path: str, line: Json) -> Json:
    kind = _TYPE + "extensions.access_loggers.file.v3.FileAccessLog"
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {"@type": kind, "path": path, "log_format": {"json_format": line}},
    }


def _source(folder: str, name: str) -> Json:
    """A file that is watched for being replaced: the folder is watched, for a rename changes the folder and not the old file."""
    watched = {"path": f"{folder}/{name}.json", "watched_directory": {"path": folder}}
    return {"resource_api_version": "V3", "path_config_source": watched}
