"""Activations: what makes an MLP more than one linear map.

Trained weights must meet the function that they were trained with: forms of GELU differ by up to
0.02.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
}
ACTIVATIONS = tuple(_FUNCTIONS)


def activate(wide: Tensor, activation: str, *, gated: bool = False) -> Tensor:
    """Return an MLP's hidden layer, activated.

    Args:
        wide: float[..., W] or, gated, float[..., 2 · W].
        activation: one of `ACTIVATIONS`.
        gated: whether the first half of wide, activated, is multiplied with the second (Shazeer,
            arXiv 2002.05202); with ``"silu"`` that is SwiGLU.

    Returns:
        float[..., W].

    >>> activate(torch.tensor([1.0, 2.0, 3.0, 4.0]), "silu", gated=True)
    tensor([2.1932, 7.0464])
    """
    if not gated:
        return _FUNCTIONS[activation](wide)
    gate, up = wide.chunk(2, dim=-1)
    return _FUNCTIONS[activation](gate) * up
