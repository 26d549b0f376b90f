"""`verify` of rows of tokens: each kind of harm is done to a folder, and found."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List, Value

import packpipe
from packpipe.rows import files

FIRST, SEQ_LEN = "data-00000.arrow", 8
LENGTHS = (3, 8, 1, 21, 5, 0, 2, 7, 4, 16)


def source(shift: int = 0) -> Dataset:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 1000, length) + shift for length in LENGTHS]
    return Dataset.from_dict(
        {
            "input_ids": [row.tolist() for row in tokens],
            "weight": [(row % 2 == 0).tolist() for row in tokens],
            "name": [None if number == 2 else f"n{number}" for number in range(len(LENGTHS))],
        },
        features=Features(
            {
                "input_ids": List(Value("int32")),
                "weight": List(Value("bool")),
                "name": Value("string"),
            }
        ),
    )


def built(folder: Path, **options: Any) -> Path:
    options = {"overflow": "split", "max_bad_fraction": 1.0, **options}
    packpipe.pack(source(), SEQ_LEN, output=folder, progress=False, **options)
    return folder


def said(folder: Path, *given: Any) -> list[str]:
    return [str(problem) for problem in packpipe.verify(folder, *given)]


@pytest.mark.parametrize(
    ("layout", "overflow", "masked"),
    [*itertools.product(("fixed", "ragged"), ("split", "truncate", "drop"), (False, True))],
)
def test_nothing_is_wrong_with_what_pack_wrote(tmp_path, layout, overflow, masked):
    folder = built(
        tmp_path / "a", layout=layout, overflow=overflow, mask_first_label=masked, pad_token_id=9
    )
    assert said(folder) == []
    assert said(folder, source()) == []


def test_nothing_is_wrong_with_rows_of_nothing(tmp_path):
    packpipe.pack(source().select([]), SEQ_LEN, output=tmp_path / "a", progress=False)
    assert said(tmp_path / "a", source().select([])) == []


def test_nothing_is_wrong_with_the_texts_of_pairs(tmp_path):
    images = [{"bytes": pictures.encoded_image(8, 8, seed), "path": None} for seed in range(5)]
    features = Features({"image": Image(), "input_ids": List(Value("int32"))})
    texts = [[1, 2], [3] * 9, [], [4], [5, 6, 7]]
    pairs = Dataset.from_dict({"image": images, "input_ids": texts}, features=features)
    options = {"max_text": 4, "overflow": "truncate", "max_bad_fraction": 1.0, "patch_size": 8}
    packpipe.pack_pairs(pairs, 2, 8, output=tmp_path / "a", progress=False, **options)
    assert said(tmp_path / "a" / "texts", pairs) == []
    assert said(tmp_path / "a" / "images", pairs) == []


def change(folder: Path, column: str, at: int, value: int, row: int = 0) -> None:
    """Have one value of a column be another, in a file that is whole."""
    with pa.OSFile(str(folder / FIRST)) as file:
        old = pa.ipc.open_stream(file).read_all().combine_chunks()
    values = old.column(column).to_pylist()
    was = values[row][at]
    values[row][at] = not was if isinstance(was, bool) else value
    place, field = old.schema.get_field_index(column), old.schema.field(column)
    changed = old.set_column(place, field, pa.array(values, field.type))
    record = files.write_table(folder / FIRST, old.schema, [changed])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][FIRST] = record
    (folder / "manifest.json").write_text(json.dumps(manifest))


HARM: dict[str, tuple[dict[str, Any], tuple[Any, ...], str]] = {
    "segment id": ({}, ("segment_ids", 0, 2), "segment_ids are not those of seq_lens"),
    "position": ({}, ("position_ids", 0, 5), "position_ids are not those of seq_lens"),
    "too many": ({}, ("seq_lens", 0, 9), "seq_lens add up to more than seq_len, 8"),
    "none": ({}, ("seq_lens", 0, 0), "a segment with no token, or a fragment below 0"),
    "fragment": ({}, ("fragment", 0, -1), "a segment with no token, or a fragment below 0"),
    "ragged": (
        {"layout": "ragged"},
        ("seq_lens", 0, 1),
        "the tokens are not as many as seq_lens say",
    ),
    "label": (
        {"mask_first_label": True},
        ("labels", 0, 5),
        "the first label of a segment is not -100",
    ),
}


@pytest.mark.parametrize(("options", "harm", "what"), HARM.values(), ids=HARM)
def test_a_row_that_breaks_an_invariant(tmp_path, options, harm, what):
    folder = built(tmp_path / "a", **options)
    change(folder, *harm)
    assert f"{FIRST}, row 0: {what}" in said(folder)


@pytest.mark.parametrize("column", ["input_ids", "weight"])
def test_padding_that_holds_something(tmp_path, column):
    folder = built(tmp_path / "a", pad_token_id=3, overflow="drop")
    rows = packpipe.read_tokens(packpipe.pack(source(), SEQ_LEN, output=folder, **_AS_BUILT))
    row = int(np.flatnonzero(rows.segment_ids[:, -1] == 0)[0])
    change(folder, column, SEQ_LEN - 1, 1, row)
    padding = 3 if column == "input_ids" else 0
    assert said(folder) == [f"{FIRST}, row {row}: {column} are not {padding} in padding"]


_AS_BUILT = {"pad_token_id": 3, "overflow": "drop", "max_bad_fraction": 1.0, "progress": False}


def test_a_segment_too_many_for_max_segments(tmp_path):
    folder = built(tmp_path / "a")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["max_segments"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "more than max_segments, 1, segments" in said(folder)[0]


def test_a_piece_that_is_there_twice_or_nowhere(tmp_path):
    folder = built(tmp_path / "a")
    packed = packpipe.pack(
        source(), SEQ_LEN, output=folder, overflow="split", max_bad_fraction=1.0, progress=False
    )
    (row, at) = next(
        (number, row["fragment"].index(1))
        for number, row in enumerate(packed)
        if 1 in row["fragment"]
    )
    example = packed[row]["example_index"][at]
    change(folder, "fragment", at, 2, row)
    what = f"example {example}: its pieces are not 0, 1, ... of {SEQ_LEN} tokens and a rest"
    assert said(folder) == [what]


def test_a_sequence_that_is_there_twice_or_nowhere(tmp_path):
    folder = built(tmp_path / "a", overflow="drop")
    row = packpipe.pack(source(), SEQ_LEN, output=folder, **_AS_BUILT | {"pad_token_id": 0})[0]
    missing, other = row["example_index"][0], 3  # which was dropped
    change(folder, "example_index", 0, other)
    assert said(folder)[:2] == [
        f"example {missing}: is in no row and not in the rejects",
        f"example {other}: is in more than one row, or in a row and in the rejects",
    ]


@pytest.mark.parametrize("layout", ["fixed", "ragged"])
@pytest.mark.parametrize("name", ["input_ids", "weight"])
def test_a_token_that_is_not_the_source_s_is_found_with_it_alone(tmp_path, layout, name):
    folder = built(tmp_path / "a", layout=layout)
    change(folder, name, 0, 77)
    assert said(folder) == []
    assert said(folder, source()) == [f"{FIRST}, row 0: {name} are not those of the source"]


def test_a_value_that_is_not_the_source_s(tmp_path):
    folder = built(tmp_path / "a")
    change(folder, "name", 0, "other")
    assert said(folder) == []
    assert said(folder, source()) == [f"{FIRST}, row 0: name is not that of the source"]


def test_a_source_that_is_another(tmp_path):
    folder = built(tmp_path / "a")
    assert "input_ids are not those of the source" in said(folder, source(shift=1))[0]
    assert said(folder, source().select(range(3))) == ["dataset: holds 3 examples, expected 10"]
    assert said(folder, source().remove_columns("name")) == ["dataset: has no column 'name'"]
    longer = source().map(
        lambda row: {"input_ids": row["input_ids"] + [1], "weight": row["weight"] + [True]}
    )
    assert said(folder, longer) == [
        "examples 0, 1, 2 and 6 more: 3 tokens in rows, expected 4, the first of them"
    ]
    wide = source().cast_column("input_ids", List(Value("int64")))
    assert "input_ids are int32, those of the source int64" in said(folder, wide)[0]
    shorter = source().map(
        lambda row: {"input_ids": row["input_ids"][:1], "weight": row["weight"][:1]}
    )
    assert "a piece that its sequence does not have" in said(folder, shorter)[0]


def test_a_byte_of_a_file_counts(tmp_path):
    folder = built(tmp_path / "a")
    whole = bytearray((folder / FIRST).read_bytes())
    whole[len(whole) // 2] ^= 1
    (folder / FIRST).write_bytes(whole)
    assert [problem.where for problem in packpipe.verify(folder)] == [FIRST]


def test_columns_that_are_no_packed_rows(tmp_path):
    folder = built(tmp_path / "a")
    copy = shutil.copytree(folder, tmp_path / "b")
    with pa.OSFile(str(folder / FIRST)) as file:
        old = pa.ipc.open_stream(file).read_all().combine_chunks()

    def stored(changed: pa.Table) -> list[str]:
        record = files.write_table(copy / FIRST, changed.schema, [changed])
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["files"][FIRST] = record
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return said(copy)

    assert stored(old.drop_columns("fragment")) == [f"{FIRST}: lacks the columns fragment"]
    plain = old.set_column(0, "input_ids", pa.array([1] * len(old)))
    assert "column 'input_ids' is int64, expected lists" in stored(plain)[0]
    place = old.schema.get_field_index("seq_lens")
    wide = old.set_column(place, "seq_lens", old.column("seq_lens").cast(pa.list_(pa.int64())))
    assert "column 'seq_lens' is list<item: int64>" in stored(wide)[0]
    null = old.column("seq_lens").to_pylist()
    null[0][0] = None
    nulls = old.set_column(place, "seq_lens", pa.array(null, pa.list_(pa.int32())))
    assert "column 'seq_lens' holds nulls" in stored(nulls)[0]
    more = old.column("seq_lens").to_pylist()
    more[0].append(1)
    uneven = old.set_column(place, "seq_lens", pa.array(more, pa.list_(pa.int32())))
    assert "the segment columns hold lists of different lengths" in stored(uneven)[0]


def test_nan_is_what_the_source_holds_too(tmp_path):
    columns = {
        "input_ids": [[1, 2, 3], [4, 5]],
        "score": [[0.5, float("nan"), 1.0], [float("nan"), 2.0]],
        "value": [float("nan"), 1.0],
    }
    dataset = Dataset.from_dict(columns)
    packpipe.pack(dataset, SEQ_LEN, output=tmp_path / "a", progress=False)
    assert said(tmp_path / "a", dataset) == []
    columns["value"][1] = float("nan")
    other = Dataset.from_dict(columns)
    assert said(tmp_path / "a", other) == [f"{FIRST}, row 0: value is not that of the source"]


def test_minus_zero_is_not_what_a_source_of_zeros_holds(tmp_path):
    columns = {"input_ids": [[1, 2], [4, 5]], "score": [[0.5, 0.0], [0.0, 2.0]]}
    columns["value"] = [0.0, None]
    packpipe.pack(Dataset.from_dict(columns), SEQ_LEN, output=tmp_path / "a", progress=False)
    assert said(tmp_path / "a", Dataset.from_dict(columns)) == []
    for name, other, what in (
        ("score", [[0.5, -0.0], [0.0, 2.0]], "score are not those of the source"),
        ("value", [-0.0, None], "value is not that of the source"),
    ):
        changed = Dataset.from_dict({**columns, name: other})
        assert said(tmp_path / "a", changed) == [f"{FIRST}, row 0: {what}"]
    features = Features({"image": Image(), "label": List(Value("float32"))})
    image = {"bytes": pictures.encoded_image(4, 4), "path": None}
    zero, minus = (
        Dataset.from_dict({"image": [image], "label": [[1.0, number]]}, features)
        for number in (0.0, -0.0)
    )
    packpipe.pack(zero, 4, patch_size=4, output=tmp_path / "b", progress=False)
    assert said(tmp_path / "b", zero) == []
    (found,) = said(tmp_path / "b", minus)
    assert "labels are not those of the source (example 0: [1.0, 0.0], expected" in found


_ANY = [None, -5, 2**70, 1.5, "x", True, [], {}, [None], ["name"], ["name", "name"]]


@pytest.mark.parametrize("value", _ANY)
def test_whatever_a_manifest_says_it_is_a_list_of_problems(tmp_path, value):
    folder = built(tmp_path / "a")
    whole = json.loads((folder / "manifest.json").read_text())
    for group in (whole, whole["counts"], whole["config"]):
        for key in list(group):
            before, group[key] = group[key], value
            (folder / "manifest.json").write_text(json.dumps(whole))
            packpipe.verify(folder, source())  # does not raise
            group[key] = before


def test_a_length_that_is_not_its_list_s_is_a_problem_beside_the_source_too(tmp_path):
    folder = built(tmp_path / "a", layout="ragged")
    with pa.OSFile(str(folder / FIRST)) as file:
        table = pa.ipc.open_stream(file).read_all()
    lens = table["seq_lens"].to_pylist()
    lens[0][0] -= 1
    place = table.schema.get_field_index("seq_lens")
    changed = table.set_column(
        place, table.schema.field(place), pa.array(lens, pa.list_(pa.int32()))
    )
    record = files.write_table(folder / FIRST, changed.schema, [changed])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][FIRST] = record
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = said(folder, source())
    assert f"{FIRST}, row 0: the tokens are not as many as seq_lens say" in found
