"""Worker processes of a loader that are stopped or killed."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import children, is_stopped, wait_until
from torch.utils.data import get_worker_info

from packpipe.loading import workers
from packpipe.loading.workers import in_processes

PARTS = [(np.array([number]), np.zeros(1, np.int64)) for number in range(12)]


@dataclass
class Numbers:
    """Gives numbers instead of batches; a signal comes at one of them."""

    folder: Path
    signal: int | None = None
    at: tuple[int, ...] = (5,)
    pin_memory: bool = False

    def rows(self, part: Any) -> int:
        assert get_worker_info() is not None
        number = int(part[0][0])
        (self.folder / str(number)).write_text(str(os.getpid()))
        if self.signal is not None and number in self.at:
            os.kill(os.getpid(), self.signal)
        return number


@pytest.fixture
def only_stopped(monkeypatch):
    """Have processes stand still that are stopped, and no other, however busy the machine is."""

    def run_time(pid: int) -> object:
        return "stopped" if is_stopped(pid) else object()

    monkeypatch.setattr(workers, "run_time", run_time)


def batches(fill: Numbers, **options: Any):
    return in_processes(fill, iter(PARTS), 2, 1, **options)


def test_undisturbed_all_batches_come_in_order(tmp_path):
    before = children()
    assert list(batches(Numbers(tmp_path))) == list(range(12))
    wait_until(lambda: children() == before)


@pytest.mark.parametrize("at", [(5,), (4, 5)], ids=["one", "both"])
@pytest.mark.usefixtures("only_stopped")
def test_a_worker_that_is_stopped_is_an_error_that_names_it(tmp_path, at):
    before = children()
    found = []
    with pytest.raises(RuntimeError) as error:  # noqa: PT012 batches before it come
        for batch in batches(Numbers(tmp_path, signal.SIGSTOP, at), still_seconds=0.2):
            found.append(batch)
    assert found == list(range(min(at)))
    (pid,) = re.findall(r"^progress of worker process (\d+) is ", str(error.value))
    assert pid in [(tmp_path / str(number)).read_text() for number in at]
    assert str(error.value) == (
        f"progress of worker process {pid} is 'none within 0.2 s', expected some; look for what "
        "stopped it, or a file system that hangs; go on from the last state"
    )
    del error
    wait_until(lambda: children() == before)


def test_a_worker_that_is_killed_is_torchs_own_error(tmp_path):
    before = children()
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid"):
        list(batches(Numbers(tmp_path, signal.SIGKILL)))
    wait_until(lambda: children() == before)


@pytest.mark.usefixtures("only_stopped")
def test_a_worker_that_nobody_waits_for_may_be_stopped(tmp_path):
    some = batches(Numbers(tmp_path), still_seconds=1e-6)
    assert next(some) == 0
    pid = int((tmp_path / "0").read_text())
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(pid))
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not is_stopped(pid))
    assert list(some) == list(range(1, 12))
