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
sequences = st.lists(  # not of 1, which XLM-R alone takes for padding
    st.lists(st.integers(2, VOCABULARY - 1), min_size=2, max_size=16), min_size=1, max_size=8
)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def made(config: Any, model: Any, implementation: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return model(config(**SIZES, attn_implementation=implementation, **options)).double()


def llama(implementation: str = "sdpa") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return made(LlamaConfig, LlamaForCausalLM, implementation, num_key_value_heads=2)


def qwen(implementation: str = "sdpa") -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = {"num_key_value_heads": 2, "head_dim": 8}
    return made(Qwen3Config, Qwen3ForCausalLM, implementation, **heads)


def bert(implementation: str = "sdpa") -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return made(BertConfig, BertForMaskedLM, implementation, **NO_DROPOUT)


def xlm_roberta(implementation: str = "sdpa") -> nn.Module:
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    return made(XLMRobertaConfig, XLMRobertaForMaskedLM, implementation, **NO_DROPOUT)


DECODERS, ENCODERS = [llama, qwen], [bert, xlm_roberta]
FIRST_POSITION = {xlm_roberta: 2}  # padding_idx + 1


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
def test_padded_rows_with_the_mask_of_flex_attention(tmp_path_factory, monkeypatch, made_by):
    """Without its compiler, which computes no gradients on a CPU: outputs and loss alone."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as theirs

    def plain(query: Any, key: Any, value: Any, training: Any = False, **options: Any) -> Any:
        del training
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr(theirs, "compile_friendly_flex_attention", plain)
    batch = batch_of(tmp_path_factory, [[3] * 7, [9] * 8, [4, 5], [6] * 11])
    wanted, _ = alone(made_by("sdpa"), batch)
    with torch.no_grad():
        found = masked_loss(made_by, made_by("flex_attention"), batch, "flex_attention")
    assert abs(found - wanted) < 1e-5


def masked_loss(
    made_by: Any, model: nn.Module, batch: TokenBatch, implementation: str, *dtype: torch.dtype
) -> Tensor:
    mask = to_attention_mask(
        batch,
        causal=made_by in DECODERS,
        implementation=implementation,
        **({"dtype": dtype[0]} if dtype else {}),
    )
    loss: Tensor = model(
        input_ids=batch.tokens["input_ids"].long(),
        labels=batch.tokens["labels"].long(),
        position_ids=batch.position_ids.long() + FIRST_POSITION.get(made_by, 0),
        attention_mask=mask,
    ).loss
    return loss


@pytest.mark.parametrize("model", [llama, bert])
def test_without_a_mask_sequences_would_see_each_other(model, tmp_path_factory):
    """Guards the tests above: they would notice."""
    mixing, batch = model(), batch_of(tmp_path_factory, [[3] * 7, [9] * 8])
    loss = mixing(
        input_ids=batch.tokens["input_ids"].long(), labels=batch.tokens["labels"].long()
    ).loss
    with pytest.raises(AssertionError):
        check(mixing, loss, batch)
