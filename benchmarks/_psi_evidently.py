"""The peer: Evidently's DataDriftPreset with PSI, as its documentation uses it."""

from typing import Any

import pandas as pd


def drift_report(reference: pd.DataFrame, current: pd.DataFrame) -> Any:
    """Runs the preset on both frames and returns its snapshot."""
    from evidently import Report
    from evidently.presets import DataDriftPreset

    return Report([DataDriftPreset(method="psi")]).run(current, reference)


def values(snapshot: Any) -> dict[str, float]:
    """The PSI of each column in a snapshot."""
    found = {}
    for metric in snapshot.dict()["metrics"]:
        column = metric.get("config", {}).get("column")
        if column is not None:
            found[column] = float(metric["value"])
    return found
