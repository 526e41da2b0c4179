"""Asking a server of this machine directly."""

import http.client


def is_ready(address: str, timeout_seconds: float = 0.3) -> bool:
    """Whether the server at `host:port` says itself that it is ready (Open Inference Protocol, `/v2/health/ready`)."""
    connection = http.client.HTTPConnection(address, timeout=timeout_seconds)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
