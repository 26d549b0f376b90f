"""Files that a kill or a power failure leaves whole, or not there at all.

A file is written under a temporary name, synced, then renamed, and its folder is synced. A file of
JSON lines grows instead, by one synced line at a time; a last line that was cut does not count.
"""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

log = logging.getLogger(__name__)

T = TypeVar("T")


def partial_of(path: Path) -> Path:
    """Return the temporary name of a file that one process at a time writes."""
    return path.with_name(path.name + ".partial")


def commit(path: Path) -> None:
    """Rename a finished file to its own name; its bytes and its name are then on the disk."""
    commit_as(partial_of(path), path)


def commit_as(partial: Path, path: Path) -> None:
    """Rename a finished file, in its folder; its bytes and its name are then on the disk."""
    # Synced before it is renamed: a power failure could otherwise keep the name and lose the bytes.
    # The writer has closed the file; fsync syncs a file through any of its descriptors.
    sync(partial)
    partial.replace(path)
    # The new name is an entry of the folder, which is synced on its own.
    sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; one of that name is replaced."""
    try:
        with partial_of(path).open("wb") as file:
            file.write(content)
    except BaseException:
        partial_of(path).unlink(missing_ok=True)  # makes room, if the disk is full
        raise
    commit(path)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return a value as JSON, as files have it."""
    return json.dumps(value, indent=2) + "\n"


def write_shared(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file that several processes may write at once, whole or not at all; the last counts.

    Temporary files of the same name that killed processes have left are removed.

    Args:
        path: the file.
        write: writes its content to an open file; may be called again.
    """
    import fcntl  # POSIX has it, and who only reads needs it not

    remove_abandoned(path.parent, f"{glob.escape(path.name)}.{'[0-9a-f]' * 32}.partial")
    while True:
        partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                with suppress(OSError):  # some file systems have no locks; nothing is removed there
                    fcntl.flock(file, fcntl.LOCK_EX)
                write(file)
                file.flush()
                os.fsync(file.fileno())
                try:
                    partial.replace(path)
                except FileNotFoundError:
                    # Removed before it was locked, or by a machine that the lock does not reach.
                    continue
            sync(path.parent)
            return
        finally:
            partial.unlink(missing_ok=True)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove the temporary files of `write_shared` that no process is writing any more."""
    import fcntl

    for left in folder.glob(pattern):
        # A lock ends with its process, however that ends; of a living one, it cannot be had.
        with suppress(OSError), left.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


@contextmanager
def first_alone(path: Path) -> Iterator[bool]:
    """Let the first of several processes go through a block alone, and the others after it.

    They wait until it has left the block, or has ended, and then go on side by side. Where nothing
    can be locked, each is a first one.

    Args:
        path: of an empty file that is there meanwhile, in a folder that all of them see.

    Yields:
        Whether this process is the first.
    """
    import fcntl

    is_first = True
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that nothing can be written to
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("ab"))
            with suppress(OSError):  # a file system without locks
                try:
                    # The lock ends with its process, however that ends.
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Another one left after this one opened its file: nobody waits for that one.
                    is_first = os.fstat(file.fileno()).st_nlink > 0
                except BlockingIOError:
                    is_first = False
                    log.warning("waiting for the process that has locked %s", path)
                    fcntl.flock(file, fcntl.LOCK_SH)
            if is_first:
                # A process that was forked meanwhile has the file open, and so the lock.
                stack.callback(_unlock, file)
                # Removed before the lock is released, so that nobody removes another one's file.
                stack.callback(path.unlink, missing_ok=True)
            else:
                stack.close()
        yield is_first


def _unlock(file: BinaryIO) -> None:
    import fcntl

    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


def made_once(path: Path, read: Callable[[], T | None], write: Callable[[BinaryIO], None]) -> T:
    """Return what a file holds; if there is none, one process writes it, and the others wait.

    If that one fails or is killed, one of those that wait writes it.

    Args:
        path: the file, in a folder that all of them see.
        read: returns what it holds, None if it is not there.
        write: writes its content to an open file; may be called again.

    Raises:
        FileNotFoundError: what was written cannot be read.
    """
    while (found := read()) is None:
        with first_alone(path.with_suffix(".lock")) as is_first:
            if is_first:
                return _made(path, read, write)
    return found


def _made(path: Path, read: Callable[[], T | None], write: Callable[[BinaryIO], None]) -> T:
    found = read()
    if found is None:
        write_shared(path, write)
        found = read()
    if found is None:
        raise FileNotFoundError(
            f"{path} is missing or damaged as soon as it was written, expected what was written; "
            "look for what removes or changes it"
        )
    return found


def append_line(path: Path, value: Any) -> None:
    """Add a value to a file of JSON lines; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)  # the file may be new


def lines_of(path: Path) -> list[Any]:
    """Return the values of a file of JSON lines, as far as they are whole; none without a file."""
    found = []
    with suppress(FileNotFoundError, ValueError):  # ValueError: a line that a power failure spoilt
        for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was cut
            found.append(json.loads(line))
    return found


def sync(path: Path) -> None:
    """Wait until the disk has the bytes of a file, or the names in a folder.

    A system without `os.O_DIRECTORY` (Windows) opens no folders; its names are left to it.
    """
    if not hasattr(os, "O_DIRECTORY") and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
