"""Training in a Ray worker: on this machine, or on a cluster."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import TransientError
from mlops_dagster.resources.training import Train, fitted
from mlops_dagster.resources.training.ray_session import LOCAL, ray_session

if TYPE_CHECKING:
    import pyarrow


class RayTrainer(ConfigurableResource):
    """Trainer (see the Protocol) as one Ray task; the table reaches the worker through shared memory, the estimator comes back pickled."""

    address: str = Field(default=LOCAL, description="`local` starts a cluster for the call; else ray://HOST:PORT or HOST:PORT.")
    cpus: int = Field(default=2, ge=1, description="CPUs of the task, and of the local cluster.")
    object_store_mebibytes: int = Field(default=256, ge=80, description="Shared memory of a local cluster.")

    def fit(self, train: Train, features: "pyarrow.Table", label: str, parameters: Mapping[str, object]) -> Any:
        """See Trainer.fit; TransientError when the worker died or the cluster is away."""
        with ray_session(self.address, self.cpus, self.object_store_mebibytes):
            import ray
            from ray.exceptions import RayError, RayTaskError

            task = ray.remote(fitted).options(num_cpus=self.cpus, max_retries=0)
            try:
                return ray.get(task.remote(train, features, label, dict(parameters)))
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:
                raise TransientError(
                    f"training on Ray at {self.address}: {error}; check the worker's memory and try again"
                ) from error
