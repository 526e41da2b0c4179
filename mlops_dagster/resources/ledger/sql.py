"""The ledger in a SQL database: SQLite (WAL) on one machine, PostgreSQL for several.

Appends are serial: SQLite by `BEGIN IMMEDIATE`, PostgreSQL by an advisory lock that ends with the transaction. The entries and
the head (last sequence and hash) change in one transaction, and triggers refuse to change or delete an entry, so a hand that
slips is stopped; who removes the triggers is found by `verify`. On PostgreSQL, grant the platform's user SELECT and INSERT on
`ledger_entries` and SELECT, INSERT, UPDATE on `ledger_head`, and let another user own the tables.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, NoSuchModuleError, SQLAlchemyError

from mlops_dagster.core.errors import DeclarationError, LedgerError, StorageError
from mlops_dagster.core.ledger import Break, Entry, NewEntry, Receipt, seal, verify

_LOCK = 0x4D4C4F5053  # "MLOPS": the advisory lock that appends take
_BUSY_SECONDS = 30
_CHUNK = 1000
_URLS = "Use sqlite:////path/ledger.db or postgresql+psycopg://user@host/database."

_METADATA = sa.MetaData()
_ENTRIES = sa.Table(
    "ledger_entries",
    _METADATA,
    sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False, index=True),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("time", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("evidence", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False, unique=True),
    sa.Column("previous", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
)
_HEAD = sa.Table(
    "ledger_head",
    _METADATA,
    sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1"), primary_key=True),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
)

_REFUSAL = "the ledger is append-only: an entry is never changed or deleted"
_SQLITE_GUARDS = tuple(
    f"CREATE TRIGGER IF NOT EXISTS ledger_no_{verb.lower()} BEFORE {verb} ON ledger_entries"
    f" BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
    for verb in ("UPDATE", "DELETE")
)
_POSTGRES_GUARDS = (
    "CREATE OR REPLACE FUNCTION ledger_refuse() RETURNS trigger LANGUAGE plpgsql AS"
    f" $$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$",
    "CREATE OR REPLACE TRIGGER ledger_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_entries"
    " FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuse()",
)


class SqlLedger:
    """A `Ledger` at an SQLAlchemy URL: `sqlite:////path/ledger.db` or `postgresql+psycopg://user@host/database`.

    Makes its tables when they are not there. Raises DeclarationError for a URL that is neither, StorageError when the database
    cannot be reached. An object may be used by many threads; after a fork, make a new one.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._sqlite = self._engine.dialect.name == "sqlite"
        self._create()

    def append(self, new: NewEntry) -> Entry:
        with self._writing() as connection:
            existing = connection.execute(sa.select(_ENTRIES).where(_ENTRIES.c.key == new.key)).first()
            if existing is not None:
                return Entry(*existing)
            head = connection.execute(sa.select(_HEAD.c.sequence, _HEAD.c.hash)).first()
            entry = seal(new, Receipt(*head) if head else None)
            connection.execute(_ENTRIES.insert().values(_row(entry)))
            place = {"sequence": entry.sequence, "hash": entry.hash}
            connection.execute(_HEAD.update().values(place) if head else _HEAD.insert().values(id=1, **place))
            return entry

    def entries(self, model: str | None = None, kind: str | None = None, after: int = 0) -> list[Entry]:
        query = sa.select(_ENTRIES).where(_ENTRIES.c.sequence > after).order_by(_ENTRIES.c.sequence)
        if model is not None:
            query = query.where(_ENTRIES.c.model == model)
        if kind is not None:
            query = query.where(_ENTRIES.c.kind == kind)
        with self._reading() as connection:
            return [Entry(*row) for row in connection.execute(query)]

    def find(self, key: str) -> Entry | None:
        with self._reading() as connection:
            row = connection.execute(sa.select(_ENTRIES).where(_ENTRIES.c.key == key)).first()
        return Entry(*row) if row else None

    def head(self) -> Receipt | None:
        with self._reading() as connection:
            row = connection.execute(sa.select(_HEAD.c.sequence, _HEAD.c.hash)).first()
        return Receipt(*row) if row else None

    def verify(self, receipts: Iterable[Receipt] = ()) -> Break | None:
        with self._reading() as connection:
            row = connection.execute(sa.select(_HEAD.c.sequence, _HEAD.c.hash)).first()
            head = Receipt(*row) if row else Receipt(0, "0" * 64)
            return verify(_all(connection), head, receipts)

    def close(self) -> None:
        """Closes idle connections; the ledger can be used again afterwards."""
        self._engine.dispose()

    def _create(self) -> None:
        if self._ready():
            return
        with self._writing() as connection:
            _METADATA.create_all(connection)
            for statement in _SQLITE_GUARDS if self._sqlite else _POSTGRES_GUARDS:
                connection.exec_driver_sql(statement)

    def _ready(self) -> bool:
        """Whether the tables are there, asked without the write lock: opening a ledger must not wait for an append."""
        with self._reading() as connection:
            there = sa.inspect(connection).has_table
            return there("ledger_entries") and there("ledger_head")

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """One transaction that no other append runs beside; committed at the end, rolled back on any error."""
        with _translated(), self._engine.connect() as connection:
            if self._sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            try:
                yield connection
            except BaseException:
                connection.exec_driver_sql("ROLLBACK") if self._sqlite else connection.rollback()
                raise
            connection.exec_driver_sql("COMMIT") if self._sqlite else connection.commit()

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """One snapshot for all reads inside."""
        with _translated(), self._engine.connect() as connection:
            if self._sqlite:
                connection.exec_driver_sql("BEGIN")
            else:
                connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
            try:
                yield connection
            finally:
                connection.exec_driver_sql("ROLLBACK") if self._sqlite else connection.rollback()


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            return _sqlite_engine(parsed)
        if parsed.get_backend_name() == "postgresql":
            # READ COMMITTED, whatever the server's default: after waiting for the lock, the next query must see the newest head.
            return sa.create_engine(parsed, isolation_level="READ COMMITTED", pool_size=2, pool_pre_ping=True)
    except (SQLAlchemyError, NoSuchModuleError, ImportError) as error:
        raise DeclarationError(f"ledger url {_hidden(url)}: {error}. {_URLS}") from error
    raise DeclarationError(f"ledger url {_hidden(url)}: no such database here. {_URLS}")


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    if not url.database or url.database == ":memory:":
        raise DeclarationError(
            "ledger url has no file: steps and sensors are separate processes, so use sqlite:////path/ledger.db"
        )
    try:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the ledger's folder {Path(url.database).parent} cannot be made: {error.strerror}.") from error
    # AUTOCOMMIT leaves transactions to us: Python's sqlite3 begins deferred ones, which cannot be upgraded safely.
    engine = sa.create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        poolclass=sa.NullPool,
        connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _prepare_sqlite(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    try:
        if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            cursor.execute("PRAGMA journal_mode = WAL")
        # FULL: an entry that was returned survives a loss of power; NORMAL in WAL mode may lose the last ones.
        cursor.execute("PRAGMA synchronous = FULL")
    finally:
        cursor.close()


def _all(connection: sa.Connection) -> Iterator[Entry]:
    query = sa.select(_ENTRIES).order_by(_ENTRIES.c.sequence).execution_options(yield_per=_CHUNK)
    for row in connection.execute(query):
        yield Entry(*row)


def _row(entry: Entry) -> dict[str, object]:
    return {
        "sequence": entry.sequence,
        "kind": entry.kind,
        "model": entry.model,
        "subject": entry.subject,
        "actor": entry.actor,
        "time": entry.time_iso,
        "reason": entry.reason,
        "evidence": entry.evidence_json,
        "key": entry.key,
        "previous": entry.previous,
        "hash": entry.hash,
    }


@contextmanager
def _translated() -> Iterator[None]:
    """The one place where the database's errors become ours."""
    try:
        yield
    except DBAPIError as error:
        text = str(error.orig).strip()
        if _REFUSAL in text:
            raise LedgerError(f"{_REFUSAL}.") from error
        advice = "Nothing was written; see that it is up, writable and not full."
        raise StorageError(f"the ledger's database refused: {text}. {advice}") from error


def _hidden(url: str) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "(not a URL)"
