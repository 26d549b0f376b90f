"""The weights of a training averaged over its steps: an exponential moving average (EMA).

Averaged weights are often better than the last ones, as if the learning rate had fallen further.

Source: Polyak & Juditsky, Acceleration of stochastic approximation by averaging (1992); the rising
share is that of TensorFlow's ``ExponentialMovingAverage(num_updates=)``.
"""

from __future__ import annotations

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from packpipe.model.navit import NaViT


def copy_of(model: NaViT) -> NaViT:
    """Return a model with the same weights, in memory of its own, to be evaluated."""
    with torch.device("meta"):  # no weights are drawn, which would change what is drawn later
        found = NaViT(model.config)
    # Not a deep copy of the model: its compiled parts would go on reading its own weights.
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    found.load_state_dict(weights, assign=True)
    return found.requires_grad_(False).eval()


def kept_share(ema: float, step: int) -> float:
    """Return how much of the average a step keeps, 0 being the first: min(ema, (1 + t) ÷ (10 + t)).

    It rises, since an average that kept ema from the beginning would be of the weights before the
    training for long: of 0.999 a third are left after 1000 steps.

    >>> kept_share(0.999, 0), kept_share(0.999, 90), kept_share(0.999, 10**5)
    (0.1, 0.91, 0.999)
    """
    return min(ema, (1 + step) / (10 + step))


def average(averaged: NaViT, model: NaViT, kept: float) -> None:
    """Make the averaged weights, in place, kept · themselves + (1 - kept) · the model's."""
    parameters = [list(one.parameters()) for one in (averaged, model)]
    get_ema_multi_avg_fn(kept)(*parameters, 0)
