"""A rollout's measurements between looks: one file each, and this process's memory where that file cannot be read or written."""

import json
import os
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mlops_dagster.assets import rollout_evidence
from mlops_dagster.assets.lake_paths import canonical
from mlops_dagster.core.errors import MlopsError, ServingError, StorageError, TransientError
from mlops_dagster.core.measurements import Counters, Measurements
from mlops_dagster.core.rollout import RolloutState
from mlops_dagster.core.spec import ModelSpec

if TYPE_CHECKING:
    from mlops_dagster.assets.rollout import Parts

HISTORY = timedelta(minutes=15)
"""How much of the champion's time before a rollout is looked at: an hour ago it may have answered under another load."""

_NEWEST: dict[Path, tuple[Path, Measurements]] = {}
"""By a model's folder: its newest file and what was to be in it. Ticks that were judged must stay, whatever becomes of the disk."""


def measured(parts: "Parts", spec: ModelSpec, state: RolloutState, now: datetime) -> tuple[Measurements, str | None]:
    """The rollout's measurements with the present look added; and what could not be counted or kept, which is an ERROR."""
    file = parts.cache / spec.name / "rollouts" / f"{state.rollout_id.replace('/', '_')}.json"
    known, written, problem = _kept(file)
    try:
        rollout_evidence.collect(parts, spec, state, now)
    except MlopsError as error:
        problem = problem or str(error)
    if known.began is None:
        known = replace(known, history=_history(parts, spec, state, now))
    try:
        reading = parts.live_metrics.totals(spec.name)
    except TransientError as error:
        return known, problem or (None if isinstance(error, ServingError) else str(error))
    arms = reading.arms
    # The first look only sets the start. What the tally has by then is all the rollout's own, so it belongs to the next tick.
    if known.began is not None:
        try:
            arms = rollout_evidence.added(arms, state, rollout_evidence.tally_of(parts, spec, state))
        except StorageError as error:  # what the gateway counted must be judged nevertheless: it may be all failures
            problem = problem or str(error)
            arms = rollout_evidence.unchanged(arms, known.last)
    # A reading is as old as its last sample: its own time counts, so that the same sample is never two ticks.
    found = known.observe(reading.at, arms)
    if found != written:
        problem = _keep(file, found) or problem
    return found, problem


def _kept(file: Path) -> tuple[Measurements, Measurements | None, str | None]:
    """What was kept so far, what of it the file holds (None: nothing), and what is wrong with the file."""
    written, problem = None, None
    try:
        written = Measurements.from_json(json.loads(file.read_bytes()))
    except FileNotFoundError:
        pass
    except OSError as error:
        problem = f"the measurements {file.name} cannot be read ({error}). Check the disk."
    except (ValueError, KeyError, TypeError, AttributeError, MlopsError) as error:
        problem = f"the measurements {file.name} were damaged ({error!r}); what is not known any more is measured anew."
    of, remembered = _NEWEST.get(file.parent, (file, Measurements()))
    known = written or Measurements()
    return (remembered if of == file and _until(remembered) > _until(known) else known), written, problem


def _until(measurements: Measurements) -> float:
    at = measurements.ticks[-1].at if measurements.ticks else measurements.began
    return at.timestamp() if at else 0.0


def _keep(file: Path, found: Measurements) -> str | None:
    """Remember the measurements and write them whole, or say why that is not possible."""
    _NEWEST[file.parent] = (file, found)
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(canonical(found.to_json()))
        aside.replace(file)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        return f"the measurements {file.name} cannot be written ({error}). Free space, or correct what is in their place."
    return None


def _history(parts: "Parts", spec: ModelSpec, state: RolloutState, now: datetime) -> Counters:
    """What the gateway counted of the champion before the rollout; nothing where it has no metrics of that time."""
    try:
        return parts.live_metrics.measure(spec.name, now - HISTORY).arms.get(state.champion or "", Counters())
    except TransientError:
        return Counters()
