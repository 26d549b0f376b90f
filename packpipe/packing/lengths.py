"""Reads the lengths passed to packing functions: any integers, checked, copied only if needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.packing import placement

_AT_ONCE = 2**16  # lengths, whose copies stay in the cache


def chunks_of(
    lengths: Any, name: str = "lengths", remedy: str = "pass tokens per example"
) -> list[NDArray[Any]]:
    """Return lengths as a list of NumPy arrays: one, or one per chunk of a chunked Arrow array.

    Memory is shared wherever a NumPy view can show it, also for slices of Arrow arrays.

    Args:
        lengths: any sequence of integers, a NumPy array, an Arrow Array or ChunkedArray.
        name: the argument's name in error messages.
        remedy: the advice in error messages.

    Raises:
        TypeError: not integers.
        ValueError: not one-dimensional, or an Arrow array with nulls (the first is named).
    """
    # A caller who has an Arrow array has loaded pyarrow; this wing never loads it.
    pyarrow = sys.modules.get("pyarrow")
    if pyarrow is None or not isinstance(lengths, (pyarrow.Array, pyarrow.ChunkedArray)):
        return [checks.integer_array(name, lengths, 1, remedy)]
    if lengths.null_count:
        where = lengths.is_null().index(True).as_py()
        expected = "an integer"
        raise ValueError(
            checks.sentence(f"{name}[{where}]", None, expected, "fill or leave out nulls")
        )
    if not (pyarrow.types.is_integer(lengths.type) or pyarrow.types.is_null(lengths.type)):
        kind = str(lengths.type)
        raise TypeError(checks.sentence(f"{name}.type", kind, "an integer type", remedy))
    # Without nulls, to_numpy shows an integer chunk as a view; it raises rather than copies.
    chunks = lengths.chunks if isinstance(lengths, pyarrow.ChunkedArray) else [lengths]
    arrays = [chunk.to_numpy() for chunk in chunks if len(chunk)]
    return arrays or [np.empty(0, np.int32)]


def joined(chunks: list[NDArray[Any]]) -> NDArray[Any]:
    """Return the chunks as one array, copied only if there are several."""
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def kernel_view(chunk: NDArray[Any]) -> NDArray[Any]:
    """Return a chunk as the kernels take it: contiguous, read-only, int32 or int64.

    Unsigned integers of 32 and 64 bits are viewed as signed: values too large for that turn
    negative, and those were out of range anyway.
    """
    dtype = np.int64 if chunk.dtype.itemsize == 8 else np.int32
    native = chunk.dtype.newbyteorder("=")
    array = np.ascontiguousarray(chunk, native)
    array = array.view(dtype) if native.itemsize >= 4 else array.astype(dtype)
    array = array.view()
    array.flags.writeable = False  # one type for the kernels, as Arrow's buffers are read-only
    return array


def unit_view(chunk: NDArray[Any], multiple: int) -> NDArray[Any]:
    """Return a chunk as the kernels take it, in units of `multiple` tokens, rounded up."""
    array = kernel_view(chunk)
    return array if multiple == 1 else kernel_view(-(-array // multiple))


def pieces(chunks: list[NDArray[Any]], multiple: int = 1) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (start, lengths in units) of pieces of all chunks, as the kernels take them.

    Piece by piece, since narrow, strided or rounded lengths are copied: one more array as long as
    all of them would be half of the memory that packing takes.
    """
    start = 0
    for chunk in chunks:
        for first in range(0, len(chunk), _AT_ONCE):
            yield start + first, unit_view(chunk[first : first + _AT_ONCE], multiple)
        start += len(chunk)


def index_dtype(number: int) -> np.dtype[np.integer[Any]]:
    """Return the dtype of indices below a number: int32 if it holds them, else int64."""
    return np.dtype(np.int32 if number < 2**31 else np.int64)


def count(chunks: list[NDArray[Any]], seq_len: int, longest: int) -> NDArray[np.int64]:
    """Return int64[seq_len + 1], how many examples there are of each length.

    Raises:
        ValueError: a length lies outside 1..longest; the first is named.
    """
    counts = np.zeros(seq_len + 1, np.int64)
    # The kernel stops at the first length outside the histogram, so checking costs no extra pass.
    for start, piece in pieces(chunks):
        where = placement.count(piece, counts[: longest + 1])
        if where >= 0:
            raise _out_of_range(start + where, joined(chunks)[start + where], seq_len, longest)
    return counts


def check(chunks: list[NDArray[Any]], seq_len: int, longest: int) -> None:
    """Raise ValueError if a length lies outside 1..longest; O(examples), whatever seq_len."""
    start = 0
    for chunk in chunks:
        if len(chunk) and not 1 <= chunk.min() <= chunk.max() <= longest:
            # Which one is looked for only now: a valid chunk takes two reductions and no other
            # array.
            where = int(np.flatnonzero((chunk < 1) | (chunk > longest))[0])
            raise _out_of_range(start + where, chunk[where], seq_len, longest)
        start += len(chunk)


def _out_of_range(where: int, length: Any, seq_len: int, longest: int) -> ValueError:
    limit = "seq_len" if longest == seq_len else "what alignment leaves of seq_len"
    return ValueError(
        f"lengths[{where}] is {length}, expected 1..{longest} ({limit}); "
        "raise seq_len, or shorten or reject the example"
    )
