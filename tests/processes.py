"""Other processes, as Linux tells of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
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
            state, parent, _, session, *_ = (folder / "stat").read_text().rsplit(")", 1)[1].split()
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


def wait_until(holds: Callable[[], object], seconds: float = 30) -> None:
    """Wait until something holds; fail if it takes too long."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)
