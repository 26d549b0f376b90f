"""The worker process: reads tasks from a socket, decodes, and fills rows in shared memory.

`pool` starts it, with plain values on its command line. A message is a line of JSON and the
bytes it announces; nothing is unpickled. A task is a line that says how many images go into which
rows, then one image after the other: one is sent while another is decoded, and none is kept.

An image that takes too much processor time, or crashes its codec, ends this process. The place of
the image in its task is in shared memory, so `pool` can tell which image it was.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import traceback
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packpipe.images.decode import PixelRules
from packpipe.images.fill import Failure, ImageTask, fill_row
from packpipe.images.opening import Confined, SizeChanged, known_formats

# Bytes that each process has at the front of the shared memory, for the place of its image.
PLACE_BYTES = 8
_NOTHING, _BYTES, _PATH, _PIXELS = range(4)


def message_of(image: ImageTask) -> list[bytes | memoryview]:
    """Return the message for one image; the image is read from its source now."""
    kept = b"" if image.kept is None else image.kept.astype(np.int32).tobytes()
    data = image.read()
    payload: bytes | memoryview
    details: list[Any]
    if isinstance(data, Failure):
        payload, details = b"", [_NOTHING, *data]
    elif isinstance(data, str | Confined):
        path, root = (data, None) if isinstance(data, str) else data
        payload, details = os.fsencode(path), [_PATH, root]
    elif isinstance(data, np.ndarray):
        payload, details = data.tobytes(), [_PIXELS, data.dtype.str, data.shape]
    elif isinstance(data, bytes | memoryview):
        payload, details = data, [_BYTES]
    else:
        raise TypeError(f"an image of type {type(data).__name__} cannot go to another process")
    # -1 for all patches: a length of 0 would mean that none is kept.
    sizes = [-1 if image.kept is None else len(kept), len(payload)]
    head = [image.example, image.image_hw, image.grid_hw, image.box, sizes, details]
    return [json.dumps(head).encode() + b"\n", kept, payload]


def _image_from(stream: Any) -> ImageTask:
    line = stream.readline()
    if not line:
        raise EOFError("nobody waits for the rest of the task")
    example, image_hw, grid_hw, box, (kept_bytes, size), (kind, *details) = json.loads(line)
    kept = None if kept_bytes < 0 else np.frombuffer(stream.read(kept_bytes), np.int32)
    payload = stream.read(size)
    data: Any = payload
    if kind == _NOTHING:
        data = Failure(*details)
    elif kind == _PATH:
        path, (root,) = os.fsdecode(payload), details
        data = path if root is None else Confined(path, root)
    elif kind == _PIXELS:
        data = np.frombuffer(payload, np.dtype(details[0])).reshape(details[1])
    box = None if box is None else tuple(box)
    return ImageTask(example, data, tuple(image_hw), tuple(grid_hw), kept, box)


def serve(setup: dict[str, Any]) -> None:
    """Fill rows until the socket is closed.

    Args:
        setup: the values that `pool` passes on the command line.
    """
    # Some codecs print; without this their text would appear in the parent's output.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    background, *others = setup["rules"]
    rules = PixelRules(tuple(background), *others)
    memory = np.frombuffer(mmap.mmap(setup["memory"], 0), np.uint8)
    rows = memory[setup["first_row"] :].reshape(-1, *setup["row_shape"])
    place = memory[: setup["first_row"]].view(np.int64)[setup["worker"] :][:1]
    known_formats()  # loads Pillow's formats now, so that no image's time limit pays for it
    with socket.socket(fileno=setup["socket"]) as channel, channel.makefile("rwb") as stream:
        while line := stream.readline():
            task = json.loads(line)
            images = (_image_from(stream) for _ in range(sum(number for _, number in task)))
            answer = _answer(task, images, rows, rules, place, setup["seconds"])
            deque(images, maxlen=0)  # after an error, reads the images that are still being sent
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()


def _answer(
    task: list[tuple[int, int]],
    images: Iterator[ImageTask],
    rows: NDArray[np.uint8],
    rules: PixelRules,
    place: NDArray[np.int64],
    seconds: float,
) -> dict[str, Any]:
    """Return {"outcomes": one for each image of each row}, or {kind of error: its message}."""

    def announced(number: int) -> Iterator[ImageTask]:
        for image in islice(images, number):
            place[0] += 1
            # Processor time, not real time: a busy machine must not cause rejects. When it is over,
            # SIGPROF ends the process.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            yield image
        signal.setitimer(signal.ITIMER_PROF, 0)

    try:
        outcomes = [fill_row(announced(number), rows[row], rules) for row, number in task]
        return {"outcomes": outcomes}
    except OSError as error:
        return {"fault": [error.errno, error.strerror or str(error)]}
    except MemoryError as error:
        return {"memory": str(error)}
    except SizeChanged as error:
        return {"changed": str(error)}
    except ValueError as error:
        return {"error": str(error)}
    except Exception:  # noqa: BLE001 a defect, raised by the parent with this traceback
        return {"defect": traceback.format_exc()}
