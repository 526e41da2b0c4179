"""How the server of one arm is started, and where it listens."""

import sys

from mlops_dagster.core.routes import version_of
from mlops_dagster.resources.serving.fleet import Member
from mlops_dagster.resources.serving.state import Folder, free_port
from mlops_dagster.resources.serving.supervision import STOP_SECONDS, Program, adopted


def new_address() -> str:
    """A place where a server can listen, remembered with the fleet from then on."""
    return f"127.0.0.1:{free_port()}"


def predictor(folder: Folder, member: Member, module: str) -> Program:
    """The program of one arm: a predictor that serves exactly this artifact; `module` is the server's (see
    `mlops_dagster.serving.server`).
    """
    arm, options = member.arm, member.options
    command = [sys.executable, "-m", module, "--artifact", arm.artifact, "--sha256", arm.sha256, "--model", member.model]
    command += ["--version", version_of(arm.key), "--arm", arm.key, "--port", member.address.rpartition(":")[2]]
    command += ["--log-root", str(folder.inference_log), "--timezone", options.time_zone, "--grace-seconds", f"{STOP_SECONDS:g}"]
    if options.feature_repo is not None:
        command += ["--feature-repo", options.feature_repo]
    return Program(member.program, adopted(folder, member.program, command, STOP_SECONDS))
