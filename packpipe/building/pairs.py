"""`pack_pairs`: images and their texts, packed side by side in two tables.

Row r of one table holds the examples of row r of the other, in the same order; both fit. So a
batch of each, read with the same seed, holds pairs: what contrastive training needs.

Source: NaViT B.1 (texts of up to 24 tokens, packed too).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np
from datasets import Dataset

from packpipe import checks
from packpipe.building.image_job import Beside, ImageContents
from packpipe.building.pack import built
from packpipe.building.token_job import TokenContents
from packpipe.planning.image_config import PackOptions, config_from
from packpipe.planning.token_config import TokenConfig
from packpipe.rows.rejects import tolerance_of
from packpipe.sources.columns import (
    check_dataset,
    check_paddings,
    image_column_of,
    label_column_of,
    token_columns_of,
)
from packpipe.sources.image_source import checked_root

TEXT_OVERFLOWS = ("error", "truncate")


def pack_pairs(
    dataset: Dataset,
    seq_len: int = 1024,
    text_seq_len: int = 256,
    *,
    max_text: int = 24,
    overflow: str = "error",
    pad_token_id: int = 0,
    image_column: str = "auto",
    label_column: str | None = "auto",
    token_columns: str | Sequence[str] = "auto",
    image_root: str | Path | None = None,
    seed: int = 0,
    epoch: int = 0,
    output: str | Path | None = None,
    num_workers: int = 1,
    image_seconds: float = 60.0,
    on_error: str = "quarantine",
    max_bad_fraction: float = 0.01,
    max_consecutive_bad: int = 100,
    progress: bool = True,
    **options: Unpack[PackOptions],
) -> tuple[Dataset, Dataset]:
    """Return rows of images, and rows of their texts: row r of both holds the same examples.

    An image that cannot be decoded leaves its row, as in `pack`; its text stays. `example_index`
    says which text belongs to which image (`packpipe.training.contrastive.in_order_of`).

    Args:
        dataset: a Dataset with an image column and lists of tokens.
        seq_len: image tokens of a row.
        text_seq_len: text tokens of a row.
        max_text: most tokens of a text.
        overflow: what becomes of a longer one: ``"error"`` or ``"truncate"``.
        pad_token_id: what stands in the padding of input_ids.
        image_column: as for `pack`.
        label_column: likewise.
        token_columns: likewise.
        image_root: likewise.
        seed: likewise.
        epoch: likewise.
        output: likewise; its folders ``images`` and ``texts``.
        num_workers: likewise.
        image_seconds: likewise.
        on_error: likewise.
        max_bad_fraction: likewise.
        max_consecutive_bad: likewise.
        progress: likewise.
        **options: of `PackConfig`.

    Raises:
        TypeError, ValueError: as `pack`; or a text is too long.
    """
    check_dataset(dataset)
    config = config_from(seq_len, dict(options))
    text_config = TokenConfig(seq_len=text_seq_len, overflow="error", pad_token_id=pad_token_id)
    remedy = "a text must fit into a row"
    max_text = checks.whole_number("max_text", max_text, 1, text_seq_len, remedy)
    checks.choice("overflow", overflow, TEXT_OVERFLOWS, "choose what too long ones become")
    seed, epoch = checks.seed_and_epoch(seed, epoch)
    tolerance = tolerance_of(len(dataset), on_error, max_bad_fraction, max_consecutive_bad)
    columns = token_columns_of(dataset.features, token_columns)
    check_paddings(dataset.features, columns, text_config)
    texts = TokenContents(dataset, columns, [], text_config, seed, epoch)
    images = ImageContents(
        dataset=dataset,
        image_column=image_column_of(dataset.features, image_column),
        label_column=label_column_of(dataset.features, label_column),
        size_columns=None,
        image_root=checked_root(image_root),
        config=config,
        seed=seed,
        epoch=epoch,
        materialize=True,
        num_workers=checks.whole_number("num_workers", num_workers, 0, 1024, "0 decodes here"),
        image_seconds=checks.positive_number("image_seconds", image_seconds, "60 is usual"),
        beside=_beside(texts, max_text, overflow),
    )
    planned = images.plan()
    texts = replace(
        texts,
        beside=planned.epoch_plan,
        longest=max_text,
        rejects=tuple(planned.rejects),
    )
    folder = None if output is None else Path(output)
    return (
        built(
            images,
            folder and folder / "images",
            tolerance,
            on_error=on_error,
            progress=progress,
        ),
        built(
            texts,
            folder and folder / "texts",
            tolerance,
            on_error=on_error,
            progress=progress,
        ),
    )


def _beside(texts: TokenContents, max_text: int, overflow: str) -> Beside:
    """Return what rows of images must know of the texts.

    Raises:
        ValueError: a text is too long, with ``overflow="error"``.
    """
    columns, rejects = texts.read()
    lens = columns[texts.token_columns[0]].lens
    long = np.flatnonzero(lens > max_text)
    if overflow == "error" and long.size:
        name, expected = f"text lengths[{long[0]}]", f"at most {max_text} (max_text)"
        remedy = f"pass overflow='truncate', or raise max_text ({long.size} are too long)"
        raise ValueError(checks.sentence(name, int(lens[long[0]]), expected, remedy))
    return Beside(
        lens=np.minimum(lens, max_text),
        seq_len=texts.config.seq_len,
        rejects=rejects,
        record={**texts.record, "max_text": max_text},
    )
