"""Scripts that run as two ranks: how the tests start them, and how every one of them ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import loading
from processes import wait_until

from packpipe.loading.ranks import end_process_group, process_group

# Ports are found by the launcher; addresses are this machine's, whatever its name leads to.
LAUNCH = ["-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
LAUNCH += ["--local-addr=127.0.0.1"]
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}


def run_on_two_ranks(*command: object) -> None:
    """Run a script, or ``-m`` and a module, on two ranks; fail if either does."""
    process = subprocess.Popen(
        [sys.executable, *LAUNCH, *map(str, command)],
        env={**loading.environment(), **ENVIRONMENT},
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        _, stderr = process.communicate(timeout=600)
    finally:
        process.terminate()  # the launcher ends its ranks, which have sessions of their own
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
    assert process.returncode == 0, stderr


@contextmanager
def one_of_two_ranks() -> Iterator[None]:
    """Be one of the ranks; nothing of their group is left to end after Python has."""
    with process_group():
        assert_there_is_a_group()
        yield
    assert_no_group_is_left()


def end_the_group_of_a_framework() -> None:
    """End the group that Lightning or accelerate made, and leaves."""
    assert_there_is_a_group()
    end_process_group()
    assert_no_group_is_left()


def assert_there_is_a_group() -> None:
    """Fail if gloo has no thread: then the check that none is left would find nothing to find."""
    # A thread gives itself its name only once it runs, which on a busy machine may be later.
    wait_until(gloo_threads, 60)


def assert_no_group_is_left() -> None:
    """Fail if gloo's threads run on, which may abort the interpreter when it ends."""
    # A thread that has been joined may be listed a moment longer.
    wait_until(lambda: not gloo_threads(), 60)


def gloo_threads() -> list[str]:
    """The names of gloo's threads in this process, as Linux tells of them."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has just ended
            names.append(path.read_text().strip())
    return [name for name in names if "gloo" in name]
