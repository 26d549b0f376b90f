"""Useful FLOPs: what a model must compute, without padding or attention between images.

A multiplication with its addition in a matrix product counts as two; normalisations, softmaxes and
positions are left out, as usual. Attention counts Σ l², whatever a backend computes.

Source: NaViT 2.1 (24·D² + 4·n·D a token and layer).
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor

from packpipe.model.config import NaViTConfig

# Passes of a training step: a backward pass costs two, gradients of inputs and of weights.
TRAINING = 3


def forward_flops(config: NaViTConfig, seq_lens: Tensor) -> int:
    """Return the FLOPs of a forward pass; a training step takes `TRAINING` times as many.

    Args:
        config: the model's shape.
        seq_lens: int[...], tokens of each segment; 0 where absent.
    """
    dim, width = config.dim, config.mlp_width
    lens = seq_lens.long()
    tokens, segments = int(lens.sum()), int((lens > 0).sum())
    embed = 2 * config.patch_size**2 * 3 * dim
    # Queries, keys, values and projection are 4 matrices of dim², the MLP 2 of dim · width, 3 if
    # gated.
    layer = 8 * dim**2 + (6 if config.gated else 4) * dim * width
    flops = tokens * (embed + config.depth * layer)
    # Logits and weighted sums take 2 · dim each for every pair of tokens of a segment.
    flops += config.depth * 4 * dim * int((lens**2).sum())
    if config.pooling == "attention":
        # Keys and values of each token; logits and weighted sums; then an MLP a segment.
        flops += tokens * (4 * dim**2 + 4 * dim) + segments * (2 * dim**2 + 4 * dim * width)
    if config.num_classes is not None:
        answers = tokens * config.cells if config.pooling == "none" else segments
        flops += answers * 2 * dim * config.num_classes
    return flops


def matrix_rate(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """Return the FLOP/s of a large matrix product on a device, which counts as an MFU of 100 %.

    Args:
        device: a CUDA device, or the CPU.
        dtype: of the matrices, random ones, since zeros run faster.
        size: rows and columns; None for 8,192 on a GPU, 512 on a CPU.
    """
    on_gpu = device.type == "cuda"
    size = size or (8192 if on_gpu else 512)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    times = []
    for _ in range(10):  # the first three warm it up
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        if on_gpu:  # where a call returns before the product is done
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - began) / 5)
    return 2 * size**3 / median(times[3:])
