"""Other processes, as Linux tells of them."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    pid: int
    state: str
    parent: int
    session: int


def all_processes() -> Iterator[Process]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, session, *_ = _stat(folder)
        except OSError:  # it has just ended
            continue
        yield Process(int(folder.name), state, int(parent), int(session))


def children() -> list[int]:
    """Children of this process, those among them that have ended and were not waited for."""
    return [process.pid for process in all_processes() if process.parent == os.getpid()]


def of_session(leader: int) -> list[int]:
    """The processes of a session that have not ended."""
    return [
        process.pid
        for process in all_processes()
        if process.session == leader and process.state not in "ZX"
    ]


def is_stopped(pid: int) -> bool:
    """Whether all threads of a process are stopped, which they are one after another."""
    try:
        return {_stat(folder)[0] for folder in Path(f"/proc/{pid}/task").iterdir()} == {"T"}
    except OSError:  # one has just ended
        return False


def _stat(folder: Path) -> list[str]:
    """What Linux says of a process or thread, behind its name, which may be any bytes."""
    return (folder / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()


def wait_until(holds: Callable[[], object], seconds: float = 300) -> None:
    """Wait until something holds; fail if it takes too long."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let this process make no file larger, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
