"""The FLOPs counted by formula are those that torch counts while the model runs."""

import packed
import pytest
import torch
from hypothesis import given
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from packpipe.model.flops import TRAINING, forward_flops
from packpipe.model.pooling import POOLINGS


def counted(work):
    # Of fused attention on a CPU torch counts nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("pooling", POOLINGS)
@given(case=packed.row_sets())
def test_a_forward_pass_costs_what_is_said(pooling, case):
    batch, model = packed.batch_of(case), packed.model_of("segments", pooling=pooling)
    with torch.no_grad():
        found = counted(lambda: model(batch))
    # Torch counts products alone: not the pool's logits and sums; it has a head and an MLP for
    # absent segments, and for tokens nothing beyond.
    config, lens = model.config, batch.seq_lens
    expected = forward_flops(config, lens)
    tokens, absent = int(lens.sum()), int((lens == 0).sum())
    head = 2 * config.dim * config.num_classes
    if pooling == "attention":
        expected -= tokens * 4 * config.dim
        expected += absent * (2 * config.dim**2 + 4 * config.dim * config.mlp_width)
    if pooling != "none":
        expected += absent * head
    assert found == expected


@pytest.mark.parametrize("gated", [False, True])
def test_a_training_step_costs_three_times_as_much_but_for_the_pixels(gated):
    model = packed.model_of("segments", pooling="mean", gated=gated)
    batch = packed.batch_of(packed.RowSet([[20, 13]], seq_len=33, max_segments=2))
    found = counted(lambda: model(batch).sum().backward())
    forward = forward_flops(model.config, batch.seq_lens)
    pixels = 33 * 2 * packed.PATCH_BYTES * model.config.dim  # nobody asks for their gradient
    assert found == TRAINING * forward - pixels


def test_attention_within_images_costs_their_squares():
    config = packed.model_of().config
    one, two = (forward_flops(config, torch.tensor(lens)) for lens in ([64], [32, 32]))
    per_segment = forward_flops(config, torch.tensor([0, 0])) * 0 + (
        2 * config.dim**2 + 4 * config.dim * config.mlp_width + 2 * config.dim * config.num_classes
    )
    assert one - two + per_segment == config.depth * 4 * config.dim * (64**2 - 2 * 32**2)
