"""Training: a short loop over packed rows (floor 2, torch)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import Any

import torch

from packpipe import checks
from packpipe.loader import PackedLoader
from packpipe.losses import segment_cross_entropy
from packpipe.navit import NaViT


def train(
    model: NaViT,
    packed: Any,
    *,
    steps: int,
    batch_size: int = 4,
    max_segments: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Iterator[float]:
    """Yield the loss of each step, a mean over the batch's images, before its update.

    AdamW with a linear warm-up over a tenth of the steps and a linear cool-down to 0; the
    gradient's norm is clipped at 1. Every epoch takes the rows in a new seeded order.

    Args:
        model: trained in place, on the device it is on.
        packed: what `pack` returned, with integer labels.
        steps: updates.
        batch_size: rows an update.
        max_segments: as the rows were packed with.
        learning_rate: its peak.
        seed: which order the rows come in.

    Raises:
        ValueError: a number is out of range, or the rows have no labels or are fewer than
            batch_size.
    """
    steps = checks.whole_number("steps", steps, 1, 2**63, "train for one step or more")
    num_rows = len(packed)
    remedy = "a batch takes that many different rows"
    batch_size = checks.whole_number("batch_size", batch_size, 1, num_rows, remedy)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.03)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )
    model.train()
    loader = PackedLoader(
        packed, batch_size, rank=0, world_size=1, seed=seed, max_segments=max_segments
    )
    endless = chain.from_iterable(repeat(loader))  # each pass is the next epoch
    for batch in islice(endless, steps):
        if batch.labels is None:
            raise ValueError(
                checks.sentence("packed.labels", None, "integer labels", "pack with label_column")
            )
        loss = segment_cross_entropy(model(batch.to(device)), batch.labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
