"""Images and their texts in aligned rows, and two towers trained on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded_image as png
from torch import Tensor, nn
from torch.nn import functional as F

from packpipe import (
    NaViT,
    NaViTConfig,
    PackedLoader,
    manifest,
    pack_pairs,
    read_rows,
    read_tokens,
    rejects,
)
from packpipe.loading.batch import TokenBatch
from packpipe.model.attention import flatten
from packpipe.training.contrastive import softmax_contrastive


def source(sizes: list[tuple[int, int]], texts: list[list[int] | None]) -> Dataset:
    features = Features({"image": Image(), "input_ids": List(Value("int32"))})
    images = [
        {"bytes": png(height, width, seed) if height else b"no image", "path": None}
        for seed, (height, width) in enumerate(sizes)
    ]
    return Dataset.from_dict({"image": images, "input_ids": texts}, features=features)


@st.composite
def examples(draw: Any) -> Dataset:
    number = draw(st.integers(1, 12))
    sides = st.integers(1, 40)
    sizes = [(draw(sides), draw(sides)) for _ in range(number)]
    token = st.integers(1, 99)
    texts = [draw(st.lists(token, min_size=0, max_size=9)) for _ in range(number)]
    return source(sizes, texts)


@settings(max_examples=20, deadline=None)
@given(examples(), st.integers(6, 20), st.integers(0, 3))
def test_rows_of_both_hold_the_same_examples(tmp_path_factory, dataset, text_seq_len, seed):
    images, texts = pack_pairs(
        dataset,
        16,
        text_seq_len,
        max_text=6,
        overflow="truncate",
        patch_size=8,
        label_column=None,
        seed=seed,
        output=tmp_path_factory.mktemp("rows"),
        num_workers=0,
        max_bad_fraction=1.0,
        progress=False,
    )
    assert len(images) == len(texts)
    if not len(images):
        return
    pictures, tokens = read_rows(images), read_tokens(texts)
    assert pictures.offsets.tolist() == tokens.offsets.tolist()
    index = pictures.example_index
    assert index.tolist() == tokens.example_index.tolist()
    wanted = dataset["input_ids"][:]
    assert sorted(index.tolist()) == [row for row, text in enumerate(wanted) if text]
    assert tokens.segment_ids.shape[1] == text_seq_len
    for row, (start, end) in enumerate(zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)):
        place = 0
        for example in index[start:end].tolist():
            own = wanted[example][:6]
            found = tokens.tokens["input_ids"][row, place : place + len(own)]
            assert found.tolist() == own
            place += len(own)
    empty = [reject["example_index"] for reject in rejects(images)]
    assert empty == [row for row, text in enumerate(wanted) if not text]
    for rows in (images, texts):
        assert manifest(rows)["counts"]["packed"] == len(index)
    lost = sum(max(0, len(text) - 6) for text in wanted)
    assert manifest(texts)["counts"]["truncated_tokens"] == lost


def test_a_lost_image_leaves_its_text_alone(tmp_path):
    sizes = [(16, 16), (16, 16), (16, 16)]
    dataset = source(sizes, [[1], [2], [3]])
    broken = png(16, 16, 1)[:-40]
    images = [row["bytes"] for row in dataset.cast_column("image", Image(decode=False))["image"]]
    features = dataset.features
    texts = dataset["input_ids"][:]
    cut = [{"bytes": one, "path": None} for one in (images[0], broken, images[2])]
    dataset = Dataset.from_dict({"image": cut, "input_ids": texts}, features=features)
    pictures, words = pack_pairs(
        dataset,
        64,
        8,
        max_text=8,
        patch_size=8,
        output=tmp_path,
        progress=False,
        max_bad_fraction=1.0,
    )
    assert sorted(read_rows(pictures).example_index) == [0, 2]
    assert sorted(read_tokens(words).example_index) == [0, 1, 2]


class TextTower(nn.Module):
    """A small encoder of packed texts: the attention of images serves it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(100, dim)
        self.places = nn.Embedding(32, dim)
        self.mix = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, batch: TokenBatch) -> Tensor:
        flat = flatten(batch, "segments")  # type: ignore[arg-type]
        x = self.words(flat.take(batch.tokens["input_ids"]).long())
        x = x + self.places(flat.take(batch.position_ids).long())
        q, k, v = (part.unflatten(-1, (2, -1)) for part in self.mix(x).chunk(3, -1))
        x = x + flat.attend(q, k, v).flatten(-2)
        sums = x.new_zeros(batch.seq_lens.numel() + 1, x.shape[-1]).index_add(0, flat.segments, x)
        means = sums[:-1] / batch.seq_lens.flatten().clamp(min=1)[:, None]
        return F.normalize(self.out(means), dim=-1).unflatten(0, batch.seq_lens.shape)


def test_two_towers_learn_from_pairs(tmp_path):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(8, 41)), int(rng.integers(8, 41))) for _ in range(40)]
    texts = [[1 + number % 90, 1 + number // 8] for number in range(40)]
    images, words = pack_pairs(
        source(sizes, texts), 64, 24, patch_size=8, output=tmp_path, progress=False
    )
    config = NaViTConfig(
        num_classes=None, patch_size=8, dim=16, depth=1, heads=2, max_side=64, head="unit"
    )
    vision, text, scale = NaViT(config), TextTower(16), nn.Parameter(torch.tensor(2.0))
    parameters = [*vision.parameters(), *text.parameters(), scale]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        for batch in PackedLoader((images, words), 2, seed=1, tail="pad"):
            loss = softmax_contrastive(
                vision(batch.images).flatten(0, 1),
                text(batch.texts).flatten(0, 1),
                scale.exp(),
                present=batch.present.flatten(),
                chunk=5,
            )
            optimizer.zero_grad()
            loss.backward()
            assert all(parameter.grad is not None for parameter in parameters)
            optimizer.step()
            losses.append(loss.item())
    steps = len(losses) // 8
    assert np.mean(losses[-steps:]) < np.mean(losses[:steps]) - 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_text": 2}, r"text lengths\[0\] is 3, expected at most 2 \(max_text\); pass overfl"),
        (
            {"max_text": 9},
            r"max_text is 9, expected an integer in 1..8; a text must fit",
        ),
        ({"overflow": "split"}, "overflow is 'split', expected one of 'error', 'truncate'"),
        ({"token_columns": "words"}, r"token_columns\[0\] is 'words', expected different ones"),
        ({"resolution": "big"}, "resolution is 'big'"),
    ],
)
def test_a_bad_call_is_refused(options, message, tmp_path):
    dataset = source([(8, 8)], [[1, 2, 3]])
    with pytest.raises((ValueError, TypeError), match=message):
        pack_pairs(dataset, 16, 8, **{"max_text": 8, "output": tmp_path, **options})


def test_a_stream_is_refused():
    with pytest.raises(TypeError, match="type\\(dataset\\) is 'list', expected Dataset"):
        pack_pairs([], 16, 8)


def test_a_folder_behind_a_scheme_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = source([(8, 8)], [[1, 2]])
    with pytest.raises(ValueError, match="output is 'hf://rows', expected a path without a scheme"):
        pack_pairs(pairs, output="hf://rows", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_list_of_numbers_beside_texts_is_no_label_unless_it_is_named(tmp_path):
    dataset = source([(9, 9), (8, 8)], [[1, 2], [3, 4]])
    dataset = dataset.add_column("labels", [[1, 2], [3, 4]])
    message = r"^features\['labels'\] is List\(.*\), expected a ClassLabel or a Value beside texts"
    with pytest.raises(ValueError, match=message):
        pack_pairs(dataset, 16, 8, max_text=4, patch_size=8, output=tmp_path / "out")
