"""Reads images whose path has a scheme, such as ``zip://``, ``s3://`` or ``https://``, by fsspec.

They are read whole, where they are asked for; processes that decode get the bytes. So what one
process alone can reach, such as ``memory://``, is reached wherever that process reads. A file may
have `MOST_BYTES`, which counts what a member of an archive is inflated to.

Errors follow the rule of `bad_images`: what the next file would meet as well, an opener that is not
installed or a storage that does not answer, is raised; every other error makes a reject. So does a
host of the web that does not answer, since the next address may lead to another one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from functools import lru_cache
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

from packpipe import checks
from packpipe.images.bad_images import BadImage, is_fault, rejecting, rejecting_giants
from packpipe.images.image_data import ImageData

_LOCAL = ("file://", "local://")
_ARCHIVE = "zip://"
_WEB = ("http://", "https://")
# Errors that say that nobody answers, whatever their number.
_SILENCE = (ConnectionError, TimeoutError, socket.gaierror)
# Files that this process alone has.
_OWN = "memory://"
# More than the most pixels that are packed unless asked for take in any format, uncompressed.
MOST_BYTES = 2**30
# Bytes that are asked for at once: more than most files have; and of what is compressed by other
# methods than deflate so few that what they are inflated to is bounded, since Python then does not.
_PIECE, _SMALL_PIECE = 2**26, 2**12


def is_remote(path: object) -> bool:
    """Return whether this is a path with a scheme that fsspec knows; others are names of files."""
    if not isinstance(path, str) or "://" not in path or not checks.has_scheme(path):
        return False
    from fsspec.registry import known_implementations, registry  # loads on first use

    scheme = path.partition("://")[0]
    return scheme in known_implementations or scheme in registry


@rejecting_giants()
def fetched(image: ImageData) -> ImageData:
    """Return the bytes of an image whose path has a scheme; any other image as it is.

    Raises:
        BadImage: there is no such file, it cannot be read, or it has more than MOST_BYTES.
        ValueError: what opens such paths is not installed.
        ConnectionError: the storage does not answer.
    """
    if not isinstance(image, str) or not is_remote(image):
        return image
    if image.startswith(_LOCAL):
        return local_file(image)  # opened like other paths, by the rules for files
    try:
        with rejecting(image):
            return _read(image)
    except (BadImage, OSError) as error:
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, ImportError):
                expected = "a scheme that fsspec can open"
                raise ValueError(checks.sentence("path", image, expected, str(cause))) from error
        if any(is_fault(one) or isinstance(one, _SILENCE) for one in causes):
            what = f"{image!r} cannot be reached: {causes[-1]}"
            if image.startswith(_WEB):
                raise BadImage("unreadable", what) from causes[-1]
            raise ConnectionError(what) from error
        if isinstance(error, BadImage) and error.reason == "missing" and _OWN in image:
            what = f"{error} in this process; {_OWN} holds the files of one process alone"
            raise BadImage("missing", what) from error.__cause__
        raise


def local_file(path: str) -> str:
    """Return the file of this machine that a path with a scheme leads to, or the path."""
    container = path.split("::")[-1]  # zip://MEMBER::ARCHIVE
    for scheme in _LOCAL:
        container = container.removeprefix(scheme)
    return path if is_remote(container) else os.path.abspath(container)


def version_of(path: str) -> str:
    """Return a text that changes with a file of ``memory://``; nothing of any other file."""
    import fsspec

    if not path.startswith(_OWN):
        return ""
    try:
        return str(fsspec.filesystem("memory").ukey(path))
    except FileNotFoundError:
        return ""


def _read(path: str) -> bytes:
    import fsspec

    member, _, container = path.removeprefix(_ARCHIVE).partition("::")
    if path.startswith(_ARCHIVE) and container:
        # fsspec reads an archive's list of files anew for each of them.
        archive = _archive(container, _status(container), os.getpid())
        try:
            found = archive.getinfo(member.lstrip("/"))
        except KeyError as error:
            raise FileNotFoundError(path) from error
        _check_bytes(found.file_size)
        bounded = found.compress_type in (ZIP_STORED, ZIP_DEFLATED)
        with archive.open(found) as file:
            return _content(file, _PIECE if bounded else _SMALL_PIECE)
    with fsspec.open(path, "rb") as file:
        return _content(file, _PIECE)


def _content(file: IO[bytes] | Any, piece: int) -> bytes:
    """Return all bytes of a file, asking for so many at once."""
    pieces, size = [], 0
    while found := file.read(piece):
        size += len(found)
        _check_bytes(size)
        pieces.append(found)
    return b"".join(pieces)


def _check_bytes(size: int) -> None:
    if size > MOST_BYTES:
        raise BadImage("unreadable", f"it has {size} bytes or more, expected at most {MOST_BYTES}")


@lru_cache(maxsize=4)
def _archive(container: str, status: object, process: int) -> ZipFile:  # noqa: ARG001 parts of the key
    """Return an open archive, of this process alone: a forked one shares the place in a file."""
    import fsspec

    local = local_file(container)
    return ZipFile(fsspec.open(container, "rb").open() if is_remote(local) else local)


def _status(container: str) -> object:
    local = local_file(container)
    if is_remote(local):
        return None
    found = os.stat(local)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and what that was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
