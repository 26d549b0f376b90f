"""The process that decodes: reads orders from a socket, fills rows in shared memory.

Started by `decoders`, with plain values on its command line. A message is a line of JSON and the
bytes it announces; nothing is unpickled. A task is a line that says how many images go into which
rows, then image after image: one is on its way while another is decoded, and none is held.

An image that takes too much processor time, or crashes its codec, takes this process with it: its
place in the task, which stands in shared memory, then says which image it was.
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
from packpipe.images.fill import Failure, Order, fill_row
from packpipe.images.opening import known_formats

# Each process has so many bytes at the front of the shared memory, for the image it is at.
PLACE_BYTES = 8
_NOTHING, _BYTES, _PATH, _PIXELS = range(4)


def message_of(order: Order) -> list[bytes | memoryview]:
    """Return what goes through the socket for an order, whose image is read now."""
    kept = b"" if order.kept is None else order.kept.astype(np.int32).tobytes()
    data = order.read()
    payload: bytes | memoryview
    details: list[Any]
    if isinstance(data, Failure):
        payload, details = b"", [_NOTHING, *data]
    elif isinstance(data, str):
        payload, details = os.fsencode(data), [_PATH]
    elif isinstance(data, np.ndarray):
        payload, details = data.tobytes(), [_PIXELS, data.dtype.str, data.shape]
    elif isinstance(data, bytes | memoryview):
        payload, details = data, [_BYTES]
    else:
        raise TypeError(f"an image of type {type(data).__name__} cannot go to another process")
    sizes = [-1 if order.kept is None else len(kept), len(payload)]
    head = [order.example, order.image_hw, order.grid_hw, sizes, details]
    return [json.dumps(head).encode() + b"\n", kept, payload]


def _order(stream: Any) -> Order:
    line = stream.readline()
    if not line:
        raise EOFError("nobody waits for the rest of the task")
    example, image_hw, grid_hw, (kept_bytes, size), (kind, *details) = json.loads(line)
    kept = None if kept_bytes < 0 else np.frombuffer(stream.read(kept_bytes), np.int32)
    payload = stream.read(size)
    data: Any = payload
    if kind == _NOTHING:
        data = Failure(*details)
    elif kind == _PATH:
        data = os.fsdecode(payload)
    elif kind == _PIXELS:
        data = np.frombuffer(payload, np.dtype(details[0])).reshape(details[1])
    return Order(example, data, tuple(image_hw), tuple(grid_hw), kept)


def serve(setup: dict[str, Any]) -> None:
    """Fill rows until the socket is closed.

    Args:
        setup: what `decoders` says on the command line.
    """
    # Codecs that print would print into whatever the parent's output is.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    background, *others = setup["rules"]
    rules = PixelRules(tuple(background), *others)
    memory = np.frombuffer(mmap.mmap(setup["memory"], 0), np.uint8)
    rows = memory[setup["first_row"] :].reshape(-1, *setup["row_shape"])
    place = memory[: setup["first_row"]].view(np.int64)[setup["worker"] :][:1]
    known_formats()  # before the first image, whose time is its own
    with socket.socket(fileno=setup["socket"]) as channel, channel.makefile("rwb") as stream:
        while line := stream.readline():
            task = json.loads(line)
            orders = (_order(stream) for _ in range(sum(number for _, number in task)))
            answer = _answer(task, orders, rows, rules, place, setup["seconds"])
            deque(orders, maxlen=0)  # what is still on its way after an error
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()


def _answer(
    task: list[tuple[int, int]],
    orders: Iterator[Order],
    rows: NDArray[np.uint8],
    rules: PixelRules,
    place: NDArray[np.int64],
    seconds: float,
) -> dict[str, Any]:
    """Return {"outcomes": of every order of every row}, or what went wrong."""

    def announced(number: int) -> Iterator[Order]:
        for order in islice(orders, number):
            place[0] += 1
            # Processor time, so that a busy machine rejects nothing; its signal ends the process.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            yield order
        signal.setitimer(signal.ITIMER_PROF, 0)

    try:
        outcomes = [fill_row(announced(number), rows[row], rules) for row, number in task]
        return {"outcomes": outcomes}
    except OSError as error:
        return {"fault": [error.errno, error.strerror or str(error)]}
    except MemoryError as error:
        return {"memory": str(error)}
    except ValueError as error:
        return {"error": str(error)}
    except Exception:  # noqa: BLE001 a defect, raised by the parent with this traceback
        return {"defect": traceback.format_exc()}
