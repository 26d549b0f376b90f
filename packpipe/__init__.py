"""packpipe packs images (or token sequences) of any size into rows of exactly seq_len tokens.

Public names bind on first use: ``import packpipe`` alone loads no third-party package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from packpipe._version import __version__ as __version__

if TYPE_CHECKING:
    from packpipe.augmenting.augment import Augment as Augment
    from packpipe.building.opened import open_packed as open_packed
    from packpipe.building.pack import manifest as manifest
    from packpipe.building.pack import pack as pack
    from packpipe.building.pack import rejects as rejects
    from packpipe.building.packer import Packer as Packer
    from packpipe.building.pairs import pack_pairs as pack_pairs
    from packpipe.building.ray_executor import RayExecutor as RayExecutor
    from packpipe.building.summary import summarize as summarize
    from packpipe.hub.own import save_pretrained as save_pretrained
    from packpipe.hub.pretrained import from_pretrained as from_pretrained
    from packpipe.hub.push import push_to_hub as push_to_hub
    from packpipe.loading.batch import PackedBatch as PackedBatch
    from packpipe.loading.batch import PairBatch as PairBatch
    from packpipe.loading.batch import TokenBatch as TokenBatch
    from packpipe.loading.epochs import EpochPacks as EpochPacks
    from packpipe.loading.loader import PackedLoader as PackedLoader
    from packpipe.loading.read import read_rows as read_rows
    from packpipe.loading.read import read_tokens as read_tokens
    from packpipe.loading.streams import PackedStream as PackedStream
    from packpipe.loading.window_packs import WindowPacks as WindowPacks
    from packpipe.model.config import NaViTConfig as NaViTConfig
    from packpipe.model.navit import NaViT as NaViT
    from packpipe.model.navit import compile_parts as compile_parts
    from packpipe.model.onnx_model import OnnxModel as OnnxModel
    from packpipe.model.predict import predict as predict
    from packpipe.packing.equal_steps import balance_steps as balance_steps
    from packpipe.packing.histogram import HistogramPlan as HistogramPlan
    from packpipe.packing.histogram import count_lengths as count_lengths
    from packpipe.packing.histogram import plan_histogram as plan_histogram
    from packpipe.packing.online import OnlinePacker as OnlinePacker
    from packpipe.packing.packs import Packs as Packs
    from packpipe.packing.packs import pack_lengths as pack_lengths
    from packpipe.packing.suggest import suggest_seq_len as suggest_seq_len
    from packpipe.planning.crops import CenterCrop as CenterCrop
    from packpipe.planning.crops import Crop as Crop
    from packpipe.planning.crops import FixedCrop as FixedCrop
    from packpipe.planning.distributions import Beta as Beta
    from packpipe.planning.distributions import Choice as Choice
    from packpipe.planning.distributions import Constant as Constant
    from packpipe.planning.distributions import TruncatedNormal as TruncatedNormal
    from packpipe.planning.distributions import Uniform as Uniform
    from packpipe.planning.dropping import ByResolution as ByResolution
    from packpipe.planning.dropping import OverTraining as OverTraining
    from packpipe.planning.epoch_plan import EpochPlan as EpochPlan
    from packpipe.planning.image_config import PackConfig as PackConfig
    from packpipe.planning.plan import plan_epoch as plan_epoch
    from packpipe.planning.resolution import Area as Area
    from packpipe.planning.resolution import Budget as Budget
    from packpipe.planning.resolution import PixelRange as PixelRange
    from packpipe.planning.resolution import Side as Side
    from packpipe.planning.resolution import Square as Square
    from packpipe.planning.token_config import TokenConfig as TokenConfig
    from packpipe.planning.token_plan import plan_tokens as plan_tokens
    from packpipe.planning.views import View as View
    from packpipe.sources.image_files import ImageFiles as ImageFiles
    from packpipe.training.export import export_onnx as export_onnx
    from packpipe.training.run_folder import load_model as load_model
    from packpipe.verification.verify import verify as verify

# Public name: the module that defines it.
_HOMES = {
    "Area": "planning.resolution",
    "Augment": "augmenting.augment",
    "Beta": "planning.distributions",
    "Budget": "planning.resolution",
    "ByResolution": "planning.dropping",
    "CenterCrop": "planning.crops",
    "Choice": "planning.distributions",
    "Constant": "planning.distributions",
    "Crop": "planning.crops",
    "EpochPacks": "loading.epochs",
    "EpochPlan": "planning.epoch_plan",
    "FixedCrop": "planning.crops",
    "HistogramPlan": "packing.histogram",
    "ImageFiles": "sources.image_files",
    "NaViT": "model.navit",
    "NaViTConfig": "model.config",
    "OnlinePacker": "packing.online",
    "OnnxModel": "model.onnx_model",
    "OverTraining": "planning.dropping",
    "PackConfig": "planning.image_config",
    "PackedBatch": "loading.batch",
    "PackedLoader": "loading.loader",
    "PackedStream": "loading.streams",
    "Packer": "building.packer",
    "Packs": "packing.packs",
    "PairBatch": "loading.batch",
    "PixelRange": "planning.resolution",
    "RayExecutor": "building.ray_executor",
    "Side": "planning.resolution",
    "Square": "planning.resolution",
    "TokenBatch": "loading.batch",
    "TokenConfig": "planning.token_config",
    "TruncatedNormal": "planning.distributions",
    "Uniform": "planning.distributions",
    "View": "planning.views",
    "WindowPacks": "loading.window_packs",
    "balance_steps": "packing.equal_steps",
    "compile_parts": "model.navit",
    "count_lengths": "packing.histogram",
    "export_onnx": "training.export",
    "from_pretrained": "hub.pretrained",
    "load_model": "training.run_folder",
    "manifest": "building.pack",
    "open_packed": "building.opened",
    "pack": "building.pack",
    "pack_lengths": "packing.packs",
    "pack_pairs": "building.pairs",
    "plan_epoch": "planning.plan",
    "plan_histogram": "packing.histogram",
    "plan_tokens": "planning.token_plan",
    "predict": "model.predict",
    "push_to_hub": "hub.push",
    "read_rows": "loading.read",
    "read_tokens": "loading.read",
    "rejects": "building.pack",
    "save_pretrained": "hub.own",
    "suggest_seq_len": "packing.suggest",
    "summarize": "building.summary",
    "verify": "verification.verify",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'packpipe' has no attribute {name!r}")
    return getattr(import_module(f"packpipe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
