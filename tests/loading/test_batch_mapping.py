"""Batches are mappings of their columns, and trees of tensors, to those who take such."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import packed
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from packpipe.loading.batch import PackedBatch, PairBatch, TokenBatch

IMAGES = ["patches", "segment_ids", "coords", "seq_lens", "grid_hw", "example_index"]
TOKENS = ["segment_ids", "position_ids", "seq_lens", "fragment", "example_index"]

names = st.text("abc_", min_size=1, max_size=3)


def images(labels: Any = "random") -> PackedBatch:
    case = packed.RowSet(lens=[[2], [1, 2]], seq_len=4, max_segments=2)
    return packed.batch_of(case, labels=labels)


def tokens(of_tokens: list[str], of_segments: list[str], width: int = 4) -> TokenBatch:
    """Rows of 4 tokens; with 4 segments their columns have the same shape."""
    columns = iter(range(100))
    return TokenBatch(
        tokens={name: torch.full((2, 4), next(columns)) for name in of_tokens},
        segment_ids=torch.ones(2, 4, dtype=torch.int32),
        position_ids=torch.arange(4).repeat(2, 1),
        seq_lens=torch.full((2, width), 4),
        fragment=torch.zeros(2, width),
        example_index=torch.arange(2 * width).reshape(2, width),
        segments={
            **{name: torch.full((2, width), next(columns)) for name in of_segments},
            "text of segments": [["a"], ["b", "c"]],
        },
    )


def same(found: Any, batch: Any) -> bool:
    """Whether two batches have equal fields, and columns in the same order."""
    fields, wanted = vars(found), vars(batch)
    leaves, others = pytree.tree_leaves(fields), pytree.tree_leaves(wanted)
    return (
        type(found) is type(batch)
        and list(found) == list(batch)
        and pytree.tree_structure(fields) == pytree.tree_structure(wanted)
        and all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(leaves, others, strict=True)
        )
    )


@pytest.mark.parametrize(
    ("batch", "columns"),
    [
        (images(), [*IMAGES, "labels"]),
        (images(labels=None), IMAGES),
        (tokens(["input_ids", "labels"], ["x"]), ["input_ids", "labels", *TOKENS, "x"]),
        (tokens(["input_ids"], ["labels"]), ["input_ids", *TOKENS, "labels"]),
    ],
)
def test_a_batch_is_a_mapping_of_its_columns(batch, columns):
    columns = [*columns, "text of segments"] if isinstance(batch, TokenBatch) else columns
    assert isinstance(batch, Mapping)
    assert list(batch) == list(batch.keys()) == columns
    assert len(batch) == len(columns)
    assert ("labels" in batch) == ("labels" in columns)
    assert batch.get("nothing") is None
    with pytest.raises(KeyError, match="nothing"):
        batch["nothing"]
    assert batch["seq_lens"] is batch.seq_lens
    assert [id(value) for value in batch.values()] == [id(batch[name]) for name in columns]
    assert (lambda **found: list(found))(**batch) == columns
    assert batch == batch
    assert len({batch, batch}) == 1


@given(
    st.lists(names, unique=True, max_size=5).flatmap(
        lambda found: st.tuples(st.just(found), st.integers(0, len(found)))
    ),
    st.integers(1, 5),
)
def test_a_batch_is_made_of_its_columns_again(case, width):
    found, cut = case
    for batch in (tokens(found[:cut], found[cut:], width), images(), images(labels=None)):
        assert same(type(batch)(dict(batch)), batch)
        leaves, tree = pytree.tree_flatten(batch)
        assert same(pytree.tree_unflatten(leaves, tree), batch)


def pairs() -> PairBatch:
    return PairBatch(images(), tokens(["input_ids"], ["x"]))


@pytest.mark.parametrize(
    "batch", [images(), images(labels=None), tokens(["input_ids"], ["x"]), pairs()]
)
def test_frameworks_change_its_tensors(batch):
    from accelerate.utils import operations
    from lightning_utilities.core.apply_func import apply_to_collection
    from transformers import Trainer

    class Arguments:
        device = "meta"

    class Itself:
        _prepare_input = Trainer._prepare_input
        args, is_deepspeed_enabled = Arguments(), False

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta")

    for found in (
        Itself()._prepare_input(batch),
        operations.send_to_device(batch, "meta"),
        operations.recursively_apply(moved, batch),
        apply_to_collection(batch, torch.Tensor, moved),
        pytree.tree_map_only(torch.Tensor, moved, batch),
        batch.to("meta"),
    ):
        assert type(found) is type(batch)
        assert list(found) == list(batch)
        assert pytree.tree_structure(found) == pytree.tree_structure(batch)
        tensors = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert len(tensors) >= len(TOKENS)


@pytest.mark.parametrize("batch", [images(), tokens(["input_ids"], ["x"]), pairs()])
def test_torch_loads_a_batch_that_it_saved(batch):
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert type(found) is type(batch)
    assert pytree.tree_structure(found) == pytree.tree_structure(batch)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(batch), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_batch_of_pairs_is_a_mapping_of_its_images_and_its_texts():
    batch = pairs()
    assert dict(**batch) == {"images": batch.images, "texts": batch.texts}
    again = PairBatch(dict(batch))
    assert again.images is batch.images
    assert again.texts is batch.texts


def test_keys_of_the_tree_are_names():
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(images())[0]]
    assert [path.strip(".[]'\"") for path in paths] == [*IMAGES, "labels"]


class Sum(torch.nn.Module):
    def forward(self, batch: Any) -> torch.Tensor:
        return batch.seq_lens.sum() + batch["segment_ids"].sum()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", [images(), images(labels=None)])
def test_models_of_batches_are_exported(batch):
    program = torch.export.export(Sum(), (batch,)).module()
    assert program(batch) == Sum()(batch) > 0


def test_a_column_that_no_batch_has_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'pixels'"):
        PackedBatch({**images(), "pixels": torch.zeros(1)})


def test_columns_in_another_order_are_refused():
    batch = tokens(["input_ids"], ["label"])
    for columns in (dict(sorted(batch.items())), dict(reversed(list(batch.items())))):
        with pytest.raises(
            ValueError, match=r"columns is \[.*, as a batch has them; keep the order"
        ):
            TokenBatch(columns)
