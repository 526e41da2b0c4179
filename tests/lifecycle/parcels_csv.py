"""Parcels for the test project: whether one is late depends on its weight and its depot, the same rows every time."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

DAYS, A_DAY, DEPOTS = 60, 60, 6


def write(file: Path) -> None:
    """Write the CSV; from the 45th day on parcels are three times as heavy, so that inputs drift and more of them are late."""
    random = np.random.default_rng(3)
    rows = DAYS * A_DAY
    day = np.repeat(np.arange(DAYS), A_DAY)
    sent = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(day * 86_400 + random.integers(0, 86_000, rows), unit="s")
    depot = random.integers(0, DEPOTS, rows)
    weight = random.gamma(2, 3, rows) * np.where(day >= 44, 3.0, 1.0)
    chance = 1 / (1 + np.exp(-(0.25 * (weight - 6) + 0.8 * (depot - 2.5))))
    table = pd.DataFrame(
        {
            "id": [f"p{i}" for i in range(rows)],
            "event_timestamp": sent,
            "depot": [f"d{d}" for d in depot],
            "weight_kg": weight.round(3),
            "delivered_at": sent + pd.to_timedelta(20, unit="h"),
            "late": (random.uniform(size=rows) < chance).astype(float),
        }
    )
    table.sort_values(["event_timestamp", "id"]).to_csv(file, index=False)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
