from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from processes import is_stopped, wait_until

from packpipe.images.watch import _LOOKS, Progress, Watch, run_time


class Looks:
    """What a watch sees, look by look; the test goes on when it has seen it all."""

    def __init__(self, *seen: Progress) -> None:
        self.seen, self.reported = iter(seen), []
        self.ended: SimpleQueue[None] = SimpleQueue()
        watch = Watch(self.look, self.report, seconds=1e-9)
        self.ended.get(timeout=300)
        watch.close()

    def look(self) -> Progress:
        try:
            return next(self.seen)
        except StopIteration:
            self.ended.put(None)
            return {}

    def report(self, who: object) -> None:
        self.reported.append(who)


def test_what_shows_the_same_progress_in_all_looks_is_reported_once():
    assert Looks(*[{"a": 1, "b": look} for look in range(3 * _LOOKS)]).reported == ["a"]
    assert Looks(*[{"a": 1}] * _LOOKS).reported == [], "the first look has nothing before it"
    assert Looks(*[{"a": 1}] * (_LOOKS + 1)).reported == ["a"]


@pytest.mark.parametrize("between", [{}, {"a": 2}], ids=["not waited for", "progress"])
def test_one_step_on_the_way_is_enough_to_be_left_alone(between):
    assert Looks(*[{"a": 1}] * _LOOKS, between, *[{"a": 1}] * _LOOKS).reported == []


@pytest.fixture
def process() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    started = []

    def start(code: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", code]))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def test_a_stopped_process_has_one_run_time_and_another_once_it_goes_on(process):
    pid = process("while True: pass").pid
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(pid))
    before = run_time(pid)
    assert run_time(pid) == before
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: run_time(pid) != before)


def test_a_process_that_nobody_can_tell_about_is_never_still(process):
    ended = process("pass")
    ended.wait()
    assert run_time(ended.pid) != run_time(ended.pid)


def test_a_system_that_counts_nothing_accuses_nobody(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _: "0 0 0\n")
    assert run_time(os.getpid()) != run_time(os.getpid())
