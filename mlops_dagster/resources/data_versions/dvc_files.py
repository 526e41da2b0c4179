"""The files that DVC keeps, written as `dvc add` writes them but without loading every `.dvc` file of the repository.

`dvc add` reads the whole repository before it adds one file (https://github.com/iterative/dvc/issues/7607, …/10251). The
formats are those of DVC 3 (`dvc/stage/serialize.py`, `dvc_data/hashfile/db/local.py`); the contract tests compare both.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 20
FICLONE = 0x40049409  # linux/fs.h: share the blocks of two files until one is written to
OBJECT_MODE = 0o444  # DVC trusts a cache object with this mode without hashing it again
PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w-]*\.[A-Za-z]\w*")
OUTPUT_MD5 = re.compile(r"^(- md5: |  md5: )'?([0-9a-f]{32})'?$", re.MULTILINE)
OUTPUT_SIZE = re.compile(r"^(  size: )\d+$", re.MULTILINE)

REMOTE = "lake"
REMOTE_SECTION = re.compile(r"""^\['remote "lake"'\]\n(?:[ \t]+.*\n?)*""", re.MULTILINE)

DVC_GITIGNORE = "/config.local\n/tmp\n/cache\n"
DVCIGNORE = (
    "# Add patterns of files dvc should ignore, which could improve\n# the performance. Learn more at\n"
    "# https://dvc.org/doc/user-guide/dvcignore\n"
)
LAKE_GITIGNORE = (
    "# Git keeps what describes the data; DVC keeps the data.\n"
    "*\n!*/\n!*.dvc\n!.gitignore\n!.dvcignore\n!/.dvc/config\n/.incoming/\n"
)

INITIAL = {".dvc/.gitignore": DVC_GITIGNORE, ".dvcignore": DVCIGNORE, ".gitignore": LAKE_GITIGNORE, ".dvc/config": ""}


def config_text(before: str | None, url: str, options: Mapping[str, str], links: str) -> str:
    """DVC's configuration with our remote as it is set now; whatever else a person wrote there is kept."""
    remote = f"['remote \"lake\"']\n    url = {url}\n" + "".join(
        f"    {name} = {value}\n" for name, value in sorted(options.items())
    )
    if not before:
        cache = "[cache]\n    type = hardlink,copy\n" if links == "hardlink" else ""
        return f"[core]\n    remote = lake\n    analytics = false\n{cache}{remote}"
    if REMOTE_SECTION.search(before):
        return REMOTE_SECTION.sub(lambda found: remote, before)
    return f"{before.rstrip()}\n{remote}"


def dvc_text(name: str, md5: str, size: int, before: str | None = None) -> str:
    """The `.dvc` file of one output; what a person added to the file `before` (description, labels) is kept."""
    if before is not None and len(OUTPUT_MD5.findall(before)) == 1 and OUTPUT_SIZE.search(before):
        return OUTPUT_SIZE.sub(rf"\g<1>{size}", OUTPUT_MD5.sub(rf"\g<1>{_scalar(md5)}", before))
    if not PLAIN_NAME.fullmatch(name):
        from dvc.utils.serialize import dumps_yaml

        return dumps_yaml({"outs": [{"md5": md5, "size": size, "hash": "md5", "path": name}]})
    return f"outs:\n- md5: {_scalar(md5)}\n  size: {size}\n  hash: md5\n  path: {name}\n"


def _scalar(md5: str) -> str:
    return f"'{md5}'" if re.fullmatch(r"\d+(e\d+)?", md5) else md5  # else YAML would read a number


def md5_in(text: str) -> str | None:
    """The MD5 that a `.dvc` file of one plain file names, else None (folders and imports are a person's own)."""
    found = OUTPUT_MD5.findall(text)
    return found[0][1] if len(found) == 1 else None


def md5_of(file: BinaryIO) -> str:
    hasher = hashlib.md5(usedforsecurity=False)
    while chunk := file.read(CHUNK):
        hasher.update(chunk)
    return hasher.hexdigest()


def object_path(base: Path, md5: str) -> Path:
    """Where a DVC cache or remote keeps the bytes with this MD5."""
    return base / "files" / "md5" / md5[:2] / md5[2:]


def keep(source: Path, base: Path, hardlink: bool = False) -> tuple[str, int]:
    """Put a file's bytes into the cache at `base`: (MD5, size). With `hardlink` the two are one read-only file."""
    while True:
        with source.open("rb") as file:
            status = os.fstat(file.fileno())
            md5 = md5_of(file)
            place = object_path(base, md5)
            if has_object(place, status.st_size):
                return md5, status.st_size
            aside = _aside(place)
            try:
                same = _linked(source, aside, status) if hardlink else _copied(file, aside)
                if same:
                    aside.chmod(OBJECT_MODE)
                    aside.replace(place)
                    return md5, status.st_size
            finally:
                aside.unlink(missing_ok=True)


def copy_object(source: Path, place: Path) -> bool:
    """Copy one object to another store on this machine; False if it is there already."""
    if has_object(place, source.stat().st_size):
        return False
    aside = _aside(place)
    try:
        with source.open("rb") as file:
            _copied(file, aside)
        aside.chmod(OBJECT_MODE)
        aside.replace(place)
    finally:
        aside.unlink(missing_ok=True)
    return True


def has_object(place: Path, size: int) -> bool:
    try:
        status = place.stat()
    except FileNotFoundError:
        return False
    return status.st_size == size and status.st_mode & 0o777 == OBJECT_MODE


def _aside(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    return place.parent / f"{uuid.uuid4().hex}.tmp"


def _linked(source: Path, aside: Path, hashed: os.stat_result) -> bool:
    """Whether `aside` now is the very file that was hashed (another writer may have replaced it meanwhile)."""
    try:
        os.link(source, aside)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        with source.open("rb") as file:
            return os.fstat(file.fileno()).st_ino == hashed.st_ino and _copied(file, aside)
    return aside.stat().st_ino == hashed.st_ino


def _copied(file: BinaryIO, aside: Path) -> bool:
    file.seek(0)
    with aside.open("wb") as target:
        try:
            fcntl.ioctl(target.fileno(), FICLONE, file.fileno())
        except OSError:
            shutil.copyfileobj(file, target, CHUNK)
    return True


def write_text(path: Path, text: str) -> None:
    """Replace a small text file whole; one that holds this text already is left alone."""
    with suppress(FileNotFoundError):
        if path.read_text() == text:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        aside.write_text(text)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
