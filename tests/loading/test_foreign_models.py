"""No cross-contamination in models of transformers: packed losses and gradients are the unpacked.

Through their own arguments: position ids that restart, which they detect, or a mask.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from consumers import (
    DECODERS,
    ENCODERS,
    VOCABULARY,
    alone,
    bert,
    llama,
    masked_loss,
    plain_flex_attention,
    step_of,
)
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from packpipe import PackedLoader, pack
from packpipe.loading.batch import TokenBatch
from packpipe.loading.exports import to_transformers

sequences = st.lists(  # not of 1, which XLM-R alone takes for padding
    st.lists(st.integers(2, VOCABULARY - 1), min_size=2, max_size=16), min_size=1, max_size=8
)


def batch_of(folder: Any, rows: list[list[int]]) -> TokenBatch:
    labels = [[-100, *((7 * token) % VOCABULARY for token in row[1:])] for row in rows]
    packed = pack(
        Dataset.from_dict({"input_ids": rows, "labels": labels}),
        16,
        output=folder.mktemp("rows") / "packed",
        progress=False,
    )
    (batch,) = PackedLoader(packed, len(packed), rank=0, world_size=1)
    return batch


def check(model: nn.Module, packed_loss: Tensor, batch: TokenBatch) -> None:
    loss, wanted = alone(model, [batch])
    assert abs(packed_loss.item() - loss) < 1e-5  # they compute it in float32
    _, found = step_of(model, packed_loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = max(gradient.abs().max().item(), 1e-3)
        assert (found[name] - gradient).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", DECODERS)
@settings(max_examples=5, deadline=None)
@given(rows=sequences)
def test_decoders_take_what_to_transformers_returns(
    tmp_path_factory, decoder, implementation, rows
):
    model, batch = decoder(implementation), batch_of(tmp_path_factory, rows)
    check(model, model(**to_transformers(batch)).loss, batch)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("made_by", [*DECODERS, *ENCODERS])
@settings(max_examples=5, deadline=None)
@given(rows=sequences)
def test_padded_rows_with_a_mask(tmp_path_factory, made_by, implementation, rows):
    model, batch = made_by(implementation), batch_of(tmp_path_factory, rows)
    check(model, masked_loss(made_by, model, batch, implementation, torch.float64), batch)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("made_by", [*DECODERS, *ENCODERS])
def test_padded_rows_with_the_mask_of_flex_attention(tmp_path_factory, made_by):
    """Outputs and loss alone: it computes no gradients on a CPU."""
    batch = batch_of(tmp_path_factory, [[3] * 7, [9] * 8, [4, 5], [6] * 11])
    wanted, _ = alone(made_by("sdpa"), [batch])
    with torch.no_grad(), plain_flex_attention():
        found = masked_loss(made_by, made_by("flex_attention"), batch, "flex_attention")
    assert abs(found - wanted) < 1e-5


@pytest.mark.parametrize("model", [llama, bert])
def test_without_a_mask_sequences_would_see_each_other(model, tmp_path_factory):
    """Guards the tests above: they would notice."""
    mixing, batch = model(), batch_of(tmp_path_factory, [[3] * 7, [9] * 8])
    loss = mixing(
        input_ids=batch.tokens["input_ids"].long(), labels=batch.tokens["labels"].long()
    ).loss
    with pytest.raises(AssertionError):
        check(mixing, loss, batch)
