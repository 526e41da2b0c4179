"""What answers and labels add to the gateway's counters: a shadow's agreement, an A/B test's units and trials, wrong predictions.

Answers are counted some seconds after they were given (`Parts.settle_seconds`): the log is then on disk, and both answers to a
mirrored request are there. A row whose other answer comes later than that is not counted. Labels are looked for in the lake,
where the inference log and live performance of a day have them, now and then (`Parts.label_seconds`).
"""

import datetime as dt
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import polars as pl

from mlops_dagster.assets import references
from mlops_dagster.assets.lake_paths import day_key, stored_days
from mlops_dagster.assets.live_performance import with_labels
from mlops_dagster.core import answers
from mlops_dagster.core.analysis import count_units
from mlops_dagster.core.errors import DataError, DeclarationError, MlopsError
from mlops_dagster.core.measurements import Counters
from mlops_dagster.core.rollout import RolloutState
from mlops_dagster.core.routes import version_of
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.core.strategies import Step
from mlops_dagster.resources.live_metrics.tally import SPREAD, Tally, Unit

if TYPE_CHECKING:
    from mlops_dagster.assets.rollout import Parts

WINDOW = dt.timedelta(minutes=5)
"""Answers are read this many at a time, however long nobody looked."""
LABEL_DAYS = 60
"""How many of the newest days with live performance are looked at, during a rollout and after it."""
SHADOW_GATES = {"disagreement", "score_shift"}
GATEWAY = ("requests", "errors", "latency", "answers", "refused")
COLUMNS = [*answers.ROW, *answers.ANSWER, "version", "shadow"]


def tally_of(parts: "Parts", spec: ModelSpec, state: RolloutState) -> Tally:
    """Where the rollout's answers are counted."""
    return Tally(parts.cache / spec.name / "rollouts" / f"{state.rollout_id.replace('/', '_')}.db")


def collect(parts: "Parts", spec: ModelSpec, state: RolloutState, now: dt.datetime) -> None:
    """Count what was answered, and which labels landed, since the last look. Raises MlopsError; what is sound is counted."""
    step, tally = state.current, tally_of(parts, spec, state)
    if step is None:
        return
    after, end = tally.until(), now - dt.timedelta(seconds=parts.settle_seconds)
    begin = max(after or state.entered_at, state.entered_at)
    while begin < end:
        until = min(end, begin + WINDOW)
        if SHADOW_GATES & {*step.gates}:
            counted = _shadow(parts, spec, step, tally, (after, begin, until))
        elif step.routes.sticky is not None:
            counted = _units(parts, spec, step, tally, (after, begin, until))
        else:
            break
        if not counted:
            break
        after = begin = until
    _labels(parts, spec, state, tally, now)
    tally.look()
    if (problem := tally.labels_problem()) is not None:
        raise MlopsError(problem)


def added(arms: Mapping[str, Counters], state: RolloutState, tally: Tally) -> dict[str, Counters]:
    """The gateway's counters with those of the tally."""
    agreed, units, labels = tally.agreement(), tally.units(), _by_version(tally.labels())
    result = {}
    for arm, counters in arms.items():
        labelled, wrong = labels.get(version_of(arm), (0, 0))
        more: dict[str, int] = {"labelled": labelled, "wrong": wrong, **units.get(arm, {})}
        if arm == state.candidate:
            more |= {name: getattr(agreed, name) for name in ("compared", "disagreed", "shifted")}
        result[arm] = replace(counters, **more)
    return result


def unchanged(arms: Mapping[str, Counters], last: Mapping[str, Counters]) -> dict[str, Counters]:
    """The gateway's counters with what the tally had said by `last`: as if nothing was answered or labelled since.

    Without it those counters would seem to begin anew, and be counted twice when the tally can be read again.
    """
    return {
        arm: replace(last.get(arm, Counters()), **{n: getattr(counters, n) for n in GATEWAY}) for arm, counters in arms.items()
    }


def described(tally: Tally) -> dict[str, Any]:
    """Numbers for people that no gate asks for."""
    agreed = tally.agreement()
    return {"mean_absolute_distance": agreed.mean_distance, "measured": agreed.measured} if agreed.measured else {}


Window = tuple[dt.datetime | None, dt.datetime, dt.datetime]


def _shadow(parts: "Parts", spec: ModelSpec, step: Step, tally: Tally, window: Window) -> bool:
    """Join the copies answered in the window with what the callers of the same requests got."""
    known, after, until = window
    settle = dt.timedelta(seconds=parts.settle_seconds)
    rows = parts.inference_segments.read_logged(spec.name, after - settle, until + settle, COLUMNS)
    log = pl.DataFrame(rows).filter(~_own())
    copy = pl.col("shadow") & (pl.col("version") == version_of(step.candidate))
    mirrored = log.filter(copy & (pl.col("logged_at") > after) & (pl.col("logged_at") <= until))
    answered = log.filter(~pl.col("shadow"))
    task, tolerance = spec.training.task, spec.rollout.score_tolerance
    return tally.count_agreement(known, until, answers.agreement(mirrored, answered, task, tolerance))


def _units(parts: "Parts", spec: ModelSpec, step: Step, tally: Tally, window: Window) -> bool:
    """Count the keys that came for the first time, each with the outcome of its first request where that is known at once.

    Requests that were the caller's fault, or that the caller gave up, are not looked at.
    """
    known, after, until = window
    _check_metric(spec, tally)
    lines = pl.DataFrame(parts.live_metrics.assigned(spec.name, after, until))
    lines = lines.filter(pl.col("status").is_between(200, 399) | (pl.col("status") >= 500))
    firsts = lines.unique("key", keep="first", maintain_order=True).to_dicts()
    outcomes = {line["request_id"]: int(line["status"] < 500) for line in firsts} if spec.rollout.ab_metric == "answered" else {}
    if spec.rollout.ab_metric == "score" and firsts:
        outcomes = _scored(parts, spec, after, until, [line["request_id"] for line in firsts])
    units = [
        Unit(
            line["key"],
            line["arm"],
            line["request_id"],
            count_units([(line["key"], line["arm"])], step.routes).misassigned > 0,
            outcomes.get(line["request_id"]),
        )
        for line in firsts
    ]
    return tally.count_units(known, until, units)


def _check_metric(spec: ModelSpec, tally: Tally) -> None:
    """A metric chosen after the first look at the data proves nothing."""
    declared = [spec.rollout.ab_metric, spec.rollout.ab_score_threshold]
    if (first := tally.first("metric", declared)) != declared:
        raise DeclarationError(
            f"rollout.ab_metric is {declared[0]!r} (ab_score_threshold {declared[1]:g}), but the test began with {first[0]!r} "
            f"({first[1]:g}): put it back, or abort the rollout and start another."
        )


def _scored(parts: "Parts", spec: ModelSpec, after: dt.datetime, until: dt.datetime, requests: list[str]) -> dict[str, int]:
    settle = dt.timedelta(seconds=parts.settle_seconds)
    rows = parts.inference_segments.read_logged(spec.name, after - settle, until + settle, ["request_id", "score", "shadow"])
    first = _first_rows(pl.DataFrame(rows), requests)
    good = first.drop_nulls("score").select(
        "request_id", good=(pl.col("score") >= spec.rollout.ab_score_threshold).cast(pl.Int64)
    )
    return dict(good.iter_rows())


def _labels(parts: "Parts", spec: ModelSpec, state: RolloutState, tally: Tally, now: dt.datetime) -> None:
    """Count the days whose live performance has changed since they were counted last; a day that is wrong holds up no other.

    Such a day is tried again at the next look for labels; until then `tally.labels_problem` says what is wrong with it.
    """
    looked = tally.labels_looked_at()
    if looked is not None and (now - looked).total_seconds() < parts.label_seconds:
        return
    tally.labels_looked(now)  # first: whatever goes wrong below, the lake is not read again at every tick
    seen, counted, problems = tally.seen(), {}, []
    labels, outcomes = tally.labels(everything=True), {}
    waiting = tally.open_requests() if _needs_labels(spec, state) else []
    for day in stored_days(parts.lake, spec, "live_performance", suffix="json")[-LABEL_DAYS:]:
        try:
            digest = _changed(parts, spec, day, seen)
            if digest is None:
                continue
            rows = _answered_with_labels(parts, spec, state, day, everything=bool(waiting))
            judged = _judged(spec, _first_rows(rows, waiting)) if waiting else {}
            labels = answers.advanced(labels, _wrong(spec, state, day, rows))
        except MlopsError as error:
            problems.append(f"labels of {day.isoformat()}: {error}")
            continue
        outcomes |= judged
        counted[day.isoformat()] = digest
    tally.count_labels(now, counted, labels, outcomes, "; ".join(problems[:3]) or None)


def _changed(parts: "Parts", spec: ModelSpec, day: dt.date, seen: Mapping[str, str]) -> str | None:
    """The digest of the day's live performance where it has requests and is not the one that was counted."""
    key = day_key(spec, "live_performance", day, suffix="json")
    content = parts.lake.read_bytes(key)
    digest = hashlib.sha256(content).hexdigest()
    if seen.get(day.isoformat()) == digest:
        return None
    try:
        return digest if json.loads(content)["requests"] else None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{key} is damaged ({error!r}): materialize live_performance of that day again.") from error


def _answered_with_labels(parts: "Parts", spec: ModelSpec, state: RolloutState, day: dt.date, everything: bool) -> pl.DataFrame:
    """The day's answers of the rollout's versions since it began, oldest first, with labels; `everything` for a metric to read."""
    columns = None if everything else [*COLUMNS, "logged_at"]
    log = pl.DataFrame(parts.lake.read(day_key(spec, "inference_log", day), columns))
    first = parts.ledger.find(f"rollout/{state.rollout_id}/0")
    began = first.time if first is not None else state.entered_at
    log = log.filter((pl.col("logged_at") >= began) & pl.col("version").is_in([state.candidate, state.champion]))
    return with_labels(spec, parts.lake, day, log.sort("logged_at", maintain_order=True))


def _wrong(spec: ModelSpec, state: RolloutState, day: dt.date, rows: pl.DataFrame) -> dict[str, tuple[int, int]]:
    """(labelled, wrong) of the day by version and part (see Tally): of a row that was answered more than once the last answer;
    a champion's copies do not count.
    """
    correct = answers.right(spec.training.task, spec.rollout.score_tolerance)
    own = rows.filter(~pl.col("shadow") | (pl.col("version") == state.candidate))
    last = own.unique(["row_id", "version"], keep="last").filter(pl.col("label").is_not_null())
    part = pl.Series("part", [zlib.crc32(row.encode()) % SPREAD for row in last["row_id"]], pl.Int64)
    groups = last.with_columns(part).group_by("version", "part")
    counts = groups.agg(labelled=pl.len(), wrong=(~correct.fill_null(False)).sum())
    return {f"{day.isoformat()}/{version}/{part}": (labelled, wrong) for version, part, labelled, wrong in counts.iter_rows()}


def _needs_labels(spec: ModelSpec, state: RolloutState) -> bool:
    step = state.current
    return step is not None and step.routes.sticky is not None and spec.rollout.ab_metric not in ("answered", "score")


def _judged(spec: ModelSpec, rows: pl.DataFrame) -> dict[str, int | None]:
    """The declared metric of these rows by request. Raises DeclarationError when the model's own function is wrong."""
    name = spec.rollout.ab_metric
    if name == "accuracy":
        values: Any = rows.select(answers.right(spec.training.task, spec.rollout.score_tolerance))[:, 0].cast(pl.Int64)
    else:
        function = references.load_callable(spec, "rollout.ab_metric")
        try:
            values = answers.outcomes(function(rows.to_arrow()), rows.height)
        except Exception as error:  # the model's own code may raise anything
            raise DeclarationError(f"rollout.ab_metric: {name} failed: {type(error).__name__}: {error}") from error
    return dict(zip(rows["request_id"], values, strict=True))


def _first_rows(log: pl.DataFrame, requests: list[str]) -> pl.DataFrame:
    """The first row of each of the requests as its caller got it."""
    wanted = pl.DataFrame({"request_id": requests}, schema={"request_id": pl.String})
    return (
        log.filter(~pl.col("shadow"))
        .join(wanted, on="request_id", how="semi")
        .unique("request_id", keep="first", maintain_order=True)
    )


def _by_version(labels: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Summed over the days on which more than one version has labels: on others there is nothing to compare."""
    versions: dict[str, set[str]] = {}
    for name in labels:
        day, version, _ = name.split("/")
        versions.setdefault(day, set()).add(version)
    found: dict[str, tuple[int, int]] = {}
    for name, (labelled, wrong) in labels.items():
        day, version, _ = name.split("/")
        if len(versions[day]) > 1:
            before = found.get(version, (0, 0))
            found[version] = before[0] + labelled, before[1] + wrong
    return found


def _own() -> pl.Expr:
    from mlops_dagster.assets.smoke import REQUEST_ID_PREFIX

    return pl.col("request_id").str.starts_with(REQUEST_ID_PREFIX)
