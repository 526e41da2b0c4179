"""Two versions of one model behind the gateway, in a temporary folder, for the gateway's benchmarks."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _predictor_servers as servers
from mlops_dagster.core.routes import Routes
from mlops_dagster.resources.serving import Arm, wait_ready
from mlops_dagster.resources.serving.embedded import EmbeddedServing
from mlops_dagster.resources.serving.state import Folder

MODEL = "m"
PATH = f"/v1/models/{MODEL}:predict"


@dataclass(frozen=True)
class Two:
    """A champion "1" and a candidate "2" with the same artifact."""

    serving: EmbeddedServing
    arms: tuple[Arm, Arm]

    @property
    def url(self) -> str:
        return self.serving.endpoint(MODEL) + PATH

    @property
    def direct_url(self) -> str:
        """The champion's server itself."""
        fleet = json.loads((Folder(self.serving.root).host / "fleet.json").read_text())
        return f"http://{next(m['address'] for m in fleet.values() if m['arm']['version'] == '1')}{PATH}"

    def route(self, routes: Routes) -> None:
        self.serving.apply(MODEL, self.arms, routes)

    def settle(self) -> None:
        wait_ready(self.serving, MODEL, timeout_seconds=120)


@contextmanager
def two_versions(routes: Routes, **settings: int | bool) -> Iterator[Two]:
    """Both versions ready and `routes` live; everything is ended afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        model = servers.train(Path(folder))
        artifact = str(model.folder / "artifact")
        arms = Arm("1", artifact, model.sha256, "champion"), Arm("2", artifact, model.sha256, "candidate")
        serving = EmbeddedServing(root=str(Path(folder) / "serving"), **settings)  # type: ignore[arg-type]
        try:
            two = Two(serving, arms)
            two.route(routes)
            two.settle()
            yield two
        finally:
            serving.stop()
