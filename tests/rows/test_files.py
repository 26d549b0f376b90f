from __future__ import annotations

import json
import re

import datasets
import numpy as np
import pyarrow as pa
import pytest
import test_schema
import xxhash

from packpipe.durable import write_json
from packpipe.loading.read import read_rows
from packpipe.rows.files import write_table

ROWS = test_schema.made_rows(test_schema.LABELS["strings"])
TABLE = test_schema.as_table(ROWS)


def test_a_table_is_written_whole_with_its_record(tmp_path):
    path = tmp_path / "rows.arrow"
    record = write_table(path, TABLE.schema, [TABLE.slice(0, 2), TABLE.slice(2)])
    content = path.read_bytes()
    assert record == {
        "rows": 6,
        "bytes": len(content),
        "xxh3_128": xxhash.xxh3_128(content).hexdigest(),
    }
    assert [file.name for file in tmp_path.iterdir()] == ["rows.arrow"]
    with pa.memory_map(str(path)) as source:
        found = pa.ipc.open_stream(source).read_all()
        assert found.equals(TABLE)
        test_schema.assert_same(read_rows(found), ROWS, list(range(6)))


def test_the_same_tables_give_the_same_bytes(tmp_path):
    records = [write_table(tmp_path / name, TABLE.schema, [TABLE]) for name in ("one", "other")]
    assert records[0] == records[1]


def test_no_tables_are_a_file_of_no_rows(tmp_path):
    record = write_table(tmp_path / "none.arrow", TABLE.schema, [])
    assert record["rows"] == 0
    with pa.ipc.open_stream((tmp_path / "none.arrow").read_bytes()) as reader:
        assert reader.schema == TABLE.schema
        assert reader.read_all().num_rows == 0


def interrupted():
    yield TABLE
    raise KeyboardInterrupt


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "rows.arrow"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        write_table(path, TABLE.schema, interrupted())
    assert path.read_bytes() == b"before"
    record = write_table(path, TABLE.schema, [TABLE])
    assert record["rows"] == 6
    assert [file.name for file in tmp_path.iterdir()] == ["rows.arrow"]


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text("before")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "before"
    write_json(path, {"a": [1, "é"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, "é"]}
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


SOURCES = {
    "table": TABLE,
    "table in chunks": pa.concat_tables([TABLE.slice(0, 2), TABLE.slice(2, 1), TABLE.slice(3)]),
    "sliced table": pa.concat_tables([TABLE.slice(4), TABLE]).slice(2),
    "dataset": datasets.Dataset(TABLE),
    "dataset with a format": datasets.Dataset(TABLE).with_format("numpy"),
    "shuffled dataset": datasets.Dataset(TABLE)
    .select([5, 3, 1, 0, 2, 4])
    .select([3, 2, 4, 1, 5, 0]),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("rows", "picked"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (0, [0]),
        (5, [5]),
        (-1, [5]),
        (-6, [0]),
        (np.int64(2), [2]),
        (slice(1, 4), [1, 2, 3]),
        (slice(None), [0, 1, 2, 3, 4, 5]),
        (slice(-2, None), [4, 5]),
        (slice(3, 100), [3, 4, 5]),
        (slice(None, None, 2), [0, 2, 4]),
        (slice(None, None, -1), [5, 4, 3, 2, 1, 0]),
        (range(2, 5), [2, 3, 4]),
        ([4, 0, 4, -1], [4, 0, 4, 5]),
        (np.array([3, 1]), [3, 1]),
        (np.array([-2], np.int8), [4]),
    ],
    ids=str,
)
def test_rows_are_read_by_number(source, rows, picked):
    test_schema.assert_same(read_rows(SOURCES[source], rows), ROWS, picked)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rows", [slice(2, 2), slice(5, 1), []], ids=str)
def test_reading_no_rows_gives_none(source, rows):
    found = read_rows(SOURCES[source], rows)
    assert len(found) == 0
    assert found.patches.shape == (0, 8, 12)


@pytest.mark.parametrize("source", ["table", "dataset"])
@pytest.mark.parametrize("rows", [6, -7, [0, 6], np.array([-7])], ids=str)
def test_a_row_out_of_range_is_an_index_error(source, rows):
    with pytest.raises(IndexError):
        read_rows(SOURCES[source], rows)


@pytest.mark.parametrize("rows", [1.0, [1.5], np.array([0.0, 1.0]), "0", [True, False]], ids=str)
def test_a_row_that_is_no_integer_is_a_type_error(rows):
    with pytest.raises(TypeError):
        read_rows(TABLE, rows)


@pytest.mark.parametrize("source", ["table", "dataset"])
def test_contiguous_rows_are_views(source):
    found = read_rows(SOURCES[source], slice(1, 4))
    assert np.shares_memory(found.patches, ROWS.patches)
    assert found.patches.ctypes.data == ROWS.patches[1:].ctypes.data
    assert np.shares_memory(found.seq_lens, ROWS.seq_lens)


@pytest.mark.parametrize("source", SOURCES)
def test_bytes_stay_bytes(source):
    found = read_rows(SOURCES[source], [1, 0])
    dtypes = [found.patches.dtype, found.segment_ids.dtype, found.coords.dtype]
    assert dtypes == [np.uint8, np.int32, np.int16]


@pytest.mark.parametrize(
    "wrong",
    [pa.table({"a": [1]}), datasets.Dataset.from_dict({"a": [1]})],
    ids=["table", "dataset"],
)
def test_another_table_is_refused(wrong):
    message = (
        "column 'patches' is 'missing', expected fixed_size_list<uint8>; "
        "read rows that packpipe has written"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_rows(wrong)


@pytest.mark.parametrize(("wrong", "name"), [([1, 2], "list"), (None, "NoneType")])
def test_something_else_is_refused(wrong, name):
    expected = "expected Dataset or pyarrow.Table; pass packed rows, one split of them"
    message = f"type(dataset) is '{name}', {expected}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        read_rows(wrong)
