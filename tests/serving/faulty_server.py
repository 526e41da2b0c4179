"""The real predictor with faults that the artifact's `faults.json` asks for: `python -m tests.serving.faulty_server …`.

`exit`: end at once with this code; `never_ready`: run, but do not listen; `fail_every`: every n-th prediction is answered with
500, or with `fail_status`; `slow_ms`: predictions take so much longer. A feature repository that is not there is left out, for the
small artifacts of tests have no features to complete.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mlops_dagster.serving import server
from mlops_dagster.serving.http_connection import Request


def faults() -> dict[str, Any]:
    path = Path(sys.argv[sys.argv.index("--artifact") + 1], "faults.json")
    return json.loads(path.read_text()) if path.exists() else {}


class FaultyPredictor(server.Predictor):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._asked = 0

    def __call__(self, request: Request) -> None:
        if request.method == "POST":
            self._asked += 1
            time.sleep(FAULTS.get("slow_ms", 0) / 1000)
            every = FAULTS.get("fail_every")
            if every and self._asked % every == 0:
                status = FAULTS.get("fail_status", 500)
                request.answer(status, [("x-model-version", self._pages.version)], b'{"error": "as asked for"}')
                return
        super().__call__(request)


def without_missing_repository(given: list[str]) -> list[str]:
    if "--feature-repo" in given and not Path(given[(at := given.index("--feature-repo")) + 1]).exists():
        return given[:at] + given[at + 2 :]
    return given


if __name__ == "__main__":
    FAULTS = faults()
    if "exit" in FAULTS:
        print("first line\nfault: the server ends as asked for", flush=True)
        sys.exit(FAULTS["exit"])
    if FAULTS.get("never_ready"):
        print("fault: the server never listens", flush=True)
        time.sleep(3600)
    server.Predictor = FaultyPredictor  # type: ignore[misc]
    code = server.main(without_missing_repository(sys.argv[1:]))
    sys.stdout.flush()
    os._exit(code)
