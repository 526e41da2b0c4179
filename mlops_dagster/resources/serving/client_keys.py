"""API keys of models: who may ask a model that has keys. Of a client's key only the SHA-256 is kept.

One file per model, `keys/<model>.json` in the serving folder. A model without it answers everybody; with it, only the clients that it names,
and nobody once the last one is revoked. The platform's own requests (smoke predictions, replay) carry a key that lies in a private file
beside the gateway's configuration.
"""

import datetime as dt
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlops_dagster.core.errors import DeclarationError, NotFoundError, StorageError
from mlops_dagster.resources.serving import checked_model
from mlops_dagster.resources.serving.state import Folder, read_json, storage_errors, write_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PLATFORM = "platform"
KEY_BYTES = 32


def add(folder: Folder, model: str, name: str, key: str, now: dt.datetime) -> None:
    """Let a client ask a model by this key from now on. DeclarationError for a name that is not usable or has a key already."""
    if not NAME.fullmatch(name) or name == PLATFORM:
        raise DeclarationError(
            f"client name {name!r}: use up to 64 letters, digits, '.', '_' and '-', and not {PLATFORM!r}, which is the platform's own"
        )
    folder.make()
    with folder.lock("keys"):
        known = _read(folder, checked_model(model)) or {}
        if name in known:
            raise DeclarationError(
                f"{model}: {name} has a key since {known[name]['since']}; revoke it first, or choose another name"
            )
        _write(folder, model, {**known, name: {"sha256": hash_api_key(key), "since": now.isoformat(timespec="seconds")}})


def revoke(folder: Folder, model: str, name: str) -> str:
    """Refuse a client's key from now on, and return its digest. NotFoundError when there is none; the last one leaves a model that
    answers nobody.
    """
    folder.make()
    with folder.lock("keys"):
        known = _read(folder, checked_model(model)) or {}
        if name not in known:
            raise NotFoundError(f"{model}: no client {name!r} has a key; there are: {', '.join(sorted(known)) or 'none'}")
        _write(folder, model, {other: entry for other, entry in known.items() if other != name})
        return str(known[name]["sha256"])


def is_live(folder: Folder, digest: str) -> bool:
    """Whether the gateway's present routes accept the key of this digest."""
    return digest in _text(folder.envoy / "rds.json")


def open_to_all(folder: Folder, model: str) -> None:
    """Forget all keys of a model: it answers everybody again."""
    folder.make()
    with folder.lock("keys"), storage_errors(_file(folder, checked_model(model)), "remove"):
        _file(folder, model).unlink(missing_ok=True)


def clients(folder: Folder, model: str) -> dict[str, str] | None:
    """When each client of a model got its key, by name; None where no key is asked for. StorageError for a damaged file."""
    known = _read(folder, checked_model(model))
    return None if known is None else {name: entry["since"] for name, entry in sorted(known.items())}


def digests(folder: Folder) -> dict[str, dict[str, str]]:
    """The models that ask for keys: the client's name by its key's digest. A damaged file lets in the platform only."""
    found = {}
    for path in (folder.root / "keys").glob("*.json"):
        known: Mapping[str, Any] = {}
        with suppress(StorageError):
            known = _read(folder, path.stem) or {}
        own = {hash_api_key(own_key(folder)): PLATFORM}
        found[path.stem] = {**{entry["sha256"]: name for name, entry in known.items()}, **own}
    return found


def own_key(folder: Folder) -> str:
    """The key of the platform's own requests, made at its first use; only this user can read its file."""
    path = folder.host / "own.key"
    if key := _text(path):
        return key
    folder.make()
    with folder.lock("keys"), storage_errors(path, "write"):
        if not _text(path):
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            part.unlink(missing_ok=True)
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())  # or a power failure may leave an empty key
            os.replace(part, path)
        return path.read_text()


def _text(path: Path) -> str:
    """What is in a file; nothing where there is none."""
    with suppress(FileNotFoundError):
        return path.read_text()
    return ""


def hash_api_key(key: str) -> str:
    """What is kept of an API key: its SHA-256 in hex. Make keys long and random, for example with `secrets.token_urlsafe(32)`."""
    import hashlib

    return hashlib.sha256(key.encode()).hexdigest()


def _file(folder: Folder, model: str) -> Path:
    return folder.root / "keys" / f"{model}.json"


def _read(folder: Folder, model: str) -> dict[str, dict[str, str]] | None:
    path = _file(folder, model)
    if not path.exists():
        return None
    known = read_json(path)
    if not isinstance(known, dict) or not all(isinstance(e, dict) and {"sha256", "since"} <= e.keys() for e in known.values()):
        raise StorageError(
            f"API keys {path.name}: the file is damaged, so no client of {model} is let in. Remove it and add them again."
        )
    return known


def _write(folder: Folder, model: str, known: Mapping[str, Any]) -> None:
    path = _file(folder, model)
    with storage_errors(path.parent, "make"):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    write_json(path, known)
