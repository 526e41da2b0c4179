"""Predictions over HTTP, with the standard library alone."""

import datetime as dt
import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from mlops_dagster.core.errors import DataError, ServingError


class Client:
    """One kept connection to a gateway; not for use by several threads at once. `key` is an API key, for models that ask for one."""

    def __init__(self, endpoint: str, timeout_seconds: float = 30.0, key: str = "") -> None:
        self._own = {"content-type": "application/json"} | ({"x-api-key": key} if key else {})
        address = urlsplit(endpoint)
        self._connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=timeout_seconds)
        self._prefix = address.path.rstrip("/")

    def predict(self, model: str, instances: list[Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        """The answer of `POST /v1/models/<model>:predict`. Raises DataError for a 4xx, ServingError for anything else that fails."""
        body = json.dumps({"instances": instances}, default=_json).encode()
        try:
            path = f"{self._prefix}/v1/models/{model}:predict"
            self._connection.request("POST", path, body, {**self._own, **(headers or {})})
            response = self._connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ServingError(
                f"{model} does not answer ({type(error).__name__}: {error}); `mlops status` shows its state"
            ) from error
        if response.status == 200:
            return json.loads(text)
        kind = DataError if 400 <= response.status < 500 else ServingError
        raise kind(f"{model} answered {response.status}: {text[:500]}")


def client_of(serving: Any, model: str) -> Client:
    """The platform's own client of a serving backend, with its key where the backend has one (see `resources.serving.client_keys`)."""
    own_key = getattr(serving, "own_key", None)
    return Client(serving.endpoint(model), key=own_key() if own_key else "")


def _json(value: Any) -> str:
    """Moments as ISO 8601; anything else that JSON cannot hold is an error."""
    if isinstance(value, dt.datetime | dt.date):
        return value.isoformat()
    raise DataError(f"{value!r} ({type(value).__name__}) cannot be sent as JSON; give numbers, text, booleans or null")
