from __future__ import annotations

import itertools
import re

import numpy as np
import packed
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from packpipe.planning.image_config import PackConfig
from packpipe.rows import text
from packpipe.rows.from_arrow import table_rows, table_segments
from packpipe.rows.rejects import Reject
from packpipe.rows.rejects_table import REJECTS_SCHEMA, rejects_table
from packpipe.rows.rows import Rows, gather
from packpipe.rows.schema import row_schema, segment_schema
from packpipe.rows.to_arrow import rows_table

CONFIG = PackConfig(seq_len=8, patch_size=2)
# Tokens of the segments of each row; the fourth row lost all it had.
SEQ_LENS = [[4, 1], [3], [2, 2, 2], [], [8], [1, 6]]
COLUMNS = [
    "patches",
    "segment_ids",
    "coords",
    "seq_lens",
    "grid_hw",
    "image_hw",
    "labels",
    "example_index",
]
TOKENS = ("patches", "segment_ids", "coords")
SEGMENTS = ("seq_lens", "grid_hw", "image_hw", "example_index")


def made_rows(labels: pa.Array | None, seq_lens=SEQ_LENS) -> Rows:
    """Rows of arbitrary values, of the right dtypes and shapes."""
    rng = np.random.default_rng(3)
    flat = [n for row in seq_lens for n in row]
    segments = packed.planned(
        offsets=np.cumsum([0, *map(len, seq_lens)]),
        seq_lens=np.array(flat, np.int32),
        grid_hw=np.array([(1, n) for n in flat], np.int16).reshape(-1, 2),
        image_hw=rng.integers(1, 2**31 - 1, (len(flat), 2)).astype(np.int32),
        example_index=rng.integers(0, 2**62, len(flat)),
        labels=labels,
    )
    shape = (len(seq_lens), CONFIG.seq_len)
    return packed.filled(
        segments,
        patches=rng.integers(0, 256, (*shape, CONFIG.patch_bytes), np.uint8),
        segment_ids=rng.integers(0, 9, shape, np.int32),
        coords=rng.integers(0, 9, (*shape, 2), np.int16),
    )


NUM_SEGMENTS = sum(map(len, SEQ_LENS))
LABELS = {
    "integers": pa.array(range(NUM_SEGMENTS), pa.int64()),
    "narrow integers": pa.array(range(NUM_SEGMENTS), pa.int8()),
    "strings": pa.array([f"label {i}" for i in range(NUM_SEGMENTS)]),
    "lists": pa.array([[i] * (i % 3) for i in range(NUM_SEGMENTS)], pa.list_(pa.float32())),
    "none": None,
}


def label_type(labels: pa.Array | None) -> pa.DataType | None:
    return None if labels is None else labels.type


def as_table(rows: Rows) -> pa.Table:
    return rows_table(rows, row_schema(CONFIG, label_type(rows.segments.get("labels"))))


def assert_same(found: Rows, rows: Rows, picked: list[int]) -> None:
    """Found are the picked rows, in values, dtypes and shapes."""
    assert len(found) == len(picked)
    for name in TOKENS:
        one, other = getattr(found, name), getattr(rows, name)[picked]
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert (one == other).all()
    bounds = rows.offsets
    spans = [np.arange(bounds[row], bounds[row + 1]) for row in picked]
    members = np.concatenate([np.empty(0, np.int64), *spans])
    assert found.offsets.dtype == np.int64
    assert found.offsets.tolist() == np.cumsum([0, *map(len, spans)]).tolist()
    for name in SEGMENTS:
        one, other = getattr(found, name), getattr(rows, name)[members]
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()
    if "labels" not in rows.segments:
        assert "labels" not in found.segments
    else:
        expected = rows.labels.take(pa.array(members))
        assert found.labels.equals(expected)


def test_the_schema_of_a_row_is_this():
    assert row_schema(CONFIG, pa.int64()) == pa.schema(
        [
            ("patches", pa.list_(pa.uint8(), 96)),
            ("segment_ids", pa.list_(pa.int32(), 8)),
            ("coords", pa.list_(pa.int16(), 16)),
            ("seq_lens", pa.list_(pa.int32())),
            ("grid_hw", pa.list_(pa.list_(pa.int16(), 2))),
            ("image_hw", pa.list_(pa.list_(pa.int32(), 2))),
            ("labels", pa.list_(pa.int64())),
            ("example_index", pa.list_(pa.int64())),
        ]
    )
    assert row_schema(CONFIG, pa.int64()).names == COLUMNS


def test_without_labels_the_column_is_absent():
    assert row_schema(CONFIG, None).names == [name for name in COLUMNS if name != "labels"]
    assert segment_schema(None).names == ["seq_lens", "grid_hw", "image_hw", "example_index"]


def test_the_segment_columns_are_the_rows_own():
    expected = [row_schema(CONFIG, pa.string()).field(name) for name in COLUMNS[3:]]
    assert list(segment_schema(pa.string())) == expected


@pytest.mark.parametrize("labels", LABELS)
def test_rows_come_back_from_arrow_as_they_were(labels):
    rows = made_rows(LABELS[labels])
    table = as_table(rows)
    assert table.schema == row_schema(CONFIG, label_type(LABELS[labels]))
    assert sum(column.null_count for column in table.columns) == 0
    assert_same(table_rows(table), rows, list(range(6)))


def test_arrow_holds_the_values_at_their_places():
    rows = made_rows(LABELS["strings"])
    first = as_table(rows).slice(0, 1).to_pylist()[0]
    assert first["patches"] == rows.patches[0].reshape(-1).tolist()
    assert first["segment_ids"] == rows.segment_ids[0].tolist()
    assert first["coords"] == rows.coords[0].reshape(-1).tolist()
    assert first["seq_lens"] == [4, 1]
    assert first["grid_hw"] == [[1, 4], [1, 1]]
    assert first["image_hw"] == rows.image_hw[:2].tolist()
    assert first["labels"] == ["label 0", "label 1"]
    assert first["example_index"] == rows.example_index[:2].tolist()


@pytest.mark.parametrize("labels", LABELS)
@given(start=st.integers(0, 5), num_rows=st.integers(1, 6))
@example(start=1, num_rows=3)
@example(start=3, num_rows=1)
def test_a_slice_of_a_table_gives_its_own_rows(labels, start, num_rows):
    rows = made_rows(LABELS[labels])
    picked = list(range(6))[start : start + num_rows]
    assert_same(table_rows(as_table(rows).slice(start, num_rows)), rows, picked)


@pytest.mark.parametrize("labels", LABELS)
@given(picked=st.lists(st.integers(0, 5), min_size=1, max_size=9))
@example(picked=[5, 0, 0, 3])
def test_taken_rows_are_the_rows_taken(labels, picked):
    rows = made_rows(LABELS[labels])
    assert_same(table_rows(as_table(rows).take(picked)), rows, picked)


@pytest.mark.parametrize("labels", LABELS)
@given(cuts=st.lists(st.integers(0, 6), min_size=1, max_size=4).map(sorted))
@example(cuts=[2])
def test_rows_in_several_chunks_are_read_as_one(labels, cuts):
    rows = made_rows(LABELS[labels])
    table = as_table(rows)
    edges = [0, *cuts, 6]
    parts = [table.slice(a, b - a) for a, b in itertools.pairwise(edges)]
    chunked = pa.concat_tables(parts)
    assert chunked.column("patches").num_chunks > 1
    assert_same(table_rows(chunked), rows, list(range(6)))
    assert_same(table_rows(chunked.slice(1, 4)), rows, [1, 2, 3, 4])


def address(column: pa.ChunkedArray) -> int:
    (chunk,) = column.chunks
    while pa.types.is_nested(chunk.type):
        chunk = chunk.values
    return chunk.buffers()[1].address


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_go_to_arrow_and_back_without_copying(name):
    rows = made_rows(None)
    table = as_table(rows)
    values = getattr(rows, name)
    assert address(table.column(name)) == values.ctypes.data
    assert np.shares_memory(getattr(table_rows(table), name), values)
    part = getattr(table_rows(table.slice(2, 3)), name)
    assert np.shares_memory(part, values[2:5])
    assert part.ctypes.data == values[2:5].ctypes.data


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_go_to_arrow_and_back_without_copying(name):
    rows = made_rows(None)
    table = as_table(rows)
    values = getattr(rows, name)
    assert address(table.column(name)) == values.ctypes.data
    assert np.shares_memory(getattr(table_rows(table), name), values)
    # Rows 2 to 4 hold the segments 3 to 6.
    part = getattr(table_rows(table.slice(2, 3)), name)
    assert part.ctypes.data == values[3:].ctypes.data


def text_and_segments(batch: pa.RecordBatch, rows: slice) -> tuple[int, int]:
    """How many bytes of labels, and how many segments, some rows have."""
    held = batch.slice(rows.start, rows.stop).to_pydict()
    labels = [one for row in held.get("labels", []) for one in row if isinstance(one, str)]
    return sum(map(len, labels)), sum(map(len, held["seq_lens"]))


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("most", [4, 9, 21, 50])
def test_columns_are_cut_into_chunks_of_rows_that_32_bit_offsets_reach(kind, most, monkeypatch):
    rows = made_rows(LABELS[kind])
    whole = as_table(rows)
    assert whole.column(0).num_chunks == 1
    monkeypatch.setattr(text, "MOST", most)
    if kind == "strings" and most < 21:
        first = 14 if most < 14 else 21
        message = (
            f"bytes of labels in row {0 if most < 14 else 2} is {first}, expected at most "
            f"{most}; cast_column it to Value('large_string')"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            as_table(rows)
        return
    cut = as_table(rows)
    cut.validate(full=True)
    assert cut.schema == whole.schema
    assert cut.to_pylist() == whole.to_pylist()
    batches = cut.to_batches()
    assert (len(batches) > 1) == (most < 9 or (kind == "strings"))
    assert all(max(text_and_segments(batch, slice(0, 9))) <= most for batch in batches)
    # No batch could have had the first row of the next one.
    for one, other in itertools.pairwise(batches):
        whole_batch, first_row = (
            text_and_segments(one, slice(0, 9)),
            text_and_segments(other, slice(0, 1)),
        )
        assert max(np.add(whole_batch, first_row)) > most


def test_texts_of_a_large_type_are_not_cut(monkeypatch):
    rows = made_rows(LABELS["strings"].cast(pa.large_string()))
    whole = as_table(rows)
    monkeypatch.setattr(text, "MOST", 12)
    assert as_table(rows).column(0).num_chunks == 1
    assert as_table(rows).equals(whole)


@pytest.mark.parametrize("kind", ["integers", "strings", "none"])
def test_rows_beyond_32_bit_offsets_are_read_and_gathered(kind, monkeypatch):
    rows = made_rows(LABELS[kind])
    table = as_table(rows)
    chunks = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    monkeypatch.setattr(text, "MOST", 3)
    found = table_rows(chunks)
    for read in (found, gather([found] * 6, range(6))):
        if kind == "strings":
            assert read.labels.type == pa.large_string()
            read.segments["labels"] = read.labels.cast(pa.string())
        assert_same(read, rows, list(range(6)))


@pytest.mark.parametrize("labels", LABELS)
def test_a_table_without_rows_has_no_rows_and_every_shape(labels):
    rows = made_rows(LABELS[labels])
    found = table_rows(as_table(rows).slice(2, 0))
    assert_same(found, rows, [])
    assert found.patches.shape == (0, 8, 12)


def test_no_rows_are_written_and_read():
    rows = made_rows(pa.array([], pa.int64()), [])
    table = as_table(rows)
    assert table.num_rows == 0
    assert table.schema == row_schema(CONFIG, pa.int64())
    assert len(table_rows(table)) == 0
    assert len(table_rows(table.schema.empty_table())) == 0


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("picked", [[0, 1, 2, 3, 4, 5], [1, 2, 3], []])
def test_segments_alone_come_back_too(labels, picked):
    rows = made_rows(LABELS[labels])
    schema = segment_schema(label_type(LABELS[labels]))
    table = rows_table(rows, schema)
    assert table.schema == schema
    start = picked[0] if picked else 0
    found = table_segments(table.slice(start, len(picked)))
    lengths = found.seq_lens.tolist()
    bounds = found.offsets.tolist()
    assert [lengths[a:b] for a, b in itertools.pairwise(bounds)] == [
        SEQ_LENS[row] for row in picked
    ]
    assert ("labels" in found.segments) == (LABELS[labels] is not None)


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "labels"])
def test_a_missing_column_is_named(name):
    table = as_table(made_rows(None)).drop_columns([name])
    with pytest.raises(ValueError, match=f"^column '{name}' is 'missing', expected "):
        table_rows(table)


@pytest.mark.parametrize(
    ("name", "wrong", "wanted"),
    [
        ("patches", pa.list_(pa.int64(), 96), "fixed_size_list<uint8>"),
        ("patches", pa.list_(pa.uint8()), "fixed_size_list<uint8>"),
        ("segment_ids", pa.list_(pa.int64(), 8), "fixed_size_list<int32>"),
        ("coords", pa.list_(pa.int32(), 16), "fixed_size_list<int16>"),
    ],
)
def test_a_column_of_another_type_is_named(name, wrong, wanted):
    table = as_table(made_rows(None))
    place = table.column_names.index(name)
    table = table.set_column(place, name, table.column(name).cast(wrong))
    message = (
        f"column '{name}' is '{wrong}', expected {wanted}; read rows that packpipe has written"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        table_rows(table)


def test_rejects_are_listed_by_example():
    rejects = [Reject(7, "probe", "empty", "E: b"), Reject(2, "label", "bad label", "E: a")]
    table = rejects_table(rejects)
    assert table.schema == REJECTS_SCHEMA
    assert table.to_pylist() == [
        {"example_index": 2, "stage": "label", "reason": "bad label", "exception": "E: a"},
        {"example_index": 7, "stage": "probe", "reason": "empty", "exception": "E: b"},
    ]


def test_no_rejects_are_an_empty_table():
    table = rejects_table([])
    assert table.schema == REJECTS_SCHEMA
    assert table.num_rows == 0
