"""Ending with the process that started this one."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, by: signal.Signals = signal.SIGTERM) -> None:
    """Have Linux send this process a signal when its parent thread ends (prctl(2), PR_SET_PDEATHSIG); exits when it has ended."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent or parent == 1:
        sys.exit("mlops predictor: the process that started this one is gone")
