"""The rank of this process, what ranks agree in, and a process group that ends before Python does.

Ranks that differ would train on other examples than they seem to, or wait for each other for ever.
`agree` and `together` raise the same error on every rank instead, so that none is left waiting.

A gloo group that is still alive when Python ends may abort it, after all work is done: "terminate
called without an active exception". Destroying the group is not enough, since it lives as long as
anything refers to it. Two things do, and both are prevented here:

* `torch.distributed.nn.functional` has ``group=group.WORLD`` among its default arguments. torch
  imports it late, for instance with the first optimizer; a group that exists by then stays in
  those defaults for ever. So `import_before_groups` imports it, with the loader and with this
  module, if torch is there.
* Reference cycles: torch's late imports keep the frames of their callers, among them the one with
  the DistributedDataParallel. They are collected before the group is destroyed.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import groupby
from types import ModuleType
from typing import Any, TypeVar

from packpipe import checks

T = TypeVar("T")


def _distributed() -> ModuleType | None:
    """Return torch.distributed if this process has imported it, and it can be used."""
    # Who has not imported torch has no group of it, and need not have torch to find that out.
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_available() else None


def import_before_groups() -> None:
    """Import what would hold a group that exists by then; see above."""
    if _distributed():
        import_module("torch.distributed.nn.functional")


import_before_groups()


def has_group() -> bool:
    """Return whether a process group exists, of one rank or several."""
    distributed = _distributed()
    return distributed is not None and distributed.is_initialized()


def rank_of_world() -> tuple[int, int]:
    """Return this process's rank and how many there are: (0, 1) without a process group."""
    if not has_group():
        return 0, 1
    import torch

    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def check_own_rank(rank: int) -> None:
    """Raise ValueError if a loader was given another rank than this process has."""
    own, _ = rank_of_world()
    if rank != own:
        expected, remedy = f"{own}, as torch.distributed counts", "leave rank and world_size out"
        raise ValueError(checks.sentence("rank", rank, expected, remedy))


def agree(values: dict[str, Any]) -> None:
    """Raise the same error on every rank unless all of them pass equal values.

    Every rank calls it at the same point. Of one rank, and without a process group, it does
    nothing.

    Args:
        values: by name; they are compared by their `repr`.

    Raises:
        ValueError: names all that differs, and each rank's value of it.
    """
    _, world_size = rank_of_world()
    if world_size == 1:
        return
    import torch

    everyone: list[dict[str, str]] = [{}] * world_size
    own = {name: repr(value) for name, value in values.items()}
    # Under NCCL through the current GPU, which torch asks every process to choose for itself.
    torch.distributed.all_gather_object(everyone, own)
    # Ranks at different points of a program pass other names; what one does not pass is missing.
    names = dict.fromkeys(name for one in everyone for name in one)
    each = {name: [one.get(name, "missing") for one in everyone] for name in names}
    if differing := [_by_rank(name, texts) for name, texts in each.items() if len(set(texts)) > 1]:
        expected = "the same on every rank; give all ranks the same data, options and checkpoint"
        if "error" in names:
            expected = (
                "None on every rank; mend what failed, since ranks go on together or not at all"
            )
        raise ValueError(f"{' and '.join(differing)}, expected {expected}")


def together(action: Callable[[], T], group: Any = None) -> T:
    """Return what an action returns; if it fails on one rank, raise an error on every rank.

    Args:
        action: what every rank does.
        group: of `host_group`, through which a number tells whether it failed anywhere: for what is
            done at every step. It may return None there, where a pass is over. Without a group the
            errors themselves are gathered, through the current GPU.

    Raises:
        ValueError: the action failed on some ranks, or in different ways; has each one's error. If
            it failed everywhere in the same way, its own error is raised. Or a pass is over on some
            ranks alone.
    """
    try:
        result = action()
    except Exception as error:
        _least_and_most(_FAILED, group)
        agree({"error": f"{type(error).__name__}: {error}"})
        raise
    is_over = group is not None and result is None
    least, most = _least_and_most(_OVER if is_over else _UNDER_WAY, group)
    if most == _FAILED:
        agree({"error": None})
    elif least != most:
        agree({"the pass": "over" if is_over else "under way"})
    return result


_UNDER_WAY, _OVER, _FAILED = range(3)


def _least_and_most(found: int, group: Any) -> tuple[int, int]:
    """Return the ends of what all ranks found; without a group, failed, since nobody knows."""
    if group is None:
        return _FAILED, _FAILED
    import torch

    ends = torch.tensor([-found, found])
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, group=group)
    return -int(ends[0]), int(ends[1])


@contextmanager
def host_group() -> Iterator[Any]:
    """Yield a group of all ranks for numbers on the CPU; None if this rank is the only one.

    Every rank enters it at the same point. What is asked through it waits for no GPU: hosts may be
    steps ahead of theirs.
    """
    if rank_of_world()[1] == 1:
        yield None
        return
    import torch

    if torch.distributed.get_backend() == "gloo":
        yield torch.distributed.group.WORLD
        return
    group = torch.distributed.new_group(backend="gloo")
    try:
        yield group
    finally:
        if has_group():  # or it has ended with the others
            torch.distributed.destroy_process_group(group)


def _by_rank(name: str, texts: list[str]) -> str:
    """Return a part of a sentence: ``seed is 1 (rank 0..2), 5 (rank 3)``."""
    parts = []
    for text in dict.fromkeys(texts):
        ranks = [rank for rank, other in enumerate(texts) if other == text]
        parts.append(f"{text} (rank {_runs(ranks)})")
    return f"{name} is {', '.join(parts)}"


def _runs(numbers: list[int]) -> str:
    """Return numbers as text, neighbours in short: ``0..6, 8``."""
    # Along a run of neighbours, a number less its place stays the same.
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    return ", ".join(f"{a}..{b}" if a < b else f"{a}" for a, b in ends)


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
    import torch

    import_before_groups()
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
        import torch

        torch.distributed.destroy_process_group()
    gc.collect()
