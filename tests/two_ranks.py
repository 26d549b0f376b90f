"""Scripts that run as two ranks: how the tests start them, and how every one of them ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import loading
import torch
from forked import Forked
from processes import wait_until

from packpipe.loading.ranks import end_process_group, process_group

# The launcher finds ports; addresses are this machine's, whatever its name leads to.
LAUNCH = ["-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
LAUNCH += ["--local-addr=127.0.0.1"]
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}


def run_on_two_ranks(script: str, *arguments: object) -> None:
    """Run a script on two ranks, as the launcher would but sooner; fail if either does."""
    # As with the launcher, the ranks find each other by a store of whoever starts them.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **ENVIRONMENT,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    ranks = [
        Forked(script, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(2)
    ]
    try:
        # One that has failed is not waited for by the other.
        wait_until(lambda: all(r.poll() == 0 for r in ranks) or any(r.poll() for r in ranks), 600)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.complaint for rank in ranks)


def launch_two_ranks(*command: object) -> None:
    """Run a script by torch's launcher on two ranks; fail if either does."""
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
