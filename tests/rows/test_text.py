"""Texts and lists whose offsets have 32 bits or 64; Arrow's limit of 2 GiB is made small here."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packpipe.rows import text

KINDS = (pa.string(), pa.binary(), pa.large_string(), pa.large_binary())
values = st.lists(st.none() | st.text(max_size=5), max_size=12)


@st.composite
def arrays(draw: st.DrawFn) -> pa.Array:
    """Texts of any kind, with nulls that may span bytes, as a slice."""
    found, kind = draw(values), draw(st.sampled_from(KINDS))
    array = pa.array(found).cast(kind) if found else pa.array([], kind)
    start = draw(st.integers(0, len(found)))
    return array.slice(start, draw(st.integers(0, len(found) - start)))


def of_several_chunks(kind: pa.DataType, *chunks: list) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(chunk, kind) for chunk in chunks])


@given(arrays())
def test_texts_are_lists_of_their_bytes_in_the_same_memory(array):
    lists = text.as_bytes(array)
    assert [None if row is None else bytes(row) for row in lists.to_pylist()] == [
        row.encode() if isinstance(row, str) else row for row in array.to_pylist()
    ]
    assert text.ends_of(array).tolist() == lists.offsets.to_pylist()
    if array.buffers()[2] is not None:
        assert lists.values.buffers()[1].address == array.buffers()[2].address


@given(arrays())
def test_large_texts_become_small_ones_and_stay_the_same(array):
    for kind in (pa.string(), pa.binary()):
        if text.wide(array.type) == text.wide(kind):
            found = text.narrowed(array.cast(text.wide(kind)), kind)
            found.validate(full=True)
            assert found.type == kind
            assert found.to_pylist() == array.to_pylist()


def test_a_null_that_spans_bytes_stays_null():
    array = pa.Array.from_buffers(
        pa.large_string(),
        3,
        [
            pa.py_buffer(b"\x05"),
            pa.py_buffer(np.array([0, 2, 4, 6])),
            pa.py_buffer(b"aabbcc"),
        ],
    )
    assert array.to_pylist() == ["aa", None, "cc"]
    assert text.narrowed(array, pa.string()).to_pylist() == ["aa", None, "cc"]
    assert text.narrowed(array.slice(1), pa.string()).to_pylist() == [None, "cc"]


@pytest.mark.parametrize(
    ("kind", "large"),
    [
        (pa.string(), pa.large_string()),
        (pa.binary(), pa.large_binary()),
        (pa.large_string(), pa.large_string()),
        (pa.list_(pa.string()), pa.large_list(pa.large_string())),
        (pa.list_(pa.list_(pa.int16(), 2)), pa.large_list(pa.list_(pa.int16(), 2))),
        (pa.int32(), pa.int32()),
    ],
    ids=str,
)
def test_chunks_beyond_the_reach_of_small_offsets_are_joined_with_large_ones(
    kind, large, monkeypatch
):
    rows = {
        pa.int32(): ([1, 2], [None, 4]),
        pa.list_(pa.string()): ([["ab"], []], [["c", None], None]),
        pa.list_(pa.list_(pa.int16(), 2)): ([[[1, 2]], []], [[[3, 4], [5, 6]], None]),
    }.get(kind, ([b"ab", b""], [b"c", None]))
    column = of_several_chunks(kind, *rows)
    wanted = column.to_pylist()
    assert text.joined(column).type == kind
    monkeypatch.setattr(text, "MOST", 2)
    assert text.joined(column).type == large
    assert text.joined(column).to_pylist() == wanted
    assert text.joined(column.slice(0, 1)).type == kind  # one chunk is as it is


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_chunks_of_2_gib_get_large_offsets_and_small_ones_again_without_a_copy(kind):
    # Pages of zeros that nobody has written to take no memory, and a chunk may come twice.
    zeros = pa.py_buffer(np.zeros(2**31 - 1, np.uint8))
    ends = np.array([0, 0, 2**31 - 1], np.int32)
    chunk = pa.Array.from_buffers(getattr(pa, kind)(), 2, [None, pa.py_buffer(ends), zeros])
    column = pa.chunked_array([chunk, chunk])
    assert column.nbytes > text.MOST
    with pytest.raises(pa.ArrowInvalid, match="offset overflow"):
        column.combine_chunks()
    wide = column.cast(text.wide(column.type))
    assert wide.type == getattr(pa, f"large_{kind}")()
    for part in wide.chunks:
        small = text.narrowed(part, column.type)
        assert text.ends_of(small).tolist() == ends.tolist()
        assert small.buffers()[2].address == zeros.address


@given(st.lists(st.lists(st.text(max_size=3), max_size=4), min_size=1, max_size=8))
def test_ends_are_where_texts_end(rows):
    array = pa.array([one for row in rows for one in row], pa.string())
    ends = text.ends_of(array)
    assert [stop - start for start, stop in pairwise(ends)] == [
        len(one.as_py().encode()) for one in array
    ]
