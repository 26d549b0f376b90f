"""Token sequences: every token in is a token out, once, whatever the form of the dataset."""

from __future__ import annotations

import re
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, LargeList, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from packpipe import (
    PackedLoader,
    Packer,
    TokenBatch,
    manifest,
    pack,
    read_tokens,
    rejects,
    verify,
)
from packpipe.building import build
from packpipe.building.job import cut_packs
from packpipe.planning.token_config import OVERFLOWS, TokenConfig
from packpipe.planning.token_plan import plan_tokens
from packpipe.rows import files
from packpipe.rows.copy import copy_tokens, number_tokens
from packpipe.rows.rejects import TooManyRejects
from packpipe.sources.token_source import one_view, token_column

DTYPES = ("int16", "int32", "int64", "uint16", "uint32")
sequences = st.lists(st.lists(st.integers(0, 2**15 - 1), max_size=20), min_size=1, max_size=30)


def labels_of(tokens: list[int]) -> list[int]:
    return [-token for token in tokens]


def made(rows: list[list[int]], dtype: str, large: bool) -> Dataset:
    kind = LargeList if large else List
    features = Features(
        {
            "labels": kind(Value("int32")),
            "input_ids": kind(Value(dtype)),
            "name": Value("string"),
        }
    )
    columns = {
        "labels": [labels_of(row) for row in rows],
        "input_ids": rows,
        "name": [f"n{number}" for number in range(len(rows))],
    }
    return Dataset.from_dict(columns, features=features)


@st.composite
def forms(draw: Any) -> tuple[Dataset, list[list[int]]]:
    """Return a dataset in one of the forms it can have, and its sequences."""
    rows = draw(sequences)
    dataset = made(rows, draw(st.sampled_from(DTYPES)), draw(st.booleans()))
    form = draw(st.sampled_from(("plain", "chunks", "slice", "select", "filter", "shuffle")))
    numbers = list(range(len(rows)))
    if form == "chunks":
        cut = draw(st.integers(0, len(rows)))
        parts = [dataset.select(numbers[:cut]), dataset.select(numbers[cut:])]
        dataset = datasets.concatenate_datasets([part for part in parts if len(part)])
    elif form == "slice":
        low, high = sorted((draw(st.integers(0, len(rows))), draw(st.integers(0, len(rows)))))
        dataset, numbers = dataset.select(numbers[low:high]), numbers[low:high]
    elif form == "select":
        numbers = draw(st.lists(st.sampled_from(numbers), max_size=20, unique=True))
        dataset = dataset.select(numbers)
    elif form == "filter":
        dataset = dataset.filter(lambda tokens: len(tokens) % 2 == 0, input_columns="input_ids")
        numbers = [number for number in numbers if len(rows[number]) % 2 == 0]
    elif form == "shuffle":
        order = np.random.default_rng(0).permutation(len(rows)).tolist()
        dataset, numbers = dataset.select(order), order
    return dataset, [rows[number] for number in numbers]


def pieces_of(packed: Dataset) -> dict[int, dict[int, dict[str, Any]]]:
    """Return what each row says of its segments: by example, by fragment."""
    found: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in packed:
        start = 0
        per_segment = zip(
            row["seq_lens"], row["example_index"], row["fragment"], row["name"], strict=True
        )
        for number, (length, example, fragment, name) in enumerate(per_segment, 1):
            place = slice(start, start + length)
            start += length
            piece = {column: row[column][place] for column in ("input_ids", "labels")}
            piece["name"] = name
            if "segment_ids" in row:
                assert row["segment_ids"][place] == [number] * length
                assert row["position_ids"][place] == list(range(length))
            assert fragment not in found[example]
            found[example][fragment] = piece
        if "segment_ids" in row:
            rest = slice(start, None)
            assert set(row["segment_ids"][rest]) <= {0}
            assert set(row["position_ids"][rest]) <= {0}
            assert set(row["input_ids"][rest]) <= {7}
            assert set(row["labels"][rest]) <= {-100}
        else:
            assert start == len(row["input_ids"])
    return found


def expected(tokens: list[int], overflow: str, seq_len: int) -> list[list[int]]:
    """Return the pieces of a sequence: the slow twin of `plan_tokens`."""
    if len(tokens) <= seq_len:
        return [tokens] if tokens else []
    return {
        "split": [tokens[start : start + seq_len] for start in range(0, len(tokens), seq_len)],
        "truncate": [tokens[:seq_len]],
        "drop": [],
    }[overflow]


@settings(max_examples=2 * settings.default.max_examples)
@given(
    forms(),
    st.integers(1, 24),
    st.sampled_from(("split", "truncate", "drop")),
    st.sampled_from(("fixed", "ragged")),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_token_in_is_a_token_out(
    tmp_path_factory, form, seq_len, overflow, layout, masked, seed
):
    dataset, rows = form
    packed = pack(
        dataset,
        seq_len,
        output=tmp_path_factory.mktemp("rows") / "packed",
        overflow=overflow,
        layout=layout,
        pad_token_id=7,
        mask_first_label=masked,
        seed=seed,
        max_bad_fraction=1.0,
        progress=False,
    )
    found = pieces_of(packed)
    absent = {reject["example_index"]: reject["reason"] for reject in rejects(packed)}
    dtypes = {name: dataset.features[name].feature for name in ("input_ids", "labels")}
    assert {name: packed.features[name].feature for name in dtypes} == dtypes
    names = dataset["name"][:]
    for example, tokens in enumerate(rows):
        pieces = expected(tokens, overflow, seq_len)
        assert [found[example][number]["input_ids"] for number in range(len(pieces))] == pieces
        for number, piece in enumerate(pieces):
            labels = labels_of(piece)
            assert found[example][number]["labels"] == [-100 if masked else labels[0], *labels[1:]]
            assert found[example][number]["name"] == names[example]
        assert len(found.pop(example, ())) == len(pieces)
        reason = None if pieces else "too long" if tokens else "empty"
        assert absent.get(example) == reason
    assert not found
    counts = manifest(packed)["counts"]
    assert counts["read"] == len(rows) == counts["packed"] + counts["rejected"]
    assert counts["tokens"] == sum(
        len(piece) for tokens in rows for piece in expected(tokens, overflow, seq_len)
    )
    lost = sum(max(0, len(tokens) - seq_len) for tokens in rows) if overflow == "truncate" else 0
    assert counts["truncated_tokens"] == lost
    assert counts["packs"] >= counts["bound"]


@given(forms(), st.integers(1, 24), st.integers(1, 40), st.booleans())
def test_map_gives_the_same_tokens_batch_by_batch(form, seq_len, batch_size, ragged):
    dataset, rows = form
    if not len(dataset):
        return
    packer = Packer(
        seq_len,
        overflow="split",
        layout="ragged" if ragged else "fixed",
        pad_token_id=7,
        on_error="drop",
    )
    packed = dataset.map(
        packer,
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        remove_columns=dataset.column_names,
        load_from_cache_file=False,
    )
    found = pieces_of(packed)
    for example, tokens in enumerate(rows):
        pieces = expected(tokens, "split", seq_len)
        assert [found[example][number]["input_ids"] for number in range(len(pieces))] == pieces


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(("u1", "i2", "f4", "i8")), st.booleans())
def test_copying_is_its_naive_twin(data, dtype, threads):
    arrays = data.draw(
        st.lists(st.lists(st.integers(0, 100), max_size=9), min_size=1, max_size=4).map(
            lambda many: [np.array(one, dtype) for one in many]
        )
    )
    values, firsts = one_view(arrays)
    runs = []
    for array, first in zip(arrays, firsts.tolist(), strict=True):
        assert values[first : first + len(array)].tolist() == array.tolist()
        low = data.draw(st.integers(0, len(array)))
        runs.append((first + low, array[low : data.draw(st.integers(low, len(array)))]))
    gaps = [data.draw(st.integers(0, 3)) for _ in runs]
    places, end = [], 0
    for gap, (_, run) in zip(gaps, runs, strict=True):
        places.append(end + gap)
        end += gap + len(run)
    out, wanted = np.full(end, 9, dtype), np.full(end, 9, dtype)
    ids, positions = np.zeros(end, np.int32), np.zeros(end, np.int32)
    wanted_ids, wanted_positions = ids.copy(), positions.copy()
    for number, (place, (_, run)) in enumerate(zip(places, runs, strict=True), 1):
        wanted[place : place + len(run)] = run
        wanted_ids[place : place + len(run)] = number
        wanted_positions[place : place + len(run)] = range(len(run))
    lens = np.array([len(run) for _, run in runs], np.int32)
    at = np.array(places, np.int64)
    starts = np.array([start for start, _ in runs], np.int64)
    numbers = np.arange(1, len(runs) + 1, dtype=np.int32)
    with ThreadPoolExecutor(2) as executor:
        several = executor if threads else None
        copy_tokens(values, starts, lens, at, out, executor=several)
        number_tokens(lens, numbers, at, ids, positions, executor=several)
    assert out.tolist() == wanted.tolist()
    assert ids.tolist() == wanted_ids.tolist()
    assert positions.tolist() == wanted_positions.tolist()


def test_ding_s_example():
    """Documents 14, 7, 5, 2, 3 at 8 tokens: one of five is cut, four rows."""
    plan = plan_tokens([14, 7, 5, 2, 3], TokenConfig(seq_len=8, overflow="split"))
    assert (len(plan), plan.num_cut) == (4, 1)
    assert sorted(plan.seq_lens.tolist()) == [2, 3, 5, 6, 7, 8]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 64), st.integers(0, 9)
)
def test_a_plan_partitions_the_tokens(lengths, seq_len, seed):
    plan = plan_tokens(lengths, TokenConfig(seq_len=seq_len, overflow="split"), seed=seed)
    assert sorted(plan.order.tolist()) == list(range(len(plan.index)))
    loads = np.add.reduceat(plan.seq_lens[plan.order], plan.offsets[:-1])
    assert loads.max() <= seq_len
    assert len(plan) >= plan.quality.bound
    for row, length in enumerate(lengths):
        own = np.flatnonzero(plan.index == row)
        assert plan.seq_lens[own].sum() == length
        assert plan.fragments[own].tolist() == list(range(len(own)))
        assert (plan.starts[own] == np.cumsum(plan.seq_lens[own]) - plan.seq_lens[own]).all()
    again = plan_tokens(lengths, TokenConfig(seq_len=seq_len, overflow="split"), seed=seed)
    assert again.order.tolist() == plan.order.tolist()


def test_rows_do_not_depend_on_how_the_dataset_is_stored(tmp_path):
    rows = [[number] * (1 + number % 11) for number in range(200)]
    whole = made(rows, "int32", large=False)
    parts = datasets.concatenate_datasets([whole.select(range(90)), whole.select(range(90, 200))])
    back = whole.select(list(reversed(range(200)))).select(list(reversed(range(200))))
    packed = [
        pack(one, 16, output=tmp_path / str(number), progress=False)
        for number, one in enumerate((whole, parts, back))
    ]
    assert packed[0][:] == packed[1][:] == packed[2][:]


def test_bools_floats_and_fixed_lists_travel_too(tmp_path):
    features = Features(
        {
            "input_ids": List(Value("int64"), length=4),
            "loss_mask": List(Value("bool")),
            "weight": List(Value("float32")),
        }
    )
    columns = {
        "input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]],
        "loss_mask": [[True, False, True, True], [False, False, True, False]],
        "weight": [[0.5, 1, 2, 3], [4, 5, 6, 7]],
    }
    packed = pack(
        Dataset.from_dict(columns, features=features), 9, output=tmp_path / "a", progress=False
    )
    (row,) = packed
    first, second = row["example_index"]
    assert row["input_ids"] == [*columns["input_ids"][first], *columns["input_ids"][second], 0]
    masks = columns["loss_mask"][first] + columns["loss_mask"][second]
    assert row["loss_mask"] == [*masks, False]
    assert packed.features["loss_mask"] == List(Value("bool"), length=9)
    assert row["weight"] == [*columns["weight"][first], *columns["weight"][second], 0]


def test_labels_are_made_when_they_are_to_be_masked(tmp_path):
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]})
    (row,) = pack(dataset, 6, mask_first_label=True, output=tmp_path / "a", progress=False)
    order = row["example_index"]
    wanted = {0: [-100, 2, 3], 1: [-100, 5]}
    assert row["labels"] == [*wanted[order[0]], *wanted[order[1]], -100]


def test_a_slice_that_map_hands_out_is_read_through_its_offsets():
    whole = pa.chunked_array([pa.array([[1, 2], [3], None, [4, 5, 6], []])])
    column = token_column(whole.slice(1, 3))
    assert [
        column.values[a : a + n].tolist() for a, n in zip(column.starts, column.lens, strict=True)
    ] == [
        [3],
        [],
        [4, 5, 6],
    ]
    assert column.bad.tolist() == [False, True, False]


def beyond_2_gib(kind: str) -> Dataset:
    """3,072 sequences, of which 3 have a token and the others 9, beside 3 GiB of text.

    The texts take no memory: their pages are never written to, and all chunks share them.
    """
    size, each = 1024, 2**20
    wide = kind.startswith("large")
    ends = (np.arange(size + 1) * each).astype(np.int64 if wide else np.int32)
    zeros = np.zeros(size * each, np.uint8)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(zeros)]
    texts = pa.chunked_array([pa.Array.from_buffers(getattr(pa, kind)(), size, buffers)] * 3)
    tokens = [[n] * (1 if n in (0, 1500, 3071) else 9) for n in range(3 * size)]
    table = pa.table({"input_ids": pa.array(tokens), "text": texts})
    return Dataset(table, fingerprint="zeros")  # else `datasets` would hash them


@pytest.mark.parametrize("kind", ["string", "binary", "large_string"])
def test_more_than_2_gib_of_text_may_stand_beside_tokens(kind, tmp_path):
    dataset = beyond_2_gib(kind)
    out, columns = tmp_path / "out", {"token_columns": "input_ids", "value_columns": "text"}
    packed = pack(dataset, 8, overflow="drop", output=out, progress=False, **columns)
    assert packed.features["text"] == List(Value(kind))
    (row,) = packed
    nothing = "\0" * 2**20
    assert sorted(row["input_ids"][:3]) == [0, 1500, 3071]
    assert row["text"] == [nothing.encode() if kind == "binary" else nothing] * 3
    assert verify(out, dataset) == []


def peak_memory(run: Callable[[], Any]) -> int:
    """Return the most bytes that NumPy and Arrow have at a time, beyond those from before."""
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


@pytest.mark.parametrize("form", ["string", "large_string", "shuffled"])
def test_texts_beside_tokens_take_a_batch_of_memory_not_all(form, tmp_path, monkeypatch):
    kind = "string" if form == "shuffled" else form
    features = Features({"input_ids": List(Value("int32")), "text": Value(kind)})
    texts = [chr(97 + n % 26) * 2**16 for n in range(1024)]  # 64 MiB
    columns = {"input_ids": [[n] * (1 + n % 7) for n in range(1024)], "text": texts}
    dataset = Dataset.from_dict(columns, features=features)
    if form == "shuffled":
        dataset = dataset.shuffle(seed=1)
    pack(dataset.select(range(8)), 8, output=tmp_path / "warm", progress=False)
    monkeypatch.setattr(files, "BATCH_BYTES", 2**21)
    out = tmp_path / "out"
    peak = peak_memory(lambda: pack(dataset, 8, output=out, progress=False))
    assert peak < 10 * 2**20
    packed = datasets.load_from_disk(str(out))
    found = {
        row: one
        for some in packed
        for row, one in zip(some["example_index"], some["text"], strict=True)
    }
    assert len(found) == 1024
    assert all(found[row] == one for row, one in enumerate(dataset["text"]))


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 60), st.integers(0, 5))
def test_rows_are_cut_by_their_bytes(sizes, most, start):
    packs = range(start, start + len(sizes))
    cut = cut_packs(packs, np.array([7] * start + sizes, np.int64), most)
    assert [pack for some in cut for pack in some] == list(packs)
    held = [[sizes[pack - start] for pack in some] for some in cut]
    assert all(sum(some) <= most or len(some) == 1 for some in held)
    assert all(sum(one) + other[0] > most for one, other in pairwise(held))


def test_the_space_asked_for_counts_texts(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(build, "check_space", lambda _, size, __: asked.append(size))
    for length in (10, 1010):
        columns = {"input_ids": [[1], [2, 3]], "text": ["a" * length, "b" * length]}
        pack(Dataset.from_dict(columns), 8, output=tmp_path / f"{length}", progress=False)
    assert asked[1] - asked[0] == 2000


def test_nulls_are_rejected_by_name(tmp_path):
    dataset = Dataset.from_dict(
        {"input_ids": [[1, 2], None, [3, None], [4]], "labels": [[1, 2], [1], [3, 4], [5, 6]]}
    )
    packed = pack(dataset, 8, output=tmp_path / "a", max_bad_fraction=1.0, progress=False)
    assert [(reject["example_index"], reject["reason"]) for reject in rejects(packed)] == [
        (1, "null"),
        (2, "null"),
        (3, "lengths differ"),
    ]
    assert packed["example_index"][:] == [[0]]


def test_an_empty_dataset_has_its_columns(tmp_path):
    packed = pack(made([], "int32", large=False), 8, output=tmp_path / "a", progress=False)
    assert len(packed) == 0
    assert {"input_ids", "labels", "name", "fragment"} <= set(packed.column_names)


def test_the_same_call_returns_the_same_folder(tmp_path):
    dataset = made([[1, 2, 3]], "int32", large=False)
    one = pack(dataset, 8, output=tmp_path / "a", progress=False)
    assert pack(dataset, 8, output=tmp_path / "a", progress=False)[:] == one[:]
    with pytest.raises(FileExistsError, match="rows made with the same seq_len;"):
        pack(dataset, 9, output=tmp_path / "a", progress=False)


TEXT = made([[1] * 5, [2] * 30], "int32", large=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"lengths\[1\] is 30, expected at most 8 \(seq_len\); pass overflow="),
        ({"overflow": "cut"}, "overflow is 'cut', expected one of 'error', 'split'"),
        ({"layout": "flat"}, "layout is 'flat', expected one of 'fixed', 'ragged'"),
        ({"resolution": "native"}, "option is 'resolution', expected one of seq_len, overflow"),
        ({"materialize": False}, "materialize is False, expected True for tokens"),
        ({"token_columns": ["name"]}, r"token_columns\[0\] is 'name', expected different ones of"),
        ({"token_columns": []}, "token_columns is \\[\\], expected one name at least"),
        ({"token_columns": "labels"}, r"features\['input_ids'\] is List"),
        ({"value_columns": ["nom"]}, r"features\['nom'\] is None, expected a column of one"),
        (
            {"pad_token_id": 2**40},
            r"features\['input_ids'\] is 'int32', expected a type that holds",
        ),
        ({"max_segments": 0}, "max_segments is 0, expected an integer in"),
    ],
)
def test_a_bad_call_is_refused(options, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        pack(TEXT, 8, output=tmp_path / "a", progress=False, **options)


def test_more_bad_calls_are_refused(tmp_path):
    with pytest.raises(ValueError, match="columns of text is"):
        pack(Dataset.from_dict({"text": ["a"]}), 8)
    reserved = TEXT.rename_column("name", "fragment")
    with pytest.raises(ValueError, match="column is 'fragment', expected none of segment_ids"):
        pack(reserved, 8, overflow="split")
    unsigned = Dataset.from_dict(
        {"labels": [[1]]}, features=Features({"labels": List(Value("uint16"))})
    )
    with pytest.raises(ValueError, match=r"features\['labels'\] is 'uint16', expected a type that"):
        pack(unsigned, 8)
    floats = TEXT.rename_columns({"labels": "a", "input_ids": "b"})
    with pytest.raises(ValueError, match="mask_first_label is True, expected False without"):
        pack(floats, 64, mask_first_label=True)
    with pytest.raises(ValueError, match=r"lengths\[0\] is 0, expected 1 or more"):
        plan_tokens([0], TokenConfig(seq_len=4))
    missing = Dataset.from_dict({"input_ids": [None, [1]]})
    with pytest.raises(TooManyRejects, match="example 0 \\(null"):
        pack(missing, 8, output=tmp_path / "b")
    with pytest.raises(ValueError, match=r"example 0 of the batch is bad \(null.*usable sequence"):
        missing.map(Packer(8, token_columns="auto"), batched=True, remove_columns=["input_ids"])


def test_what_is_dropped_as_asked_is_not_bad(tmp_path):
    for _ in range(2):  # written, then opened again
        packed = pack(TEXT, 8, overflow="drop", output=tmp_path / "a", progress=False)
    assert [reject["reason"] for reject in rejects(packed)] == ["too long"]


def test_overflows_are_all_known():
    assert OVERFLOWS == ("error", "split", "truncate", "drop")


@settings(max_examples=25, deadline=None)
@given(sequences, st.integers(1, 24), st.integers(1, 4), st.integers(0, 5))
def test_batches_hold_the_rows_and_resume_at_any_step(tmp_path_factory, rows, seq_len, size, stop):
    packed = pack(
        made(rows, "uint16", large=False),
        seq_len,
        output=tmp_path_factory.mktemp("rows") / "packed",
        overflow="split",
        max_bad_fraction=1.0,
        progress=False,
    )
    if not len(packed):
        return

    def loader(**options: Any) -> PackedLoader:
        return PackedLoader(packed, size, rank=0, world_size=1, seed=3, tail="pad", **options)

    batches = list(loader())
    stored = read_tokens(packed)
    seen = []
    for batch in batches:
        assert batch.tokens["input_ids"].dtype == torch.int64
        assert batch.tokens["input_ids"].shape == (size, seq_len)
        assert (batch.seq_lens.sum(1) == (batch.segment_ids > 0).sum(1)).all()
        for row in range(size):
            tokens = batch.tokens["input_ids"][row][batch.segment_ids[row] > 0]
            seen.append((batch.example_index[row].tolist(), tokens.tolist()))
    wanted = []
    for row, ids in enumerate(stored.segment_ids):
        start, end = stored.offsets[row : row + 2]
        examples = stored.example_index[start:end].tolist()
        absent = [-1] * (batches[0].example_index.shape[1] - len(examples))
        wanted.append((examples + absent, stored.tokens["input_ids"][row][ids > 0].tolist()))
    empty = ([-1] * batches[0].example_index.shape[1], [])
    assert sorted(one for one in seen if one != empty) == sorted(wanted)
    first = loader()
    taken = [batch for _, batch in zip(range(stop), first, strict=False)]
    resumed = loader(num_workers=1)
    resumed.load_state_dict(first.state_dict())
    rest = [] if len(taken) == len(batches) else list(resumed)
    for one, other in zip([*taken, *rest], batches, strict=True):
        assert torch.equal(one.tokens["input_ids"], other.tokens["input_ids"])
        assert torch.equal(one.position_ids, other.position_ids)
        assert torch.equal(one.example_index, other.example_index)


def test_token_rows_that_are_not_there_are_refused(tmp_path):
    ragged = pack(TEXT, 32, layout="ragged", output=tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="layout is 'ragged', expected rows of one length"):
        read_tokens(ragged)
    with pytest.raises(ValueError, match="column 'patches' is 'missing', expected fixed_size_l"):
        read_tokens(TEXT)
    fixed = pack(TEXT, 64, output=tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match=r"num_segments\[0\] is 2, expected at most 1"):
        TokenBatch.from_rows(read_tokens(fixed), max_segments=1)
    assert read_tokens(fixed, [0]).segments["name"].to_pylist() == fixed["name"][0]


def test_values_of_sequences_reach_the_batch(tmp_path):
    columns = {
        "input_ids": [[1, 2], [3], [4, 5, 6]],
        "labels": [7, 8, 9],
        "weight": [0.5, None, 1.5],
        "rare": [None, 1, 2],
        "right": [True, False, True],
        "name": ["a", "b", None],
    }
    packed = pack(Dataset.from_dict(columns), 4, output=tmp_path / "packed", progress=False)
    (batch,) = PackedLoader(packed, 2, rank=0, world_size=1)
    assert batch.segments.keys() == columns.keys() - {"input_ids"}
    index = batch.example_index
    for row, column in batch.present.nonzero().tolist():
        example = int(index[row, column])
        for name in ("labels", "right"):
            assert batch.segments[name][row, column] == columns[name][example]
        for name in ("rare", "name"):
            assert batch.segments[name][row][column] == columns[name][example]
        weight, wanted = float(batch.segments["weight"][row, column]), columns["weight"][example]
        assert weight == wanted or (wanted is None and np.isnan(weight))
    absent = ~batch.present
    assert absent.any()
    assert (batch.segments["labels"][absent] == -100).all()
    assert batch.segments["weight"][absent].isnan().all()
    assert not batch.segments["right"][absent].any()
    assert batch.segments["right"].dtype == torch.bool
    moved = batch.to("meta")
    assert moved.segments["labels"].device.type == "meta"
    assert moved.segments["name"] == batch.segments["name"]


def test_labels_of_sequences_are_not_masked(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [1]})
    with pytest.raises(
        ValueError, match=r"features\['labels'\] is Value.*for mask_first_label=True"
    ):
        pack(rows, 4, mask_first_label=True, output=tmp_path / "packed")


def with_bools(kind: str = "bool") -> Dataset:
    """Return sequences beside bools, for every token and for every sequence, in several chunks."""
    masks = [[(place + row) % 3 == 0 for place in range(1 + row % 5)] for row in range(30)]
    columns = {
        "input_ids": [[row] * len(mask) for row, mask in enumerate(masks)],
        "labels": [[-row] * len(mask) for row, mask in enumerate(masks)],
        "mask": masks,
    }
    kinds = {"input_ids": "int64", "labels": "int64", "mask": kind}
    features = Features({name: List(Value(kinds[name])) for name in columns})
    whole = Dataset.from_dict(columns, features=features)
    return datasets.concatenate_datasets([whole.select(range(7)), whole.select(range(7, 30))])


@pytest.mark.parametrize("seq_len", [8, 13])  # rows of whole bytes of bits, and others
def test_bools_are_bools_in_rows_and_batches(tmp_path, monkeypatch, seq_len):
    monkeypatch.setattr(files, "BATCH_BYTES", 700)  # some rows a record batch
    dataset, out = with_bools(), tmp_path / "out"
    packed = pack(dataset, seq_len, output=out, progress=False)
    assert packed.features["mask"] == List(Value("bool"), length=seq_len)
    assert manifest(packed)["bool_columns"] == ["mask"]
    assert verify(out, dataset) == []
    rows = read_tokens(packed, [3, 1])
    assert rows.tokens["mask"].dtype == np.bool_
    assert rows.tokens["mask"].tolist() == [packed[3]["mask"], packed[1]["mask"]]
    batches = list(PackedLoader(packed, 2, rank=0, world_size=1, tail="pad"))
    assert len(batches) > 3
    seen = 0
    for batch in batches:
        mask, labels = batch.tokens["mask"], batch.tokens["labels"]
        assert mask.dtype == torch.bool
        # A uint8 mask would be taken for row numbers by its ~.
        assert len(labels[~mask]) == int((~mask).sum())
        for row, here in enumerate(batch.segment_ids):
            for number, example in enumerate(batch.example_index[row].tolist(), 1):
                if example >= 0:
                    assert mask[row][here == number].tolist() == dataset[example]["mask"]
                    seen += 1
            assert not mask[row][here == 0].any()
    assert seen == len(dataset)


@pytest.mark.parametrize("way", ["ragged", "map"])
def test_bools_are_bools_in_every_way_of_packing(tmp_path, way):
    dataset, out = with_bools(), tmp_path / "out"
    if way == "ragged":
        packed = pack(dataset, 8, layout="ragged", output=out, progress=False)
        assert verify(out, dataset) == []
    else:
        packed = dataset.map(Packer(8), batched=True, remove_columns=dataset.column_names)
    assert packed.features["mask"].feature == Value("bool")
    found = sorted(token for row in packed["mask"] for token in row)
    number = sum(len(row) for row in packed["mask"])
    true = sum(map(sum, dataset["mask"]))
    assert found == [False] * (number - true) + [True] * true


def test_old_rows_of_bools_stay_what_they_were(tmp_path):
    # What was written for bools before they were kept, but for the source's fingerprint.
    packed = pack(with_bools("uint8"), 8, output=tmp_path / "old", progress=False)
    assert "bool_columns" not in manifest(packed)
    assert verify(tmp_path / "old", with_bools()) == []
    (batch,) = PackedLoader(packed, len(packed), rank=0, world_size=1)
    assert batch.tokens["mask"].dtype == torch.uint8


def test_bools_cannot_hold_padding_that_is_no_bool(tmp_path):
    columns = {"input_ids": [[1, 2]], "labels": [[True, False]]}
    message = r"features\['labels'\] is 'bool', expected a type that holds -100; cast_column it"
    with pytest.raises(ValueError, match=message):
        pack(Dataset.from_dict(columns), 8, output=tmp_path / "a", progress=False)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["a", "b"], "Value('string')"),
        ([True, False], "Value('bool')"),
    ],
)
def test_labels_of_sequences_are_numbers_unless_they_are_named(tmp_path, labels, found):
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": labels})
    message = (
        f"features['labels'] is {found}, expected integers, a ClassLabel, floats or lists of "
        "numbers; class_encode_column it, or name the columns to be stored in value_columns"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack(rows, 4, output=tmp_path / "packed")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Packer(4)(rows.data.table)
    packed = pack(rows, 4, value_columns="labels", output=tmp_path / "packed", progress=False)
    (row,) = packed
    assert row["labels"] == [labels[number] for number in row["example_index"]]


def test_labels_of_tokens_are_integers(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[0.5, 1.5]]})
    message = (
        r"^features\['labels'\] is 'float64', expected integers; cast_column or rename_column it$"
    )
    with pytest.raises(ValueError, match=message):
        pack(rows, 4, output=tmp_path / "packed")
