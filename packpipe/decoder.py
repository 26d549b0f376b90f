"""The process that decodes: reads orders from a socket, fills rows in shared memory (floor 1).

Started by `decoders`, with plain values on its command line. A message is a line of JSON and the
bytes it announces; nothing is unpickled. An image that takes too much processor time, or crashes
its codec, takes this process with it: its place in the task, which stands in shared memory, then
says which image it was.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packpipe.images import PixelRules
from packpipe.orders import Failure, Order, fill_row

# Each process has so many bytes at the front of the shared memory, for the image it is at.
PLACE_BYTES = 8
_NOTHING, _BYTES, _PATH, _PIXELS = range(4)


def head_of(order: Order) -> tuple[list[Any], list[Any]]:
    """Return what JSON says of an order, and its bytes."""
    kept = b"" if order.kept is None else order.kept.astype(np.int32).tobytes()
    data = order.data
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
    return [order.example, order.image_hw, order.grid_hw, sizes, details], [kept, payload]


def _order(head: list[Any], stream: Any) -> Order:
    example, image_hw, grid_hw, (kept_bytes, size), (kind, *details) = head
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
    with socket.socket(fileno=setup["socket"]) as channel, channel.makefile("rwb") as stream:
        while line := stream.readline():
            task = [
                (row, [_order(head, stream) for head in heads]) for row, heads in json.loads(line)
            ]
            answer = _answer(task, rows, rules, place, setup["seconds"])
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()


def _answer(
    task: list[tuple[int, list[Order]]],
    rows: NDArray[np.uint8],
    rules: PixelRules,
    place: NDArray[np.int64],
    seconds: float,
) -> dict[str, Any]:
    """Return {"outcomes": of every order of every row}, or what went wrong."""

    def announced(orders: list[Order]) -> Iterator[Order]:
        for order in orders:
            place[0] += 1
            # Processor time, so that a busy machine rejects nothing; its signal ends the process.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            yield order
        signal.setitimer(signal.ITIMER_PROF, 0)

    try:
        return {"outcomes": [fill_row(announced(orders), rows[row], rules) for row, orders in task]}
    except OSError as error:
        return {"fault": [error.errno, error.strerror or str(error)]}
    except MemoryError as error:
        return {"memory": str(error)}
    except ValueError as error:
        return {"error": str(error)}
    except Exception:  # noqa: BLE001 a defect, raised by the parent with this traceback
        return {"defect": traceback.format_exc()}
