"""Prefix tokens: whether the rows of a batch have as many as a model."""

from __future__ import annotations

from packpipe import checks
from packpipe.loading.batch import PackedBatch


def check_prefix(batch: PackedBatch, prefix_tokens: int) -> None:
    """Raise ValueError if the images of a batch, on the CPU, have other prefix tokens.

    Args:
        batch: packed rows.
        prefix_tokens: of the model.
    """
    found, images = int((batch.coords[..., 0] < 0).sum()), int(batch.present.sum())
    if found != prefix_tokens * images:
        name, expected = "prefix tokens of the batch", f"{prefix_tokens} an image (the model's)"
        remedy = f"pack with prefix_tokens={prefix_tokens}"
        raise ValueError(checks.sentence(name, found // max(images, 1), expected, remedy))
