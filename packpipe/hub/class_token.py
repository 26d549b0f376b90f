"""Encoders with a class token, as transformers stores them: DINOv2, DINOv3, ViT, CLIP's of images.

Their blocks are NaViT's with biases and without query-key normalisation. A class token and, in
some, registers stand before the patches as prefix tokens; what the model returns is the class
token's. Its own place in a table of positions is added to it here, once. Tables are resized to each
image's grid as transformers' ``interpolate_pos_encoding`` does.

Source: Oquab et al., arXiv 2304.07193; Darcet et al., arXiv 2309.16588; Siméoni et al., arXiv
2508.10104; Dosovitskiy et al., arXiv 2010.11929; Radford et al., arXiv 2103.00020.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from packpipe import checks
from packpipe.hub.encoder import (
    Encoder,
    check_size,
    mean_and_std,
    shape_settings,
    squares,
    tower_of,
)
from packpipe.hub.files import CONFIG, Weights
from packpipe.hub.folding import channels_last, fold_pixels
from packpipe.model.config import NaViTConfig
from packpipe.model.presets import CLIP, DINOV2, DINOV2_REGISTERS, DINOV3, VIT

# Pillow's numbers of these filters, which image processors store.
_BILINEAR, _BICUBIC = 2, 3
# Mean and deviation of red, green and blue, over ImageNet and over CLIP's own pictures.
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_OF_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_CROPPED = {"do_center_crop": True, "resample": _BICUBIC, "crop_size": 224}
_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "hidden_act": "gelu",
}


@dataclass(frozen=True)
class Family:
    """How a family names its tensors, and what its files leave out where it is as usual.

    Attributes:
        switches: of `NaViTConfig`.
        usual: settings of config.json.
        processing: settings of the image processor.
        first: the class token, by which what stands before all names is known.
        patches: the patch embedding.
        layer: what stands before the names of a layer, with its number.
        parts: ours: theirs, of a layer, each with a weight and a bias.
        projections: of queries, keys and values.
        norms: ours: theirs, outside of the layers, each with a weight and a bias.
        table: of positions, the class token's first; None without one.
        registers: the other prefix tokens; None without any.
        scales: of attention and MLP; none without layer scale.
        wide: a gated MLP's gate and the other half, in the place of ``widen``.
        modules: names of transformers 5's modules, which it writes with
            ``save_original_format=False``: those of version 4, which both write otherwise.
    """

    switches: dict[str, Any]
    usual: dict[str, Any]
    processing: dict[str, Any]
    first: str
    patches: str
    layer: str
    parts: dict[str, str]
    projections: tuple[str, str, str]
    norms: dict[str, str]
    table: str | None = "embeddings.position_embeddings"
    registers: str | None = None
    scales: tuple[str, ...] = ()
    wide: tuple[str, ...] = field(default=())
    modules: dict[str, str] = field(default_factory=dict)


_OF_BERT = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_OF_LLAMA = {
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
}
_DINOV2: dict[str, Any] = {
    "usual": _SIZES | {"mlp_ratio": 4.0, "patch_size": 14, "layer_norm_eps": 1e-6},
    "processing": _CROPPED | _IMAGENET | {"size": {"shortest_edge": 256}},
    "first": "embeddings.cls_token",
    "patches": "embeddings.patch_embeddings.projection",
    "layer": "encoder.layer.{}.",
    "parts": {
        "norm_attention": "norm1",
        "project": "attention.output.dense",
        "norm_mlp": "norm2",
        "widen": "mlp.fc1",
        "narrow": "mlp.fc2",
    },
    "projections": _OF_BERT,
    "norms": {"norm": "layernorm"},
    "scales": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    "modules": _OF_LLAMA,
}
FAMILIES = {
    "dinov2": Family(switches=DINOV2, **_DINOV2),
    "dinov2_with_registers": Family(
        switches=DINOV2_REGISTERS,
        registers="embeddings.register_tokens",
        **_DINOV2 | {"usual": _DINOV2["usual"] | {"patch_size": 16, "num_register_tokens": 4}},
    ),
    "dinov3_vit": Family(
        switches=DINOV3,
        usual=_SIZES
        | {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_attention_heads": 6,
            "patch_size": 16,
            "layer_norm_eps": 1e-5,
            "num_register_tokens": 0,
        },
        processing={"resample": _BILINEAR, "size": {"height": 224, "width": 224}} | _IMAGENET,
        first="embeddings.cls_token",
        patches="embeddings.patch_embeddings",
        layer="layer.{}.",
        parts={
            "norm_attention": "norm1",
            "project": "attention.o_proj",
            "norm_mlp": "norm2",
            "widen": "mlp.up_proj",
            "narrow": "mlp.down_proj",
        },
        projections=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        norms={"norm": "norm"},
        table=None,
        registers="embeddings.register_tokens",
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        wide=("mlp.gate_proj", "mlp.up_proj"),
        modules={"model.layer.": "layer."},
    ),
    "vit": Family(
        switches=VIT,
        usual=_SIZES | {"patch_size": 16, "layer_norm_eps": 1e-12},
        processing={"resample": _BILINEAR, "size": {"height": 224, "width": 224}},
        first="embeddings.cls_token",
        patches="embeddings.patch_embeddings.projection",
        layer="encoder.layer.{}.",
        parts={
            "norm_attention": "layernorm_before",
            "project": "attention.output.dense",
            "norm_mlp": "layernorm_after",
            "widen": "intermediate.dense",
            "narrow": "output.dense",
        },
        projections=_OF_BERT,
        norms={"norm": "layernorm"},
        modules={
            **_OF_LLAMA,
            "layers.": "encoder.layer.",
            "mlp.fc1.": "intermediate.dense.",
            "mlp.fc2.": "output.dense.",
        },
    ),
    "clip": Family(
        switches=CLIP,
        usual=_SIZES | {"patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
        processing=_CROPPED | _OF_CLIP | {"size": {"shortest_edge": 224}},
        first="embeddings.class_embedding",
        patches="embeddings.patch_embedding",
        layer="encoder.layers.{}.",
        parts={
            "norm_attention": "layer_norm1",
            "project": "self_attn.out_proj",
            "norm_mlp": "layer_norm2",
            "widen": "mlp.fc1",
            "narrow": "mlp.fc2",
        },
        projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        norms={"norm_embed": "pre_layrnorm", "norm": "post_layernorm"},
        table="embeddings.position_embedding.weight",
    ),
}
# Heads, decoders and towers of texts, which a model of images alone does not use; and what stands
# for patches that were masked in training.
OTHERS = (
    *("pooler.", "classifier.", "decoder.", "visual_projection.", "text_projection."),
    *("embeddings.mask_token", "dinov2.embeddings.mask_token", "vit.embeddings.mask_token"),
    *("dinov2_with_registers.embeddings.mask_token", "vit.pooler."),
)
# What must be as usual, for which there is no switch.
_FIXED = {
    "use_swiglu_ffn": False,
    "qkv_bias": True,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "rope_theta": 100.0,
}


def read_class_token(
    settings: dict[str, Any], processing: dict[str, Any], weights: Weights, *, name: str
) -> Encoder:
    """Return an encoder that answers with its class token.

    Args:
        settings: what config.json says, of both towers or of this one.
        processing: what is known of the image processor.
        weights: of both towers or of this one.
        name: of `FAMILIES`.
    """
    family = FAMILIES[name]
    config = shape_of(settings, name)
    processing = family.processing | processing
    return Encoder(
        config=config,
        weights=_weights(config, processing, weights, family),
        packing=squares(config, processing, config.patch_size * config.side),
    )


def shape_of(settings: dict[str, Any], name: str) -> NaViTConfig:
    """Return the shape of an encoder, given what transformers says of it or of both towers.

    Raises:
        TypeError, ValueError: it is of a kind that there is no switch for, or a setting is wrong.
    """
    family = FAMILIES[name]
    own = tower_of(settings, family.usual)
    for known, usual in _FIXED.items():
        if own.get(known, usual) != usual:
            what, remedy = f"{known} in {CONFIG}", "other encoders of the family are not supported"
            raise ValueError(checks.sentence(what, own[known], repr(usual), remedy))
    switches = family.switches | shape_settings(own)
    if family.registers is not None:
        switches["prefix_tokens"] = 1 + own["num_register_tokens"]
    if family.table is not None:
        side = checks.whole_number(
            f"image_size in {CONFIG}", own["image_size"], 1, 2**15, "correct it"
        )
        switches["max_side"] = side // own["patch_size"]
    # Families write the MLP's width, or its ratio to the model's, or both.
    ratio = own.get("mlp_ratio")
    width = own["intermediate_size"] if ratio is None else int(own["hidden_size"] * ratio)
    return NaViTConfig(
        num_classes=None, mlp_dim=width, gated=own.get("use_gated_mlp", False), **switches
    )


def _weights(
    config: NaViTConfig, processing: dict[str, Any], weights: Weights, family: Family
) -> dict[str, Tensor]:
    weights.rename(family.modules)
    # The model may be a part of another, with a head or a tower of texts.
    (within, *_) = [k for k in weights.left() if k.endswith(family.first)] or [family.first]
    within = within.removesuffix(family.first)

    def take(name: str) -> Tensor:
        return weights.take(within + name)

    patches = channels_last(take(f"{family.patches}.weight"))
    check_size("hidden_size", config.dim, len(patches))
    check_size("patch_size", config.patch_size, isqrt(patches.shape[1] // 3))
    # CLIP's has no bias, but its pixels have a mean.
    bias = torch.zeros(config.dim) if config.norm_embed else take(f"{family.patches}.bias")
    folded = fold_pixels(patches, bias, *mean_and_std(processing))
    found = dict(zip(("embed.weight", "embed.bias"), folded, strict=True))
    prefix = take(family.first).reshape(1, -1)
    if family.table is not None:
        table = take(family.table).reshape(-1, config.dim)
        check_size("image_size ÷ patch_size,", config.side, isqrt(max(0, len(table) - 1)))
        # The class token's place is the same in every image, so it is added here once.
        prefix, found["position.table"] = prefix + table[:1], table[1:]
    if family.registers is not None:
        prefix = torch.cat([prefix, take(family.registers)[0]])
    check_size("1 + num_register_tokens", config.prefix_tokens, len(prefix))
    found["prefix"] = prefix
    for number in range(config.depth):
        ours, theirs = f"blocks.{number}.", family.layer.format(number)
        if config.gated:
            parts = {own: name for own, name in family.parts.items() if own != "widen"}
            for kind in ("weight", "bias"):
                # NaViT computes gate and other half in one product.
                halves = [take(f"{theirs}{name}.{kind}") for name in family.wide]
                found[f"{ours}widen.{kind}"] = torch.cat(halves)
        else:
            parts = family.parts
        found |= weights.pairs(parts, ours, within + theirs)
        projections = [take(f"{theirs}{name}.weight") for name in family.projections]
        found[f"{ours}queries_keys_values.weight"] = torch.cat(projections)
        found[f"{ours}bias_queries_values"] = _biases(config, weights, within + theirs, family)
        for own, name in zip(("scale_attention", "scale_mlp"), family.scales, strict=False):
            found[f"{ours}{own}.weight"] = take(theirs + name)
    return found | weights.pairs(family.norms, theirs=within)


def _biases(config: NaViTConfig, weights: Weights, layer: str, family: Family) -> Tensor:
    """Return the biases of queries and values, [2, heads, E].

    Those of keys move no output without rotary positions; with them, a family has none.
    """
    queries, keys, values = (f"{layer}{name}.bias" for name in family.projections)
    if config.position == "resized":
        weights.take(keys)
    biases = torch.stack([weights.take(queries), weights.take(values)])
    by_head: Tensor = biases.unflatten(1, (config.heads, -1))
    return by_head
