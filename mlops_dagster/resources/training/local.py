"""Training in this process."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dagster import ConfigurableResource

from mlops_dagster.resources.training import Train, fitted

if TYPE_CHECKING:
    import pyarrow


class LocalTrainer(ConfigurableResource):
    """Trainer (see the Protocol) without any other process."""

    def fit(self, train: Train, features: "pyarrow.Table", label: str, parameters: Mapping[str, object]) -> Any:
        """See Trainer.fit."""
        return fitted(train, features, label, parameters)
