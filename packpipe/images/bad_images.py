"""`BadImage`: which errors are an image's own, and make it a reject; the others stop the work.

One rule tells errors apart. An error of the machine is one that the next file would meet as well,
whatever it is: something has run out, the storage cannot be reached, or this process is at fault
(`_MACHINE_FAULTS`). It is raised and stops the work. Every other error is one of the file at this
path, and the image is a reject; if it is the disk that fails after all, the limits on rejects stop
the work. Memory is an image's own fault if there is enough for others once the image is given up.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from packpipe.images.image_data import name_of
from packpipe.images.modes import NoRule

# What must be left of memory once an image is given up: an ordinary one takes less.
_MEMORY_LEFT = 2**26

# Errors of the machine: the next file would meet them as well. No system knows all the names.
_MACHINE_FAULTS = frozenset(
    getattr(errno, name)
    for name in (
        # Something has run out: memory, descriptors, space, locks.
        *("ENOMEM", "EMFILE", "ENFILE", "ENOSPC", "EDQUOT", "ENOBUFS", "ENOSR", "ENOLCK", "EUSERS"),
        # The storage cannot be reached.
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENONET", "ENOLINK"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "ENOTCONN", "ESHUTDOWN", "ETIMEDOUT"),
        *("ETIME", "ECOMM", "EPIPE", "EPROTO", "ESTALE"),
        # This process is at fault. (After EINTR Python itself tries again.)
        *("EBADF", "EFAULT", "ENOSYS", "ECANCELED"),
    )
    if hasattr(errno, name)
)


class SizeChanged(ValueError):
    """An image has another size than its plan was made for: the source was changed since."""


class BadImage(ValueError):
    """An image that gives no tokens; ``reason`` is the word by which rejects are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def exception(self) -> str:
        """Name and message of the exception that caused it, the same in every run."""
        return f"{type(self.__cause__ or self).__name__}: {self}"


@contextmanager
def rejecting(source: object) -> Iterator[None]:
    """Turn exceptions of opening and of header parsers, of any type, into `BadImage`."""
    try:
        yield
    except Exception as error:
        reraise_faults(error)
        if isinstance(error, FileNotFoundError):
            raise BadImage("missing", f"no file {name_of(source)!r}") from error
        if isinstance(error, Image.DecompressionBombError):
            raise BadImage("too many pixels", str(error)) from error
        if isinstance(error, NoRule):
            raise BadImage("unsupported mode", str(error)) from error
        # Pillow's own message holds an address, which differs from run to run.
        unknown = isinstance(error, UnidentifiedImageError)
        message = "no known image format" if unknown else message_of(error, source)
        raise BadImage("unreadable", message) from error


def reraise_faults(error: Exception) -> None:
    """Raise the error if the machine caused it, not the image: it must not become a reject."""
    if is_fault(error) or isinstance(error, (BadImage, MemoryError)):
        raise error


@contextmanager
def rejecting_giants() -> Iterator[None]:
    """Turn a MemoryError into `BadImage` if the image alone takes more than there is.

    Raises:
        BadImage: with the reason "too much memory".
        MemoryError: there is not enough for an ordinary image either.
    """
    try:
        yield
    except MemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold what was decoded so far
        if not _has_memory():
            raise
        raise BadImage("too much memory", "more than this process can allocate") from error


def _has_memory() -> bool:
    """Return whether this process can allocate as much as an ordinary image takes."""
    try:
        np.empty(_MEMORY_LEFT, np.uint8)
    except MemoryError:
        return False
    return True


def is_fault(error: BaseException) -> bool:
    """Return whether this is an error of the machine by its number (see above)."""
    # Pillow's decoders raise OSError without a number: of the image.
    return isinstance(error, OSError) and error.errno in _MACHINE_FAULTS


def message_of(error: Exception, source: object) -> str:
    """Return the message of an error of an image, with the path where there is one."""
    path = name_of(source)
    if isinstance(error, OSError) and error.errno is not None and isinstance(path, str):
        return str(OSError(error.errno, error.strerror, path))
    return str(error).strip() or "its decoder does not say why"
