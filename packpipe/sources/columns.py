"""The arguments of `pack` that name columns of a dataset, and what they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset

from packpipe import checks
from packpipe.planning.image_options import PackOptions
from packpipe.planning.token_config import TokenConfig
from packpipe.rows.own_columns import holds_rows
from packpipe.sources.file_search import packed_rows
from packpipe.sources.image_columns import (
    ImageColumns,
    check_labels,
    image_column_of,
    label_column_of,
    mask_column_of,
    weight_column_of,
)
from packpipe.sources.image_files import ImageFiles
from packpipe.sources.image_source import checked_root
from packpipe.sources.kinds import holds_images, holds_numbers
from packpipe.sources.sizes import checked_columns
from packpipe.sources.token_columns import (
    TokenColumns,
    check_paddings,
    mask_of,
    token_columns_of,
    value_columns_of,
)


def check_dataset(dataset: Any) -> None:
    """Raise if this is no Dataset, such as a dict of splits or a stream, or has a transform."""
    if not isinstance(dataset, Dataset):
        name, remedy = type(dataset).__name__, "pass one split, such as dataset['train']"
        if isinstance(dataset, IterableDataset):
            remedy = "packpipe.PackedStream packs what comes as a stream"
        elif isinstance(dataset, ImageFiles):
            remedy = "packpipe.pack and packpipe.WindowPacks take files"
        raise TypeError(checks.sentence("type(dataset)", name, "Dataset", remedy))
    if holds_rows(dataset.column_names):
        raise packed_rows("dataset")
    checks.untransformed("dataset", dataset)


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

    def of_images(
        self, dataset: Dataset, *, beside_texts: bool = False, stored: bool = True
    ) -> ImageColumns:
        """Return the columns of a dataset of images: as named, or found.

        Args:
            dataset: the images.
            beside_texts: whether lists of tokens are expected beside them.
            stored: whether rows are stored, which may hold any labels; batches alone may not.

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
        if not stored:
            check_labels(features, label, "pass label_column=None")
        elif self.label_column == "auto":
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
