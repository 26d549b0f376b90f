"""A training step as one CUDA graph: its thousands of launches are recorded once, and replayed.

Launching the kernels of a step takes a processor some 50 ms, longer than a small model's kernels
run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

log = logging.getLogger(__name__)
EAGER = 3  # steps before the capture, in which code is compiled and memory is found


class CapturedStep:
    """A step that reads its batches from tensors of its own, so that a graph can be replayed.

    Batches of another form than the first, of other columns or shapes, are stepped on as they are.
    So are all, if the step cannot be captured; a warning says so.

    Args:
        step: takes batches, a tree of tensors; changes the model, waits for no result, and returns
            a tree of tensors. No Python of it runs when the graph is replayed.
        device: of the model.
        captures: whether a graph is made; None is on a GPU. Without, the same is computed from the
            same tensors.
    """

    def __init__(
        self, step: Callable[[Any], Any], device: torch.device, *, captures: bool | None = None
    ) -> None:
        self._step, self._device = step, device
        self._captures = device.type == "cuda" if captures is None else captures
        self._eager = EAGER
        self._form: Any = None
        self._own: list[Any] = []  # leaves of the tree: tensors, or None
        self._graph: Any = None
        self._found: Any = None

    def __call__(self, batches: Any) -> Any:
        """Take a step and return what it returns; the next call may overwrite that."""
        given, tree = pytree.tree_flatten(batches)
        form = tree, [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in given]
        if self._form is None:
            self._form = form
            self._own = [
                torch.empty_like(x, device=self._device) if isinstance(x, Tensor) else x
                for x in given
            ]
        if form != self._form:
            return self._step(batches)
        for one, own in zip(given, self._own, strict=True):
            if isinstance(own, Tensor):
                own.copy_(one, non_blocking=True)
        fixed = pytree.tree_unflatten(self._own, tree)
        if not self._captures:
            return self._step(fixed)
        if self._eager:  # real steps, too
            self._eager -= 1
            return self._aside(fixed)
        if self._graph is None and not self._capture(fixed):
            return self._step(fixed)
        self._graph.replay()
        return self._found

    def _aside(self, fixed: Any) -> Any:
        """Take the step on a stream of its own, as torch demands of the steps before a capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = self._step(fixed)
        torch.cuda.current_stream().wait_stream(side)
        return found

    def _capture(self, fixed: Any) -> bool:
        """Return whether the step is captured now; it is not taken."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._found = self._step(fixed)
        except RuntimeError as error:
            log.warning("the step is not captured as a graph, and goes on without: %s", error)
            self._captures = False
            return False
        self._graph = graph
        return True
