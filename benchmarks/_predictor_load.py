"""wrk as the load generator: fixed body, keep-alive connections."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

SECONDS = 5
CONNECTIONS = 16
UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


@dataclass(frozen=True)
class Load:
    """Answers a second, and the time within which 99 % of them came."""

    rate: float
    p99_ms: float


def wrk_or_exit() -> None:
    """Say what is missing and how to get it."""
    if shutil.which("wrk") is None:
        sys.exit("The predictor benchmark needs the load generator wrk: apt-get install wrk (Debian), brew install wrk (macOS).")


def measure(url: str, body: bytes, seconds: int = SECONDS, connections: int = CONNECTIONS, warm_up_seconds: int = 1) -> Load:
    """Post `body` to `url` over and over; raises RuntimeError when any answer is not a 200."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(
            f'wrk.method = "POST"\nwrk.headers["content-type"] = "application/json"\nwrk.body = {json.dumps(body.decode())}\n'
        )
        script.flush()
        _wrk(url, script.name, warm_up_seconds, connections)
        said = _wrk(url, script.name, seconds, connections)
    if wrong := re.search(r"Non-2xx or 3xx responses: \d+|Socket errors: .*", said):
        raise RuntimeError(f"{url}: {wrong[0]}")
    found, rate = re.search(r"99%\s+([\d.]+)(us|ms|s)", said), re.search(r"Requests/sec:\s+([\d.]+)", said)
    if not found or not rate:
        raise RuntimeError(f"wrk said nothing of use about {url}: {said}")
    return Load(float(rate[1]), float(found[1]) * UNITS[found[2]])


def _wrk(url: str, script: str, seconds: int, connections: int) -> str:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script, url]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
