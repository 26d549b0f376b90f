"""The front door: what counts as lengths, and what every function says of anything else."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import datasets
import naive
import numpy as np
import pyarrow as pa
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from packpipe.packing import lengths as fronts
from packpipe.packing.histogram import count_lengths
from packpipe.packing.packs import STRATEGIES, Packs, pack_lengths

LENGTHS = [100, 60, 40, 20, 100, 7, 7, 33]
SEQ_LEN = 120
FFD = [[0, 3], [4, 5, 6], [1, 2], [7]]
FIRST_FIT = [[0, 3], [1, 2, 5, 6], [4], [7]]
COUNTS = {7: 2, 20: 1, 33: 1, 40: 1, 60: 1, 100: 2}

NUMPY_TYPES = [
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *(">i2", ">i4", ">i8", ">u2", ">u4", ">u8"),
]
ARROW_TYPES = [
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64()),
    *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
]


def read_only(values: list[int]) -> np.ndarray:
    array = np.array(values)
    array.flags.writeable = False
    return array


def every_other(values: list[int]) -> np.ndarray:
    return np.repeat(np.array(values, np.int32), 2)[::2]


def sliced(values: list[int]) -> pa.Array:
    return pa.array([None, 0, *values, -1, None]).slice(2, len(values))


def chunked(values: list[int], kind: pa.DataType | None = None) -> pa.ChunkedArray:
    """Three chunks of values and three empty ones."""
    parts = [[], values[:3], [], values[3:4], values[4:], []]
    return pa.chunked_array(parts, kind or pa.int64())


def dataset_of(values: list[int], kind: str = "int64") -> datasets.Dataset:
    features = datasets.Features({"n": datasets.Value(kind)})
    return datasets.Dataset.from_dict({"n": values}, features)


def arrow_column(dataset: datasets.Dataset) -> pa.ChunkedArray:
    return dataset.with_format("arrow")["n"][:]


def concatenated(values: list[int]) -> datasets.Dataset:
    return datasets.concatenate_datasets([dataset_of(values[:3]), dataset_of(values[3:])])


def behind_indices(values: list[int]) -> datasets.Dataset:
    """A dataset whose rows are looked up through indices."""
    return dataset_of(values[::-1]).select(range(len(values) - 1, -1, -1))


FORMS = {
    "a list": list,
    "a tuple": tuple,
    **{f"NumPy {name}": partial(np.array, dtype=name) for name in NUMPY_TYPES},
    "NumPy read-only": read_only,
    "NumPy every other": every_other,
    "NumPy reversed": lambda values: np.array(values[::-1], np.uint16)[::-1],
    "NumPy in a wider row": lambda values: np.array([values, values], np.uint32).T[:, 1],
    **{f"Arrow {kind}": partial(pa.array, type=kind) for kind in ARROW_TYPES},
    **{f"Arrow chunks of {kind}": partial(chunked, kind=kind) for kind in ARROW_TYPES},
    "Arrow sliced between nulls": sliced,
    "Arrow chunks sliced": lambda values: chunked([1, *values, 2]).slice(1, len(values)),
    "a table's column": lambda values: pa.table({"n": values})["n"],
    "a dataset's column": lambda values: dataset_of(values)["n"],
    "a dataset's column as a list": lambda values: dataset_of(values)["n"][:],
    "a dataset's Arrow column": lambda values: arrow_column(dataset_of(values)),
    "a dataset's uint16": lambda values: arrow_column(dataset_of(values, "uint16")),
    "a dataset's Arrow batch": lambda values: dataset_of(values).with_format("arrow")[:]["n"],
    "a dataset's NumPy column": lambda values: dataset_of(values).with_format("numpy")["n"][:],
    "a dataset's pandas column": lambda values: dataset_of(values).with_format("pandas")["n"][:],
    "a dataset's own table": lambda values: dataset_of(values).data.column("n"),
    "a concatenated dataset": lambda values: arrow_column(concatenated(values)),
    "a dataset behind indices": lambda values: arrow_column(behind_indices(values)),
}


def listed(packs: Packs) -> list[list[int]]:
    return [pack.tolist() for pack in packs]


def test_what_is_expected_here_is_the_naive_rule():
    assert naive.first_fit_decreasing(LENGTHS, SEQ_LEN) == FFD


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("strategy", "expected"), [("ffd", FFD), ("first_fit", FIRST_FIT)])
def test_every_form_of_lengths_is_packed_alike(form, strategy, expected):
    packs = pack_lengths(FORMS[form](LENGTHS), SEQ_LEN, strategy=strategy)
    assert listed(packs) == expected
    assert packs.lengths.tolist() == LENGTHS
    assert packs.quality.num_tokens == sum(LENGTHS)
    assert packs.tokens_per_pack.tolist() == [sum(LENGTHS[i] for i in pack) for pack in expected]
    assert packs.attention_work.tolist() == [
        sum(LENGTHS[i] ** 2 for i in pack) for pack in expected
    ]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_lengths_is_packed_alike_under_two_limits(form):
    packs = pack_lengths(FORMS[form](LENGTHS), SEQ_LEN, also=(FORMS[form](LENGTHS), 1000))
    assert listed(packs) == FFD


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_lengths_is_counted_alike(form):
    counts = count_lengths(FORMS[form](LENGTHS), SEQ_LEN)
    assert counts.dtype == np.int64
    assert len(counts) == SEQ_LEN + 1
    assert {length: counts[length] for length in np.flatnonzero(counts)} == COUNTS


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", ["Arrow chunks of uint8", "Arrow sliced between nulls"])
def test_every_strategy_takes_arrow(strategy, form):
    packs = pack_lengths(FORMS[form](LENGTHS), SEQ_LEN, strategy=strategy)
    assert listed(packs) == listed(pack_lengths(LENGTHS, SEQ_LEN, strategy=strategy))
    assert len(packs) >= 4


@pytest.mark.parametrize("strategy", ["ffd", "bfd", "best_fit"])
@given(case=strategies.packing_cases(), places=st.lists(st.integers(0, 60), max_size=6))
def test_any_chunks_give_the_same_packs(strategy, case, places):
    ends = sorted(place % (len(case.lengths) + 1) for place in places)
    parts = [case.lengths[a:b] for a, b in pairwise([0, *ends, len(case.lengths)])]
    options = {"strategy": strategy, "max_segments": case.max_segments}
    packs = pack_lengths(pa.chunked_array(parts, pa.int16()), case.seq_len, **options)
    whole = pack_lengths(case.lengths, case.seq_len, **options)
    assert listed(packs) == listed(whole)
    assert packs.quality == whole.quality


def test_any_chunks_are_redrawn_alike():
    lengths = [1, 2, 3, 4] * 20
    expected = listed(pack_lengths(lengths, 8).redraw(seed=1))
    assert listed(pack_lengths(chunked(lengths), 8).redraw(seed=1)) == expected
    assert listed(pack_lengths(lengths, 8)) != expected


@pytest.mark.parametrize("strategy", ["next_fit", "first_fit", "best_fit", "ffd", "balanced"])
@pytest.mark.parametrize(
    "dtype",
    [
        "int64",
        "int8",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
    ],
)
def test_narrow_lengths_are_aligned_like_wide_ones(dtype, strategy):
    lengths = np.array([5, 3, 5, 3], dtype)
    packs = pack_lengths(lengths, 400, strategy=strategy, segment_multiple=200)
    assert listed(packs) == [[0, 1], [2, 3]]


def buffer_of(array: pa.Array) -> np.ndarray:
    return np.frombuffer(array.buffers()[1], np.uint8)


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
def test_numpy_lengths_are_not_copied(dtype):
    array = np.array(LENGTHS, dtype)
    (chunk,) = fronts.chunks_of(array)
    assert np.shares_memory(chunk, array)
    assert np.shares_memory(pack_lengths(array, SEQ_LEN).lengths, array)
    assert np.shares_memory(fronts.chunks_of(array[1::2])[0], array)


@pytest.mark.parametrize("kind", ARROW_TYPES, ids=str)
def test_arrow_lengths_are_not_copied(kind):
    array = pa.array(LENGTHS, kind)
    assert np.shares_memory(fronts.chunks_of(array)[0], buffer_of(array))
    part = array.slice(3, 4)
    (chunk,) = fronts.chunks_of(part)
    assert chunk.tolist() == LENGTHS[3:7]
    assert np.shares_memory(chunk, buffer_of(array))
    assert np.shares_memory(pack_lengths(part, SEQ_LEN).lengths, buffer_of(array))


def test_chunks_are_not_copied_and_empty_ones_left_out():
    array = chunked(LENGTHS)
    found = fronts.chunks_of(array)
    assert [chunk.tolist() for chunk in found] == [LENGTHS[:3], LENGTHS[3:4], LENGTHS[4:]]
    full = [chunk for chunk in array.chunks if len(chunk)]
    assert all(np.shares_memory(a, buffer_of(b)) for a, b in zip(found, full, strict=True))


def test_a_dataset_column_is_not_copied():
    dataset = dataset_of(LENGTHS).with_format("arrow")
    (stored,) = dataset.data.column("n").chunks
    assert np.shares_memory(fronts.chunks_of(dataset["n"][:])[0], buffer_of(stored))


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
def test_kernels_see_int32_or_int64_read_only(dtype):
    array = np.array(LENGTHS, dtype)
    view = fronts.kernel_view(array)
    assert view.tolist() == LENGTHS
    assert view.dtype == (np.int64 if array.dtype.itemsize == 8 else np.int32)
    assert view.dtype.isnative
    assert view.flags.c_contiguous
    assert not view.flags.writeable
    assert array.flags.writeable
    as_they_are = array.dtype.isnative and array.dtype.itemsize >= 4
    assert np.shares_memory(view, array) == as_they_are


def test_one_chunk_is_joined_without_a_copy():
    one, other = np.array([1, 2]), np.array([3])
    assert fronts.joined([one]) is one
    assert fronts.joined([one, other]).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("number", "dtype"), [(0, np.int32), (2**31 - 1, np.int32), (2**31, np.int64)]
)
def test_indices_are_as_narrow_as_can_be(number, dtype):
    assert fronts.index_dtype(number) == dtype


EMPTY = {
    "a list": [],
    "a tuple": (),
    "NumPy float64": np.array([]),
    "NumPy uint8": np.empty(0, np.uint8),
    "Arrow int8": pa.array([], pa.int8()),
    "Arrow null": pa.nulls(0),
    "Arrow sliced": pa.array([None, 3]).slice(2),
    "no Arrow chunk": pa.chunked_array([], pa.int16()),
    "empty Arrow chunks": pa.chunked_array([[], []], pa.uint64()),
    "Arrow chunks of null": pa.chunked_array([pa.nulls(0), pa.nulls(0)]),
    "a dataset's column": dataset_of([])["n"],
    "a dataset's Arrow column": arrow_column(dataset_of([3]).select([])),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", EMPTY)
def test_no_examples_give_no_packs(form, strategy):
    packs = pack_lengths(EMPTY[form], 8, strategy=strategy)
    assert len(packs) == len(packs.order) == 0
    assert packs.offsets.tolist() == [0]
    assert packs.quality.bound == packs.quality.gap == 0
    assert packs.quality.fill == 1.0
    assert count_lengths(EMPTY[form], 8).tolist() == [0] * 9


REMEDY = "pass tokens per example"
OUTSIDE = "expected 1..8 (seq_len); raise seq_len, or shorten or reject the example"
NULL = "expected an integer; fill or leave out nulls"
DTYPE = f"expected an integer dtype; {REMEDY}"
TYPE = f"expected an integer type; {REMEDY}"

BAD_VALUES = {
    "zero": ([5, 0, 0], f"lengths[1] is 0, {OUTSIDE}"),
    "negative": ([5, 3, -4], f"lengths[2] is -4, {OUTSIDE}"),
    "too long": ([9, 0], f"lengths[0] is 9, {OUTSIDE}"),
    "int8": (np.array([1, -128], np.int8), f"lengths[1] is -128, {OUTSIDE}"),
    "big-endian": (np.array([8, 256], ">i2"), f"lengths[1] is 256, {OUTSIDE}"),
    "uint8": (np.array([8, 255], np.uint8), f"lengths[1] is 255, {OUTSIDE}"),
    "uint32": (np.array([8, 2**31], np.uint32), f"lengths[1] is {2**31}, {OUTSIDE}"),
    "largest uint32": (np.array([2**32 - 1], np.uint32), f"lengths[0] is {2**32 - 1}, {OUTSIDE}"),
    "more than 32 bits": (np.array([2**32 + 1]), f"lengths[0] is {2**32 + 1}, {OUTSIDE}"),
    "uint64": (np.array([1, 2**63 + 5], np.uint64), f"lengths[1] is {2**63 + 5}, {OUTSIDE}"),
    "largest uint64": (np.array([2**64 - 1], ">u8"), f"lengths[0] is {2**64 - 1}, {OUTSIDE}"),
    "Arrow uint64": (pa.array([1, 2**63], pa.uint64()), f"lengths[1] is {2**63}, {OUTSIDE}"),
    "Arrow sliced": (pa.array([0, 5, 9, 0]).slice(1), f"lengths[1] is 9, {OUTSIDE}"),
    "Arrow chunks": (chunked([1, 2, 3, 4, 5, 9]), f"lengths[5] is 9, {OUTSIDE}"),
    "first of a chunk": (chunked([1, 2, 3, 4, -5, 9]), f"lengths[4] is -5, {OUTSIDE}"),
    "last of a chunk": (chunked([1, 2, 30, 4, 50, 9]), f"lengths[2] is 30, {OUTSIDE}"),
    "chunks sliced": (
        chunked([0, 1, 2, 3, 4, 5, 9]).slice(1),
        f"lengths[5] is 9, {OUTSIDE}",
    ),
    "a dataset": (arrow_column(concatenated([1, 2, 3, 4, 0])), f"lengths[4] is 0, {OUTSIDE}"),
    "Arrow null": (pa.array([5, None, 0, None]), f"lengths[1] is None, {NULL}"),
    "Arrow null of type null": (pa.nulls(3), f"lengths[0] is None, {NULL}"),
    "Arrow null, sliced": (pa.array([None, 5, None]).slice(1), f"lengths[1] is None, {NULL}"),
    "Arrow null in a chunk": (
        pa.chunked_array([[1, 2], [], [3, None], [None]], pa.int64()),
        f"lengths[3] is None, {NULL}",
    ),
    "ragged": (
        [[1], [1, 2]],
        f"lengths is 'ragged', expected an integer array of 1 dimension; {REMEDY}",
    ),
    "two dimensions": ([[1, 2]], f"lengths.ndim is 2, expected 1; {REMEDY}"),
    "two dimensions, empty": (
        np.empty((0, 3), int),
        f"lengths.ndim is 2, expected 1; {REMEDY}",
    ),
    "a number": (3, f"lengths.ndim is 0, expected 1; {REMEDY}"),
}
BAD_TYPES = {
    "floats": ([1.0, 2.0], f"lengths.dtype is 'float64', {DTYPE}"),
    "float16": (np.ones(2, np.float16), f"lengths.dtype is 'float16', {DTYPE}"),
    "NaN": ([float("nan")], f"lengths.dtype is 'float64', {DTYPE}"),
    "strings": (["5", "31"], f"lengths.dtype is '<U2', {DTYPE}"),
    "bool": ([True, False], f"lengths.dtype is 'bool', {DTYPE}"),
    "None": (None, f"lengths.dtype is 'object', {DTYPE}"),
    "None in a list": ([5, None], f"lengths.dtype is 'object', {DTYPE}"),
    "more than 64 bits": ([5, 2**64], f"lengths.dtype is 'object', {DTYPE}"),
    "a dictionary": ({5: 1}, f"lengths.dtype is 'object', {DTYPE}"),
    "Arrow floats": (pa.array([1.0]), f"lengths.type is 'double', {TYPE}"),
    "Arrow strings": (pa.array(["5"]), f"lengths.type is 'string', {TYPE}"),
    "Arrow bool": (pa.array([True]), f"lengths.type is 'bool', {TYPE}"),
    "Arrow lists": (pa.array([[1], [2]]), f"lengths.type is 'list<item: int64>', {TYPE}"),
    "Arrow dates": (pa.array([1], pa.date32()), f"lengths.type is 'date32[day]', {TYPE}"),
    "Arrow chunks of floats": (
        pa.chunked_array([[1.0], [2.0]]),
        f"lengths.type is 'double', {TYPE}",
    ),
    "dates": (np.array([1], "M8[s]"), f"lengths.dtype is 'datetime64[s]', {DTYPE}"),
}
BAD = [
    pytest.param(lengths, error, message, id=name)
    for error, cases in [(ValueError, BAD_VALUES), (TypeError, BAD_TYPES)]
    for name, (lengths, message) in cases.items()
]


@pytest.mark.parametrize("function", [pack_lengths, count_lengths])
@pytest.mark.parametrize(("lengths", "error", "message"), BAD)
def test_bad_lengths_are_named(lengths, error, message, function):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(lengths, 8)


def test_time_spans_are_no_lengths():
    message = f"lengths.dtype is 'timedelta64[s]', {DTYPE}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        pack_lengths(np.array([1, 2], "m8[s]"), 8)


def test_alignment_is_named_where_it_makes_a_length_too_long():
    message = (
        "lengths[1] is 9, expected 1..8 (what alignment leaves of seq_len); "
        "raise seq_len, or shorten or reject the example"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack_lengths([8, 9], 10, segment_multiple=4)


@pytest.mark.parametrize("function", [pack_lengths, count_lengths])
@pytest.mark.parametrize("seq_len", [0, -1, 2**24 + 1, 2**70])
def test_a_seq_len_out_of_range_is_named(function, seq_len):
    message = f"seq_len is {seq_len}, expected an integer in 1..{2**24}; choose a shorter pack"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function([1, 2], seq_len)


@pytest.mark.parametrize("function", [pack_lengths, count_lengths])
@pytest.mark.parametrize("seq_len", [8.0, True, "8", None])
def test_a_seq_len_that_is_no_integer_is_named(function, seq_len):
    message = f"seq_len is {seq_len!r}, expected an integer in 1..{2**24}; choose a shorter pack"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        function([1, 2], seq_len)


def test_the_largest_seq_len_is_packed():
    packs = pack_lengths([2**24, 2**24 - 1, 1], 2**24)
    assert listed(packs) == [[0], [1, 2]]
    assert packs.quality.padding == 0.0


def test_masked_lengths_are_refused():
    message = "lengths is 'masked', expected values without a mask; fill or leave out"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack_lengths(np.ma.array([1, 2], mask=[False, True]), 8)


MANY = 400_000


def peak_memory(work: Callable[[], object]) -> int:
    """Return the most bytes held at a time, with what the call returns; NumPy reports its own."""
    work()  # compiles
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def strided(lengths: np.ndarray) -> np.ndarray:
    return np.repeat(lengths, 2)[::2]


IN_MEMORY = {
    **{dtype: partial(np.ndarray.astype, dtype=dtype) for dtype in NUMPY_TYPES},
    "strided": strided,
    "arrow": pa.array,
    "chunked": lambda lengths: pa.chunked_array([lengths[: MANY // 3], lengths[MANY // 3 :]]),
}


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("form", IN_MEMORY)
def test_lengths_of_every_type_are_packed_in_four_bytes_an_example_beside_the_result(
    form, multiple
):
    lengths = IN_MEMORY[form](np.random.default_rng(0).integers(1, 101, MANY))
    options = {"segment_multiple": multiple}
    packs = pack_lengths(lengths, SEQ_LEN, **options)
    assert packs.order.nbytes == 4 * MANY
    most = max(4 * MANY + packs.offsets.nbytes, 8 * MANY) + 2**21  # and tables by length
    assert 8 * MANY <= peak_memory(lambda: pack_lengths(lengths, SEQ_LEN, **options)) <= most
    assert peak_memory(lambda: packs.plan.pack_numbers(lengths)) <= most
    assert peak_memory(lambda: count_lengths(lengths, SEQ_LEN)) <= 2**21


@pytest.mark.parametrize("form", ["int8", ">i4", "strided", "chunked"])
def test_a_bad_length_far_behind_is_named_by_its_place(form):
    lengths = np.full(MANY, 7)
    lengths[MANY - 2] = 0
    with pytest.raises(ValueError, match=rf"^lengths\[{MANY - 2}\] is 0, expected 1..120"):
        pack_lengths(IN_MEMORY[form](lengths), SEQ_LEN)
