"""Padding and empty sequences in a source of tokens are left out and counted; neither is bad."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import numpy as np
import pictures
import pytest
from datasets import Dataset, Features, Image, LargeList, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

import packpipe
from packpipe.rows.rejects import TooManyRejects
from packpipe.sources.token_columns import TokenColumns
from packpipe.sources.token_source import token_source

KINDS = ("int8", "int64", "bool", "float64")
PACK: dict[str, Any] = {"progress": False}


def tokens_of(packed: Any, *names: str) -> dict[int, list[Any]]:
    """Return the tokens of each example in rows of whole sequences, by its row in the source."""
    rows, found = packpipe.read_rows(packed), {}
    for row in range(len(rows)):
        segments = range(*rows.offsets[row : row + 2].tolist())
        for number, segment in enumerate(segments, 1):
            here = rows.segment_ids[row] == number
            example = int(rows.example_index[segment])
            assert example not in found
            found[example] = [rows.tokens[name][row][here].tolist() for name in names]
    return found


def made(sequences: list[list[tuple[int, int]]], kind: str, wrap: Any = List) -> Dataset:
    """Return a dataset of sequences of (token, mask)."""
    columns = {
        "labels": [[-token for token, _ in row] for row in sequences],
        "attention_mask": [[mask for _, mask in row] for row in sequences],
        "input_ids": [[token for token, _ in row] for row in sequences],
    }
    kinds = {"labels": "int32", "attention_mask": kind, "input_ids": "int64"}
    features = Features({name: wrap(Value(kinds[name])) for name in columns})
    return Dataset.from_dict(columns, features=features)


@st.composite
def sequences(draw: Any) -> list[list[tuple[int, int]]]:
    """Return sequences padded at the left, the right, both, between tokens, or not at all."""
    found = []
    for _ in range(draw(st.integers(1, 12))):
        length = draw(st.integers(0, 9))
        left, right = draw(st.integers(0, length)), draw(st.integers(0, length))
        masks = draw(
            st.sampled_from(
                (
                    [1] * length,
                    [0] * left + [1] * (length - left),
                    [1] * (length - right) + [0] * right,
                    [int(left <= place < length - right) for place in range(length)],
                )
            )
            | st.lists(st.integers(0, 1), min_size=length, max_size=length)
        )
        tokens = draw(st.lists(st.integers(1, 99), min_size=length, max_size=length))
        found.append(list(zip(tokens, masks, strict=True)))
    return found


@settings(max_examples=50)
@given(
    sequences(),
    st.sampled_from(KINDS),
    st.sampled_from((List, LargeList)),
    st.sampled_from(("whole", "slice", "shuffled", "chunks")),
)
def test_tokens_are_those_that_the_mask_keeps(rows, kind, wrap, form):
    dataset, numbers = made(rows, kind, wrap), list(range(len(rows)))
    if form == "slice":
        numbers = numbers[len(rows) // 2 :]
        dataset = dataset.select(numbers)
    elif form == "shuffled":
        numbers = np.random.default_rng(0).permutation(len(rows)).tolist()
        dataset = dataset.select(numbers)
    elif form == "chunks":
        dataset = datasets.concatenate_datasets([dataset, dataset])
        numbers = numbers * 2
    names = ["input_ids", "labels", "attention_mask"]
    source = token_source(dataset, TokenColumns(names, [], "attention_mask"))
    kept = [[token for token, mask in rows[number] if mask] for number in numbers]
    found = {
        name: [
            column.values[start : start + length].tolist()
            for start, length in zip(column.starts, column.lens, strict=True)
        ]
        for name, column in source.columns.items()
    }
    assert found["input_ids"] == kept
    assert found["labels"] == [[-token for token in row] for row in kept]
    assert found["attention_mask"] == [[1] * len(row) for row in kept]
    assert source.num_masked == sum(len(rows[n]) for n in numbers) - sum(map(len, kept))
    empty = [place for place, row in enumerate(kept) if not row]
    assert [reject.example_index for reject in source.rejects] == empty
    assert {reject.reason for reject in source.rejects} <= {"empty"}
    assert not any(reject.is_bad for reject in source.rejects)


PADDED = [
    [(5, 1), (6, 1), (7, 1), (0, 0), (0, 0)],
    [(0, 0), (0, 0), (8, 1), (9, 1), (10, 1)],
    [(0, 0), (0, 0), (0, 0), (0, 0), (0, 0)],
    [(11, 1), (12, 0), (13, 1), (0, 0), (14, 1)],
    [],
    [(15, 1), (16, 1), (17, 1), (18, 1), (19, 1)],
]
KEPT = {0: [5, 6, 7], 1: [8, 9, 10], 3: [11, 13, 14], 5: [15, 16, 17, 18, 19]}


@pytest.mark.parametrize("layout", ["fixed", "ragged"])
def test_padding_of_the_source_is_in_no_row_and_counted(tmp_path, layout):
    dataset, out = made(PADDED, "int8"), tmp_path / "out"
    packed = packpipe.pack(dataset, 8, layout=layout, output=out, on_error="raise", **PACK)
    found = sorted(token for row in packed["input_ids"] for token in row if token)
    assert found == sorted(token for row in KEPT.values() for token in row)
    counts = packpipe.manifest(packed)["counts"]
    assert counts["masked_tokens"] == 11
    assert counts["tokens"] == 14
    assert counts["rejected_by_reason"] == {"empty": 2}
    assert packpipe.manifest(packed)["mask_column"] == "attention_mask"
    assert "masked    11 tokens of padding in the source left out" in str(packpipe.summarize(out))
    assert packpipe.verify(out) == packpipe.verify(out, dataset) == []
    # With it, models of transformers would not look where positions start again.
    assert "attention_mask" not in packed.column_names
    if layout == "fixed":
        wanted = {n: [row, [-t for t in row]] for n, row in KEPT.items()}
        assert tokens_of(packed, "input_ids", "labels") == wanted
    # Opened again, with no other row.
    again = packpipe.pack(dataset, 8, layout=layout, output=out, on_error="raise", **PACK)
    assert again[:] == packed[:]


def test_verify_finds_another_mask_than_the_one_packed_with(tmp_path):
    packpipe.pack(made(PADDED, "int8"), 8, output=tmp_path / "out", **PACK)
    other = [[(token, 1) for token, _ in row] for row in PADDED]
    said = [str(one) for one in packpipe.verify(tmp_path / "out", made(other, "int8"))]
    assert "examples 0, 1, 3: 3 tokens in rows, expected 5, the first of them" in said


def test_a_length_is_that_without_padding(tmp_path):
    packed = packpipe.pack(made(PADDED[:2], "int8"), 3, output=tmp_path / "out", **PACK)
    assert tokens_of(packed, "input_ids") == {0: [[5, 6, 7]], 1: [[8, 9, 10]]}


def test_a_mask_is_packed_if_it_is_named(tmp_path):
    columns = ["input_ids", "attention_mask"]
    packed = packpipe.pack(
        made(PADDED, "int8"),
        8,
        output=tmp_path / "out",
        token_columns=columns,
        value_columns=[],
        **PACK,
    )
    wanted = {n: [row, [1] * len(row)] for n, row in KEPT.items()}
    assert tokens_of(packed, *columns) == wanted


def test_a_mask_counts_where_rows_are_selected(tmp_path):
    rows = made([[(5, 1), (6, 1)], [(7, 1), (8, 0)], [(9, 1)]], "int8").select([0, 2])
    packed = packpipe.pack(rows, 8, output=tmp_path / "out", **PACK)
    assert "mask_column" not in packpipe.manifest(packed)


def test_any_zero_of_a_mask_of_floats_is_padding(tmp_path):
    kinds = datasets.Features(input_ids=List(Value("int64")), attention_mask=List(Value("float32")))
    rows = {"input_ids": [[1, 2, 3]], "attention_mask": [[1.0, -0.0, 0.0]]}
    dataset = datasets.Dataset.from_dict(rows, features=kinds)
    packed = packpipe.pack(dataset, 8, output=tmp_path / "out", **PACK)
    assert packed[0]["input_ids"][:2] == [1, 0]
    assert packpipe.manifest(packed)["counts"]["masked_tokens"] == 2
    rows["attention_mask"] = [[1.0, float("nan"), 0.0]]
    with pytest.raises(ValueError, match="attention_mask is nan, expected 0 at padding"):
        packpipe.pack(datasets.Dataset.from_dict(rows, features=kinds), 8, progress=False)


def test_the_mask_goes_with_input_ids_also_if_it_is_not_packed(tmp_path):
    dataset = made(PADDED, "int8")
    only = {"token_columns": ["input_ids", "labels"]}
    packed = packpipe.pack(dataset, 8, output=tmp_path / "out", **only, **PACK)
    assert "attention_mask" not in packed.column_names
    assert tokens_of(packed, "input_ids") == {n: [row] for n, row in KEPT.items()}
    assert packpipe.verify(tmp_path / "out", dataset) == []
    other = {"token_columns": "labels", "value_columns": []}
    whole = packpipe.pack(dataset, 8, output=tmp_path / "whole", **other, **PACK)
    assert packpipe.manifest(whole)["counts"]["tokens"] == 25


def test_a_folder_without_padding_says_nothing_of_a_mask(tmp_path):
    whole = [[(token, 1) for token, _ in row] for row in PADDED]
    packed = packpipe.pack(made(whole, "int8"), 8, output=tmp_path / "out", **PACK)
    found = packpipe.manifest(packed)
    assert "mask_column" not in found
    assert "masked_tokens" not in found["counts"]


def test_a_mask_that_does_not_say_what_is_padding_is_refused(tmp_path):
    rows = [[(1, 0), (2, -1)]]
    message = "attention_mask is -1, expected 0 at padding, and numbers above 0 at tokens; rename"
    with pytest.raises(ValueError, match=message):
        packpipe.pack(made(rows, "int64"), 8, output=tmp_path / "out", **PACK)


def test_what_is_bad_beside_a_mask_is_rejected_as_bad(tmp_path):
    columns = {
        "input_ids": [[1, 2, 3], [4, 5], None, [6, 7], [8]],
        "attention_mask": [[1, 0, 1], [1], [1], [0, None], [0]],
    }
    options = {"output": tmp_path / "out", "max_bad_fraction": 1.0, **PACK}
    packed = packpipe.pack(Dataset.from_dict(columns), 8, **options)
    reasons = {one["example_index"]: one["reason"] for one in packpipe.rejects(packed)}
    assert reasons == {1: "lengths differ", 2: "null", 3: "null", 4: "empty"}
    assert packpipe.manifest(packed)["counts"]["masked_tokens"] == 2
    assert packpipe.verify(tmp_path / "out", Dataset.from_dict(columns)) == []


def test_packer_leaves_out_padding_and_empty_sequences(caplog):
    dataset = made(PADDED, "int64")
    options = {
        "batched": True,
        "batch_size": 2,
        "with_indices": True,
        "load_from_cache_file": False,
    }
    with caplog.at_level(logging.DEBUG, "packpipe"):
        packed = dataset.map(packpipe.Packer(8), remove_columns=dataset.column_names, **options)
    assert tokens_of(packed, "input_ids") == {n: [row] for n, row in KEPT.items()}
    assert "example 2 left out: input_ids holds nothing" in caplog.text


@pytest.mark.parametrize("overflow", ["error", "truncate"])
def test_texts_of_pairs_are_packed_without_padding(tmp_path, overflow):
    images = [{"bytes": pictures.encoded_image(8, 8, seed), "path": None} for seed in range(6)]
    texts = made(PADDED, "int8")
    pairs = Dataset.from_dict(
        {"image": images, **{name: texts[name][:] for name in ("input_ids", "attention_mask")}},
        features=Features(
            {
                "image": Image(),
                "input_ids": List(Value("int32")),
                "attention_mask": List(Value("int8")),
            }
        ),
    )
    longest = 5 if overflow == "error" else 3
    options: dict[str, Any] = {"patch_size": 8, "token_columns": "input_ids", "num_workers": 0}
    rows = packpipe.pack_pairs(
        pairs, 2, 8, output=tmp_path / "out", max_text=longest, overflow=overflow, **options, **PACK
    )
    assert rows[0]["example_index"][:] == rows[1]["example_index"][:]
    assert tokens_of(rows[1], "input_ids") == {n: [row[:longest]] for n, row in KEPT.items()}
    assert packpipe.verify(tmp_path / "out", pairs) == []
    assert packpipe.verify(tmp_path / "out" / "images", pairs) == []


@pytest.mark.parametrize("on_error", ["quarantine", "raise"])
def test_empty_sequences_are_no_bad_input(tmp_path, on_error):
    dataset = Dataset.from_dict({"input_ids": [[], [1, 2], []] * 200})
    for _ in range(2):  # written, then opened again
        packed = packpipe.pack(dataset, 8, output=tmp_path / "out", on_error=on_error, **PACK)
    assert packpipe.manifest(packed)["counts"]["rejected_by_reason"] == {"empty": 400}
    assert packpipe.rejects(packed)["example_index"][:3] == [0, 2, 3]
    assert packpipe.verify(tmp_path / "out", dataset) == []


def test_nulls_among_empty_sequences_count_alone(tmp_path):
    dataset = Dataset.from_dict({"input_ids": [[], [1, 2], None, []] * 5})
    message = r"^rejected is 5 of 20 examples \(25\.00%\).*First: example 2 \(null"
    with pytest.raises(TooManyRejects, match=message):
        packpipe.pack(dataset, 8, output=tmp_path / "out", **PACK)


def test_nothing_but_empty_sequences_gives_no_row(tmp_path):
    assert (
        packpipe.Packer(8)({"input_ids": [[1], [2, 3]], "attention_mask": [[0], [0, 0]]}).num_rows
        == 0
    )
    packed = packpipe.pack(
        Dataset.from_dict({"input_ids": [[0], []]}).map(
            lambda row: {"attention_mask": [0] * len(row["input_ids"])}
        ),
        8,
        output=tmp_path / "out",
        **PACK,
    )
    assert len(packed) == 0
    assert len(packpipe.rejects(packed)) == 2
