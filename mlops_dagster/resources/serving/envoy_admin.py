"""Envoy's admin interface over its private Unix socket, read into our own types."""

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import ServingError


@dataclass(frozen=True)
class Host:
    """One server as Envoy sees it. Counters run since Envoy began: `success` (no 5xx, but maybe
    4xx), `error` (5xx, resets, refused connections).
    """

    cluster: str
    address: str
    healthy: bool
    ejected: bool
    success: int
    error: int
    timeout: int


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class EnvoyAdmin:
    """The admin interface behind one socket. Every method raises ServingError when Envoy does not answer."""

    def __init__(self, path: Path, timeout_seconds: float = 5.0) -> None:
        self._path = path
        self._timeout = timeout_seconds

    def hosts(self) -> dict[str, Host]:
        """Every server by the name of its cluster (an arm's cluster has one server; aggregates have none of their own)."""
        found = {}
        for cluster in json.loads(self._call("GET", "/clusters?format=json")).get("cluster_statuses", []):
            for host in cluster.get("host_statuses", []):
                found[cluster["name"]] = _host(cluster["name"], host)
        return found

    def cluster_names(self) -> frozenset[str]:
        """The clusters that are in use (a new one is not, until its first health check was made)."""
        return frozenset(c["name"] for c in json.loads(self._call("GET", "/clusters?format=json")).get("cluster_statuses", []))

    def versions(self) -> dict[str, str]:
        """Which version of each kind of file is followed now: `lds`, `cds`, `rds` to `version_info`."""
        text = self._call("GET", "/stats?type=TextReadouts&filter=version_text&format=json")
        found = {}
        for stat in json.loads(text).get("stats", []):
            kind = (
                "cds"
                if stat["name"].startswith("cluster_manager.cds")
                else "lds"
                if stat["name"].startswith("listener_manager.lds")
                else "rds"
            )
            found[kind] = stat["value"]
        return found

    def route_table(self) -> dict[str, Any] | None:
        """The route table as Envoy holds it, or None when it has none yet."""
        dump = json.loads(self._call("GET", "/config_dump?resource=dynamic_route_configs"))
        tables = [row["route_config"] for row in dump.get("configs", []) if "route_config" in row]
        return tables[0] if tables else None

    def refusals(self) -> list[str]:
        """Why Envoy refused a file that it was given last, if it did; and listeners that could not be opened."""
        dump = json.loads(self._call("GET", "/config_dump"))
        return sorted(set(_error_states(dump)))

    def latencies(self) -> dict[str, tuple[tuple[float, int], ...]]:
        """Cumulative latency buckets by cluster: (upper bound in ms, answers at or below it), the last bound infinite."""
        text = self._call("GET", "/stats?type=Histograms&format=json&histogram_buckets=cumulative&filter=upstream_rq_time%24")
        found = {}
        for stat in json.loads(text).get("stats", []):
            for row in stat.get("histograms", []):
                name = row["name"].removeprefix("cluster.").removesuffix(".upstream_rq_time")
                found[name] = tuple((float(bucket["upper_bound"]), int(bucket["cumulative"])) for bucket in row["buckets"])
        return found

    def answers(self) -> dict[str, tuple[int, int]]:
        """Answers by the cluster that a route names: all of them, and those that were 4xx."""
        text = self._call("GET", "/stats?type=Counters&format=json&filter=%5C.upstream_rq_(completed%7C4xx)%24")
        found: dict[str, dict[str, int]] = {}
        for stat in json.loads(text).get("stats", []):
            name, _, kind = stat["name"].removeprefix("cluster.").rpartition(".")
            if not name.endswith(".retry"):  # answers that nobody got, for the request was asked again
                found.setdefault(name, {})[kind] = int(stat["value"])
        return {name: (kinds.get("upstream_rq_completed", 0), kinds.get("upstream_rq_4xx", 0)) for name, kinds in found.items()}

    def reopen_logs(self) -> None:
        self._call("POST", "/reopen_logs")

    def _call(self, method: str, path: str) -> str:
        connection = UnixConnection(self._path, self._timeout)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise ServingError(f"the gateway does not answer ({error}); the serving host starts it again.") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise ServingError(f"the gateway's admin interface answered {answer.status}: {body[:200]}")
        return body


def _host(cluster: str, raw: Mapping[str, Any]) -> Host:
    counts = {stat["name"]: int(stat.get("value", 0)) for stat in raw.get("stats", [])}
    health = raw.get("health_status", {})
    checked = not health.get("failed_active_health_check", False)
    ejected = bool(health.get("failed_outlier_check", False))
    success, error, timeout = (counts.get(name, 0) for name in ("rq_success", "rq_error", "rq_timeout"))
    return Host(cluster, _address(raw.get("address", {})), checked, ejected, success, error, timeout)


def _address(raw: Mapping[str, Any]) -> str:
    at = raw.get("socket_address", {})
    return f"{at.get('address')}:{at.get('port_value')}"


def _error_states(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "error_state" in node and "details" in node["error_state"]:
            yield str(node["error_state"]["details"])[:500]
        for value in node.values():
            yield from _error_states(value)
    elif isinstance(node, list):
        for value in node:
            yield from _error_states(value)
