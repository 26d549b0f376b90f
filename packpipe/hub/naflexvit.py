"""timm's NaFlexViT, whose images keep their aspect ratio, as timm stores it.

Registers stand before the patches, and no pool sees them: attention (``map``) or the mean (``gap``)
of the patches. The table of positions is resized to each image's grid; in ``par``, to a square of
its longer side, of which the grid is cut, so that patches stay as far apart on both axes.

Source: Wightman, pytorch-image-models; Dehghani et al., arXiv 2307.06304; Beyer et al., arXiv
2212.08013.
"""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from packpipe import checks
from packpipe.hub.encoder import (
    RESAMPLING,
    Encoder,
    check_size,
    filters,
    mean_and_std,
    seq_len_of,
)
from packpipe.hub.files import CONFIG, Weights
from packpipe.hub.folding import fold_pixels, fold_probe
from packpipe.model.config import NaViTConfig
from packpipe.model.presets import NAFLEXVIT
from packpipe.planning.image_config import PackConfig

# Ours: theirs, each with a weight and a bias.
_LAYER = {
    "norm_attention": "norm1",
    "project": "attn.proj",
    "norm_mlp": "norm2",
    "widen": "mlp.fc1",
    "narrow": "mlp.fc2",
}
_POOL = {"project": "proj", "norm_mlp": "norm", "widen": "mlp.fc1", "narrow": "mlp.fc2"}
# Arguments of the model that change an architecture: theirs, ours.
_ARGUMENTS = {
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "heads",
    "patch_size": "patch_size",
    "reg_tokens": "prefix_tokens",
}
_POOLS = {"map": "attention", "avg": "mean"}


def read_naflexvit(
    settings: dict[str, Any], processing: dict[str, Any], weights: Weights
) -> Encoder:
    """Return an encoder of timm, with its head, if there is one.

    Args:
        settings: what config.json says: an architecture of timm, ``model_args`` that change it, and
            ``pretrained_cfg`` with the size, filter, mean and deviation of its images.
        processing: nothing; timm has no files of processors.
        weights: of the model.
    """
    shape = shape_of(settings)
    images = _part(settings, "pretrained_cfg")
    name, remedy = f"interpolation in {CONFIG}", "other filters are not supported"
    number = RESAMPLING.index(
        checks.choice(name, images.get("interpolation", "bicubic"), RESAMPLING, remedy)
    )
    processing = {"resample": number} | {
        f"image_{kind}": images[kind] for kind in ("mean", "std") if kind in images
    }
    patch = shape.patch_size
    size = images.get("input_size", [3, 384, 384])
    if not isinstance(size, list) or len(size) != 3:
        name, remedy = f"input_size in {CONFIG}", "write channels, height and width"
        raise ValueError(checks.sentence(name, size, "a list of three numbers", remedy))
    height, width = (
        checks.whole_number(f"input_size in {CONFIG}", side, patch, 2**15 - 1, "correct it")
        for side in size[1:]
    )
    tokens = (height // patch) * (width // patch)
    packing = PackConfig(
        seq_len=seq_len_of(tokens + shape.prefix_tokens),
        patch_size=patch,
        prefix_tokens=shape.prefix_tokens,
        resolution="budget",
        max_tokens=tokens,
        **filters(processing, patch),
    )
    return Encoder(config=shape, weights=_weights(shape, processing, weights), packing=packing)


def shape_of(settings: dict[str, Any]) -> NaViTConfig:
    """Return the shape of a model, given what timm says of it.

    Raises:
        TypeError, ValueError: an argument of the model is not known, or has a wrong type.
    """
    arguments = dict(_part(settings, "model_args"))
    classes = arguments.pop("num_classes", None)
    classes = settings.get("num_classes", classes)
    # Where transformers wrapped the model, its type is the architecture's name.
    said = settings.get("architecture", settings.get("model_type"))
    remedy = "others are not known"
    architecture = checks.choice(f"architecture in {CONFIG}", said, NAFLEXVIT, remedy)
    # timm writes 0 classes for no head.
    shape = NaViTConfig.preset(architecture, num_classes=classes or None)
    pool = arguments.pop("global_pool", settings.get("global_pool"))
    if pool not in (None, *(name for name, own in _POOLS.items() if own == shape.pooling)):
        what, expected = f"global_pool in {CONFIG}", "that of the architecture"
        remedy = "other pools are not supported"
        raise ValueError(checks.sentence(what, pool, expected, remedy))
    if arguments.pop("in_chans", 3) != 3:
        what, remedy = f"in_chans in {CONFIG}", "packed images have three colours"
        raise ValueError(checks.sentence(what, settings["model_args"]["in_chans"], "3", remedy))
    ratio = arguments.pop("mlp_ratio", None)
    if ratio is not None:
        checks.positive_number(f"mlp_ratio in {CONFIG}", ratio, "correct it")
    checks.known_options(arguments, list(_ARGUMENTS), f"model_args in {CONFIG}")
    shape = replace(shape, **{_ARGUMENTS[name]: value for name, value in arguments.items()})
    if ratio is None and "embed_dim" in arguments:
        # timm keeps the ratio of an architecture where its width alone is changed.
        was = NaViTConfig.preset(architecture, num_classes=None)
        ratio = was.mlp_width / was.dim
    return shape if ratio is None else replace(shape, mlp_dim=int(shape.dim * ratio))


def _part(settings: dict[str, Any], name: str) -> dict[str, Any]:
    found = settings.get(name, {})
    if not isinstance(found, dict):
        what, expected = f"{name} in {CONFIG}", "settings by their names"
        raise TypeError(checks.sentence(what, found, expected, "correct it"))
    return found


def _weights(
    config: NaViTConfig, processing: dict[str, Any], weights: Weights
) -> dict[str, Tensor]:
    take, pairs, names = weights.take, weights.pairs, set(weights.left())
    patches, bias = (take(f"embeds.proj.{kind}") for kind in ("weight", "bias"))
    check_size("embed_dim", config.dim, len(patches))
    check_size("patch_size", config.patch_size, isqrt(patches.shape[1] // 3))
    folded = fold_pixels(patches, bias, *mean_and_std(processing))
    found = dict(zip(("embed.weight", "embed.bias"), folded, strict=True))
    table = take("embeds.pos_embed").flatten(0, 2)
    check_size("pos_embed_grid_size", config.side, isqrt(len(table)))
    found["position.table"] = table
    if config.prefix_tokens:
        found["prefix"] = take("embeds.reg_token")[0]
        check_size("reg_tokens", config.prefix_tokens, len(found["prefix"]))
    for number in range(config.depth):
        ours = theirs = f"blocks.{number}."
        found |= pairs(_LAYER, ours, theirs)
        found[f"{ours}queries_keys_values.weight"] = take(f"{theirs}attn.qkv.weight")
        # Some have none; those of keys move no output.
        biases = torch.zeros(3 * config.dim)
        if f"{theirs}attn.qkv.bias" in names:
            biases = take(f"{theirs}attn.qkv.bias")
        by_part = biases.unflatten(0, (3, config.heads, -1))
        found[f"{ours}bias_queries_values"] = by_part[[0, 2]]
        if config.layer_scale is not None:
            for part, name in (("scale_attention", "ls1"), ("scale_mlp", "ls2")):
                found[f"{ours}{part}.weight"] = take(f"{theirs}{name}.gamma")
    found |= pairs({"norm": "fc_norm" if config.norm_pooled else "norm"})
    if config.pooling == "attention":
        found |= pairs(_POOL, "pool.", "attn_pool.")
        latent = take("attn_pool.latent").flatten()
        to_query, bias_query = (take(f"attn_pool.q.{kind}") for kind in ("weight", "bias"))
        found["pool.query"] = fold_probe(latent, to_query, bias_query, config.heads)
        found["pool.keys_values.weight"] = take("attn_pool.kv.weight")
        values = take("attn_pool.kv.bias").chunk(2)[1]
        found["pool.bias_values"] = values.unflatten(0, (config.heads, -1))
    if config.num_classes is not None:
        found |= pairs({"head": "head"})
    return found
