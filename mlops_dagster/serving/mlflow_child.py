"""MLflow's own scoring server as a child of a predictor: `python -m mlops_dagster.serving.mlflow_child DESCRIPTOR PARENT`.

It runs what `mlflow models serve --env-manager local --workers 1` runs (`mlflow/pyfunc/scoring_server/__init__.py`, `get_cmd`), but on a
listening Unix socket that the parent opened, and never outlives the parent.
"""

import signal
import sys

from mlops_dagster.serving.parentage import die_with_parent

APPLICATION = "mlflow.pyfunc.scoring_server.app:app"
KEEP_ALIVE_SECONDS = 3600


def main() -> None:
    descriptor, parent = map(int, sys.argv[1:])
    die_with_parent(parent, signal.SIGKILL)  # it holds nothing that an orderly end would save
    import uvicorn

    uvicorn.run(
        APPLICATION,
        fd=descriptor,
        workers=1,
        loop="asyncio",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )


if __name__ == "__main__":
    main()
