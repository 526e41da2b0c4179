"""Every error that a user can meet. Each message names the field, the value and the remedy."""


class MlopsError(Exception):
    """The root: anything this package raises on purpose."""


class TerminalError(MlopsError):
    """Trying again cannot help: the input, the declaration or the state must change first."""


class TransientError(MlopsError):
    """The same call may succeed later: a server was away, a lock was held."""


class DeclarationError(TerminalError):
    """A model's declaration, or the Python that it names, is wrong."""


class DataError(TerminalError):
    """Rows do not meet what was declared of them."""


class LeakageError(DataError):
    """A feature or a label would have been known only after the moment of prediction."""


class ArtifactError(TerminalError):
    """A model artifact is missing, unreadable or not the one that was registered."""


class NotFoundError(TerminalError):
    """A name (model, version, partition) does not exist; the message lists those that do."""


class ApprovalError(TerminalError):
    """An approval or rejection is not allowed in the present state."""


class RolloutError(TerminalError):
    """A rollout command is not allowed in the present state."""


class LedgerError(TerminalError):
    """The ledger was changed by hand, or an entry cannot be read."""


class StorageError(TransientError):
    """Disk or object store: full, read-only, unreachable."""


class ServingError(TransientError):
    """A server did not start, did not become ready, or does not answer."""
