"""Gathers batches into page-locked memory, from which a GPU copies without waiting.

Rows go from the mapped file straight to where the GPU reads them, and memory that was read is used
again: a copy less, and no new pages.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.utils import _pytree as pytree


class PageLocked:
    """Arrays in page-locked memory, and batches that are made of them."""

    def __init__(self) -> None:
        self._own: dict[int, Tensor] = {}  # by where they begin

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array as `numpy.empty` does."""
        kind = np.dtype(dtype)
        own = _memory(math.prod(shape) * kind.itemsize)
        self._own[own.data_ptr()] = own
        return own.numpy().view(kind).reshape(shape)

    def batch(self, batch: Any) -> Any:
        """Return a batch with all of its tensors in page-locked memory.

        Those that share memory with an array of `empty` stay where they are; others are copied.
        """
        return pytree.tree_map(self._locked, batch)

    def _locked(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        own = self._own.get(value.data_ptr())
        if own is None or own.nbytes != value.nbytes or not value.is_contiguous():
            return value.pin_memory()
        # torch's own tensor knows of copies under way; memory of an array might be used again too
        # early, if a part of it is copied.
        return own.view(value.dtype).view(value.shape)


def _memory(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
