"""Where this machine keeps the artifacts that it serves, and the measurements of running rollouts."""

from dagster import ConfigurableResource
from pydantic import Field


class ArtifactCache(ConfigurableResource):
    """A folder that may be deleted at any time: everything in it is fetched or measured again."""

    root: str = Field(description="The folder.")
