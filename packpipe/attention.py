"""Attention within segments: a token sees its own image and nothing else (floor 2, torch).

Two backends of one function, exact twins of each other:

* ``"reference"``: one SDPA call with a boolean mask. Runs anywhere, compiles, costs O(L²) a
  row whatever the segments; the oracle.
* ``"segments"``: one SDPA call a segment. Costs Σ l², which makes it the CPU default. Inside
  ``torch.compile`` it becomes the masked form: one graph must serve every batch.

Shape letters: B rows, L tokens a row, H heads, E channels a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from packpipe.batch import PackedBatch

BACKENDS = ("segments", "reference")

# (queries, keys, values) -> outputs, each [B, L, H, E]; outputs are 0 in padding.
Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def segment_attention(batch: PackedBatch, backend: str) -> Attention:
    """Return the attention of a batch; what it needs of the segments is worked out once.

    Args:
        batch: whose segments.
        backend: ``"segments"`` or ``"reference"``.
    """
    # A loop over segments would be another graph for every batch.
    if backend == "reference" or torch.compiler.is_compiling():
        return _masked(batch)
    return _one_call_a_segment(batch)


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Return bool[B, 1, L, L]: whether the query (row) may see the key (column).

    Args:
        segment_ids: int[B, L], 0 in padding, which sees nothing and is seen by nobody.
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same & (segment_ids != 0)[:, None, None, :]


def _masked(batch: PackedBatch) -> Attention:
    mask = segment_mask(batch.segment_ids)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # SDPA gives 0, not NaN, for a query whose mask is empty.
        return scaled_dot_product_attention(
            queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask
        ).transpose(1, 2)

    return attend


def _one_call_a_segment(batch: PackedBatch) -> Attention:
    seq_len = batch.segment_ids.shape[1]
    lens: list[int] = []
    is_segment: list[bool] = []
    for row in batch.seq_lens.tolist():
        present = [length for length in row if length]
        lens += [*present, seq_len - sum(present)]
        is_segment += [*([True] * len(present)), False]

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tokens = [
            torch.split(x.flatten(0, 1), lens) for x in (queries, keys, values)
        ]  # [l, H, E] each
        outputs = [
            _attend_alone(q, k, v) if real else torch.zeros_like(v)
            for q, k, v, real in zip(*tokens, is_segment, strict=True)
        ]
        return torch.cat(outputs).view(queries.shape) if outputs else torch.zeros_like(values)

    return attend


def _attend_alone(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return [l, H, E], every token of one segment seeing every other."""
    return scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    )[0].transpose(0, 1)
