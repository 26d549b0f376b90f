"""Kernels that copy sequences of tokens into rows, number them, and find what a mask keeps."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


def copy_tokens(
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
    word = _word(values)  # bits are copied, whatever they mean
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


def kept_runs(
    mask: NDArray[Any], starts: NDArray[np.int64], lens: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the runs of values that are not 0: how many each list has, their places and lengths.

    Args:
        mask: one-dimensional array.
        starts: int64[lists], first value of each list.
        lens: int64[lists], values of each.

    Returns:
        int64[lists], runs of each list; int64[runs], list by list, the place within its list at
        which each begins; int64[runs], the values of each.
    """
    values, num_runs = mask.view(_word(mask)), np.empty(len(lens), np.int64)
    _count_runs(values, starts, lens, num_runs)
    places, sizes = np.empty((2, num_runs.sum()), np.int64)
    _find_runs(values, starts, lens, places, sizes)
    return num_runs, places, sizes


def _word(values: NDArray[Any]) -> np.dtype[Any]:
    """Return the unsigned type of the same size: Numba compiles one kernel for each, not dtype."""
    return np.dtype(f"u{values.dtype.itemsize}")


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


@njit(cache=True, nogil=True)
def _count_runs(mask, starts, lens, num_runs):  # type: ignore[no-untyped-def]
    for k in range(starts.shape[0]):
        own = mask[starts[k] : starts[k] + lens[k]]
        count, before = 0, False
        for j in range(lens[k]):
            kept = own[j] != 0
            count += kept and not before
            before = kept
        num_runs[k] = count


@njit(cache=True, nogil=True)
def _find_runs(mask, starts, lens, places, sizes):  # type: ignore[no-untyped-def]
    run = -1
    for k in range(starts.shape[0]):
        own = mask[starts[k] : starts[k] + lens[k]]
        before = False
        for j in range(lens[k]):
            kept = own[j] != 0
            if kept and not before:
                run += 1
                places[run], sizes[run] = j, 0
            if kept:
                sizes[run] += 1
            before = kept
