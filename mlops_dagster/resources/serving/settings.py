"""What the serving host was started with, kept in its state folder: port, API keys, how many threads Envoy has."""

from dataclasses import asdict, dataclass

from mlops_dagster.resources.serving.envoy_listener import Gateway
from mlops_dagster.resources.serving.state import Folder, free_port, read_json, write_json

PREDICTOR = "mlops_dagster.serving.server"


@dataclass(frozen=True)
class HostSettings:
    """`concurrency`: Envoy's worker threads; `port_is_chosen`: nobody configured the port, so another one may be taken;
    `predictor`: the module that serves one version (`python -m <predictor> …`).
    """

    gateway: Gateway
    concurrency: int = 1
    predictor: str = PREDICTOR
    port_is_chosen: bool = True

    @classmethod
    def read(cls, folder: Folder) -> "HostSettings":
        """The settings kept in the folder, or defaults with a free port."""
        raw = read_json(folder.host / "settings.json")
        if raw is None:
            return cls(Gateway("127.0.0.1", free_port()))
        return cls(**{**raw, "gateway": Gateway(**raw["gateway"])})

    def write(self, folder: Folder) -> bool:
        """Keep them; False when they were these already. Raises StorageError."""
        return write_json(folder.host / "settings.json", asdict(self))
