"""`content_of`: the bytes of an encoded image, wherever it lies."""

from __future__ import annotations

import errno
import os

from packpipe.images.bad_images import BadImage, rejecting, rejecting_giants
from packpipe.images.image_data import Confined, ImageData
from packpipe.images.regular_files import open_file

# An image beyond this is no photograph, and a file of it may be nothing but a length.
MOST_BYTES = 2**31 - 1


@rejecting_giants()
def content_of(data: ImageData) -> bytes | memoryview:
    """Return the bytes of an encoded image: as they are, or those of its file.

    Raises:
        BadImage: there is no such file, or it has 2 GiB or more.
        TypeError: it is an array of pixels, which is not encoded.
    """
    if isinstance(data, str | Confined):
        with rejecting(data), open_file(data) as file:
            _check_size(os.fstat(file.fileno()).st_size)
            content = file.readall()
            if content is None:  # of a file that would have to be waited for
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return content
    if not isinstance(data, bytes | memoryview):
        raise TypeError(f"an image of type {type(data).__name__} is not encoded")
    _check_size(len(data))
    return data


def _check_size(num_bytes: int) -> None:
    if num_bytes > MOST_BYTES:
        raise BadImage("too many bytes", f"{num_bytes:,} bytes, expected at most {MOST_BYTES:,}")
