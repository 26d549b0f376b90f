"""Drop path (stochastic depth): in training, an image now and then goes around a part of a block.

What is drawn for an image is a function of (seed, epoch, example_index, view) and of the block, so
it is the same in any pack, batch and world size, and where a training goes on.

Source: Huang et al., Deep Networks with Stochastic Depth, arXiv 1603.09382, 3 (equation 4 and the
linear decay rule); attention and MLP are drawn apart, as in DeiT.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from packpipe import checks, philox
from packpipe.loading.batch import PackedBatch
from packpipe.philox import Key


def drawn_paths(batch: PackedBatch, key: Key, rate: float, depth: int) -> Tensor:
    """Return float32[B, S, depth, 2], what attention and MLP of each block count for each image.

    0 with the block's rate p, else 1 ÷ (1 - p), so that 1 is the mean. The rate rises in equal
    steps to that of the last block: in block b, 0 being the first, it is rate · (b + 1) ÷ depth.
    Absent segments have 0.

    Args:
        batch: on the CPU.
        key: the loader's seed, and the epoch that the batch is of.
        rate: of the last block, in [0, 1).
        depth: blocks of the model.

    Raises:
        ValueError: the rows do not say which example is which.
    """
    present = batch.present
    index = batch.example_index[present].numpy()
    if (index < 0).any():
        expected = "rows that say which example is which, for drop_path"
        remedy = "pack with pack, or map with with_indices=True"
        raise ValueError(checks.sentence("example_index", -1, expected, remedy))
    view = 0 if batch.view is None else batch.view[present].numpy()
    words = philox.words(
        key, index=index, stream=philox.DROP_PATH, num_words=2 * depth, view=view
    ).reshape(-1, depth, 2)
    rates = (rate * np.arange(1, depth + 1) / depth)[:, None]
    scales = np.where(philox.uniform_from(words) < rates, 0.0, 1 / (1 - rates))
    paths = torch.zeros(*present.shape, depth, 2)
    paths[present] = torch.from_numpy(scales).to(torch.float32)
    return paths


def check_drop_path(value: float) -> float:
    """Return the rate of the last block, if it is in [0, 1)."""
    remedy = "0.1 is usual, 0 is none"
    rate = checks.real_number("drop_path", value, remedy)
    if not 0 <= rate < 1:
        raise ValueError(checks.sentence("drop_path", rate, "in [0, 1)", remedy))
    return float(rate)
