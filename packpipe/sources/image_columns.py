"""Which columns of a dataset of images hold what: as named, or found by type."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Features, Image, LargeList, List, Value

from packpipe import checks
from packpipe.images.masks import TargetRules, checked_rules
from packpipe.sources.kinds import holds_images, holds_labels, holds_numbers, is_text, pixel_type

_LABEL_NAMES = ("label", "labels")
# Of an Image column, what says that its masks have classes above 255.
_WIDE_MODES = ("I;16", "I")


class ImageColumns(NamedTuple):
    """The columns of a dataset of images.

    Attributes:
        image: the images.
        label: their labels; None for no labels.
        sizes: upright heights and widths in pixels; None reads headers.
        root: the only folder that paths may lead into; None follows them all.
        weight: what each image counts in the loss; None is 1.
        mask: the class of each pixel; None without targets.
        target_stride: pixels a side of a target's cell; None is a patch.
    """

    image: str
    label: str | None
    sizes: tuple[str, str] | None
    root: str | None
    weight: str | None = None
    mask: str | None = None
    target_stride: int | None = None


def image_column_of(
    features: Features, asked: str, *, beside_texts: bool = False, mask: str | None = None
) -> str:
    """Return the name of the image column: the one asked for, or the only one there is.

    Args:
        features: of the dataset.
        asked: the name, or ``"auto"``.
        beside_texts: whether lists of tokens are expected beside it.
        mask: the column of masks, which is not that of images.
    """
    remedy = "pass image_column (--image-column)"
    images = [n for n, feature in features.items() if n != mask and holds_images(feature)]
    if asked == "auto":
        if not images:
            _refuse_other_columns(features)
        if not beside_texts:
            _refuse_bytes_beside_tokens(features, images)
        if len(images) != 1:
            raise ValueError(
                checks.sentence(
                    "image columns", images, "exactly one, for image_column='auto'", remedy
                )
            )
        asked = str(images[0])
    if asked not in features:
        raise ValueError(checks.sentence("image_column", asked, f"one of {list(features)}", remedy))
    # Image(mode=...) asks `datasets` for that mode; packpipe itself decodes, always to RGB.
    mode = getattr(features[asked], "mode", None)
    if mode not in (None, "RGB"):
        name, remedy = f"features[{asked!r}].mode", "cast_column it to Image()"
        raise ValueError(checks.sentence(name, mode, "None or 'RGB'", remedy))
    if asked not in images:
        _refuse_nested(features, asked)
        expected = "Image(), Value('binary') or arrays of bool, uint8 or uint16"
        name = f"features[{asked!r}]"
        raise ValueError(checks.sentence(name, features[asked], expected, "cast_column it"))
    return asked


def _refuse_nested(features: Features, name: str) -> None:
    """Raise if a column holds images, but not one a row."""
    feature = features[name]
    if isinstance(feature, List | LargeList) and _has_images(feature):
        expected = "one image an example"
        remedy = "make each image a row of its own, with dataset.map(..., batched=True)"
        raise ValueError(checks.sentence(f"features[{name!r}]", feature, expected, remedy))
    if isinstance(feature, dict) and _has_images(feature):
        expected, remedy = "a column of images", "call dataset.flatten() first"
        raise ValueError(checks.sentence(f"features[{name!r}]", feature, expected, remedy))


def _has_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_has_images, feature.values()))
    return isinstance(feature, Image) or _has_images(getattr(feature, "feature", None) or {})


def _refuse_other_columns(features: Features) -> None:
    """Raise if columns without images show what was meant: nested images, tokens, texts."""
    for name in features:
        _refuse_nested(features, name)
    tokens = [name for name in ("input_ids", "tokens") if holds_numbers(features.get(name))]
    if tokens:
        expected = "images"
        remedy = "packpipe.pack packs sequences, and PackedLoader takes their rows"
        raise ValueError(checks.sentence("columns of tokens", tokens, expected, remedy))
    texts = [name for name, feature in features.items() if is_text(feature)]
    if texts and not any(map(holds_numbers, features.values())):
        expected = "images, or lists of tokens"
        remedy = "tokenize texts first, with dataset.map; cast_column paths to Image()"
        raise ValueError(checks.sentence("columns of text", texts, expected, remedy))


def _refuse_bytes_beside_tokens(features: Features, images: list[str]) -> None:
    """Raise if columns of bytes, which may be anything, lie beside tokens and no column Image()."""
    bare = [name for name in images if isinstance(features[name], Value)]
    if bare and bare == images and "input_ids" in features and holds_numbers(features["input_ids"]):
        expected = "named, since bytes beside input_ids may be images or not"
        remedy = (
            "packpipe.pack(token_columns='input_ids') packs the tokens, image_column the images"
        )
        raise ValueError(checks.sentence("columns of bytes", bare, expected, remedy))


def label_column_of(features: Features, asked: str | None) -> str | None:
    """Return the name of the label column: as named; ``"auto"`` finds one, None means none."""
    found = asked
    if asked == "auto":
        named = [name for name in _LABEL_NAMES if name in features]
        typed = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        # A column named label or labels goes before other ClassLabels.
        if len(named or typed) > 1:
            expected = "one at most, for label_column='auto'"
            remedy = "pass label_column (--label-column)"
            raise ValueError(checks.sentence("label columns", named or typed, expected, remedy))
        found = next(iter(named or typed), None)
    elif asked is not None and asked not in features:
        expected = f"one of {list(features)}, 'auto' or None"
        raise ValueError(checks.sentence("label_column", asked, expected, "check its spelling"))
    if found is not None and not holds_labels(features[found]):
        name, expected = f"features[{found!r}]", "a ClassLabel, a Value or a list of numbers"
        remedy = "pass another label_column, or None"
        raise ValueError(checks.sentence(name, features[found], expected, remedy))
    return found


def check_labels(features: Features, column: str | None, remedy: str) -> None:
    """Check that batches can hold the labels of a column: classes, or floats and lists of numbers.

    Raises:
        ValueError: it holds others, such as bools or texts.
    """
    if column is None or isinstance(features[column], List | LargeList):
        return
    kind = features[column].pa_type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return
    name, expected = f"features[{column!r}]", "integers, a ClassLabel, floats or lists of numbers"
    remedy = f"class_encode_column it, or {remedy}"
    raise ValueError(checks.sentence(name, features[column], expected, remedy))


def weight_column_of(features: Features, asked: str | None) -> str | None:
    """Return the name of the column of weights, if one is asked for.

    Raises:
        ValueError: there is no such column, or it holds no numbers.
    """
    if asked is None:
        return None
    _check_named("weight_column", asked, features)
    feature = features[asked]
    kind = feature.pa_type if isinstance(feature, Value) else pa.null()
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        name, remedy = f"features[{asked!r}]", "cast_column it to Value('float32')"
        raise ValueError(checks.sentence(name, feature, "a number an image", remedy))
    return asked


def mask_column_of(features: Features, asked: str | None) -> str | None:
    """Return the name of the column of masks, if one is asked for.

    Raises:
        ValueError: there is no such column, or it holds no masks.
    """
    if asked is None:
        return None
    _check_named("mask_column", asked, features)
    if not holds_images(features[asked]):
        name = f"features[{asked!r}]"
        expected = "Image(), Value('binary') or arrays of bool, uint8 or uint16"
        raise ValueError(checks.sentence(name, features[asked], expected, "cast_column it"))
    return asked


def _check_named(what: str, asked: str, features: Features) -> None:
    if asked not in features:
        expected = f"one of {list(features)}, or None"
        raise ValueError(checks.sentence(what, asked, expected, "check its spelling"))


def target_rules_of(
    features: Features, mask: str | None, stride: int | None, patch_size: int
) -> TargetRules | None:
    """Return how the masks of a column become targets, None without one.

    Raises:
        TypeError, ValueError: a patch cannot be divided by the stride, or there is no mask.
    """
    if mask is None:
        if stride is not None:
            expected, remedy = "None without mask_column", "pass mask_column, too"
            raise ValueError(checks.sentence("target_stride", stride, expected, remedy))
        return None
    # PNG says only when it is read how many bits it has; its feature may say so before.
    feature = features[mask]
    wide = pixel_type(feature) == np.uint16 or getattr(feature, "mode", None) in _WIDE_MODES
    return checked_rules(stride, patch_size, "uint16" if wide else "uint8")
