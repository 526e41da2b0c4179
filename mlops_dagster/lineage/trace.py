"""From a logged request back to the bytes that it came from."""

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mlops_dagster.core.errors import MlopsError, NotFoundError
from mlops_dagster.core.ledger import Entry, approval_of, chain_hash, live_at
from mlops_dagster.lineage import request_search, training_record
from mlops_dagster.lineage.deployments import spells
from mlops_dagster.lineage.places import Places, ReadableLake
from mlops_dagster.lineage.request_search import Found

FACTS = ("request_id", "row_id", "model", "version", "arm", "shadow", "logged_at", "event_timestamp", "latency_ms")
ANSWER = ("prediction", "prediction_label", "score")
EVALUATION = ("metrics", "baseline", "champion", "gate")


def trace(places: Places, request_id: str, model: str | None = None) -> list[dict[str, Any]]:
    """Everything behind each row that was logged under a request id, as plain JSON values.

    Raises NotFoundError for an id or a model that was never logged, saying what was.
    """
    models = places.models()
    if model is not None and model not in models:
        raise NotFoundError(f"{model} has no data in this state folder; there is data of: {', '.join(models) or 'no model'}")
    looked_at = [model] if model else models
    found = [row for name in looked_at for row in request_search.find(places, name, request_id)]
    if not found:
        raise NotFoundError(_unknown(places, looked_at, request_id))
    entries = {row.model: places.entries(row.model) for row in found}
    return [behind(places.lake, row, entries[row.model]) for row in found]


def _unknown(places: Places, models: Sequence[str], request_id: str) -> str:
    known = []
    for name in models:
        summaries = [index.summary for _, index in request_search.indexes(places, name)]
        moments = [m for s in summaries for m in (s.first_logged, s.last_logged) if m]
        told = f", logged {min(moments)} … {max(moments)}" if moments else ""
        known.append(f"{name}: {sum(s.rows for s in summaries)} collected predictions{told}")
    return (
        f"no prediction was logged under the request id {request_id!r} ({'; '.join(known) or 'no model has data'}). The id is the request's "
        f"header x-request-id, or the `id` of its answer; a prediction can be traced a second after it was answered"
    )


def behind(lake: ReadableLake, found: Found, entries: Sequence[Entry]) -> dict[str, Any]:
    """One logged row with the decisions, data and code behind it; None where nothing was recorded, with the reason in `notes`."""
    row, version, notes = found.row, str(found.row["version"]), list[str]()
    approval = approval_of(entries, found.model, version)
    evidence = approval.evidence if approval else {}
    if approval is None:
        notes.append(f"the ledger has no decision about version {version}")
    return {
        "request": {name: _plain(row.get(name)) for name in FACTS},
        "logged_in": found.file,
        "features": {name: _plain(value) for name, value in (row.get("features") or {}).items()},
        "answer": {name: _plain(row.get(name)) for name in ANSWER if row.get(name) is not None},
        "deployment": _deployment(entries, found.model, version, row["logged_at"], notes),
        "approval": approval and {**_entry(approval), "decision": approval.kind, "evidence_hash": evidence.get("evidence_hash")},
        "evaluation": {name: evidence.get(name) for name in EVALUATION} if evidence else None,
        "artifact": evidence.get("artifact"),
        "training_set": _training_set(lake, found.model, version, evidence, notes),
        "parameters": evidence.get("parameters"),
        "code": {"digest": evidence.get("code"), "revision": evidence.get("revision")},
        "environment": evidence.get("lock"),
        "notes": notes,
    }


def _entry(entry: Entry) -> dict[str, Any]:
    """What identifies a ledger entry; `intact`: its content still gives its hash."""
    told = {"entry": entry.sequence, "at": entry.time_iso, "by": entry.actor, "reason": entry.reason, "hash": entry.hash}
    return {**told, "intact": chain_hash(entry) == entry.hash}


def _deployment(
    entries: Sequence[Entry], model: str, version: str, moment: dt.datetime, notes: list[str]
) -> dict[str, Any] | None:
    spell = next((s for s in spells(entries, model) if s.version == version and s.covers(moment)), None)
    if spell is None:
        # Servers answer a moment before the entry that follows from it is written, and until they have taken new routes.
        earlier = [s for s in spells(entries, model) if s.version == version]
        if not earlier:
            notes.append(f"the ledger has no deployment of version {version}")
            return None
        spell = min(earlier, key=lambda s: abs((s.since - moment).total_seconds()))
        notes.append(f"version {version} answered at {moment.isoformat()}, outside the time that the ledger has it deployed for")
    routes = live_at(entries, model, moment)
    return {
        **_entry(spell.began),
        "kind": spell.began.kind,
        "until": spell.until and spell.until.isoformat(),
        "routes": routes and routes.routes.to_json(),
        "routes_entry": routes and routes.entry.sequence,
    }


def _training_set(
    lake: ReadableLake, model: str, version: str, evidence: Mapping[str, Any], notes: list[str]
) -> dict[str, Any] | None:
    if not evidence:
        return None
    told = {
        "sha256": evidence.get("training_set"),
        "key": evidence.get("training_set_key"),
        "first_day": evidence.get("first_day"),
        "last_day": evidence.get("last_day"),
        "rows": evidence.get("rows"),
        "dvc_commit": evidence.get("dvc_commit"),
        "inputs": evidence.get("inputs"),
        "feature_views": None,
        "raw_data": None,
    }
    try:
        record = training_record.of_version(lake, model, version, evidence)
    except MlopsError as error:
        notes.append(str(error))
        return told
    views = {name: asdict(view) for name, view in record.views.items()}
    partitions = {
        "raw_data": dict(record.raw_data),
        "lookback_days": record.lookback_days,
        "quarantined": list(record.quarantined),
    }
    return {**told, "feature_views": views, **partitions}


def _plain(value: Any) -> Any:
    if isinstance(value, dt.datetime | dt.date):
        return value.isoformat()
    if isinstance(value, float) and value != value:
        return None
    return value


def show(found: Sequence[Mapping[str, Any]]) -> str:
    """The same for people."""
    return "\n\n".join("\n".join(f"{name:<14}{text}" for name, text in _lines(one) if text) for one in found)


def _lines(one: Mapping[str, Any]) -> list[tuple[str, Any]]:
    request, deployment, approval = one["request"], one["deployment"], one["approval"]
    training, evaluation = one["training_set"] or {}, one["evaluation"] or {}
    raw, views = training.get("raw_data") or {}, training.get("feature_views") or {}
    shares = ", ".join(
        f"version {w['arm']} {w['percent']:g} %" for w in ((deployment or {}).get("routes") or {}).get("weights", [])
    )
    digests = [("digest", one["code"]["digest"]), ("revision", one["code"]["revision"])]
    return [
        (
            "request",
            f"{request['request_id']} (row {request['row_id']}) of {request['model']}, {request['logged_at']}, {request['latency_ms']:.2f} ms",
        ),
        ("answer", ", ".join(f"{k} {v}" for k, v in one["answer"].items())),
        ("features", ", ".join(f"{k} {v}" for k, v in one["features"].items())),
        (
            "version",
            f"{request['version']}, arm {request['arm']}{', shadow' if request['shadow'] else ''}; artifact {one['artifact']}",
        ),
        ("deployment", deployment and f"{_told(deployment)} ({deployment['kind']}); then {shares}"),
        ("approval", approval and f"{approval['decision']}, {_told(approval)}"),
        ("evaluation", ", ".join(f"{k} {v:.4f}" for k, v in (evaluation.get("metrics") or {}).items())),
        (
            "training set",
            training and f"{training['sha256']}, {training['first_day']} … {training['last_day']}, {training['rows']} rows",
        ),
        ("data revision", training.get("dvc_commit") or ""),
        *[
            ("feature view", f"{n}: definition {v['definition'][:12]}, data {v['data'][:12]} of {v['days']} days")
            for n, v in views.items()
        ],
        *[("raw data", f"{md5}  {key}") for key, md5 in sorted(raw.items())],
        ("code", ", ".join(f"{name} {value}" for name, value in digests if value)),
        ("environment", one["environment"] or ""),
        *[("note", note) for note in one["notes"]],
    ]


def _told(entry: Mapping[str, Any]) -> str:
    broken = "" if entry["intact"] else ", CHANGED since: run `mlops ledger verify`"
    why = f": {entry['reason']}" if entry["reason"] else ""
    return f"ledger entry {entry['entry']}{broken}, {entry['at']} by {entry['by']}{why}"


def as_json(found: Sequence[Mapping[str, Any]]) -> str:
    """One JSON list."""
    return json.dumps(found, indent=2, default=str)
