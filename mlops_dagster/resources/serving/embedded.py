"""Serving on one machine: predictor processes behind Envoy, kept by a host that outlives whoever started it."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import ArtifactError, DeclarationError, NotFoundError, ServingError
from mlops_dagster.core.routes import Routes
from mlops_dagster.resources.serving import DEFAULT_OPTIONS, Arm, ArmState, Observed, Phase, ServingOptions, checked_model
from mlops_dagster.resources.serving.client_keys import hash_api_key, own_key
from mlops_dagster.resources.serving.envoy_admin import EnvoyAdmin
from mlops_dagster.resources.serving.envoy_listener import Gateway
from mlops_dagster.resources.serving.gateway import EnvoyFiles
from mlops_dagster.resources.serving.settings import PREDICTOR, HostSettings
from mlops_dagster.resources.serving.start import ensure_running, stop, wake
from mlops_dagster.resources.serving.state import Desired, Folder, free_port, read_json, write_json

SILENT_SECONDS = 10.0


class EmbeddedServing(ConfigurableResource):
    """`Serving` as processes of this machine. All state is in `root`; any number of processes may use it at once.

    Settings of the gateway take effect when the host starts next. Example:

        serving = EmbeddedServing(root=".mlops/serving")
        serving.apply("flight_delay", [Arm("1", folder, sha256, "champion")], Routes.all_to("1"))
        wait_ready(serving, "flight_delay", timeout_seconds=60)
    """

    root: str = Field(description="The folder of the host's state, logs and inference log, usually <MLOPS_HOME>/serving.")
    port: int = Field(default=0, ge=0, le=65535, description="The gateway's port; 0 chooses a free one once and remembers it.")
    host: str = Field(default="127.0.0.1", description="The address on which the gateway listens.")
    concurrency: int = Field(default=1, ge=1, le=64, description="Worker threads of Envoy.")
    max_body_bytes: int = Field(default=16 << 20, ge=1024, description="A longer request is answered with 413.")
    access_log: bool = Field(default=True, description="Write one JSON line a request, with the arm, to logs/access.jsonl.")
    predictor: str = Field(
        default=PREDICTOR, description="The Python module that serves one version, with the predictor's arguments."
    )
    api_keys: dict[str, str] = Field(
        default={}, description="Client name to the SHA-256 (hex) of its API key (see `hash_api_key`); none: no key is asked for."
    )

    def apply(self, model: str, arms: Sequence[Arm], routes: Routes, options: ServingOptions = DEFAULT_OPTIONS) -> None:
        desired = _checked(Desired(checked_model(model), tuple(map(_absolute, arms)), routes, _in_place(options)))
        folder = Folder(self.root)
        folder.make()
        folder.stopped.unlink(missing_ok=True)
        write_json(folder.desired_file(model), desired.to_json())
        self.start()
        wake(folder)

    def observe(self, model: str) -> Observed:
        folder = Folder(self.root)
        desired = folder.model(checked_model(model))
        if desired is None:
            known = ", ".join(sorted(path.stem for path in folder.desired.glob("*.json"))) or "none"
            raise NotFoundError(f"model {model!r} is not served; served are: {known}. Deploy it first.")
        if folder.stopped.exists():
            stopped = ArmState(Phase.STOPPED, "the serving host was stopped; `mlops up` or the next deployment starts it")
            return Observed(model, {arm.key: stopped for arm in desired.arms}, None, "the serving host is stopped")
        self.start()
        return self._observed(folder, desired)

    def endpoint(self, model: str = "") -> str:
        """The same for all models; without a model, the gateway's own address."""
        folder = Folder(self.root)
        if model and not folder.desired_file(checked_model(model)).exists():
            raise NotFoundError(f"model {model!r} is not served, so it has no address. Deploy it first.")
        gateway = HostSettings.read(folder).gateway
        return f"http://{gateway.host}:{gateway.port}"

    def remove(self, model: str) -> None:
        folder = Folder(self.root)
        path = folder.desired_file(checked_model(model))
        if path.exists():
            path.unlink()
            wake(folder)

    def start(self) -> None:
        """Make sure that the host runs. Raises ServingError when a port is taken or it does not start."""
        folder = Folder(self.root)
        if (folder.host / "settings.json").exists() and not folder.stopped.exists() and _runs(folder):
            return
        folder.make()
        folder.stopped.unlink(missing_ok=True)
        with folder.lock("settings"):
            self._settings(folder).write(folder)
        ensure_running(folder)

    def stop(self) -> None:
        """End the host and everything it runs; the desired state stays, and `start` or the next `apply` brings it back."""
        stop(Folder(self.root))

    def _settings(self, folder: Folder) -> HostSettings:
        """The configured settings, with the port that was chosen before where none is configured."""
        for client, digest in self.api_keys.items():
            if (
                len(digest) != 64
                or not set(digest) <= set("0123456789abcdef")
                or not client.replace("-", "").replace("_", "").isalnum()
            ):
                raise DeclarationError(
                    f"api_keys[{client!r}] must be a plain name with the SHA-256 of a key in lower-case hex (see hash_api_key)."
                )
        known = read_json(folder.host / "settings.json")
        port = self.port or (known["gateway"]["port"] if known and known["port_is_chosen"] else free_port())
        gateway = Gateway(self.host, port, self.max_body_bytes, self.access_log, dict(self.api_keys))
        return HostSettings(gateway, self.concurrency, self.predictor, port_is_chosen=not self.port)

    def own_key(self) -> str:
        """The key of the platform's own requests, for models that ask for one (see `client_keys`)."""
        return own_key(Folder(self.root))

    def _observed(self, folder: Folder, desired: Desired) -> Observed:
        report = read_json(folder.observed_file(desired.model)) or {}
        current = report.get("routes") == desired.routes.to_json()
        arms = {}
        for arm in desired.arms:
            raw = report.get("arms", {}).get(arm.key)
            arms[arm.key] = (
                ArmState(**raw | {"phase": Phase(raw["phase"])})
                if raw
                else ArmState(Phase.STARTING, "the server is being started")
            )
        problem = _silence(folder) or report.get("problem", "")
        try:
            live = EnvoyFiles(folder, EnvoyAdmin(folder.socket("admin"))).live_routes().get(desired.model)
        except ServingError as error:
            live, problem = None, problem or str(error)
        pending = report.get("pending", "") if current else "the serving host has not looked at the new state yet"
        if not pending and live != desired.routes:
            pending = "the gateway does not follow the desired routes yet"
        return Observed(desired.model, arms, live, pending, tuple(report.get("warm", ())), problem)


def _silence(folder: Folder) -> str:
    """What is wrong when the host has not done a round for long; "" while it has not had the time for its first one."""
    age = time.time() - folder.heartbeat.stat().st_mtime if folder.heartbeat.exists() else 0.0
    return f"the serving host has not reported for {age:.0f} s; see logs/host.log" if age > SILENT_SECONDS else ""


def _runs(folder: Folder) -> bool:
    from mlops_dagster.resources.serving.supervision import Supervisor

    return Supervisor(folder).alive()


def _absolute(arm: Arm) -> Arm:
    """The host works in another folder than the caller."""
    return replace(arm, artifact=os.path.abspath(arm.artifact))


def _in_place(options: ServingOptions) -> ServingOptions:
    repo = options.feature_repo
    return options if repo is None else replace(options, feature_repo=os.path.abspath(repo))


def _checked(desired: Desired) -> Desired:
    keys = [arm.key for arm in desired.arms]
    if len(set(keys)) != len(keys):
        raise DeclarationError(f"arms of {desired.model} name a version twice: {', '.join(keys)}. Name each once.")
    missing = [arm for arm in desired.routes.arms if arm not in keys]
    if missing:
        raise DeclarationError(
            f"routes of {desired.model} lead to {', '.join(missing)}, but the arms are {', '.join(keys) or 'none'}."
        )
    for arm in desired.arms:
        if not Path(arm.artifact).is_dir():
            raise ArtifactError(
                f"artifact of {desired.model} version {arm.version}: there is no such folder. Register the version again."
            )
    return desired


__all__ = ["EmbeddedServing", "hash_api_key"]
