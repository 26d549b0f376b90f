"""`Encoder`: what reading a pretrained model gives, and what readers of all families share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from packpipe import checks
from packpipe.hub.files import CONFIG
from packpipe.model.config import NaViTConfig
from packpipe.planning.crops import CenterCrop, CropLaw, FixedCrop
from packpipe.planning.distributions import Constant
from packpipe.planning.image_config import PackConfig
from packpipe.planning.image_options import MAX_IMAGE_SEQ_LEN
from packpipe.planning.resolution import Square

# Pillow's numbers of its resampling filters, which image processors store.
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_ABOUT = 1024  # tokens a row
_OWNER = "image processor's"


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder that was trained elsewhere.

    Attributes:
        config: the shape.
        weights: by the names of ``NaViT.state_dict``.
        packing: how images become rows for it.
    """

    config: NaViTConfig
    weights: dict[str, Tensor]
    packing: PackConfig


def filters(processing: dict[str, Any], patch_size: int) -> dict[str, Any]:
    """Return the options of `PackConfig` that give a Pillow image processor's pixels.

    Args:
        processing: its settings, ``resample`` among them.
        patch_size: of the model.

    Raises:
        ValueError: the filter is not known, images are not resized, rescaled and normalised, they
            are cropped or padded, or patches have another size than the model's.
    """
    remedy = "packed images are resized, and scaled by 1/255"
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if processing.get(name, True) is not True:
            raise _wrong(name, processing[name], "True", remedy)
    for name in ("do_center_crop", "do_pad"):
        if processing.get(name, False) is not False:
            remedy = "packed images are resized as a whole, so set it to false if that is meant"
            raise _wrong(name, processing[name], "False", remedy)
    # A decimal number in JSON, of which not every writer keeps all digits.
    scale = processing.get("rescale_factor", 1 / 255)
    if not isinstance(scale, float) or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
        raise _wrong("rescale_factor", scale, "1/255", remedy)
    if (size := processing.get("patch_size", patch_size)) != patch_size:
        remedy = "take the processor of this model"
        raise _wrong("patch_size", size, f"{patch_size} (the model's)", remedy)
    number = processing["resample"]
    if not isinstance(number, int) or number not in range(len(RESAMPLING)):
        expected = f"a number of Pillow's filters, 0..{len(RESAMPLING) - 1}"
        raise _wrong("resample", number, expected, "correct the processor's")
    name = RESAMPLING[number]
    # Processors resize in one step, and take numbers of any colour profile for sRGB.
    return {
        "downscale_filter": name,
        "upscale_filter": name,
        "reducing_gap": None,
        "profiles": "ignore",
    }


def mean_and_std(processing: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return what a processor normalises each of three colours by; one half, if it says nothing.

    Raises:
        TypeError, ValueError: they are no three numbers, or a deviation is not above 0.
    """
    found = []
    for name, check in (("image_mean", checks.real_number), ("image_std", checks.positive_number)):
        values, remedy = processing.get(name, [0.5] * 3), "write one for each colour"
        if not isinstance(values, list) or len(values) != 3:
            raise _wrong(name, values, "a list of three numbers", remedy)
        found.append([check(f"{_OWNER} {name}", value, remedy) for value in values])
    return found[0], found[1]


def side_of(processing: dict[str, Any], usual: int, patch_size: int) -> int:
    """Return the pixels a side of the squares that a processor makes of images.

    Args:
        processing: its settings.
        usual: the side, if they do not say it.
        patch_size: the smallest side.

    Raises:
        TypeError, ValueError: it makes no squares of one size. One number is none: it means an
            image's shorter side.
    """
    size = processing.get("size", {"height": usual, "width": usual})
    if (
        not isinstance(size, dict)
        or (side := size.get("height")) is None
        or side != size.get("width")
    ):
        remedy = "write the one that the model was trained with, as height and as width"
        raise _wrong("size", size, "one height and width", remedy)
    return checks.whole_number(f"{_OWNER} size", side, patch_size, 2**15 - 1, "correct it")


def _wrong(name: str, value: object, expected: str, remedy: str) -> ValueError:
    return ValueError(checks.sentence(f"{_OWNER} {name}", value, expected, remedy))


def tower_of(settings: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Return config.json's settings of the image tower, and the usual ones where it has none.

    Args:
        settings: of both towers or of this one.
        usual: a value for each setting that is asked for, whose type others must have, too.

    Raises:
        TypeError, ValueError: a setting has another type.
    """
    said = settings.get("vision_config", settings)
    if not isinstance(said, dict):
        name, remedy = f"vision_config in {CONFIG}", "correct it"
        raise TypeError(checks.sentence(name, said, "settings by their names", remedy))
    found = usual | said
    for setting, known in usual.items():
        value, name = found[setting], f"{setting} in {CONFIG}"
        # Before int: to Python a bool is an int.
        if isinstance(known, bool):
            checks.boolean(name, value)
        elif isinstance(known, int):
            checks.whole_number(name, value, 0, 2**31 - 1, "correct it")
        elif isinstance(known, float):
            checks.real_number(name, value, "correct it")
        elif not isinstance(value, str):
            raise TypeError(checks.sentence(name, value, "a text", "correct it"))
    return found


ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}


def shape_settings(own: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of `NaViTConfig` that transformers names alike in its families.

    Args:
        own: what config.json says of the image tower.

    Raises:
        TypeError, ValueError: the activation is not known, patches are no squares, or there are
            not three channels.
    """
    checks.choice(
        f"hidden_act in {CONFIG}",
        own["hidden_act"],
        ACTIVATIONS,
        "this activation is not supported",
    )
    channels = own.get("num_channels", 3)
    for name, value in (("patch_size", own["patch_size"]), ("num_channels", channels)):
        checks.whole_number(f"{name} in {CONFIG}", value, 1, 2**15 - 1, "correct it")
    if channels != 3:
        name, remedy = f"num_channels in {CONFIG}", "packed images have three colours"
        raise ValueError(checks.sentence(name, channels, "3", remedy))
    return {
        "patch_size": own["patch_size"],
        "dim": own["hidden_size"],
        "depth": own["num_hidden_layers"],
        "heads": own["num_attention_heads"],
        "activation": ACTIVATIONS[own["hidden_act"]],
        "norm_eps": own["layer_norm_eps"],
    }


def check_size(name: str, said: int, stored: int) -> None:
    """Raise ValueError if config.json says another size than the weights have."""
    if said != stored:
        expected, remedy = f"{stored} as of the weights", "take both files of one model"
        raise ValueError(checks.sentence(f"{name} in {CONFIG}", said, expected, remedy))


def squares(config: NaViTConfig, processing: dict[str, Any], usual: int) -> PackConfig:
    """Return the options that make the squares of an image processor.

    A processor that resizes the shorter side and crops the middle makes the pixels of a crop that
    is resized, but for the rounding of the box to whole pixels of the picture, and for what the
    filter sees beyond it.

    Args:
        config: the model's shape.
        processing: the processor's settings.
        usual: pixels a side, if they do not say it.

    Raises:
        TypeError, ValueError: of `filters` and `side_of`; or a cropped square is not of whole
            patches.
    """
    crop: CropLaw | None = None
    patch = config.patch_size
    if processing.get("do_center_crop"):
        size, shorter = _middle(processing)
        if size % patch:
            expected = f"a multiple of {patch} (patch_size) of an encoder"
            raise _wrong("crop_size", size, expected, "set it to whole patches")
        # CenterCrop takes a share of the area, and cuts before it resizes; they cut afterwards.
        crop = CenterCrop(min(1.0, (size / shorter) ** 2), shape="square")
        # Done by the crop above, so `filters`, which refuses crops, need not know of it.
        processing = {**processing, "do_center_crop": False}
    else:
        size = side_of(processing, usual, patch)
    pixels = size // patch * patch
    # Their convolution leaves out what is no whole patch, at the right and below.
    if pixels < size:
        crop = FixedCrop(0.0, 0.0, pixels / size, pixels / size)
    slots = config.prefix_tokens
    return PackConfig(
        seq_len=seq_len_of((pixels // patch) ** 2 + slots),
        patch_size=patch,
        prefix_tokens=slots,
        crop=crop,
        resolution=Square(Constant(pixels)),
        **filters(processing, patch),
    )


def _middle(processing: dict[str, Any]) -> tuple[int, int]:
    """Return pixels a side of the square that is cropped, and of the shorter side before.

    Raises:
        ValueError: no square is cropped, or not of an image whose shorter side was resized.
    """
    size, crop = processing.get("size"), processing.get("crop_size")
    shorter: Any = size.get("shortest_edge") if isinstance(size, dict) else size
    side: Any = crop.get("height") if isinstance(crop, dict) else crop
    if isinstance(crop, dict) and side != crop.get("width"):
        side = None
    for name, value, found in (("size", size, shorter), ("crop_size", crop, side)):
        if not isinstance(found, int) or found < 1:
            expected = "one number of pixels" if name == "crop_size" else "a shortest_edge"
            raise _wrong(name, value, expected, "write the one that the model was trained with")
    if side > shorter:
        remedy = "images are not padded"
        raise _wrong("crop_size", side, f"at most {shorter} (the shorter side)", remedy)
    return side, shorter


def seq_len_of(tokens: int) -> int:
    """Return the multiple of most tokens of an image that is nearest to 1024: rows fill well.

    >>> seq_len_of(256), seq_len_of(196), seq_len_of(729)
    (1024, 980, 729)
    """
    return min(tokens * max(1, round(_ABOUT / tokens)), MAX_IMAGE_SEQ_LEN)
