"""The ledger's pure part: what an entry is, how entries are chained by hash, and what can be read out of a chain.

**The hash.** An entry's hash is the SHA-256 (hex) of the canonical JSON of an object with the fields sequence, kind, model,
subject, actor, time, reason, evidence, key and previous, where `time` is the stored text, `evidence` is the stored canonical
JSON *text* (a string inside the object, so that even a changed space is found), and `previous` is the hash of the entry before
it (64 zeros for the first). Canonical JSON: keys sorted by code point, no spaces, UTF-8 without escapes beyond JSON's own, the
shortest float text that reads back the same, neither NaN nor infinities.

**What the chain can show.** A changed, inserted, reordered or deleted entry breaks it, except at the end: cutting off the last
entries leaves a shorter chain that is whole. Two things guard the end: the storage keeps the head (last sequence and hash) apart,
and `verify` takes receipts, heads that were noted elsewhere (each append returns one). Who can write to all of these places can
rewrite history; only a receipt kept out of their reach shows it.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlops_dagster.core.errors import LedgerError
from mlops_dagster.core.routes import Routes, version_of

GENESIS = "0" * 64

APPROVAL = "approval"
REJECTION = "rejection"
ROLLOUT_STARTED = "rollout_started"
ROLLOUT_STEP = "rollout_step"
ROLLOUT_PAUSED = "rollout_paused"
ROLLOUT_HELD = "rollout_held"
ROLLOUT_ERROR = "rollout_error"
PROMOTION = "promotion"
ROLLBACK = "rollback"
ROLLOUT_ABORTED = "rollout_aborted"
ROLLOUT_SUPERSEDED = "rollout_superseded"
RETRAINING = "retraining"
QUARANTINE = "quarantine"
QUARANTINE_LIFTED = "quarantine_lifted"


@dataclass(frozen=True)
class NewEntry:
    """What a caller wants recorded: who decided what about which version of which model, when, why and on what evidence.

    `key` makes it idempotent: a second append with the same key changes nothing and gives the entry that is there. `time` is
    aware of its zone. `evidence` is plain JSON with finite numbers. Raises LedgerError naming the field.
    """

    kind: str
    model: str
    subject: str
    actor: str
    time: datetime
    reason: str
    evidence: dict[str, Any]
    key: str

    def __post_init__(self) -> None:
        for name in ("kind", "model", "actor", "key"):
            if not getattr(self, name):
                raise LedgerError(f"{name} is empty: every ledger entry names its {name}.")
        for name in ("kind", "model", "subject", "actor", "reason", "key"):
            check_text(name, getattr(self, name))
        if not isinstance(self.time, datetime) or self.time.utcoffset() is None:
            raise LedgerError(f"time is {self.time!r}: give a datetime with a zone, such as datetime.now(UTC).")
        if not isinstance(self.evidence, dict):
            raise LedgerError(f"evidence is {type(self.evidence).__name__}: give an object of JSON values.")
        canonical_json(self.evidence)


@dataclass(frozen=True)
class Receipt:
    """The head of a ledger at some moment; kept elsewhere, it shows later whether the entries up to there are still the same."""

    sequence: int
    hash: str


@dataclass(frozen=True)
class Entry:
    """One row of the ledger, as stored: every field is text or a number, so it reads the same from any database."""

    sequence: int
    kind: str
    model: str
    subject: str
    actor: str
    time_iso: str
    reason: str
    evidence_json: str
    key: str
    previous: str
    hash: str

    @property
    def time(self) -> datetime:
        """When it was decided, in UTC; raises LedgerError when the stored text is not a time."""
        try:
            return datetime.fromisoformat(self.time_iso)
        except ValueError as error:
            raise LedgerError(f"ledger entry {self.sequence}: time is {self.time_iso!r}. Run `mlops ledger verify`.") from error

    @property
    def evidence(self) -> dict[str, Any]:
        """A fresh copy of the evidence; raises LedgerError when the stored text is not JSON."""
        try:
            return json.loads(self.evidence_json)
        except ValueError as error:
            raise LedgerError(f"ledger entry {self.sequence}: its evidence is not JSON. Run `mlops ledger verify`.") from error

    @property
    def receipt(self) -> Receipt:
        """This entry's place and hash, to be kept elsewhere."""
        return Receipt(self.sequence, self.hash)


@dataclass(frozen=True)
class Break:
    """Where a chain is first broken: the sequence number, what is wrong, and the entry when there is one."""

    sequence: int
    reason: str
    entry: Entry | None = None

    def __str__(self) -> str:
        return f"ledger entry {self.sequence}: {self.reason}"


@dataclass(frozen=True)
class Live:
    """What answered at a moment: the routes, the entry since which requests are divided so, and the champion with the entry that made
    it the champion (a promotion or a way back; both None before the first). The entries' reasons and evidence say why.
    """

    routes: Routes
    entry: Entry
    champion: str | None = None
    crowned: Entry | None = None

    @property
    def since(self) -> datetime:
        """Since when requests are divided so."""
        return self.entry.time

    @property
    def shares(self) -> dict[str, float]:
        """Every version that answers callers by weight, with its percent, the largest first."""
        found: dict[str, int] = {}
        for arm, per_mille in self.routes.weights:
            if per_mille:
                found[version_of(arm)] = found.get(version_of(arm), 0) + per_mille
        return {version: found[version] / 10 for version in sorted(found, key=lambda v: -found[v])}

    @property
    def version(self) -> str:
        """The version with the largest share of the requests."""
        return next(iter(self.shares))


def canonical_json(value: Any) -> str:
    """The one JSON text of `value` (see the module's text); raises LedgerError naming the path of what JSON cannot hold."""
    _check_json("evidence", value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def check_text(field: str, text: Any) -> None:
    """Raises LedgerError unless `text` is a string that every database stores unchanged (no NUL, no lone surrogate)."""
    if not isinstance(text, str):
        raise LedgerError(f"{field} is {text!r}: give text.")
    if "\x00" in text:
        raise LedgerError(f"{field} holds a NUL character, which PostgreSQL cannot store: remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LedgerError(f"{field} is not valid Unicode ({error.reason}): decode it properly first.") from error


def time_text(time: datetime) -> str:
    """A moment as it is stored: UTC with microseconds, `2013-03-01T00:00:00.000000+00:00`."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def seal(new: NewEntry, previous: Receipt | None) -> Entry:
    """The entry that follows `previous` (None: the first one), with its hash."""
    sequence, before = (previous.sequence + 1, previous.hash) if previous else (1, GENESIS)
    evidence, time = canonical_json(new.evidence), time_text(new.time)
    fields = (sequence, new.kind, new.model, new.subject, new.actor, time, new.reason, evidence, new.key, before)
    return Entry(*fields, hash=_hash(*fields))


def chain_hash(entry: Entry) -> str:
    """The hash that `entry` should have, from its other fields."""
    return _hash(
        entry.sequence,
        entry.kind,
        entry.model,
        entry.subject,
        entry.actor,
        entry.time_iso,
        entry.reason,
        entry.evidence_json,
        entry.key,
        entry.previous,
    )


def verify(entries: Iterable[Entry], head: Receipt | None = None, receipts: Iterable[Receipt] = ()) -> Break | None:
    """The first broken entry of a whole ledger, given in order, or None.

    `head` is what the storage keeps apart from the entries, `receipts` are heads that were noted elsewhere.
    """
    last = Receipt(0, GENESIS)
    noted = {receipt.sequence: receipt.hash for receipt in receipts}
    for entry in entries:
        if reason := _fault(entry, last, noted.pop(entry.sequence, None)):
            return Break(min(entry.sequence, last.sequence + 1), reason, entry)
        last = entry.receipt
    if head is not None and head != last:
        return _cut_off(last, head, "the ledger's own head")
    for sequence in sorted(noted):
        if sequence > last.sequence:
            return _cut_off(last, Receipt(sequence, noted[sequence]), "a receipt")
    return None


def live_at(entries: Iterable[Entry], model: str, time: datetime) -> Live | None:
    """What answered for `model` at `time` by the ledger's entries in order, or None while nothing was deployed.

    An entry whose evidence holds `routes` set them from its time on (null: nothing answers), and `champion` with them. An arm that is
    only started or kept warm divides no request, so it does not change since when they are divided as they are.
    """
    live: Live | None = None
    champion, crowned = None, None
    for entry in entries:
        evidence = entry.evidence if entry.model == model and entry.time <= time else {}
        if "routes" not in evidence:
            continue
        if evidence.get("champion") != champion:
            champion = evidence.get("champion")
            crowned = entry if champion is not None else None
        if evidence["routes"] is None:
            live = None
            continue
        routes = Routes.from_json(evidence["routes"])
        same = live is not None and _division(routes) == _division(live.routes)
        live = Live(routes, live.entry if live and same else entry, champion, crowned)
    return live


def _division(routes: Routes) -> tuple[object, ...]:
    """What decides who answers a request, or sees a copy of it: the routes without the arms that only run."""
    return ([weight for weight in routes.weights if weight[1]], routes.mirror, routes.match, routes.sticky)


def approval_of(entries: Iterable[Entry], model: str, version: str) -> Entry | None:
    """The last approval or rejection of a version, whichever was later; None when nobody has decided."""
    decided: Entry | None = None
    for entry in entries:
        if entry.model == model and entry.subject == version and entry.kind in (APPROVAL, REJECTION):
            decided = entry
    return decided


def _fault(entry: Entry, last: Receipt, noted: str | None) -> str | None:
    """What is wrong with `entry` as the one after `last`, or None."""
    if entry.sequence != last.sequence + 1:
        gap = f"{last.sequence + 1} to {entry.sequence - 1}" if entry.sequence - last.sequence > 2 else f"{last.sequence + 1}"
        return f"missing: entry {gap} was deleted" if entry.sequence > last.sequence else "its number appears twice"
    if entry.previous != last.hash:
        return "it does not follow the entry before it: an entry was replaced"
    if chain_hash(entry) != entry.hash:
        return "its content was changed after it was written"
    if noted is not None and noted != entry.hash:
        return "it is not the entry that a receipt was given for: the ledger was rewritten"
    return None


def _cut_off(last: Receipt, head: Receipt, source: str) -> Break:
    if head.sequence > last.sequence:
        return Break(last.sequence + 1, f"missing: {source} says that there are {head.sequence} entries")
    return Break(max(last.sequence, 1), f"{source} is at entry {head.sequence} with another hash: the head was changed")


def _hash(*fields: Any) -> str:
    names = ("sequence", "kind", "model", "subject", "actor", "time", "reason", "evidence", "key", "previous")
    text = json.dumps(dict(zip(names, fields, strict=True)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # A row that was edited by hand may hold what UTF-8 cannot; it must fail as changed, not crash the check.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _check_json(path: str, value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        check_text(path, value.replace("\x00", ""))
    elif isinstance(value, int | float):
        if not -float("inf") < value < float("inf"):
            raise LedgerError(f"{path} is {value}: JSON has finite numbers only; leave it out or write null.")
    elif isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise LedgerError(f"{path} has the key {name!r}: the keys of a JSON object are text.")
            _check_json(f"{path}.{name}", inner)
            check_text(f"{path} (a key)", name.replace("\x00", ""))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _check_json(f"{path}[{number}]", inner)
    else:
        raise LedgerError(f"{path} is a {type(value).__name__}: JSON has text, numbers, true, false, null, lists and objects.")
