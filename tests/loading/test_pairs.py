"""Batches of pairs: each image beside its own text, whichever images fail; resumed to the byte."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import loading
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from strategies import encode

import packpipe
from packpipe import PackedLoader, PairBatch, rejects

OPTIONS: dict[str, Any] = {"seq_len": 16, "patch_size": 8, "max_text": 6, "overflow": "truncate"}
ANY = {"max_bad_fraction": 1.0, "progress": False, "num_workers": 0}


class Pair(NamedTuple):
    """An image of one colour, and a text of one word, both told from all others."""

    height: int
    width: int
    num_words: int
    image: str = "good"


def colour(number: int) -> tuple[int, int, int]:
    return number, 255 - number, 7 * number % 256


def encoded(number: int, pair: Pair) -> bytes:
    if pair.image == "no header":
        return b"no image"
    png = encode(PillowImage.new("RGB", (pair.width, pair.height), colour(number)), "PNG")
    # Its header tells a size, so it is planned; then there are no pixels to decode.
    return png if pair.image == "good" else png[: png.index(b"IDAT") + 4]


def packed(pairs: list[Pair], folder: Any, **options: Any) -> tuple[Dataset, Dataset]:
    """Both tables of some pairs."""
    columns = {
        "image": [{"bytes": encoded(*one), "path": None} for one in enumerate(pairs)],
        "input_ids": [[number + 1] * pair.num_words for number, pair in enumerate(pairs)],
    }
    features = Features({"image": Image(), "input_ids": List(Value("int32"))})
    dataset = Dataset.from_dict(columns, features=features)
    return packpipe.pack_pairs(dataset, output=folder, **{**OPTIONS, "text_seq_len": 12, **options})


def shown(batch: PairBatch, pairs: list[Pair]) -> list[int]:
    """The examples of a batch, after a look at every byte of their pixels and words."""
    images, texts, found = batch.images, batch.texts, []
    assert torch.equal(images.example_index, texts.example_index)
    assert torch.equal(images.present, texts.present)
    assert torch.equal(batch.present, texts.present)
    for row, slot in batch.present.nonzero().tolist():
        number = int(images.example_index[row, slot])
        pixels = images.patches[row, images.segment_ids[row] == slot + 1].unflatten(-1, (-1, 3))
        assert len(pixels) == images.seq_lens[row, slot] > 0
        assert (pixels == torch.tensor(colour(number), dtype=torch.uint8)).all()
        own = texts.segment_ids[row] == slot + 1
        length = min(pairs[number].num_words, OPTIONS["max_text"])
        assert texts.tokens["input_ids"][row, own].tolist() == [number + 1] * length
        assert texts.position_ids[row, own].tolist() == list(range(length))
        assert texts.seq_lens[row, slot] == length
        found.append(number)
    for rows in (images, texts):  # whose segments follow each other, without a gap
        starts = (torch.diff(rows.segment_ids, dim=1, prepend=rows.segment_ids[:, :1]) != 0).sum(1)
        wanted = rows.present.sum(1) - 1 + (rows.segment_ids[:, -1] == 0).int()
        assert torch.equal(starts.clamp(min=0), wanted.clamp(min=0))
        for ids in rows.segment_ids.tolist():
            assert [one for one in ids if one] == sorted(one for one in ids if one)
    return found


sides = st.integers(1, 30)
kinds = st.sampled_from(["good", "good", "good", "no pixels", "no header"])
some_pairs = st.lists(st.builds(Pair, sides, sides, st.integers(0, 8), kinds), max_size=14)
LOST = [Pair(8, 8, 2, "no pixels" if number in (0, 4, 5) else "good") for number in range(9)]


@settings(max_examples=10)
@given(some_pairs, st.integers(0, 3), st.integers(1, 3), st.sampled_from([0, 2]))
@example(LOST, 0, 2, 0)
@example([Pair(8, 8, 3, "no pixels")] * 3, 0, 2, 0)
def test_every_pair_is_shown_once_an_epoch_and_beside_no_other(
    tmp_path_factory, pairs, seed, batch_size, num_workers
):
    tables = packed(pairs, tmp_path_factory.mktemp("rows"), seed=seed, **ANY)
    loader = PackedLoader(tables, batch_size, seed=seed, tail="pad", num_workers=num_workers)
    wanted = [n for n, pair in enumerate(pairs) if pair.image == "good" and pair.num_words]
    for _ in range(2):
        assert sorted(n for batch in loader for n in shown(batch, pairs)) == wanted


def test_a_text_moves_up_where_the_image_before_it_was_lost(tmp_path):
    tables = packed(LOST, tmp_path, text_seq_len=24, **ANY)
    assert {row["stage"] for row in rejects(tables[0])} == {"decode"}
    (batch,) = PackedLoader(tables, 1, shuffle=False)
    planned = packpipe.read_tokens(tables[1]).example_index.tolist()
    assert len(planned) == 9
    kept = [number for number in planned if number not in (0, 4, 5)]
    assert batch.texts.example_index.tolist() == [kept]
    words = [number + 1 for number in kept for _ in range(2)]
    assert batch.texts.tokens["input_ids"].tolist() == [words + [0] * 12]
    assert shown(batch, LOST) == kept
    assert kept != sorted(planned)[: len(kept)]


PAIRS = [
    Pair(8 + 5 * (n % 5), 8 + 7 * (n % 4), 1 + n % 7, "no pixels" if n % 6 == 2 else "good")
    for n in range(60)
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> tuple[Dataset, Dataset]:
    found = packed(PAIRS, tmp_path_factory.mktemp("pairs") / "rows", **ANY)
    lost = packpipe.read_tokens(found[1]).num_segments - packpipe.read_rows(found[0]).num_segments
    assert lost.max() > 0
    assert lost.sum() == 10
    assert max(packpipe.read_rows(found[0]).num_segments) > 1
    return found


ways = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 3),
        "balance": st.booleans(),
        "tail": st.sampled_from(["drop", "pad"]),
        "max_segments": st.sampled_from([None, 12]),
    }
)


@settings(max_examples=12)
@given(
    st.booleans(),
    ways,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0, 2]),
)
def test_resumed_at_every_step_and_on_any_ranks_the_batches_are_the_same(
    tables, shuffle, way, before, after, num_workers
):
    # Of all loaders, so that their digests of the data are computed once.
    packs = PackedLoader(tables, 1, shuffle=shuffle).packs

    def ranks(world_size: int, epoch: int = 0) -> list[PackedLoader]:
        options = {**way, "epoch": epoch, "num_workers": num_workers}
        size = 4 // world_size
        return [
            PackedLoader(packs, size, rank=rank, world_size=world_size, **options)
            for rank in range(world_size)
        ]

    whole = loading.steps_of(ranks(1)) + loading.steps_of(ranks(1, epoch=1))
    stopped = ranks(before)
    assert len(whole) == 2 * len(stopped[0]) > 8
    steps = zip(*stopped, strict=True)
    for taken, parts in enumerate(steps, 1):
        assert loading.digest_of(parts) == whole[taken - 1]
        state = json.loads(json.dumps(stopped[-1].state_dict()))
        resumed = ranks(after)
        for loader in resumed:
            loader.load_state_dict(state)
        left = loading.steps_of(resumed)
        if taken < len(whole) // 2:
            assert left == whole[taken : len(whole) // 2]
        else:  # the epoch is at its end, and the next one begins
            assert left == whole[taken:]


def test_worker_processes_fill_the_same_batches(tables):
    wanted = loading.steps_of([PackedLoader(tables, 4)])
    by_processes = PackedLoader(tables, 4, num_workers=2, workers="processes")
    assert loading.steps_of([by_processes]) == wanted
    assert len(wanted) > 4


def test_tables_that_are_selected_and_shuffled_alike_are_pairs_still(tables):
    rows = np.random.default_rng(0).permutation(len(tables[0]))[: len(tables[0]) // 2]
    some = tuple(table.select(rows) for table in tables)
    for pair in (some, tuple(table.with_format("arrow")[:] for table in some)):
        found = [n for batch in PackedLoader(pair, 2, tail="pad") for n in shown(batch, PAIRS)]
        assert sorted(found) == sorted(packpipe.read_rows(some[0]).example_index)
        assert len(found) > 10


def test_attention_work_is_that_of_both(tables):
    key = packpipe.philox.Key(0, 0)
    each = [PackedLoader(table, 1).packs.work(key) for table in tables]
    assert PackedLoader(tables, 1).packs.work(key).tolist() == sum(each).tolist()


def test_what_is_no_pair_of_tables_is_refused(tables):
    images, texts = tables
    number = len(images)
    found = packpipe.read_rows(images, 1).example_index.tolist()
    expected = packpipe.read_tokens(texts, 0).example_index.tolist()
    for packs, message in (
        ((images,), "len(packs) is 1, expected 2 (images, texts); pass what pack_pairs returned"),
        ((images, texts, texts), "len(packs) is 3, expected 2 (images, texts); pass what"),
        ((texts, images), "packs[0] is 'rows of tokens', expected rows of images; pass (images, t"),
        ((images, images), "packs[1] is 'rows of images', expected rows of tokens; pass (images"),
        (
            (images.select(range(5)), texts),
            f"len(texts) is {number}, expected 5 (rows of images); select and shuffle both alike",
        ),
        (
            (images.select([1, *range(1, number)]), texts),
            f"example_index of images[0] is {found}, expected {expected} (texts[0]), or some of th",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            PackedLoader(packs, 2)


def test_rows_that_do_not_say_which_example_is_which_are_no_pairs(tables):
    images, texts = tables
    nameless = images.map(lambda row: {"example_index": [-1] * len(row["seq_lens"])})
    message = "example_index of images is -1, expected rows that say which example is which; pass"
    with pytest.raises(ValueError, match=message):
        PackedLoader((nameless, texts), 2)


def test_texts_that_are_no_lists_of_columns_are_refused(tables):
    with pytest.raises(TypeError, match=r"type\(dataset\) is 'str', expected Dataset or pyarrow.T"):
        PackedLoader((tables[0], "texts"), 2)


def test_a_state_is_kept_from_other_pairs(tables, tmp_path):
    loader = PackedLoader(tables, 2)
    next(iter(loader))
    state = loader.state_dict()
    again = packed(PAIRS, tmp_path / "again", **ANY)
    resumed = PackedLoader(again, 2)
    resumed.load_state_dict(state)
    assert len(list(resumed)) == len(resumed) - 1
    others = {
        "images": (again[0].map(lambda row: {"patches": np.zeros_like(row["patches"])}), again[1]),
        "texts": (again[0], again[1].map(lambda row: {"input_ids": [0] * len(row["input_ids"])})),
    }
    for name, pair in others.items():
        assert pair[0].features == again[0].features
        assert pair[1].features == again[1].features
        with pytest.raises(ValueError, match=rf"^state\['contents'\]\['{name}\.\w+'\] is '\w+', e"):
            PackedLoader(pair, 2).load_state_dict(state)
    for packs in (tables[0], tables[1], packed(PAIRS, tmp_path / "other", seed=1, **ANY)):
        with pytest.raises(ValueError, match=r"^state\['fingerprint'\] is '\w+', expected '\w+'"):
            PackedLoader(packs, 2).load_state_dict(state)


def test_accelerate_leaves_out_the_first_batches(tables):
    from accelerate import skip_first_batches

    whole = loading.steps_of([PackedLoader(tables, 4)])
    left = skip_first_batches(PackedLoader(tables, 4), 2)
    assert [loading.digest(batch) for batch in left] == whole[2:]
