"""Decoders: processes that fill rows in shared memory.

Processes, not threads: a picture's decoding holds the interpreter lock in places (WebP pictures in
two threads reach 1.6 times one, in two processes 1.9), an image that takes too long can be stopped,
and a codec that crashes takes no build with it. A process is told what to do in plain messages
(`decoder`); what it makes, it writes into the row itself.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from packpipe.images.decode import PixelRules
from packpipe.images.fill import Failure, Order
from packpipe.images.worker import PLACE_BYTES, message_of

_START = (
    "import json, sys; setup = json.loads(sys.argv[1]); sys.path[:] = setup['path']; "
    "from packpipe.images.worker import serve; serve(setup)"
)
# glibc: keep the memory of one image for the next; clean pages cost 5 to 10 % of the time.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": f"{2**26}", "MALLOC_TRIM_THRESHOLD_": f"{2**26}"}
# A broken pipe, or a stream that another thread has closed: no answer will come.
_NO_ANSWER = (OSError, ValueError)
_STOPPED = "the decoding processes were stopped"
# Signals that come from outside: the system that runs out of memory, or somebody.
_KILLED = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
_STARTS = 3  # of a process that does not come as far as its first image


class RowOrders(NamedTuple):
    """A row of the shared memory, and what to fill it with."""

    row: int
    orders: list[Order]


class DecoderError(RuntimeError):
    """A decoding process failed in a way no image is to blame for."""


class Decoders:
    """Processes that fill rows, and the memory that they share with this one.

    Args:
        num_workers: processes, 1 or more.
        num_rows: rows of the shared memory.
        row_shape: (seq_len, P·P·3) of a row.
        rules: how pixels are made.
        seconds: processor time an image may take; one that takes longer is a `Failure`.

    Attributes:
        rows: uint8[num_rows, seq_len, P·P·3], the shared memory.
    """

    def __init__(
        self,
        num_workers: int,
        num_rows: int,
        row_shape: tuple[int, int],
        rules: PixelRules,
        seconds: float,
    ) -> None:
        row_bytes = row_shape[0] * row_shape[1]
        first_row = num_workers * PLACE_BYTES
        self._file = _shared_file(first_row + num_rows * row_bytes)
        memory = np.frombuffer(mmap.mmap(self._file, 0), np.uint8)
        self.rows: NDArray[np.uint8] = memory[first_row:].reshape(num_rows, *row_shape)
        setup = {
            "path": [folder for folder in sys.path if isinstance(folder, str)],
            "memory": self._file,
            "first_row": first_row,
            "row_shape": row_shape,
            "rules": rules,
            "seconds": seconds,
        }
        places = memory[:first_row].view(np.int64)
        self._processes = [
            _Process({**setup, "worker": worker}, places[worker : worker + 1])
            for worker in range(num_workers)
        ]
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="packpipe")
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        try:
            for process in self._processes:
                process.start()  # all at once: each takes a moment
                self._idle.put(process)
        except BaseException:
            self.close()
            raise

    def submit(self, task: list[RowOrders]) -> Future[list[list[Failure | None]]]:
        """Have some rows filled; the result says of every order of every row what became of it."""
        return self._executor.submit(self._fill, task)

    def close(self) -> None:
        """Stop the processes, whatever they are at."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.stop()
        self._executor.shutdown(wait=True)
        os.close(self._file)  # the mapping lives as long as `rows` does

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, task: list[RowOrders]) -> list[list[Failure | None]]:
        process = self._idle.get_nowait()  # there are as many as threads
        try:
            return _fill(process, task)
        finally:
            self._idle.put(process)


class _Process:
    """One process, started again when it has ended.

    Attributes:
        place: of the image it is at, or was last, in its task; -1 before the first.
    """

    def __init__(self, setup: dict[str, Any], place: NDArray[np.int64]) -> None:
        self._setup, self._place = setup, place
        self.seconds: float = setup["seconds"]
        self._popen: subprocess.Popen[bytes] | None = None
        self._starting_or_stopping = Lock()
        self._stopped = False

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        with self._starting_or_stopping, ours, theirs:
            if self._stopped:
                raise DecoderError(_STOPPED)
            setup = {**self._setup, "socket": theirs.fileno()}
            self._popen = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-c", _START, json.dumps(setup)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._setup["memory"]),
                env={**_MEMORY, **os.environ},
                process_group=0,  # Ctrl-C is for this process to answer
            )
            self._stream = ours.makefile("rwb")

    def ask(self, task: list[RowOrders]) -> dict[str, Any] | None:
        """Return the answer to a task; None if the process ended instead."""
        if self._popen is None:
            self.start()
        self._place[0] = -1
        try:
            line = self._answer(task)
        except BaseException:  # an image that is not to be read; the process waits for it
            self._end()
            raise
        answer: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        return answer

    def _answer(self, task: list[RowOrders]) -> bytes:
        """Return the line that answers a task; not a whole one if the process ends."""
        rows = [(row, len(orders)) for row, orders in task]
        head: list[bytes | memoryview] = [json.dumps(rows).encode() + b"\n"]
        images = (message_of(order) for _, orders in task for order in orders)
        for message in chain([head], images):
            with suppress(*_NO_ANSWER):
                self._stream.writelines(message)
                self._stream.flush()  # the process begins with the first image
        with suppress(*_NO_ANSWER):
            return self._stream.readline()
        return b""

    def ended(self) -> tuple[int, int]:
        """Return the exit status of a process that ended, and its place."""
        if self._stopped or self._popen is None:
            raise DecoderError(_STOPPED)
        status = self._popen.wait()
        self._close()
        return status, self.place

    @property
    def place(self) -> int:
        return int(self._place[0])

    def stop(self) -> None:
        self._stopped = True
        self._end()

    def _end(self) -> None:
        with self._starting_or_stopping:
            if self._popen is not None:
                self._popen.kill()
                self._popen.wait()
                self._close()

    def _close(self) -> None:
        self._popen = None
        with suppress(OSError):  # what was not sent yet
            self._stream.close()


def _fill(process: _Process, task: list[RowOrders]) -> list[list[Failure | None]]:
    """Have a process fill rows, without the images that it ends at."""
    task = [RowOrders(row, list(orders)) for row, orders in task]
    suspect: Order | None = None
    starts = 0
    while (answer := process.ask(task)) is None:
        status, place = process.ended()
        if place < 0:
            starts += 1
            if starts == _STARTS:
                raise DecoderError(f"a decoding process does not start: it ended with {status}")
            continue
        row, at = _place(task, place)
        order = task[row].orders[at]
        if status == -signal.SIGPROF:
            what = f"not decoded within {process.seconds:g} s of processor time"
            task[row].orders[at] = order._replace(data=Failure("too slow", what))
        elif order is suspect and status in _KILLED:
            what = f"was killed twice at example {order.example}, by signal {-status}"
            raise DecoderError(f"a decoding process {what}; is there enough memory?")
        elif order is suspect:
            what = f"decoding it ended the process with {status}"
            task[row].orders[at] = order._replace(data=Failure("crashed", what))
        else:
            suspect = order  # or somebody ended the process: see whether it happens again
    ((kind, said),) = answer.items()
    if kind != "outcomes":
        row, at = _place(task, process.place)
        raise _fault(kind, said, task[row].orders[at].example)
    return [[None if one is None else Failure(*one) for one in row] for row in said]


def _place(task: list[RowOrders], place: int) -> tuple[int, int]:
    """Return (row of the task, order of the row) of the place-th image of a task."""
    for row, (_, orders) in enumerate(task):
        if place < len(orders):
            return row, place
        place -= len(orders)
    raise DecoderError(f"a decoding process says it was at an image {place} beyond its task")


def _fault(kind: str, said: Any, example: int) -> Exception:
    """Return what a process met at an example that is not the image's fault."""
    if kind == "error":
        return ValueError(said)  # names the example
    if kind == "fault":
        return OSError(said[0], f"example {example}: {said[1]}")
    if kind == "memory":
        return MemoryError(f"example {example}: {said or 'not enough to decode it in'}")
    return DecoderError(said)


def _shared_file(size: int) -> int:
    """Return the descriptor of a file without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):  # /dev/shm is often too small in containers
        file = os.memfd_create("packpipe")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return file
