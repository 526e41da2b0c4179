"""Which packages count as the environment of a model."""

from importlib.metadata import version
from pathlib import Path

import pytest

from mlops_dagster.assets.provenance import environment_listing


def test_a_copy_that_a_package_puts_on_the_module_path_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment_listing()
    assert f"numpy=={version('numpy')}" in before.splitlines()
    folder = tmp_path / "numpy-0.0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert version("numpy") == "0.0.1"
    assert environment_listing() == before
