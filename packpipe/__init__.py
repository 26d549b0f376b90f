"""packpipe packs images (or token sequences) of any size into rows of exactly seq_len tokens.

Public names bind on first use: ``import packpipe`` alone loads no third-party package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from packpipe.balance import balance_steps as balance_steps
    from packpipe.batch import PackedBatch as PackedBatch
    from packpipe.config import PackConfig as PackConfig
    from packpipe.dataset import manifest as manifest
    from packpipe.dataset import pack as pack
    from packpipe.dataset import rejects as rejects
    from packpipe.distributions import Beta as Beta
    from packpipe.distributions import Choice as Choice
    from packpipe.distributions import Constant as Constant
    from packpipe.distributions import TruncatedNormal as TruncatedNormal
    from packpipe.distributions import Uniform as Uniform
    from packpipe.dropping import ByResolution as ByResolution
    from packpipe.dropping import OverTraining as OverTraining
    from packpipe.epoch_plan import EpochPlan as EpochPlan
    from packpipe.epochs import EpochPacks as EpochPacks
    from packpipe.histogram import HistogramPlan as HistogramPlan
    from packpipe.histogram import count_lengths as count_lengths
    from packpipe.histogram import plan_histogram as plan_histogram
    from packpipe.loader import PackedLoader as PackedLoader
    from packpipe.model_config import NaViTConfig as NaViTConfig
    from packpipe.navit import NaViT as NaViT
    from packpipe.online import OnlinePacker as OnlinePacker
    from packpipe.packer import Packer as Packer
    from packpipe.packing import Packs as Packs
    from packpipe.packing import pack_lengths as pack_lengths
    from packpipe.pairs import pack_pairs as pack_pairs
    from packpipe.plan import plan_epoch as plan_epoch
    from packpipe.resolution import Area as Area
    from packpipe.resolution import Budget as Budget
    from packpipe.resolution import Side as Side
    from packpipe.resolution import Square as Square
    from packpipe.seq_lens import suggest_seq_len as suggest_seq_len
    from packpipe.streams import PackedStream as PackedStream
    from packpipe.summary import summarize as summarize
    from packpipe.table import read_rows as read_rows
    from packpipe.table import read_tokens as read_tokens
    from packpipe.token_batch import TokenBatch as TokenBatch
    from packpipe.token_config import TokenConfig as TokenConfig
    from packpipe.token_plan import plan_tokens as plan_tokens
    from packpipe.verification import verify as verify

# Public name: the module that defines it.
_HOMES = {
    "Area": "resolution",
    "Beta": "distributions",
    "Budget": "resolution",
    "ByResolution": "dropping",
    "Choice": "distributions",
    "Constant": "distributions",
    "EpochPacks": "epochs",
    "EpochPlan": "epoch_plan",
    "HistogramPlan": "histogram",
    "NaViT": "navit",
    "NaViTConfig": "model_config",
    "OnlinePacker": "online",
    "OverTraining": "dropping",
    "PackConfig": "config",
    "PackedBatch": "batch",
    "PackedLoader": "loader",
    "PackedStream": "streams",
    "Packer": "packer",
    "Packs": "packing",
    "Side": "resolution",
    "Square": "resolution",
    "TokenBatch": "token_batch",
    "TokenConfig": "token_config",
    "TruncatedNormal": "distributions",
    "Uniform": "distributions",
    "balance_steps": "balance",
    "count_lengths": "histogram",
    "manifest": "dataset",
    "pack": "dataset",
    "pack_lengths": "packing",
    "pack_pairs": "pairs",
    "plan_epoch": "plan",
    "plan_histogram": "histogram",
    "plan_tokens": "token_plan",
    "read_rows": "table",
    "read_tokens": "table",
    "rejects": "dataset",
    "suggest_seq_len": "seq_lens",
    "summarize": "summary",
    "verify": "verification",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'packpipe' has no attribute {name!r}")
    return getattr(import_module(f"packpipe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
