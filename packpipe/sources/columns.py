"""Which columns of a dataset hold images, labels or token lists: as named, or found by type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Array2D,
    Array3D,
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    LargeList,
    List,
    Value,
)

from packpipe import checks
from packpipe.images.masks import TargetRules, checked_rules
from packpipe.planning.image_config import PackOptions
from packpipe.planning.token_config import TokenConfig
from packpipe.rows.fill_tokens import padding_of
from packpipe.rows.rows import NO_LABEL
from packpipe.rows.schema import RESERVED, holds_rows
from packpipe.sources.image_source import checked_root
from packpipe.sources.sizes import checked_columns

_LABEL_NAMES = ("label", "labels")
# Tokenizers' own name: 0 at tokens that only fill up a sequence, as with padding="max_length".
_MASK = "attention_mask"
# Of an Image column, what says that its masks have classes above 255.
_WIDE_MODES = ("I;16", "I")


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


def is_text(feature: Any) -> bool:
    """Return whether a column holds texts."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


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


def holds_labels(feature: Any) -> bool:
    """Return whether a column holds a value an example, or a list of numbers.

    Lists of classes, of which an image has several, are none: they are of no fixed length.
    """
    if isinstance(feature, ClassLabel | Value):
        return True
    return holds_numbers(feature) and not isinstance(feature.feature, ClassLabel)


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


def holds_images(feature: Any) -> bool:
    """Return whether a column holds images: encoded, or arrays of pixels."""
    if isinstance(feature, Image) or feature in (Value("binary"), Value("large_binary")):
        return True
    return pixel_type(feature) is not None


def pixel_type(feature: Any) -> np.dtype[Any] | None:
    """Return the type of the pixels of an array column, None if it is no such column."""
    depth = 0  # axes of an array: [height, width] or [height, width, channels]
    while isinstance(feature, List | LargeList):
        feature, depth = feature.feature, depth + 1
    if isinstance(feature, Array2D | Array3D):
        depth = 0 if depth else len(feature.shape)  # lists of arrays are no images
    dtype = getattr(feature, "dtype", None)
    found = depth in (2, 3) and dtype in ("bool", "uint8", "uint16")
    return np.dtype(dtype) if found else None


def check_dataset(dataset: Any) -> None:
    """Raise if this is no Dataset, such as a dict of splits or a stream, or has a transform."""
    if not isinstance(dataset, Dataset):
        name, remedy = type(dataset).__name__, "pass one split, such as dataset['train']"
        if isinstance(dataset, IterableDataset):
            remedy = "packpipe.PackedStream packs what comes as a stream"
        raise TypeError(checks.sentence("type(dataset)", name, "Dataset", remedy))
    if holds_rows(dataset.column_names):
        expected, remedy = (
            "images or sequences",
            "pass packed rows to PackedLoader, or their source",
        )
        raise ValueError(checks.sentence("dataset", "packed rows", expected, remedy))
    checks.untransformed("dataset", dataset)


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


class TokenColumns(NamedTuple):
    """The columns of a dataset of token sequences.

    Attributes:
        tokens: lists of numbers; the first gives a sequence's length.
        values: one value a sequence.
        mask: lists that are 0 where a sequence has padding, which is left out; None without any.
    """

    tokens: list[str]
    values: list[str]
    mask: str | None = None

    @property
    def lists(self) -> list[str]:
        """The columns of lists: of tokens, and the mask."""
        if self.mask is None or self.mask in self.tokens:
            return self.tokens
        return [*self.tokens, self.mask]


@dataclass(frozen=True)
class AskedColumns:
    """The column arguments of `pack`, whose docstring describes them."""

    image_column: str = "auto"
    label_column: str | None = "auto"
    size_columns: tuple[str, str] | None = None
    image_root: str | Path | None = None
    token_columns: str | Sequence[str] = "auto"
    value_columns: str | Sequence[str] = "auto"
    weight_column: str | None = None
    mask_column: str | None = None
    target_stride: int | None = None

    def hold_tokens(self, features: Features) -> bool:
        """Return whether to pack tokens: columns are named, or there are lists and no images."""
        if self.token_columns != "auto":
            return True
        # Images come first: their datasets may have lists of numbers too, such as boxes.
        if self.image_column != "auto" or any(map(holds_images, features.values())):
            return False
        return any(map(holds_numbers, features.values()))

    def of_images(self, dataset: Dataset, *, beside_texts: bool = False) -> ImageColumns:
        """Return the columns of a dataset of images: as named, or found.

        Args:
            dataset: the images.
            beside_texts: whether lists of tokens are expected beside them.

        Raises:
            TypeError, ValueError: an argument or a column is wrong.
        """
        features, sizes = dataset.features, self.size_columns
        label = label_column_of(features, self.label_column)
        if beside_texts and self.label_column == "auto" and holds_numbers(features.get(label)):
            # It may be of tokens, which are lists of numbers, too.
            name, expected = f"features[{label!r}]", "a ClassLabel or a Value beside texts"
            remedy = "pass label_column, or None"
            raise ValueError(checks.sentence(name, features[label], expected, remedy))
        # A column that was named is stored whatever it holds, for `read_rows`: captions, say.
        if self.label_column == "auto":
            remedy = f"pass label_column=None, or {label!r} to store it for read_rows alone"
            check_labels(features, label, remedy)
        return ImageColumns(
            image=image_column_of(
                features, self.image_column, beside_texts=beside_texts, mask=self.mask_column
            ),
            label=label,
            sizes=None if sizes is None else checked_columns(dataset, sizes),
            root=checked_root(self.image_root),
            weight=weight_column_of(features, self.weight_column),
            mask=mask_column_of(features, self.mask_column),
            target_stride=self.target_stride,
        )

    def of_tokens(self, dataset: Dataset, config: TokenConfig) -> TokenColumns:
        """Return the columns of a dataset of token sequences: as named, or found.

        Raises:
            ValueError: an argument or a column is wrong, or its type cannot hold its padding.
        """
        features = dataset.features
        for name in ("weight_column", "mask_column", "target_stride"):
            if (asked := getattr(self, name)) is not None:
                expected, remedy = "None for tokens", "only images have one"
                raise ValueError(checks.sentence(name, asked, expected, remedy))
        tokens = token_columns_of(features, self.token_columns)
        check_paddings(features, tokens, config)
        values = value_columns_of(features, tokens, self.value_columns)
        # As above, but for floats: batches hold them, for models of regression.
        found = self.value_columns == "auto" and "labels" in values
        if found and not pa.types.is_floating(features["labels"].pa_type):
            check_labels(features, "labels", "name the columns to be stored in value_columns")
        return TokenColumns(tokens, values, mask_of(dataset, tokens))


class Options(PackOptions, total=False):
    """The options of `PackConfig` and of `TokenConfig`, as keyword arguments."""

    overflow: str
    layout: str
    pad_token_id: int
    mask_first_label: bool


def token_columns_of(features: Features, asked: str | Sequence[str]) -> list[str]:
    """Return the names of the columns that hold tokens; ``"auto"`` finds all lists of numbers.

    The first gives a sequence's length: ``input_ids``, if there is one. Its ``attention_mask`` is
    left out: what stays is 1 everywhere, and with it models of transformers mix the sequences of a
    row, since they look at positions only where no mask is given.
    """
    lists = [name for name, feature in features.items() if holds_numbers(feature)]
    if asked == "auto":
        chosen = [name for name in lists if not _is_mask(features, name)]
        if not chosen:
            expected, remedy = "a list of numbers", "tokenize first, or pass token_columns"
            raise ValueError(checks.sentence("token columns", list(features), expected, remedy))
    else:
        chosen = [asked] if isinstance(asked, str) else list(asked)
        for number, name in enumerate(chosen):
            if name not in lists or name in chosen[:number]:
                expected, remedy = f"different ones of {lists}", "name lists of numbers"
                if name in features and is_text(features[name]):
                    remedy = "tokenize texts first, with dataset.map"
                where = f"token_columns[{number}]"
                raise ValueError(checks.sentence(where, name, expected, remedy))
        if not chosen:
            raise ValueError(
                checks.sentence("token_columns", chosen, "one name at least", "'auto' finds them")
            )
    # Stable: input_ids comes first, the others keep their order.
    chosen.sort(key=lambda name: name != "input_ids")
    _refuse_reserved(chosen)
    return chosen


def value_columns_of(
    features: Features, token_columns: list[str], asked: str | Sequence[str]
) -> list[str]:
    """Return the columns with one value a sequence; ``"auto"`` takes all but those of tokens."""
    others = [name for name in features if name not in token_columns]
    if asked == "auto":
        chosen = [name for name in others if not _is_mask(features, name)]
    else:
        chosen = [asked] if isinstance(asked, str) else list(asked)
    for name in chosen:
        if name not in others or not isinstance(features[name], ClassLabel | Value):
            found = features.get(name)
            expected = "a column of one number, class or text an example"
            remedy = "leave it out of value_columns, or name token_columns"
            raise ValueError(checks.sentence(f"features[{name!r}]", found, expected, remedy))
    _refuse_reserved(chosen)
    return chosen


def _is_mask(features: Features, name: str) -> bool:
    """Return whether a column says which of the input_ids are tokens, not padding."""
    return name == _MASK and holds_numbers(features[name]) and "input_ids" in features


def mask_of(dataset: Dataset, token_columns: list[str]) -> str | None:
    """Return the column whose zeros are padding in the source; None if there is no such zero.

    It is ``attention_mask``, packed or not, and goes with ``input_ids``.

    Raises:
        ValueError: it holds numbers below 0 or NaN, so it is not 0 in padding alone.
    """
    belongs = not {_MASK, "input_ids"}.isdisjoint(token_columns)
    if not belongs or not holds_numbers(dataset.features.get(_MASK)):
        return None
    # One look at each value, where it lies: a dataset without padding has no other cost.
    masks = dataset.data.column(_MASK)
    if dataset._indices is not None:  # what is not selected does not count
        masks = dataset.select_columns(_MASK).with_format("arrow")[:].column(_MASK)
    values = pc.list_flatten(masks)
    lowest = pc.min(values).as_py()
    if pa.types.is_floating(values.type) and pc.any(pc.is_nan(values)).as_py():
        lowest = float("nan")
    if lowest is not None and not lowest >= 0:
        expected = "0 at padding, and numbers above 0 at tokens"
        raise ValueError(checks.sentence(_MASK, lowest, expected, "rename or remove the column"))
    return None if lowest is None or lowest else _MASK


def check_paddings(features: Features, columns: list[str], config: TokenConfig) -> None:
    """Check that the types of token columns can hold what is written into them.

    Raises:
        ValueError: a type cannot hold its column's padding or -100; the message names the column.
    """
    if config.mask_first_label and not {"labels", "input_ids"} & set(columns):
        expected = "False without a column labels or input_ids"
        raise ValueError(checks.sentence("mask_first_label", True, expected, "rename the column"))
    if config.mask_first_label and "labels" in features and "labels" not in columns:
        found, expected = features["labels"], "a list of numbers, for mask_first_label=True"
        remedy = "rename it, or leave mask_first_label out"
        raise ValueError(checks.sentence("features['labels']", found, expected, remedy))
    written = {name: padding_of(name, config) for name in columns}
    if config.mask_first_label and "labels" not in columns:  # labels are made from input_ids
        written["labels"] = NO_LABEL
    for name, value in written.items():
        dtype = np.dtype(value_type(features, name).to_pandas_dtype())
        if name == "labels" and dtype.kind == "f":  # models would take them as classes, cut off
            expected, remedy = "integers", "cast_column or rename_column it"
            raise ValueError(checks.sentence(f"features[{name!r}]", str(dtype), expected, remedy))
        # -100 in a column of uint32 or of bools, for instance.
        if dtype.kind in "iub" and np.array(value).astype(dtype) != value:
            expected = f"a type that holds {value}"
            remedy = "cast_column it to List(Value('int32'))"
            raise ValueError(checks.sentence(f"features[{name!r}]", str(dtype), expected, remedy))


def value_type(features: Features, name: str) -> Any:
    """Return the Arrow type of a token column's values.

    Labels that packing makes have the type of input_ids.
    """
    feature: Any = features[name if name in features else "input_ids"]
    return feature.feature.pa_type


def bools_of(features: Features, columns: list[str]) -> list[str]:
    """Return which columns of tokens hold bools."""
    return [name for name in columns if pa.types.is_boolean(value_type(features, name))]


def holds_numbers(feature: Any) -> bool:
    """Return whether a feature is one of lists of numbers: of tokens."""
    # A list of bools, integers or floats. ClassLabel has integers, Value may be of text or dates.
    inner = getattr(feature, "feature", None)
    if not isinstance(feature, List | LargeList) or not isinstance(inner, ClassLabel | Value):
        return False
    return inner.dtype == "bool" or np.dtype(inner.pa_type.to_pandas_dtype()).kind in "iuf"


def _refuse_reserved(names: list[str]) -> None:
    for name in names:
        if name in RESERVED:
            remedy = "rename_column or remove_columns it"
            raise ValueError(
                checks.sentence("column", name, f"none of {', '.join(RESERVED)}", remedy)
            )
