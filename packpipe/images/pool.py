"""Decodes images in worker processes, which fill rows in shared memory.

Processes, not threads: decoding holds the interpreter lock in places (two threads decode WebP 1.6
times as fast as one, two processes 1.9 times), an image that takes too long can be stopped, and a
codec that crashes does not end the build. Tasks are sent to a process as plain messages (`worker`);
the process writes tokens straight into the rows.

A process that ends at an image, or is ended since it stands still (`watch`), is started again and
the image tried once more, for the cause may lie outside. The second time, the image is left out.
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
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from packpipe.images.bad_images import SizeChanged
from packpipe.images.fill import Failure, ImageTask, Outcome
from packpipe.images.masks import TargetRules
from packpipe.images.patches import side_of
from packpipe.images.rules import PixelRules
from packpipe.images.watch import STILL_SECONDS, Progress, Watch, run_time
from packpipe.images.worker import PLACE_BYTES, message_of, parts_of

_START = (
    "import json, sys; setup = json.loads(sys.argv[1]); sys.path[:] = setup['path']; "
    "from packpipe.images.worker import serve; serve(setup)"
)
# Makes glibc keep the memory of one image for the next; fresh pages cost 5 to 10 % of the time.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": f"{2**26}", "MALLOC_TRIM_THRESHOLD_": f"{2**26}"}
# Raised by a broken pipe, and by a stream that another thread has closed: no answer will come.
_NO_ANSWER = (OSError, ValueError)
_STOPPED = "the decoding processes were stopped"
# Signals that come from outside, for example from a system that has run out of memory.
_KILLED: set[int] = {
    -number
    for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
    if (number := getattr(signal, name, None)) is not None  # Windows has half of them
}
# Reasons of images that ended the process that decoded them, kept it busy or took more memory than
# it had; another machine may decode them.
ENDED = ("too slow", "crashed", "standstill", "too much memory")
_STARTS = 3  # attempts to start a process that ends before its first image
# Seconds that a killed process may take to end; one that waits for a device cannot, until that
# answers, and is left behind.
_DYING = 30.0


class RowTask(NamedTuple):
    """A row of the shared memory, and the images to fill it with."""

    row: int
    images: list[ImageTask]


class DecoderError(RuntimeError):
    """Raised when a decoding process fails and no image is the cause."""


class Decoders:
    """A pool of processes that fill rows, and the memory that they share with this process.

    Args:
        num_workers: number of processes, 1 or more.
        num_rows: rows of the shared memory.
        row_shape: (seq_len, P·P·3) of a row.
        rules: how pixels are made.
        seconds: processor time an image may take; one that takes longer becomes a `Failure`.
        targets: how masks become targets; None without masks.
        still_seconds: how long a process may stand still; see `watch`.

    Attributes:
        rows: uint8[num_rows, seq_len, P·P·3], the shared memory.
        targets: uint8 or uint16[num_rows, seq_len, T], the same; None without masks.
    """

    def __init__(
        self,
        num_workers: int,
        num_rows: int,
        row_shape: tuple[int, int],
        rules: PixelRules,
        seconds: float,
        *,
        targets: TargetRules | None = None,
        still_seconds: float = STILL_SECONDS,
    ) -> None:
        row_bytes = row_shape[0] * row_shape[1]
        if targets is not None:
            cells = targets.cells(side_of(row_shape[1]))
            row_bytes += row_shape[0] * cells * np.dtype(targets.dtype).itemsize
        first_row = num_workers * PLACE_BYTES
        self._file = _shared_file(first_row + num_rows * row_bytes)
        memory = np.frombuffer(mmap.mmap(self._file, 0), np.uint8)
        setup: dict[str, Any] = {
            # The parent's import path, so that a worker loads the same packpipe.
            "path": [folder for folder in sys.path if isinstance(folder, str)],
            "memory": self._file,
            "first_row": first_row,
            "row_shape": row_shape,
            "targets": targets,
            "rules": rules,
            "seconds": seconds,
            "still_seconds": still_seconds,
        }
        self.rows, self.targets = parts_of(memory[first_row:], setup)
        places = memory[:first_row].view(np.int64)
        self._processes = [
            _Process({**setup, "worker": worker}, places[worker : worker + 1])
            for worker in range(num_workers)
        ]
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="packpipe")
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        self._watch = Watch(self._progress, self._end_still, still_seconds)
        try:
            for process in self._processes:
                process.start()  # none is waited for, so all start at the same time
                self._idle.put(process)
        except BaseException:
            self.close()
            raise

    def submit(self, task: list[RowTask]) -> Future[list[list[Outcome]]]:
        """Fill some rows; the future gives the outcome of each image of each row."""
        return self._executor.submit(self._fill, task)

    def close(self) -> None:
        """Stop the processes at once, also those that are decoding."""
        self._watch.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.stop()
        self._executor.shutdown(wait=True)
        os.close(self._file)  # the mapping lives as long as `rows` does

    def _progress(self) -> Progress:
        found = {number: process.progress() for number, process in enumerate(self._processes)}
        return {number: progress for number, progress in found.items() if progress is not None}

    def _end_still(self, number: Any) -> None:
        self._processes[number].end_still()

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, task: list[RowTask]) -> list[list[Outcome]]:
        process = self._idle.get_nowait()  # never empty: there are as many processes as threads
        try:
            return _fill(process, task)
        finally:
            self._idle.put(process)


class _Process:
    """One worker process; started again when it has ended.

    Attributes:
        place: number, within its task, of the image it works on or worked on last; -1 before
            the first. The process writes it to shared memory, so it can be read after a crash.
    """

    def __init__(self, setup: dict[str, Any], place: NDArray[np.int64]) -> None:
        self._setup, self._place = setup, place
        self.seconds: float = setup["seconds"]
        self.still_seconds: float = setup["still_seconds"]
        self._popen: subprocess.Popen[bytes] | None = None
        self._stood_still = False
        self._messages = 0  # sent so far, over all starts
        self._waited_for = False
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
                process_group=0,  # so that Ctrl-C reaches the parent only, which stops the workers
            )
            # Closed with the stream, not before.
            self._socket, self._stream = ours, ours.makefile("rwb")
            self._stood_still = False

    def ask(self, task: list[RowTask]) -> dict[str, Any] | None:
        """Send a task and return the answer; None if the process ended, or was ended, instead."""
        if self._popen is None:
            self.start()
        self._place[0] = -1
        try:
            line = self._answer(task)
        except BaseException:  # an image could not be read; the process would wait for it for ever
            self._end()
            raise
        answer: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        return answer

    def _answer(self, task: list[RowTask]) -> bytes:
        """Send a task and return the line that answers it; incomplete if the process ends."""
        rows = [(row, len(images)) for row, images in task]
        head: list[bytes | memoryview] = [json.dumps(rows).encode() + b"\n"]
        images = (message_of(image) for _, images in task for image in images)
        # Images are read between two messages, so that this is not time that the process takes.
        for message in chain([head], images):
            with self._waiting():
                self._stream.writelines(message)
                self._stream.flush()  # so that the process can start with the first image
        with self._waiting():
            return self._stream.readline()
        return b""

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Note that this thread waits for the process, which may end meanwhile."""
        self._messages += 1
        self._waited_for = True
        try:
            with suppress(*_NO_ANSWER):
                yield
        finally:
            self._waited_for = False

    def progress(self) -> object:
        """Return how far the process has got, if it is waited for; None if it is not."""
        popen = self._popen
        if not self._waited_for or popen is None:
            return None
        return popen.pid, self._messages, self.place, run_time(popen.pid)

    def end_still(self) -> None:
        """Kill the process, since it stands still, and end the wait for it."""
        with self._starting_or_stopping:
            if self._popen is not None:
                self._stood_still = True
                self._kill(self._popen)

    def ended(self) -> tuple[int | None, int]:
        """Return the exit status of a process that ended, and the place of its last image.

        The status is None if the process was ended since it stood still.
        """
        popen = self._popen
        if self._stopped or popen is None:
            raise DecoderError(_STOPPED)
        if self._stood_still:
            self._end()
            return None, self.place
        status = popen.wait()
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
                self._kill(self._popen)
                with suppress(subprocess.TimeoutExpired):
                    self._popen.wait(_DYING)
                self._close()

    def _kill(self, popen: subprocess.Popen[bytes]) -> None:
        popen.kill()
        with suppress(OSError):  # nobody is at the other end
            self._socket.shutdown(socket.SHUT_RDWR)

    def _close(self) -> None:
        self._popen = None
        with suppress(OSError):  # closing sends what is still buffered, to a process that is gone
            self._stream.close()


def _fill(process: _Process, task: list[RowTask]) -> list[list[Outcome]]:
    """Fill rows in a process; images that end the process are left out as failures."""
    # When the process ends, the task is sent again: rows filled before are written once more, with
    # the same bytes.
    task = [RowTask(row, list(images)) for row, images in task]
    suspect: ImageTask | None = None
    starts = 0
    while (answer := process.ask(task)) is None:
        status, place = process.ended()
        how = f"ended with {status}"
        if status is None:
            how = f"made no progress at all within {process.still_seconds:g} s"
        # Ended before its first image, so no image is the cause.
        if place < 0:
            starts += 1
            if starts == _STARTS:
                raise DecoderError(f"a decoding process does not start: it {how}")
            continue
        row, at = _place(task, place)
        image = task[row].images[at]
        failure = None
        if status == -signal.SIGPROF:
            what = f"not decoded within {process.seconds:g} s of processor time"
            failure = Failure("too slow", what)
        elif image is not suspect:
            suspect = image  # a second time proves it; the cause may have come from outside once
        elif status in _KILLED:
            what = f"was killed twice at example {image.example}, by signal {-status}"
            raise DecoderError(f"a decoding process {what}; is there enough memory?")
        elif status is None:
            failure = Failure("standstill", f"the process that decodes it {how}, twice")
        else:
            failure = Failure("crashed", f"decoding it ended the process with {status}")
        if failure is not None:
            task[row].images[at] = image._replace(data=failure)
    ((kind, said),) = answer.items()
    if kind != "outcomes":
        row, at = _place(task, process.place)
        raise _fault(kind, said, task[row].images[at].example)
    # JSON has no tuples: a list was a `Failure`.
    return [[Failure(*one) if isinstance(one, list) else one for one in row] for row in said]


def _place(task: list[RowTask], place: int) -> tuple[int, int]:
    """Return (row in the task, image in the row) of the image numbered `place` in the task."""
    for row, (_, images) in enumerate(task):
        if place < len(images):
            return row, place
        place -= len(images)
    raise DecoderError(f"a decoding process says it was at an image {place} beyond its task")


def _fault(kind: str, said: Any, example: int) -> Exception:
    """Return the exception for an error at an example that the image did not cause."""
    if kind in ("changed", "error"):  # these name the example
        return SizeChanged(said) if kind == "changed" else ValueError(said)
    if kind == "fault":
        return OSError(said[0], f"example {example}: {said[1]}")
    if kind == "memory":
        return MemoryError(f"example {example}: {said or 'not enough to decode it in'}")
    return DecoderError(said)


def _shared_file(size: int) -> int:
    """Return the descriptor of a file without a name, in memory if the system allows it."""
    if hasattr(os, "memfd_create"):  # /dev/shm is often too small in containers
        file = os.memfd_create("packpipe")
    else:
        with tempfile.TemporaryFile() as temporary:  # deleted on closing; the copy keeps its bytes
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return file
