"""`from_pretrained`: an encoder that another library trained, as a model of packed rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from packpipe import checks
from packpipe.hub import class_token, naflexvit, own, siglip
from packpipe.hub.encoder import Encoder
from packpipe.hub.files import (
    CONFIG,
    Weights,
    first_line,
    folder_of,
    processing_of,
    settings_of,
)
from packpipe.hub.meaning import KIND
from packpipe.model.navit import NaViT
from packpipe.model.presets import NAFLEXVIT
from packpipe.planning.image_config import PackConfig

log = logging.getLogger(__name__)

# model_type of config.json, or timm's architecture: who reads it.
_FAMILIES: dict[str, Callable[..., Encoder]] = {
    KIND: own.read_own,
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), partial(siglip.read_siglip, naflex=True)),
    **dict.fromkeys(("siglip", "siglip_vision_model"), partial(siglip.read_siglip, naflex=False)),
    **{name: partial(class_token.read_class_token, name=name) for name in class_token.FAMILIES},
    "clip_vision_model": partial(class_token.read_class_token, name="clip"),
    **dict.fromkeys(NAFLEXVIT, naflexvit.read_naflexvit),
}
# Beginnings of names that a model of images alone does not use.
_OTHERS = (*siglip.OTHERS, *class_token.OTHERS)


def from_pretrained(
    source: str | Path,
    *,
    num_classes: int | None = None,
    attention: str = "auto",
    revision: str | None = None,
) -> tuple[NaViT, PackConfig]:
    """Return a pretrained encoder on the CPU, and the options that pack images as it expects them.

    Outputs are those of the original model to float32's rounding, in packed rows of any other
    images::

        model, packing = packpipe.from_pretrained("google/siglip2-base-patch16-naflex")
        vectors = packpipe.predict(model, files, **packing.to_options())

    Known are SigLIP and SigLIP 2, NaFlex and of fixed sizes, DINOv2 with and without registers,
    DINOv3's ViTs, ViT and CLIP, as transformers 4 or 5 stores them, with or without their tower of
    texts or a head, which is left; timm's NaFlexViTs, with their head; and what
    `save_pretrained` wrote. The model returns what the
    original calls ``pooler_output``; without a pool, ``last_hidden_state``; of ViT, whose pooler is
    left, the class token of it.

    Args:
        source: a folder with config.json and model.safetensors, or the name of a model of the
            Hugging Face Hub. If it has the settings of an image processor, its mean and standard
            deviation are folded into the weights, and packing has its size and filter; without
            them those that are usual for the family count.
        num_classes: gives the model a new head of so many classes, its weights drawn by torch's
            generator; None keeps the head, if there is one.
        attention: backend.
        revision: branch, tag or commit of the Hub.

    Returns:
        The model, its weights in float32, and options for `predict`, `pack` and `EpochPacks`. Their
        pixels are those of the processor of Pillow, but for transparent images, whose alpha it
        drops; for sizes that are no multiple of a patch, such as 384 of 14: their edge, which
        the original does not see, is cropped, to whole pixels of the picture; and for processors
        that crop the middle (DINOv2, CLIP), of which the crop comes before the resize, to whole
        pixels, too.

    Raises:
        FileNotFoundError: there are no such files, and they cannot be downloaded.
        ValueError: the family is not known, or the weights are not all of it: a tensor is missing,
            or there is one that nothing here uses.
    """
    folder = folder_of(source, revision)
    settings = settings_of(folder)
    kind = settings.get("model_type", settings.get("architecture"))
    name = f"model_type in {folder / CONFIG}"
    kind = checks.choice(name, kind, _FAMILIES, "other encoders are not known")
    weights = Weights(folder)
    try:
        encoder = _FAMILIES[kind](settings, processing_of(folder), weights)
    except (RuntimeError, IndexError) as error:  # of torch, of tensors that do not fit, or memory
        expected = f"tensors of the shapes that {CONFIG} says, and room for them"
        expected += f" ({first_line(error)})"
        what, remedy = "weights", "take both files of one model"
        raise ValueError(checks.sentence(what, str(folder), expected, remedy)) from error
    tell_unused(source, weights.left())
    encoder = replace(encoder, config=replace(encoder.config, attention=attention))
    return model_of(folder, encoder, num_classes), encoder.packing


def model_of(folder: Path, encoder: Encoder, num_classes: int | None = None) -> NaViT:
    """Return the model of an encoder, in float32.

    Args:
        folder: where it was read, for errors.
        encoder: its shape and weights.
        num_classes: gives the model a new head of so many classes; None keeps the head.

    Raises:
        ValueError: weights have other shapes than the model, or there are others.
    """
    config, found = encoder.config, encoder.weights
    if num_classes is not None:
        # The old head is dropped even where it has the shape: its classes are others.
        config = replace(config, num_classes=num_classes)
        found = {name: value for name, value in found.items() if not name.startswith("head.")}
    with torch.device("meta"):  # sizes that are wrong may be too large for memory
        shapes = NaViT(config).state_dict()
    if num_classes is not None:
        shapes = {name: one for name, one in shapes.items() if not name.startswith("head.")}
    _check_shapes(folder, found, shapes)
    model = NaViT(config)
    model.load_state_dict({**model.state_dict(), **found})
    return model


def _check_shapes(folder: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in [*wanted, *(found.keys() - wanted.keys())]:
        have, want = (tuple(of[name].shape) if name in of else None for of in (found, wanted))
        if have != want:
            expected = f"{want}, the shape that {CONFIG} says"
            remedy = "take both files of one model"
            raise ValueError(checks.sentence(f"{folder}: {name}", have, expected, remedy))


def tell_unused(source: str | Path, left: list[str]) -> None:
    """Log the tensors of other towers; refuse those of no known part."""
    # Older versions stored the numbers of positions, which hold nothing.
    unknown = [k for k in left if not k.startswith(_OTHERS) and not k.endswith("position_ids")]
    if unknown:
        name, more = f"tensors of {source}", f" and {len(unknown) - 3} more" * (len(unknown) > 3)
        expected = f"those of its family, without {', '.join(unknown[:3])}{more}"
        remedy = "remove them, if the encoder does not need them"
        raise ValueError(checks.sentence(name, len(unknown), expected, remedy))
    if left:
        groups = Counter(k.split(".")[0] for k in left)
        told = ", ".join(f"{name} ({number})" for name, number in groups.items())
        log.warning("%s: %d tensors are not used: %s", source, len(left), told)
