"""What tests of encoders that other libraries trained share: a case, weights, and two laws."""

from __future__ import annotations

from dataclasses import replace

import packed
import torch
from laws import close

CASE = packed.RowSet(lens=[[1] * 4, [20, 1, 7, 3], [30]], seq_len=33, max_segments=4)
MEAN, STD = [0.48, 0.45, 0.4], [0.23, 0.25, 0.28]


def shaken(model):
    """The model with weights that all matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (0.15 if weight.ndim > 1 else 0.3))
            if "norm" in name and name.endswith("weight"):
                weight.add_(1)
    return model.eval()


def check_outputs(outputs, wanted):
    """Assert that outputs of the images of CASE are the original's; give both models gradients."""
    assert outputs.shape == (9, 32)
    assert close(outputs, wanted, 1e-5)
    assert wanted.std(0).min() > 0.01
    slope = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    for values in (outputs, wanted):
        (values * slope).sum().backward()


def check_sees_no_neighbours(model, batch):
    """Assert that an image of CASE changes its own output alone, and rows may lie in any order."""
    pixels = batch.patches.clone()
    own = (batch.segment_ids[1] == 1) & (batch.coords[1, :, 0] >= 0)
    assert own.any()
    pixels[1, own] = 255 - pixels[1, own]
    with torch.no_grad():
        before, after = model(batch), model(replace(batch, patches=pixels))
    others = batch.present.clone()
    others[1, 0] = False
    assert others.sum() == 8
    assert torch.equal(before[others], after[others])
    assert not close(before[1, 0], after[1, 0], 1e-3)
    turned = type(batch)(**{name: value.flip(0) for name, value in batch.items()})
    with torch.no_grad():
        assert close(model(turned).flip(0)[batch.present], before[batch.present], 1e-6)
