"""No cross-contamination in models of transformers: packed losses and gradients are the unpacked.

Through their own arguments: position ids that restart, which they detect, or a mask.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from packpipe import PackedLoader, pack
from packpipe.loading.batch import TokenBatch
from packpipe.loading.exports import to_attention_mask, to_transformers

VOCABULARY = 50
sequences = st.lists(
    st.lists(st.integers(1, VOCABULARY - 1), min_size=2, max_size=16), min_size=1, max_size=8
)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).double()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return BertForMaskedLM(config).double()


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


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def alone(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the sequences one at a time, a mean over all labels, and its gradients."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, lens in enumerate(batch.seq_lens.tolist()):
        start = 0
        for length in filter(None, lens):
            place = slice(start, start + length)
            start += length
            labels = batch.tokens["labels"][row : row + 1, place].long()
            number = int((labels != -100).sum())
            ids = batch.tokens["input_ids"][row : row + 1, place].long()
            total = total + model(input_ids=ids, labels=labels).loss * number
            count += number
    return total / count, gradients(model, total / count)


def check(model: nn.Module, packed_loss: Tensor, batch: TokenBatch) -> None:
    loss, wanted = alone(model, batch)
    assert abs(packed_loss.item() - loss.item()) < 1e-5  # they compute it in float32
    found = gradients(model, packed_loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = max(gradient.abs().max().item(), 1e-3)
        assert (found[name] - gradient).abs().max() < 1e-5 * largest, name


@settings(max_examples=10, deadline=None)
@given(sequences)
def test_llama_by_position_ids_that_restart(tmp_path_factory, rows):
    model, batch = llama(), batch_of(tmp_path_factory, rows)
    inputs = to_transformers(batch)
    kept = {name: inputs[name] for name in ("input_ids", "labels", "position_ids")}
    loss = model(**kept, use_cache=False).loss
    check(model, loss, batch)


@settings(max_examples=10, deadline=None)
@given(sequences)
def test_llama_by_a_mask_on_padded_rows(tmp_path_factory, rows):
    model, batch = llama(), batch_of(tmp_path_factory, rows)
    loss = model(
        input_ids=batch.tokens["input_ids"].long(),
        labels=batch.tokens["labels"].long(),
        position_ids=batch.position_ids.long(),
        attention_mask=to_attention_mask(batch, causal=True),
    ).loss
    check(model, loss, batch)


@settings(max_examples=10, deadline=None)
@given(sequences)
def test_bert_by_a_mask_on_padded_rows(tmp_path_factory, rows):
    model, batch = bert(), batch_of(tmp_path_factory, rows)
    loss = model(
        input_ids=batch.tokens["input_ids"].long(),
        labels=batch.tokens["labels"].long(),
        position_ids=batch.position_ids.long(),
        attention_mask=to_attention_mask(batch),
    ).loss
    check(model, loss, batch)


@pytest.mark.parametrize("model", [llama, bert])
def test_without_a_mask_sequences_would_see_each_other(model, tmp_path_factory):
    """Guards the tests above: they would notice."""
    made, batch = model(), batch_of(tmp_path_factory, [[3] * 7, [9] * 8])
    loss = made(
        input_ids=batch.tokens["input_ids"].long(), labels=batch.tokens["labels"].long()
    ).loss
    with pytest.raises(AssertionError):
        check(made, loss, batch)
