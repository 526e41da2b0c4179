"""What holds for every test."""

import os
import sys
from pathlib import Path

import pytest

# As in the Makefile: the processes that tests start compile their imports once, not each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

QUICKEST_LAST = ("lineage", "contracts", "serving", "models", "core")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take minutes, so that none of them is left to one core at the end."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return QUICKEST_LAST.index(folder) if folder in QUICKEST_LAST else -1

    items.sort(key=place)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI every server that a test needs is there: a skip is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("CI: a skipped test counts as a failed one", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
