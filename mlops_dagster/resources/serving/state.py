"""The serving host's state on disk: desired state, fleet, ports; every file is replaced whole, never changed in place."""

import fcntl
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import MlopsError, ServingError, StorageError
from mlops_dagster.core.routes import Routes
from mlops_dagster.resources.serving import Arm, ServingOptions

SOCKET_PATH_LIMIT = 100  # sockaddr_un holds 108 bytes (104 on macOS); supervisor appends its process id to the name


@dataclass(frozen=True)
class Desired:
    """What one model should look like: the arms that run, and how requests are divided among them."""

    model: str
    arms: tuple[Arm, ...]
    routes: Routes
    options: ServingOptions = field(default_factory=ServingOptions)

    def to_json(self) -> dict[str, Any]:
        arms = [asdict(arm) for arm in self.arms]
        return {"model": self.model, "arms": arms, "routes": self.routes.to_json(), "options": asdict(self.options)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Desired":
        arms = tuple(Arm(**arm) for arm in raw["arms"])
        return cls(raw["model"], arms, Routes.from_json(raw["routes"]), ServingOptions(**raw["options"]))


class Folder:
    """Where everything of one serving host lies. Only names here, and the few reads and writes that several processes share."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.desired = self.root / "desired"
        self.observed = self.root / "observed"
        self.host = self.root / "host"
        self.programs = self.host / "programs"
        self.records = self.host / "records"
        self.envoy = self.root / "envoy"
        self.logs = self.root / "logs"
        self.inference_log = self.root / "inference_log"
        self.samples = self.root / "samples.db"
        self.unit_log = self.logs / "units.jsonl"
        self.stopped = self.host / "stopped"
        self.heartbeat = self.host / "heartbeat"

    def make(self) -> None:
        """Create the folders. Raises StorageError when that is not possible."""
        with storage_errors(self.root, "make"):
            for folder in (self.desired, self.observed, self.programs, self.records, self.envoy, self.logs, self.inference_log):
                folder.mkdir(parents=True, exist_ok=True)

    @property
    def sockets(self) -> Path:
        """A private folder with a path short enough for sockets: in the state folder, or by its hash in the temporary folder."""
        near = self.root / "run"
        if len(os.fsencode(near)) + 40 <= SOCKET_PATH_LIMIT:
            folder = near
        else:
            name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]
            folder = Path(tempfile.gettempdir()) / f"mlops-{os.getuid()}-{name}"
        with storage_errors(folder, "make"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise ServingError(f"socket folder {folder.name}: it belongs to another user. Set TMPDIR to a folder of your own.")
        folder.chmod(0o700)
        return folder

    def socket(self, name: str) -> Path:
        return self.sockets / f"{name}.sock"

    def desired_file(self, model: str) -> Path:
        return self.desired / f"{model}.json"

    def observed_file(self, model: str) -> Path:
        return self.observed / f"{model}.json"

    def model(self, name: str) -> Desired | None:
        """The desired state of one model; None when there is none. Raises StorageError for a file that is not what was written."""
        path = self.desired_file(name)
        if not path.exists():
            return None
        try:
            return Desired.from_json(read_json(path))
        except (KeyError, TypeError, ValueError, MlopsError) as error:
            raise StorageError(f"serving state {path.name}: it is damaged ({error}). Apply the model again.") from error

    def models(self) -> tuple[dict[str, Desired], frozenset[str]]:
        """The desired state of every model, and the names of those whose file is damaged (they must be left as they run)."""
        found, damaged = {}, set()
        for path in sorted(self.desired.glob("*.json")):
            try:
                wanted = self.model(path.stem)
            except StorageError:
                damaged.add(path.stem)
            else:
                if wanted is not None:
                    found[path.stem] = wanted
        return found, frozenset(damaged)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """One process at a time; released when the holder dies."""
        with storage_errors(self.host, "lock"), (self.host / f"{name}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextmanager
def storage_errors(path: Path, verb: str) -> Iterator[None]:
    """Turns an OSError into a StorageError that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"serving state {path.name}: cannot {verb} it ({error.strerror or error}). Check the disk's space and permissions."
        ) from error


def write_json(path: Path, value: Any) -> bool:
    """Replace a file by this JSON, atomically and flushed; False when it held just this already. Raises StorageError."""
    content = json.dumps(value, indent=1, sort_keys=True).encode()
    return write_bytes(path, content)


def write_bytes(path: Path, content: bytes, always: bool = False) -> bool:
    """Replace a file, atomically and flushed to disk; False when it held just this already (unless `always`). Raises StorageError."""
    with storage_errors(path, "write"):
        if not always and path.exists() and path.read_bytes() == content:
            return False
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    return True


def read_json(path: Path) -> Any:
    """The JSON in a file, or None when there is no file or it is not JSON (it is then written anew)."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def free_port() -> int:
    """A loopback TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there: nobody else does, also nobody who would share the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
