"""Feast's own universal tests, run with our offline store, from a checkout of the Feast version that is installed:

    mkdir suite; ln -s CHECKOUT/sdk/python/tests suite/tests; cd suite
    PYTHONPATH=.:PROJECT:PROJECT/tests/contracts/feature_store FULL_REPO_CONFIGS_MODULE=asof_feast_suite FEAST_IS_LOCAL_TEST=True IS_TEST=True \\
        python -m pytest --integration tests/integration/offline_store --ignore tests/integration/offline_store/test_dqm_validation.py

They need testcontainers, minio, python-keycloak, pytest-env, pytest-asyncio and pytest-timeout as well (no container is started).
"""

import tests.universal.feature_repos.repo_configuration as universal  # pyright: ignore[reportMissingImports]
from feast.repo_config import FeastConfigBaseModel
from tests.universal.feature_repos.universal.data_sources.file import FileDataSourceCreator  # pyright: ignore[reportMissingImports]

from mlops_dagster.resources.feature_store.asof import AsofOfflineStoreConfig


class AsofDataSourceCreator(FileDataSourceCreator):
    """Feast's Parquet test sources under our offline store."""

    def create_offline_store_config(self) -> FeastConfigBaseModel:
        return AsofOfflineStoreConfig()


AVAILABLE_OFFLINE_STORES = [("local", AsofDataSourceCreator)]
AVAILABLE_ONLINE_STORES = {"sqlite": ({"type": "sqlite"}, None)}
# The tests that Feast limits to its file store run with ours as well.
universal.OFFLINE_STORE_TO_PROVIDER_CONFIG["file"] = AVAILABLE_OFFLINE_STORES[0]
