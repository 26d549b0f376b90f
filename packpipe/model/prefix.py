"""Prefix tokens: whether the rows of a batch have as many as a model."""

from __future__ import annotations

import torch

from packpipe import checks
from packpipe.loading.batch import PackedBatch


def check_prefix(batch: PackedBatch, prefix_tokens: int) -> None:
    """Raise ValueError if an image of a batch, on the CPU, has other prefix tokens.

    Args:
        batch: packed rows.
        prefix_tokens: of the model.
    """
    present = batch.present
    # Of padding, segment 0, there are none.
    found = torch.zeros(len(present), present.shape[1] + 1, dtype=torch.int64)
    is_prefix = (batch.coords[..., 0] < 0).to(found.dtype)
    found.scatter_add_(1, batch.segment_ids.to(found.dtype), is_prefix)
    wrong = present & (found[:, 1:] != prefix_tokens)
    if wrong.any():
        row, segment = wrong.nonzero()[0].tolist()
        name = f"prefix tokens of segment {segment + 1} of row {row}"
        expected, remedy = f"{prefix_tokens} (the model's)", "pack with prefix_tokens="
        number = int(found[row, segment + 1])
        raise ValueError(checks.sentence(name, number, expected, f"{remedy}{prefix_tokens}"))
