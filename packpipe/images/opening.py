"""Opens image files; refuses other files, and settings of Pillow that would change pixels.

Files are not trusted: only regular files of the raster formats below are opened, none of which
runs another program, and sizes are checked before anything is allocated.

One rule tells errors apart. An error of the machine is one that the next file would meet as well,
whatever it is: something has run out, the storage cannot be reached, or this process is at fault
(`_MACHINE_FAULTS`). It is raised and stops the work. Every other error is one of the file at this
path, and the image is a reject; if it is the disk that fails after all, the limits on rejects stop
the work. Memory is an image's own fault if there is enough for others once the image is given up.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import struct
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from io import BufferedReader, BytesIO, FileIO
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from packpipe import checks
from packpipe.images.extras import coded_hw, extra_kind, open_extra
from packpipe.images.headers import HEAD_BYTES, ICON, icon_hw, most_values
from packpipe.images.layouts import unread_samples
from packpipe.images.modes import NoRule, image_of


class Confined(NamedTuple):
    """The path of a file that must lie within a folder.

    Attributes:
        path: absolute, with all links resolved.
        root: the folder, absolute, with all links resolved.
    """

    path: str
    root: str


# The bytes of an encoded image, the path of its file, or its pixels.
ImageData: TypeAlias = "bytes | memoryview | str | Confined | NDArray[Any] | Image.Image"


FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "PCX"),
    *("SGI", "QOI", "DDS", "DIB", "CUR", "DCX", "ICNS", "PSD"),
)


# Matches warnings from Pillow's modules, and those that Pillow attributes to its caller, this wing.
_PILLOW_WARNS = ("ignore", None, Warning, re.compile(r"PIL\.|packpipe\.images\."), 0)


# Pillow decodes no row of 2**31 bits and more, and has 64 of them in a pixel at most.
LONGEST_SIDE = 2**24
# More than any header needs; some can be made to take the time of as many reads as they have bytes.
MOST_READS = 2**15
# Those that say of what format a file is.
_START_BYTES = 64
# Values of an entry of a TIFF file; Pillow makes four Python objects of each place of a strip.
_MOST_VALUES = 2**18
# Above this Pillow itself refuses an image, unless somebody changes its limit.
_PILLOWS_LIMIT = 178_956_970


_FARTHEST = 2**40  # below the limit of file systems: a seek beyond that is an error, not with bytes


# Settings of Pillow by which it reads files otherwise, and what they are when nobody changes them:
# whether cut images are read, and the text that a PNG file may inflate, in bytes.
_SETTINGS = {
    "PIL.ImageFile.LOAD_TRUNCATED_IMAGES": False,
    "PIL.PngImagePlugin.MAX_TEXT_CHUNK": 2**20,
    "PIL.PngImagePlugin.MAX_TEXT_MEMORY": 2**26,
}


# What must be left of memory once an image is given up: an ordinary one takes less.
_MEMORY_LEFT = 2**26


_PILLOW_LOG = logging.getLogger("PIL.TiffImagePlugin")


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
# How the folders on the way to a file are opened: a link is an error, and permission to search them
# is enough.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY)
_FOLDER |= getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_OPENS_STEPWISE = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")


class _Counted:
    """A file that may be read only so often, until its image is open: a header is no more work.

    Attributes:
        reads_left: how often; None for any number of times.
    """

    reads_left: int | None = MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        if self.reads_left is not None:
            if self.reads_left == 0:
                raise BadImage("unreadable", f"its header takes more than {MOST_READS} reads")
            self.reads_left -= 1
        found: bytes = super().read(size)  # type: ignore[misc]
        return found


class _Bytes(_Counted, BytesIO):
    """The bytes of a file."""


class _Clipped(_Counted, BufferedReader):
    """A file that allows reads of gigabytes and seeks outside of it, as `BytesIO` does.

    Damaged headers ask for both; so files and bytes give the same pixels or the same error.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size > HEAD_BYTES:
            # No more than there is: BufferedReader would allocate all that is asked for.
            rest = self._size() - self.tell()
            size = max(0, rest if size is None else min(size, rest))
        return super().read(size)

    def seek(self, target: int, whence: int = os.SEEK_SET, /) -> int:
        if whence != os.SEEK_SET:
            target += self.tell() if whence == os.SEEK_CUR else self._size()
            target = max(target, 0)
        # A number above sys.maxsize is an error with BytesIO, too, so it is passed on.
        if _FARTHEST < target <= sys.maxsize:
            target = _FARTHEST
        return super().seek(target)

    def _size(self) -> int:
        return os.fstat(self.fileno()).st_size


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


@cache
def known_formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow knows; the first call imports its modules."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _file(path: str | Confined) -> FileIO:
    """Open a regular file for reading; anything else at the path raises `BadImage`."""
    name = _name_of(path)
    opener: Callable[[str, int], int] = _at_once
    if isinstance(path, Confined):
        opener = partial(_within if _OPENS_STEPWISE else _checked_within, path.root)
    file = open(name, "rb", buffering=0, opener=opener)  # noqa: SIM115 the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BadImage("unreadable", f"{name!r} is no regular file")
    return file


def _name_of(source: object) -> Any:
    """Return the path of a file that is to be opened or is; of other images, the image."""
    if isinstance(source, FileIO):
        return source.name
    return source.path if isinstance(source, Confined) else source


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
    with _file(path) as file:
        content = file.read(most)
    if content is None:  # of a file that would have to be waited for
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), _name_of(path))
    return content


@contextmanager
def _opened(source: ImageData | FileIO, max_pixels: int) -> Iterator[Image.Image]:
    """Yield the image with its header read; close afterwards what was opened here."""
    check_limit(max_pixels)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        with rejecting(source):
            image = _image(source, stack, max_pixels)
            width, height = image.size
            _check_hw(height, width, max_pixels)
            if width * height == 0:
                raise BadImage("empty", f"{height}x{width} pixels")
            if isinstance(image, TiffImageFile):  # a tile is decoded whole, even if larger than it
                rows, columns = (int(image.tag_v2.get(side, 0)) for side in (TILELENGTH, TILEWIDTH))
                _check_hw(rows, columns, max_pixels)
        yield image


def check_settings() -> None:
    """Raise ValueError if settings of Pillow would change what is decoded in this process."""
    for name, value in changed_settings().items():
        remedy = (
            "set it back before images are decoded in this process, or call packpipe.pack with "
            "num_workers=1 or more: the processes that decode do not inherit it"
        )
        raise ValueError(checks.sentence(name, value, str(_SETTINGS[name]), remedy))


def changed_settings() -> dict[str, Any]:
    """Return the settings of Pillow in this process by which it would read files otherwise."""
    found = {
        "PIL.ImageFile.LOAD_TRUNCATED_IMAGES": ImageFile.LOAD_TRUNCATED_IMAGES,
        "PIL.PngImagePlugin.MAX_TEXT_CHUNK": PngImagePlugin.MAX_TEXT_CHUNK,
        "PIL.PngImagePlugin.MAX_TEXT_MEMORY": PngImagePlugin.MAX_TEXT_MEMORY,
    }
    return {name: value for name, value in found.items() if value != _SETTINGS[name]}


def check_limit(max_pixels: int) -> None:
    """Raise ValueError if Pillow, in this process, opens no images of as many pixels."""
    limit, most = Image.MAX_IMAGE_PIXELS, min(max_pixels, _PILLOWS_LIMIT)
    if limit is not None and 2 * limit < most:  # Pillow warns above it, refuses above twice
        name, expected = "PIL.Image.MAX_IMAGE_PIXELS", f"{-(-most // 2)} or more"
        raise ValueError(checks.sentence(name, limit, expected, "lower max_pixels instead"))


def _image(source: ImageData | FileIO, stack: ExitStack, max_pixels: int) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        _array_hw(source, max_pixels)
        return image_of(source)
    file: BinaryIO
    if isinstance(source, str | Confined):
        source = stack.enter_context(_file(source))
    if isinstance(source, FileIO):
        file = stack.enter_context(_Clipped(source, HEAD_BYTES))
    else:
        # Counting takes half as long again as opening, and few bytes are few reads.
        file = (BytesIO if len(source) <= HEAD_BYTES else _Bytes)(source)
    file.seek(0)
    start = file.read(_START_BYTES)
    if not start:
        raise BadImage("empty", "the file holds no bytes")
    # Pillow decodes an icon as soon as it opens it, so its size is checked before.
    if start.startswith(ICON):
        _check_hw(*icon_hw(file), max_pixels)
    if extra_kind(start) == "HEIC":
        _check_hw(*coded_hw(file), max_pixels, "an image in the HEIC file has ")
    values = most_values(file)
    if values > _MOST_VALUES:
        expected = f"at most {_MOST_VALUES} strips, tiles or other values in an entry"
        raise BadImage("unreadable", f"{values}, expected {expected}")
    image = stack.enter_context(_of_known_format(file))
    if isinstance(file, _Counted):
        file.reads_left = None
    return image


def _of_known_format(file: BinaryIO) -> ImageFile.ImageFile:
    """Open an image as `Image.open` does, but for the limit on pixels, which is a global."""
    file.seek(0)
    head = file.read(_START_BYTES)
    prefix, kind = head[:16], extra_kind(head)
    if kind is not None:
        return open_extra(kind, file)
    if prefix[:2] == b"PF" and prefix[2:3].isspace():
        raise NoRule("a PFM of three channels has no rule to become RGB")
    for name in known_formats():
        factory, accept = Image.OPEN[name]
        try:
            accepted = accept is None or accept(prefix)
            if accepted and not isinstance(accepted, str):  # else it says why not
                file.seek(0)
                return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            if str(error) == "unknown pixel mode":  # of TIFF files
                raise unread_samples(file) from error
    raise UnidentifiedImageError(file)


def _array_hw(pixels: NDArray[Any], max_pixels: int) -> tuple[int, int]:
    height, width = pixels.shape[:2] if pixels.ndim > 1 else (0, 0)
    _check_hw(height, width, max_pixels)
    if height * width == 0:
        raise BadImage("empty", f"an array of shape {list(pixels.shape)} holds no pixels")
    return height, width


def _check_hw(height: int, width: int, max_pixels: int, of: str = "") -> None:
    most = f"{max_pixels}" if height * width > max_pixels else f"{LONGEST_SIDE} a side"
    if height * width > max_pixels or max(height, width) > LONGEST_SIDE:
        said = f"{of}{height}x{width} pixels, expected at most {most}"
        raise BadImage("too many pixels", said)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings and the error it logs; every condition they report is checked here.

    Adds one entry to the process's warning filters and removes it, which does not affect other
    threads; `catch_warnings` would restore the whole list and undo changes that they made.
    """
    filters: Any = warnings.filters
    filters.insert(0, _PILLOW_WARNS)
    log_filter = logging.Filter("nobody")
    _PILLOW_LOG.addFilter(log_filter)
    try:
        yield
    finally:
        _PILLOW_LOG.removeFilter(log_filter)
        if _PILLOW_WARNS in filters:
            filters.remove(_PILLOW_WARNS)


@contextmanager
def rejecting(source: object) -> Iterator[None]:
    """Turn exceptions of opening and of header parsers, of any type, into `BadImage`."""
    try:
        yield
    except Exception as error:
        _reraise_faults(error)
        if isinstance(error, FileNotFoundError):
            raise BadImage("missing", f"no file {_name_of(source)!r}") from error
        if isinstance(error, Image.DecompressionBombError):
            raise BadImage("too many pixels", str(error)) from error
        if isinstance(error, NoRule):
            raise BadImage("unsupported mode", str(error)) from error
        # Pillow's own message holds an address, which differs from run to run.
        unknown = isinstance(error, UnidentifiedImageError)
        message = "no known image format" if unknown else _said(error, source)
        raise BadImage("unreadable", message) from error


def _reraise_faults(error: Exception) -> None:
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


def _said(error: Exception, source: object) -> str:
    """Return the message of an error of an image, with the path where there is one."""
    path = _name_of(source)
    if isinstance(error, OSError) and error.errno is not None and isinstance(path, str):
        return str(OSError(error.errno, error.strerror, path))
    return str(error).strip() or "its decoder does not say why"
