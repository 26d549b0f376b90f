"""Reads files of a store that may fail: each request is made up to four times.

An answer is the bytes that were asked for, all of them, or an error that names the file. What
another attempt would not mend (no such file, no permission, no package that opens the URL, no
memory) is raised at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from packpipe import checks
from packpipe.storage.storage import Storage

log = logging.getLogger(__name__)

# Seconds before a request is made again, three times at most.
WAITS = (0.5, 2.0, 8.0)
# Bytes of a request for a part of a large file.
_PIECE = 16 * 2**20
# What is the same however often it is tried.
_REFUSED = (PermissionError, ImportError, ValueError, TypeError)
_FINAL = (*_REFUSED, FileNotFoundError, IsADirectoryError, NotADirectoryError, MemoryError)

_Found = TypeVar("_Found")


def found_file(storage: Storage, name: str) -> bytes | None:
    """Return a file that may be absent: None then.

    Raises:
        ConnectionError: the store does not answer.
        PermissionError: the file may not be read.
    """
    return _patiently(storage, name, lambda: storage.get(name))


def found_files(storage: Storage) -> dict[str, int]:
    """Return the files in a folder, with their sizes; raises as `found_file` does."""
    return _patiently(storage, "", storage.listed)


def found_folders(storage: Storage) -> set[str]:
    """Return the names of the folders in a folder; raises as `found_file` does."""
    return _patiently(storage, "", storage.folders)


def bytes_of(storage: Storage, name: str, start: int, stop: int) -> bytes:
    """Return the bytes start..stop - 1 of a file, all of them.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the store does not answer, or with fewer bytes.
        PermissionError: the file may not be read.
    """
    if start == stop:
        return b""

    def ask() -> bytes | None:
        found = storage.get_range(name, start, stop)
        if found is not None and len(found) != stop - start:
            raise OSError(f"{len(found)} bytes came of bytes {start}..{stop - 1}")
        return found

    return _there(storage, name, _patiently(storage, name, ask))


def version_of(storage: Storage, name: str) -> str:
    """Return a text that changes when a file is replaced; raises as `bytes_of` does."""
    found = _patiently(storage, name, lambda: storage.version(name))
    return _there(storage, name, found)


def pieces_of(storage: Storage, name: str, size: int) -> Iterator[bytes]:
    """Yield the first size bytes of a file, piece by piece; raises as `bytes_of` does."""
    for start in range(0, size, _PIECE):
        yield bytes_of(storage, name, start, min(start + _PIECE, size))


def patiently(place: str, ask: Callable[[], _Found]) -> _Found:
    """Return what is asked for, at the first to the fourth attempt.

    Args:
        place: what is read, for errors.
        ask: asks for it, from the beginning each time.

    Raises:
        ConnectionError: all attempts failed; what another would not mend is raised as it is.
    """
    for wait in (*WAITS, None):
        try:
            return ask()
        except _FINAL:
            raise
        except Exception as error:  # each store raises errors of its own
            if wait is None:
                expected = f"an answer to one of {len(WAITS) + 1} requests"
                remedy = "call again when the store answers"
                message = checks.sentence(place, _said(error), expected, remedy)
                raise ConnectionError(message) from error
            log.info("%s: %s; asking again in %g s", place, _said(error), wait)
            time.sleep(wait)
    raise AssertionError  # the last round returns or raises


def _there(storage: Storage, name: str, found: _Found | None) -> _Found:
    if found is None:
        expected, remedy = "there", "look whether the folder was copied whole, or is removed"
        raise FileNotFoundError(checks.sentence(_place(storage, name), "missing", expected, remedy))
    return found


def _patiently(storage: Storage, name: str, ask: Callable[[], _Found]) -> _Found:
    place = _place(storage, name)
    try:
        return patiently(place, ask)
    except _REFUSED as error:
        expected, remedy = "a file that can be opened", "pass what opens it as storage_options"
        kind = PermissionError if isinstance(error, PermissionError) else ValueError
        raise kind(checks.sentence(place, _said(error), expected, remedy)) from error


def _place(storage: Storage, name: str) -> str:
    return f"{storage.url}/{name}" if name else storage.url


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
