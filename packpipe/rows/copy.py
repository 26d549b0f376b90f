"""Copies runs of tokens from source columns to their places in packed rows, each once."""

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
    lens: NDArray[np.integer],
    places: NDArray[np.int64],
    out: NDArray[Any],
    *,
    executor: Executor | None = None,
) -> None:
    """Copy runs of values: ``out[places[k] + j] = values[starts[k] + j]`` for j < lens[k].

    Args:
        values: one-dimensional array.
        starts: int64[runs], first value of each run.
        lens: int[runs], values of each run.
        places: int64[runs], where each run begins in out; runs do not overlap there.
        out: one-dimensional array of the same dtype.
        executor: threads that copy one part per processor; None copies in this thread.
    """
    # Bits are copied, whatever they mean. So Numba compiles one kernel for each item size, not one
    # for each dtype.
    word = np.dtype(f"u{values.dtype.itemsize}")
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
    """Write each segment's number, and the positions 0, 1, ..., at all of its tokens.

    Args:
        lens: int32[segments], tokens of each.
        numbers: int32[segments], number of each in its row, from 1.
        places: int64[segments], place of each one's first token.
        segment_ids: int32[...], gets the numbers.
        position_ids: int32[...], gets the positions.
        executor: threads that write one part per processor; None writes in this thread.
    """
    _in_tasks(
        lambda some: _number(lens[some], numbers[some], places[some], segment_ids, position_ids),
        len(lens),
        executor,
    )


def _in_tasks(run: Callable[[slice], None], size: int, executor: Executor | None) -> None:
    """Call run with slices that cover range(size): one per processor, or one without executor."""
    if executor is None:
        run(slice(0, size))
        return
    tasks = os.cpu_count() or 1
    # The kernels release the interpreter lock (nogil), so threads copy at the same time: 5.4 GB/s
    # on one processor, 9.0 on two (benchmarks/results/text.md).
    bounds = [size * task // tasks for task in range(tasks + 1)]
    for done in [executor.submit(run, slice(*pair)) for pair in pairwise(bounds)]:
        done.result()  # raises what the task raised


@njit(cache=True, nogil=True)
def _copy_runs(values, starts, lens, places, out):  # type: ignore[no-untyped-def]
    for k in range(starts.shape[0]):
        # Numba tests an index for being negative, unless it cannot be, as j here. So this loop
        # becomes vector instructions; values[starts[k] + j] would not.
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
