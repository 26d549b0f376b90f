"""Named shapes of models: sizes such as "B/16", and what pretrained encoders differ in."""

from __future__ import annotations

import re
from typing import Any

from packpipe import checks

# dim, depth, heads, MLP width (ViT; DeiT for Ti; SigLIP for So400m).
PRESETS = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
}
# Of encoders alone.
_OTHER_SIZES = {"So150m2": (832, 21, 13, 2176)}
# Encoders of SigLIP and SigLIP 2 (of a fixed size, and NaFlex): sizes, and switches of all.
_SIGLIP_SIZES = {"base": "B", "large": "L", "so400m": "So400m"}
_SIGLIP = re.compile(
    rf"(?!siglip-.*naflex)siglip2?-({'|'.join(_SIGLIP_SIZES)})-patch([0-9]+)-(naflex|[0-9]+)"
)
_SIZES = {"small": "S", "base": "B", "large": "L"}
SIGLIP: dict[str, Any] = {
    "position": "resized",
    "bias": True,
    "qk_norm": False,
    "activation": "gelu_tanh",
    "norm_eps": 1e-6,
    "norm_out": False,
}
# NaFlex's table is resized as it was in training; a fixed one as transformers does for other grids.
SIGLIP_NAFLEX = SIGLIP | {"resize": "bilinear", "antialias": True, "max_side": 16}
SIGLIP_FIXED = SIGLIP | {"resize": "bicubic", "antialias": False}
# Encoders with a class token, which is what they return.
_CLASS_TOKEN: dict[str, Any] = {
    "bias": True,
    "qk_norm": False,
    "prefix_tokens": 1,
    "pooling": "first",
}
_RESIZED = _CLASS_TOKEN | {"position": "resized", "resize": "bicubic"}
DINOV2 = _RESIZED | {"antialias": False, "norm_eps": 1e-6, "layer_scale": 1.0, "max_side": 37}
DINOV2_REGISTERS = DINOV2 | {"antialias": True, "prefix_tokens": 5}
DINOV3 = _CLASS_TOKEN | {
    "position": "rotary_fractional",
    "norm_eps": 1e-5,
    "layer_scale": 1.0,
    "prefix_tokens": 5,
}
VIT = _RESIZED | {"antialias": False, "norm_eps": 1e-12}
CLIP = _RESIZED | {
    "antialias": False,
    "activation": "quick_gelu",
    "norm_embed": True,
    "norm_pooled": True,
}
_NAMED = {
    **{f"dinov2-{name}": (f"{size}/14", DINOV2) for name, size in _SIZES.items()},
    **{
        f"dinov2-with-registers-{name}": (f"{size}/14", DINOV2_REGISTERS)
        for name, size in _SIZES.items()
    },
    **{f"dinov3-vit{size.lower()}16": (f"{size}/16", DINOV3) for size in ("S", "B", "L")},
    "vit-base-patch16-224": ("B/16", VIT | {"max_side": 14}),
    "vit-large-patch16-224": ("L/16", VIT | {"max_side": 14}),
    "clip-vit-base-patch32": ("B/32", CLIP | {"max_side": 7}),
    "clip-vit-base-patch16": ("B/16", CLIP | {"max_side": 14}),
    "clip-vit-large-patch14": ("L/14", CLIP | {"max_side": 16}),
}
# timm's NaFlexViT: registers, and a pool of the patches.
_NAFLEXVIT: dict[str, Any] = {
    "position": "resized",
    "bias": True,
    "qk_norm": False,
    "norm_eps": 1e-6,
    "max_side": 16,
    "norm_out": False,
}
_SCALED = _NAFLEXVIT | {"resize": "bicubic", "layer_scale": 1e-5}
_MEAN = {"pooling": "mean", "norm_pooled": True, "norm_out": True}
_REGISTERS = _SCALED | {"prefix_tokens": 4, **_MEAN}
_TANH = _NAFLEXVIT | {"activation": "gelu_tanh", "resize": "bilinear"}
NAFLEXVIT = {
    "naflexvit_base_patch16_gap": ("B/16", _REGISTERS),
    "naflexvit_base_patch16_par_gap": ("B/16", _REGISTERS | {"keep_aspect": True}),
    "naflexvit_base_patch16_map": ("B/16", _SCALED | {"prefix_tokens": 1}),
    "naflexvit_so150m2_patch16_reg1_gap": ("So150m2/16", _SCALED | {"prefix_tokens": 1, **_MEAN}),
    "naflexvit_so150m2_patch16_reg1_map": ("So150m2/16", _SCALED | {"prefix_tokens": 1}),
    "naflexvit_base_patch16_siglip": ("B/16", _TANH),
    "naflexvit_so400m_patch16_siglip": ("So400m/16", _TANH),
}
_NAMED |= NAFLEXVIT


def preset_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sizes of a named shape, and its switches, both by the names of `NaViTConfig`.

    Args:
        name: as `NaViTConfig.preset` takes it.

    Raises:
        ValueError: no shape has this name.
    """
    if found := _SIGLIP.fullmatch(name):
        size, patch, side = found.groups()
        switches = SIGLIP_NAFLEX if side == "naflex" else SIGLIP_FIXED
        if side != "naflex":
            if not 0 < int(patch) <= int(side):
                expected = "a patch size of 1 or more, and images no smaller than a patch"
                remedy = "the last number is pixels a side, as in 'siglip-base-patch16-224'"
                raise ValueError(checks.sentence("name", name, expected, remedy))
            switches = switches | {"max_side": int(side) // int(patch)}
        return _sizes_of(f"{_SIGLIP_SIZES[size]}/{patch}"), switches
    if name in _NAMED:
        shape, switches = _NAMED[name]
        return _sizes_of(shape), switches
    return _sizes_of(name), {}


def _sizes_of(name: str) -> dict[str, Any]:
    """Return the sizes of a shape that is named by its size and patch size, such as "B/16"."""
    size, _, patch = name.partition("/")
    if size not in PRESETS | _OTHER_SIZES or not patch.isdecimal():
        known = ", ".join(PRESETS)
        expected = f"one of {known} and a patch size, such as 'B/16', or an encoder's name"
        raise ValueError(checks.sentence("name", name, expected, "or pass dim, depth, heads"))
    dim, depth, heads, mlp_dim = (PRESETS | _OTHER_SIZES)[size]
    widths = {"dim": dim, "depth": depth, "heads": heads, "mlp_dim": mlp_dim}
    return {"patch_size": int(patch), **widths}
