"""Images that run Python where they are decoded; as a script, two decoders that are kept busy."""

from __future__ import annotations

import json
import signal
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

from packpipe.images import pool
from packpipe.images.fill import ImageTask
from packpipe.images.pool import Decoders, RowTask
from packpipe.images.rules import PixelRules

RULES = PixelRules((255, 255, 255), 10_000, 1.0, "bicubic", "bicubic", "srgb")
# In a process that is so started, an image that begins with #! is Python to run before decoding.
_TRAP = """
from packpipe.images import fill
decode = fill.decode
def run_and_decode(data, **others):
    if isinstance(data, bytes) and data.startswith(b"#!"):
        code, _, data = data.partition(b"\\0")
        exec(code, {})
    return decode(data, **others)
fill.decode = run_and_decode
"""
START = pool._START.replace("serve(setup)", f"exec({_TRAP!r}); serve(setup)")


def running(code: str, file: bytes) -> bytes:
    """An image that has Python run where it is decoded, and is another file then."""
    return f"#!\n{code}\0".encode() + file


def say(line: object) -> None:
    """Tell whoever started this process."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def be_busy(folder: str, code: str, start: str, deaf: bool) -> None:
    """Have two decoders each leave a mark in a folder and run some code.

    Args:
        folder: where.
        code: Python.
        start: Python that each runs first of all.
        deaf: whether this process shrugs off a Ctrl-C.
    """
    if deaf:
        signal.signal(signal.SIGINT, lambda *_: None)
    file = BytesIO()
    Image.new("RGB", (2, 2), (1, 2, 3)).save(file, "PNG")
    pool._START = start + START
    say("starting")
    with Decoders(2, 2, (2, 12), RULES, 600) as found:
        tasks = []
        for number in range(2):
            marks = f"open({str(Path(folder, str(number)))!r}, 'w')"
            images = [running(text, file.getvalue()) for text in (marks, code)]
            orders = [ImageTask(0, image, (2, 2), (1, 1), None) for image in images]
            tasks.append(found.submit([RowTask(number, orders)]))
        for task in tasks:
            task.result()
    say("done")


if __name__ == "__main__":
    be_busy(*json.loads(sys.argv[1]))
