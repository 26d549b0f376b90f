"""Tokens from where they lie to where they go: one pass over the memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


def gather(
    values: NDArray[Any],
    starts: NDArray[np.int64],
    lens: NDArray[np.int32],
    places: NDArray[np.int64],
    out: NDArray[Any],
    *,
    executor: Executor | None = None,
) -> None:
    """Copy runs of values: ``out[places[k] + j] = values[starts[k] + j]`` for j < lens[k].

    Args:
        values: [...], one dimension.
        starts: int64[runs], first value of each run.
        lens: int32[runs], values of each.
        places: int64[runs], where each goes; they do not overlap.
        out: [...] of the same dtype.
        executor: runs a part on each processor; None runs all of it here.
    """
    word = np.dtype(f"u{values.dtype.itemsize}")  # bits are copied, whatever they mean
    source, target = values.view(word), out.view(word)
    _in_tasks(
        lambda some: _copy_runs(source, starts[some], lens[some], places[some], target),
        len(starts),
        executor,
    )


def number_tokens(
    lens: NDArray[np.int32],
    numbers: NDArray[np.int32],
    places: NDArray[np.int64],
    segment_ids: NDArray[np.int32],
    position_ids: NDArray[np.int32],
    *,
    executor: Executor | None = None,
) -> None:
    """Write the number of each segment, and 0, 1, ..., at all of its tokens.

    Args:
        lens: int32[segments], tokens of each.
        numbers: int32[segments], 1, 2, ... within its row.
        places: int64[segments], its first token's.
        segment_ids: int32[...], written to.
        position_ids: int32[...], written to.
        executor: as for `gather`.
    """
    _in_tasks(
        lambda some: _number(lens[some], numbers[some], places[some], segment_ids, position_ids),
        len(lens),
        executor,
    )


def _in_tasks(run: Callable[[slice], None], size: int, executor: Executor | None) -> None:
    """Call run with slices that cover range(size), side by side if there is an executor."""
    if executor is None:
        run(slice(0, size))
        return
    tasks = os.cpu_count() or 1
    bounds = [size * task // tasks for task in range(tasks + 1)]
    for done in [executor.submit(run, slice(*pair)) for pair in pairwise(bounds)]:
        done.result()


@njit(cache=True, nogil=True)
def _copy_runs(values, starts, lens, places, out):  # type: ignore[no-untyped-def]
    for k in range(starts.shape[0]):
        # Slices of their own: an index that cannot be negative is copied in vectors.
        source = values[starts[k] : starts[k] + lens[k]]
        target = out[places[k] : places[k] + lens[k]]
        for j in range(lens[k]):
            target[j] = source[j]


@njit(cache=True, nogil=True)
def _number(lens, numbers, places, segment_ids, position_ids):  # type: ignore[no-untyped-def]
    for k in range(lens.shape[0]):
        ids = segment_ids[places[k] : places[k] + lens[k]]
        positions = position_ids[places[k] : places[k] + lens[k]]
        for j in range(lens[k]):
            ids[j] = numbers[k]
            positions[j] = j
