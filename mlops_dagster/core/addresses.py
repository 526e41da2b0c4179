"""Addresses of storage and servers as settings state them: what they mean, and an error without the password where they are wrong."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from mlops_dagster.core.errors import DeclarationError

ONLINE_STORES = (
    "sqlite, redis://[:PASSWORD@]HOST[:PORT][/NUMBER] (rediss:// for TLS) or postgresql://USER[:PASSWORD@]HOST[:PORT]/DATABASE"
)
S3_PLACE = "s3://BUCKET/PREFIX"
_PASSWORD = re.compile(r"(://[^\s/:@]*):[^\s/]*@")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class OnlineStore:
    """Feast's `online_store` section, in which `${NAME}` stands for a secret, and the secrets by those names."""

    section: Mapping[str, Any]
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


def masked(address: str) -> str:
    """The address with `***` in place of its password, which may hold what it should not: all up to the last `@` counts as user and password."""
    before, at, place = address.rpartition("@")
    if not at:
        return address
    scheme, found, person = before.partition("://")
    if not found:
        return f"***@{place}"
    user, colon, _ = person.partition(":")
    return f"{scheme}://{user}{':***' if colon else ''}@{place}"


def masked_in(text: str, *addresses: str) -> str:
    """The text with `***` in place of the passwords of these addresses and of every other URL in it."""
    for address in addresses:
        text = text.replace(address.rstrip("/"), masked(address).rstrip("/"))
    return _PASSWORD.sub(r"\1:***@", text)


def s3_place(name: str, address: str) -> tuple[str, str]:
    """Bucket and prefix (perhaps empty) of an address such as s3://bucket/lake. Raises DeclarationError naming the setting."""
    parts = _split(name, address, S3_PLACE)
    prefix = parts.path.strip("/")
    if parts.scheme != "s3" or not _BUCKET.fullmatch(parts.netloc) or parts.query or "//" in prefix:
        raise _wrong(name, address, f"use {S3_PLACE}; the endpoint comes from AWS_ENDPOINT_URL, the credentials from AWS_…")
    return parts.netloc, prefix


def online_store(name: str, address: str, secret: str) -> OnlineStore:
    """The online store at an address; its password is known as `${secret}`. Raises DeclarationError naming the setting."""
    if address == "sqlite":
        return OnlineStore({"type": "sqlite", "path": "online.db"})
    parts = _split(name, address, ONLINE_STORES)
    password = unquote(parts.password) if parts.password else ""
    if parts.scheme in ("redis", "rediss") and parts.hostname:
        return _redis(name, address, parts, password, secret)
    if parts.scheme in ("postgresql", "postgres") and parts.hostname and parts.username and parts.path.strip("/"):
        return _postgres(name, address, parts, password, secret)
    raise _wrong(name, address, f"use {ONLINE_STORES}")


def _redis(name: str, address: str, parts: SplitResult, password: str, secret: str) -> OnlineStore:
    number = parts.path.strip("/") or "0"
    if not number.isdigit() or parts.query:
        raise _wrong(name, address, "after the port there is at most /NUMBER, the database")
    if "," in password:
        raise _wrong(name, address, "Feast separates its settings of Redis by commas; use a password without one")
    settings = [f"{parts.hostname}:{parts.port or 6379}", f"db={number}"]
    settings += [f"username={unquote(parts.username)}"] if parts.username else []
    settings += [f"password=${{{secret}}}"] if password else []
    settings += ["ssl=true"] if parts.scheme == "rediss" else []
    return OnlineStore({"type": "redis", "connection_string": ",".join(settings)}, {secret: password} if password else {})


def _postgres(name: str, address: str, parts: SplitResult, password: str, secret: str) -> OnlineStore:
    options = dict(parse_qsl(parts.query))
    if unknown := sorted(options.keys() - {"sslmode", "schema"}):
        raise _wrong(name, address, f"{', '.join(unknown)} is no option; there are sslmode and schema")
    section = {
        "type": "postgres",
        "host": parts.hostname,
        "port": parts.port or 5432,
        "database": unquote(parts.path.strip("/")),
        "db_schema": options.get("schema", "public"),
        "user": unquote(parts.username or ""),
        "password": f"${{{secret}}}",
        "sslmode": options.get("sslmode", "prefer"),
    }
    return OnlineStore(section, {secret: password})


def mlflow_server(name: str, address: str) -> str:
    """The address of an MLflow server or database, as it is. Raises DeclarationError naming the setting."""
    parts = _split(name, address, "http(s)://HOST:PORT")
    web = parts.scheme in ("http", "https") and bool(parts.hostname)
    database = parts.scheme.partition("+")[0] == "postgresql" and bool(parts.hostname)
    if not (web or database or address.startswith("sqlite:///")):
        raise _wrong(name, address, "use http(s)://HOST:PORT of a tracking server, postgresql://… or sqlite:///FILE")
    return address


def _split(name: str, address: str, remedy: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises for what is no number
    except ValueError:
        raise _wrong(name, address, f"use {remedy}") from None
    return parts


def _wrong(name: str, address: str, remedy: str) -> DeclarationError:
    return DeclarationError(f"{name} is {masked(address)!r}: {remedy}")
