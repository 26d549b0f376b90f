"""SigLIP and SigLIP 2 of a fixed size, and NaFlex, as transformers stores them.

Their blocks and pool are NaViT's with biases and without query-key normalisation. The table of
positions is resized to each image's grid: NaFlex was trained so, with bilinear weights and
antialiasing; the others take grids of other sizes as transformers' ``interpolate_pos_encoding``.

Source: Zhai et al., arXiv 2303.15343; Tschannen et al., arXiv 2502.14786.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from packpipe import checks
from packpipe.hub.encoder import (
    Encoder,
    check_size,
    filters,
    mean_and_std,
    seq_len_of,
    shape_settings,
    squares,
    tower_of,
)
from packpipe.hub.files import CONFIG, Weights
from packpipe.hub.folding import channels_last, fold_pixels, fold_probe
from packpipe.model.config import NaViTConfig
from packpipe.model.presets import SIGLIP_FIXED, SIGLIP_NAFLEX
from packpipe.planning.image_config import PackConfig
from packpipe.planning.image_options import MAX_IMAGE_SEQ_LEN

# Ours: theirs, each with a weight and a bias.
_LAYER = {
    "norm_attention": "layer_norm1",
    "project": "self_attn.out_proj",
    "norm_mlp": "layer_norm2",
    "widen": "mlp.fc1",
    "narrow": "mlp.fc2",
}
_POOL = {
    "project": "attention.out_proj",
    "norm_mlp": "layernorm",
    "widen": "mlp.fc1",
    "narrow": "mlp.fc2",
}
# The tower of texts, and what both towers share.
OTHERS = ("text_model.", "logit_scale", "logit_bias")
# What transformers leaves out of a configuration where it is as usual, and of a processor.
_USUAL = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
    "num_patches": 256,
    "image_size": 224,
}
_BILINEAR, _BICUBIC = 2, 3


def read_siglip(
    settings: dict[str, Any], processing: dict[str, Any], weights: Weights, *, naflex: bool
) -> Encoder:
    """Return the image tower of a SigLIP.

    Args:
        settings: what config.json says, of both towers or of this one.
        processing: what is known of the image processor.
        weights: of both towers or of this one, with or without ``vision_model.`` before the names.
        naflex: whether images keep their aspect ratio, within a budget of patches.
    """
    own = tower_of(settings, _USUAL)
    config = shape_of(own, naflex=naflex)
    usual = {"resample": _BILINEAR if naflex else _BICUBIC, "max_num_patches": own["num_patches"]}
    processing = usual | processing
    return Encoder(
        config=config,
        weights=_weights(config, processing, weights),
        packing=_packing(config, processing, naflex=naflex),
    )


def shape_of(own: dict[str, Any], *, naflex: bool) -> NaViTConfig:
    """Return the shape of an encoder, given all that transformers says of its image tower."""
    shape = shape_settings(own)
    name = "num_patches" if naflex else "image_size"
    checks.whole_number(f"{name} in {CONFIG}", own[name], 1, 2**15 - 1, "correct it")
    side = isqrt(own["num_patches"]) if naflex else own["image_size"] // own["patch_size"]
    switches = {**(SIGLIP_NAFLEX if naflex else SIGLIP_FIXED), "max_side": side, **shape}
    return NaViTConfig(
        num_classes=None,
        mlp_dim=own["intermediate_size"],
        pooling="attention" if own["vision_use_head"] else "none",
        **switches,
    )


def _packing(config: NaViTConfig, processing: dict[str, Any], *, naflex: bool) -> PackConfig:
    patch = config.patch_size
    if not naflex:
        return squares(config, processing, config.side * patch)
    tokens = processing["max_num_patches"]
    name, most = "image processor's max_num_patches", MAX_IMAGE_SEQ_LEN
    tokens = checks.whole_number(name, tokens, 1, most, "correct it")
    return PackConfig(
        seq_len=seq_len_of(tokens),
        patch_size=patch,
        resolution="budget",
        max_tokens=tokens,
        **filters(processing, patch),
    )


def _weights(
    config: NaViTConfig, processing: dict[str, Any], weights: Weights
) -> dict[str, Tensor]:
    within = "vision_model." if any(k.startswith("vision_model.") for k in weights.left()) else ""

    def take(name: str) -> Tensor:
        return weights.take(within + name)

    patches, bias = (take(f"embeddings.patch_embedding.{kind}") for kind in ("weight", "bias"))
    if patches.ndim == 4:  # a convolution
        patches = channels_last(patches)
    check_size("hidden_size", config.dim, len(patches))
    check_size("patch_size", config.patch_size, isqrt(patches.shape[1] // 3))
    folded = fold_pixels(patches, bias, *mean_and_std(processing))
    found = dict(zip(("embed.weight", "embed.bias"), folded, strict=True))
    found["position.table"] = table = take("embeddings.position_embedding.weight")
    check_size("image_size ÷ patch_size, or √num_patches,", config.side, isqrt(len(table)))
    for number in range(config.depth):
        ours, theirs = f"blocks.{number}.", f"encoder.layers.{number}."
        found |= weights.pairs(_LAYER, ours, within + theirs)
        parts = {
            (part, kind): take(f"{theirs}self_attn.{part}_proj.{kind}")
            for part in "qkv"
            for kind in ("weight", "bias")
        }
        found[f"{ours}queries_keys_values.weight"] = torch.cat([parts[p, "weight"] for p in "qkv"])
        # A bias of keys adds the same to all products of a query, which softmax takes away again.
        biases = torch.stack([parts[part, "bias"] for part in "qv"])
        found[f"{ours}bias_queries_values"] = biases.unflatten(1, (config.heads, -1))
    found |= weights.pairs({"norm": "post_layernorm"}, theirs=within)
    if config.pooling == "attention":
        found |= weights.pairs(_POOL, "pool.", f"{within}head.")
        to_query, to_keys, to_values = take("head.attention.in_proj_weight").chunk(3)
        bias_query, _, bias_values = take("head.attention.in_proj_bias").chunk(3)
        probe = take("head.probe").flatten()
        found["pool.query"] = fold_probe(probe, to_query, bias_query, config.heads)
        found["pool.keys_values.weight"] = torch.cat([to_keys, to_values])
        found["pool.bias_values"] = bias_values.unflatten(0, (config.heads, -1))
    return found
