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

from packpipe.images.bad_images import SizeChanged
from packpipe.images.decode import prepare
from packpipe.images.fill import Failure, ImageTask, fill_row
from packpipe.images.image_data import Confined, ImageData
from packpipe.images.masks import TargetRules
from packpipe.images.patches import side_of
from packpipe.images.rules import PixelRules

# Bytes that each process has at the front of the shared memory, for the place of its image.
PLACE_BYTES = 8
_NOTHING, _BYTES, _PATH, _PIXELS = range(4)


def message_of(image: ImageTask) -> list[bytes | memoryview]:
    """Return the message for one image; the image, and its mask, are read from the source now."""
    kept = b"" if image.kept is None else image.kept.astype(np.int32).tobytes()
    payload, details = _sent(image.read())
    mask = image.mask() if callable(image.mask) else image.mask
    of_mask, mask_details = (b"", None) if mask is None else _sent(mask)
    # -1 for all patches: a length of 0 would mean that none is kept.
    sizes = [-1 if image.kept is None else len(kept), len(payload), len(of_mask)]
    places = [image.example, image.image_hw, image.grid_hw, image.box]
    head = [*places, sizes, details, mask_details]
    return [json.dumps(head).encode() + b"\n", kept, payload, of_mask]


def _sent(data: ImageData | Failure) -> tuple[bytes | memoryview, list[Any]]:
    """Return an image as bytes, and what they are."""
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
    return payload, details


def _image_from(stream: Any) -> ImageTask:
    line = stream.readline()
    if not line:
        raise EOFError("nobody waits for the rest of the task")
    example, image_hw, grid_hw, box, sizes, details, mask_details = json.loads(line)
    kept_bytes, size, mask_size = sizes
    kept = None if kept_bytes < 0 else np.frombuffer(stream.read(kept_bytes), np.int32)
    data = _received(stream.read(size), details)
    of_mask = stream.read(mask_size)
    mask = None if mask_details is None else _received(of_mask, mask_details)
    box = None if box is None else tuple(box)
    return ImageTask(example, data, tuple(image_hw), tuple(grid_hw), kept, box, mask=mask)


def _received(payload: bytes, known: list[Any]) -> Any:
    """Return the image that `_sent` made bytes of."""
    kind, *details = known
    data: Any = payload
    if kind == _NOTHING:
        data = Failure(*details)
    elif kind == _PATH:
        path, (root,) = os.fsdecode(payload), details
        data = path if root is None else Confined(path, root)
    elif kind == _PIXELS:
        data = np.frombuffer(payload, np.dtype(details[0])).reshape(details[1])
    return data


def parts_of(
    memory: NDArray[np.uint8], setup: dict[str, Any]
) -> tuple[NDArray[np.uint8], NDArray[np.integer] | None]:
    """Return patches [rows, seq_len, P·P·3] and targets [rows, seq_len, T] in shared memory.

    Args:
        memory: all patches, then all targets, if there are.
        setup: ``row_shape`` and ``targets`` among it, the latter None without masks.
    """
    seq_len, patch_bytes = setup["row_shape"]
    if setup["targets"] is None:
        return memory.reshape(-1, seq_len, patch_bytes), None
    rules = TargetRules(*setup["targets"])
    cells = rules.cells(side_of(patch_bytes))
    target_bytes = cells * np.dtype(rules.dtype).itemsize
    num_rows = len(memory) // (seq_len * (patch_bytes + target_bytes))
    end = num_rows * seq_len * patch_bytes
    targets = memory[end:].view(rules.dtype).reshape(num_rows, seq_len, cells)
    return memory[:end].reshape(num_rows, seq_len, patch_bytes), targets


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
    rows, targets = parts_of(memory[setup["first_row"] :], setup)
    place = memory[: setup["first_row"]].view(np.int64)[setup["worker"] :][:1]
    prepare(rules)
    with socket.socket(fileno=setup["socket"]) as channel, channel.makefile("rwb") as stream:
        while line := stream.readline():
            task = json.loads(line)
            images = (_image_from(stream) for _ in range(sum(number for _, number in task)))
            answer = _answer(task, images, rows, targets, rules, place, setup)
            deque(images, maxlen=0)  # after an error, reads the images that are still being sent
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()


def _answer(
    task: list[tuple[int, int]],
    images: Iterator[ImageTask],
    rows: NDArray[np.uint8],
    targets: NDArray[np.integer] | None,
    rules: PixelRules,
    place: NDArray[np.int64],
    setup: dict[str, Any],
) -> dict[str, Any]:
    """Return {"outcomes": one for each image of each row}, or {kind of error: its message}."""
    target_rules = None if targets is None else TargetRules(*setup["targets"])

    def announced(number: int) -> Iterator[ImageTask]:
        for image in islice(images, number):
            place[0] += 1
            # Processor time, not real time: a busy machine must not cause rejects. When it is over,
            # SIGPROF ends the process.
            signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
            yield image
        signal.setitimer(signal.ITIMER_PROF, 0)

    try:
        outcomes = [
            fill_row(
                announced(number),
                rows[row],
                rules,
                targets=None if targets is None else targets[row],
                target_rules=target_rules,
            )
            for row, number in task
        ]
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
