"""Opens regular files for reading, and no others; confined paths without following a link.

A file reads as its bytes would (`Clipped`), and so often at most until its image is open.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from functools import partial
from io import BufferedReader, BytesIO, FileIO

from packpipe.images.bad_images import BadImage
from packpipe.images.headers import HEAD_BYTES
from packpipe.images.image_data import Confined, name_of

# More than any header needs; some can be made to take the time of as many reads as they have bytes.
MOST_READS = 2**15
# Pillow puts the blocks of a JPEG file together one by one, copying all that it has each time.
MOST_EXIF = 2**22
_EXIF = b"Exif\0\0"

_FARTHEST = 2**40  # below the limit of file systems: a seek beyond that is an error, not with bytes

# How the folders on the way to a file are opened: a link is an error, and permission to search them
# is enough.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY)
_FOLDER |= getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_OPENS_STEPWISE = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")


class Counted:
    """A file that may be read only so often, until its image is open: a header is no more work.

    Attributes:
        reads_left: how often; None for any number of times.
        exif_left: bytes that its blocks of EXIF may have meanwhile.
    """

    reads_left: int | None = MOST_READS
    exif_left = MOST_EXIF

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as any file does; raises `BadImage` where no read is left, or EXIF is too long."""
        found: bytes = super().read(size)  # type: ignore[misc]
        if self.reads_left is None:
            return found
        if self.reads_left == 0:
            raise BadImage("unreadable", f"its header takes more than {MOST_READS} reads")
        self.reads_left -= 1
        if found.startswith(_EXIF):
            self.exif_left -= len(found)
            if self.exif_left < 0:
                raise BadImage("unreadable", f"its EXIF has more than {MOST_EXIF} bytes")
        return found


class CountedBytes(Counted, BytesIO):
    """The bytes of a file."""


class Clipped(Counted, BufferedReader):
    """A file that allows reads of gigabytes and seeks outside of it, as `BytesIO` does.

    Damaged headers ask for both; so files and bytes give the same pixels or the same error.
    """

    def __init__(self, raw: FileIO) -> None:
        super().__init__(raw, HEAD_BYTES)
        if self._size() <= HEAD_BYTES:
            self.reads_left = None  # few bytes are few reads

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most what there is."""
        if size is None or size > HEAD_BYTES:
            # No more than there is: BufferedReader would allocate all that is asked for.
            rest = self._size() - self.tell()
            size = max(0, rest if size is None else min(size, rest))
        return super().read(size)

    def seek(self, target: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a place of the file, or beyond its end."""
        if whence != os.SEEK_SET:
            target += self.tell() if whence == os.SEEK_CUR else self._size()
            target = max(target, 0)
        # A number above sys.maxsize is an error with BytesIO, too, so it is passed on.
        if _FARTHEST < target <= sys.maxsize:
            target = _FARTHEST
        return super().seek(target)

    def _size(self) -> int:
        return os.fstat(self.fileno()).st_size


def open_file(path: str | Confined) -> FileIO:
    """Open a regular file for reading; anything else at the path raises `BadImage`."""
    name = name_of(path)
    opener: Callable[[str, int], int] = _at_once
    if isinstance(path, Confined):
        opener = partial(_within if _OPENS_STEPWISE else _checked_within, path.root)
    file = open(name, "rb", buffering=0, opener=opener)  # noqa: SIM115 the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BadImage("unreadable", f"{name!r} is no regular file")
    return file


def _at_once(path: str, flags: int, *, folder: int | None = None) -> int:
    # A pipe would wait for a writer, and a file under a lease for its holder.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), dir_fd=folder)


def _within(root: str, path: str, flags: int) -> int:
    """Open a file from root on, folder by folder, none of which may be a link.

    The links on its way are resolved already. One that is there now was put there since, and may
    lead out of root.
    """
    *folders, name = os.path.relpath(path, root).split(os.sep)
    folder = os.open(root, _FOLDER)
    try:
        for inner in folders:
            outer, folder = folder, os.open(inner, _FOLDER, dir_fd=folder)
            os.close(outer)
        return _at_once(name, flags | os.O_NOFOLLOW, folder=folder)
    finally:
        os.close(folder)


def _checked_within(root: str, path: str, flags: int) -> int:  # noqa: ARG001 it is in the path
    """Open a file, then make sure that its path still leads to it without a link.

    For systems that cannot open a file from a folder on. Links that come and go at the right
    moments could deceive it.
    """
    file = _at_once(path, flags)
    status = os.fstat(file)
    if os.path.realpath(path) != path or not os.path.samestat(status, os.stat(path)):
        os.close(file)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    return file


def first_bytes(path: str | Confined, most: int) -> bytes:
    """Return the first bytes of a regular file; anything else at the path raises `BadImage`."""
    with open_file(path) as file:
        content = file.read(most)
    if content is None:  # of a file that would have to be waited for
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), name_of(path))
    return content
