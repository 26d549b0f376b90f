"""Positions: what autocast must not round. Their values are those of a naive twin in test_navit."""

import pytest
import torch

from packpipe.model.positions import POSITIONS, ROTARY, position_embedding

ADDED = [name for name in POSITIONS if name not in (*ROTARY, "none")]
RESIZING = {"resize": "bicubic", "antialias": True, "keep_aspect": False}


def place(position):
    """A module of a position; rows and columns of a grid of 4 by 5, and that grid."""
    torch.manual_seed(0)
    coords = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    return position_embedding(position, 16, 6, **RESIZING), coords, torch.tensor([[4, 5]] * 20)


@pytest.mark.parametrize("position", ADDED)
def test_autocast_does_not_round_a_position(position):
    module, coords, grids = place(position)
    exact = module(coords, grids, torch.float32)
    assert exact.shape == (20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(coords, grids, torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


def test_a_resized_table_compiles_as_one_graph_with_and_without_autocast():
    module, coords, grids = place("resized")
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    exact = module(coords, grids, torch.float32)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(compiled(coords, grids, torch.float32), exact)
