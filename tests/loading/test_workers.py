"""Worker processes of a loader: kept from pass to pass, and some are stopped or killed."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loading
import numpy as np
import pytest
from processes import children, is_stopped, of_session, wait_until
from torch.utils.data import get_worker_info

from packpipe.loading import workers
from packpipe.loading.workers import Part, Processes
from packpipe.philox import Key


def parts_of(epoch: int = 0) -> list[Part]:
    return [
        Part(Key(0, epoch), np.array([12 * epoch + number]), np.zeros(1, np.int64))
        for number in range(12)
    ]


@dataclass
class Numbers:
    """Gives numbers instead of batches; a signal comes at one of them."""

    folder: Path
    signal: int | None = None
    at: tuple[int, ...] = (5,)
    pin_memory: bool = False

    def rows(self, part: Any) -> int:
        assert get_worker_info() is not None
        number = int(part.packs[0])
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


def batches(fill: Numbers, **options: Any) -> Iterator[Any]:
    return Processes(fill, 2, 1, **options).batches(iter(parts_of()))


def pids(processes: Processes) -> list[int]:
    return [worker.pid for worker in processes._batches._workers]


def test_undisturbed_all_batches_come_in_order(tmp_path):
    before = children()
    assert list(batches(Numbers(tmp_path))) == list(range(12))
    wait_until(lambda: children() == before)


def test_later_passes_are_filled_by_the_same_processes(tmp_path):
    before = children()
    processes = Processes(Numbers(tmp_path), 2, 1)
    found = [list(processes.batches(iter(parts_of(epoch)))) for epoch in range(3)]
    assert found == [list(range(12 * epoch, 12 * epoch + 12)) for epoch in range(3)]
    assert {path.read_text() for path in tmp_path.iterdir()} == set(map(str, pids(processes)))
    assert sorted(children()) == sorted([*before, *pids(processes)])
    del processes
    wait_until(lambda: children() == before)


def test_nothing_of_a_pass_that_has_ended_is_held(tmp_path):
    processes = Processes(Numbers(tmp_path), 2, 1)
    parts = parts_of()
    held = [weakref.ref(part.packs) for part in parts]
    assert len(list(processes.batches(iter(parts)))) == len(held) == 12
    del parts
    gc.collect()
    assert not any(packs() is not None for packs in held)
    assert processes._batches._task_info == {}
    assert processes.can_go_on()


@pytest.mark.parametrize("taken", [0, 1, 5, 11])
def test_a_pass_that_is_left_early_changes_nothing_of_the_next(tmp_path, taken):
    processes = Processes(Numbers(tmp_path), 2, 2)
    first = processes.batches(iter(parts_of(0)))
    assert [next(first) for _ in range(taken)] == list(range(taken))
    later = processes.batches(iter(parts_of(1)))
    found = [next(later)]
    first.close()  # only now
    assert [*found, *later] == list(range(12, 24))


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


def test_a_worker_that_has_ended_between_passes_is_replaced(tmp_path, caplog):
    before = children()
    processes = Processes(Numbers(tmp_path), 2, 1)
    assert list(processes.batches(iter(parts_of()))) == list(range(12))
    worker = processes._batches._workers[0]
    os.kill(worker.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    wait_until(lambda: not worker.is_alive())
    with caplog.at_level(logging.WARNING, logger="packpipe"):
        assert not processes.can_go_on()
    assert caplog.messages == [
        f"worker processes [{worker.pid}] have ended between passes; others are started"
    ]
    del processes
    wait_until(lambda: children() == before)


def test_a_worker_that_is_killed_between_passes_is_torchs_own_error(tmp_path):
    processes = Processes(Numbers(tmp_path), 2, 1)
    assert list(processes.batches(iter(parts_of()))) == list(range(12))
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid"):  # noqa: PT012 in a handler
        os.kill(pids(processes)[1], signal.SIGKILL)
        wait_until(lambda: not processes.can_go_on())
    assert not processes.can_go_on()


@pytest.mark.usefixtures("only_stopped")
def test_a_worker_that_is_stopped_between_passes_is_an_error_that_names_it(tmp_path):
    before = children()
    processes = Processes(Numbers(tmp_path), 2, 1, still_seconds=0.2)
    assert list(processes.batches(iter(parts_of()))) == list(range(12))
    pid = pids(processes)[1]
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(pid))
    assert processes.can_go_on()
    with pytest.raises(RuntimeError, match=f"^progress of worker process {pid} is 'none within"):
        next(processes.batches(iter(parts_of(1))))
    assert not processes.can_go_on()
    wait_until(lambda: children() == before)


def test_stopped_workers_end_with_the_object_that_holds_them(tmp_path):
    before = children()
    processes = Processes(Numbers(tmp_path), 2, 1)
    for pid in pids(processes):
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda pid=pid: is_stopped(pid))
    del processes
    assert children() == before


def test_what_goes_wrong_in_a_worker_ends_all_of_them(tmp_path):
    before = children()
    processes = Processes(Numbers(tmp_path), 2, 1)
    wrong = Part(Key(0, 0), np.array(["no number"]), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="invalid literal"):
        list(processes.batches(iter([*parts_of(), wrong])))
    assert not processes.can_go_on()
    assert children() == before


AT_EXIT = """
import os, signal, sys
from test_workers import Numbers, Path, Processes, is_stopped, parts_of, pids, wait_until
processes = Processes(Numbers(Path(sys.argv[1])), 2, 1)
assert list(processes.batches(iter(parts_of()))) == list(range(12))
os.kill(pids(processes)[0], signal.SIGSTOP)
wait_until(lambda: is_stopped(pids(processes)[0]))
"""


@pytest.mark.slow
def test_idle_workers_end_with_the_interpreter_even_stopped_ones(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", AT_EXIT, str(tmp_path)],
        env=loading.environment(),
        cwd=Path(__file__).parent,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, stderr = process.communicate(timeout=300)
        assert (process.returncode, stderr) == (0, "")
        assert len(list(tmp_path.iterdir())) == 12
        assert of_session(process.pid) == []
    finally:
        for pid in of_session(process.pid):
            os.kill(pid, signal.SIGKILL)
