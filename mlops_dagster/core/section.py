"""What all parts of a declaration have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the declaration: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
