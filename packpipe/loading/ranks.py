"""The rank of this process, and a process group that ends before Python does.

A gloo group that is still alive when Python ends may abort it, after all work is done: "terminate
called without an active exception". Destroying the group is not enough, since it lives as long as
anything refers to it. Two things do, and both are prevented here:

* `torch.distributed.nn.functional` has ``group=group.WORLD`` among its default arguments. torch
  imports it late, for instance with the first optimizer; a group that exists by then stays in
  those defaults for ever. So it is imported here, before there is a group.
* Reference cycles: torch's late imports keep the frames of their callers, among them the one with
  the DistributedDataParallel. They are collected before the group is destroyed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Before there is a group; see above.
if torch.distributed.is_available():
    import torch.distributed.nn.functional


def has_group() -> bool:
    """Return whether a process group exists, of one rank or several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_of_world() -> tuple[int, int]:
    """Return this process's rank and how many there are: (0, 1) without a process group."""
    if not has_group():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextmanager
def process_group(backend: str = "gloo") -> Iterator[None]:
    """Join the process group that torchrun started; end it completely after the block.

    Call the training from a function of its own, so that its model and loader are gone when the
    group ends::

        with process_group():
            main()

    After an error the group is not ended here, since NCCL would wait for ranks that still compute;
    the launcher ends all ranks.

    Args:
        backend: backend of torch.distributed, ``"gloo"`` or ``"nccl"``.
    """
    torch.distributed.init_process_group(backend)
    try:
        yield
    except SystemExit as ended:
        if not ended.code:  # no error: `main` calls sys.exit(0)
            end_process_group()
        raise
    end_process_group()


def end_process_group() -> None:
    """Destroy the process group if there is one, also one that a framework has made."""
    # First the cycles that refer to the group: it would outlive its destruction.
    gc.collect()
    if has_group():
        torch.distributed.destroy_process_group()
    gc.collect()
