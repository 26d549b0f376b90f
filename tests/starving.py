"""Decode within a limit on memory (a script, since the limit is one of its process)."""

from __future__ import annotations

import json
import resource
import struct
import sys
from io import BytesIO
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from packpipe.images.fill import ImageTask, fill_row
from packpipe.images.pool import Decoders, RowTask
from packpipe.images.rules import PixelRules

RULES = PixelRules((255, 255, 255), 10**9, 1.0, "bicubic", "bicubic", "srgb")
MIB = 2**20
GIANT, ORDINARY = 12_000, 3_400  # sides; 549 MiB and 44 MiB of RGBA
LARGE = 5_000  # a side; a decoder takes 160 MiB


def header_of(side: int) -> bytes:
    """A PNG file of RGBA with no pixels in it: the memory for them is asked for before."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def task_of(file: bytes, side: int) -> ImageTask:
    return ImageTask(0, file, (side, side), (2, 2), None)


def tasks() -> list[ImageTask]:
    sound = BytesIO()
    Image.new("RGB", (40, 40), (9, 9, 9)).save(sound, "PNG")
    of_files = [task_of(header_of(GIANT), GIANT), task_of(sound.getvalue(), 40)]
    pixels = np.zeros((1, 1, 4), np.uint8)
    array = np.broadcast_to(pixels, (GIANT, GIANT, 4))
    return [*of_files, task_of(array, GIANT), task_of(sound.getvalue(), 40)]


def jpeg_xl(side: int) -> bytes:
    import pillow_jxl  # noqa: F401

    file = BytesIO()
    Image.new("RGB", (side, side)).save(file, "JXL", effort=1)
    return file.getvalue()


def keep(mebibytes: int) -> None:
    """Let this process allocate so much more, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main() -> None:
    """Print what comes of images where there is next to no memory, here, and in another process."""
    some, ordinary = tasks(), task_of(header_of(ORDINARY), ORDINARY)
    # Room for all of them, as in a row that was planned.
    out = np.empty((sum(task.num_tokens for task in [*some, ordinary]), 16 * 16 * 3), np.uint8)
    keep(32)
    try:
        starved = str(fill_row([ordinary], out, RULES))
    except MemoryError as error:
        starved = type(error).__name__
    keep(300)
    here = fill_row([*some, ordinary], out, RULES)
    with Decoders(1, 1, out.shape, RULES, 60) as decoders:
        there = decoders.submit([RowTask(0, [some[0], some[1], some[3]])]).result()
    sys.stdout.write(json.dumps([starved, here, there]))


def of_jpeg_xl() -> None:
    """Print what comes of three files, the second of which takes more memory than there is."""
    files = [task_of(jpeg_xl(side), side) for side in (40, LARGE, 40)]
    keep(110)
    sys.stdout.write(json.dumps(fill_row(files, np.empty((12, 16 * 16 * 3), np.uint8), RULES)))


if __name__ == "__main__":
    of_jpeg_xl() if sys.argv[1:] else main()
