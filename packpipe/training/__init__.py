"""Losses, the training loop, checkpoints, evaluation.

The loop's names can be imported from here: ``from packpipe.training import TrainConfig, train``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packpipe.training.log import read_log as read_log
    from packpipe.training.loop import Record as Record
    from packpipe.training.loop import TrainConfig as TrainConfig
    from packpipe.training.loop import train as train

__all__ = ["Record", "TrainConfig", "read_log", "train"]


# On first use (PEP 562), so that importing a loss does not import the loop and all it needs.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'packpipe.training' has no attribute {name!r}")
    return getattr(import_module("packpipe.training.loop"), name)
