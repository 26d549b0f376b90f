"""`pack_pairs`: images and their texts, packed side by side in two tables.

Row r of one table holds the examples of row r of the other, in the same order, and both fit their
seq_len. ``PackedLoader(pack_pairs(...), 8)`` reads batches of both, as contrastive training needs
them.

Source: NaViT B.1 (texts of up to 24 tokens, packed too).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack, cast

import numpy as np
from datasets import Dataset

from packpipe import checks
from packpipe.building.image_job import image_job
from packpipe.building.images import IMAGE_SECONDS, Images, PairedTexts
from packpipe.building.job import Job
from packpipe.building.pack import build_or_open
from packpipe.building.token_job import Sequences, token_job, token_record
from packpipe.philox import checked_key
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import config_from
from packpipe.planning.image_options import PackOptions
from packpipe.planning.token_config import TokenConfig
from packpipe.rows.rejects import tolerance_of
from packpipe.sources.columns import AskedColumns, check_dataset

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
    image_seconds: float = IMAGE_SECONDS,
    on_error: str = "quarantine",
    max_bad_fraction: float = 0.01,
    max_consecutive_bad: int = 100,
    progress: bool = True,
    **options: Unpack[PackOptions],
) -> tuple[Dataset, Dataset]:
    """Return rows of images, and rows of their texts: row r of both holds the same examples.

    An image that cannot be decoded is left out of its row, like in `pack`; its text stays, and
    `PackedLoader` leaves it out when it reads both. By `example_index` they are found elsewhere.
    Padding of texts (``attention_mask`` 0) is left out, and an example whose text is then empty.

    Args:
        dataset: a Dataset with an image column and lists of tokens.
        seq_len: image tokens of a row.
        text_seq_len: text tokens of a row.
        max_text: most tokens of a text.
        overflow: what happens to a longer text: ``"error"`` or ``"truncate"``.
        pad_token_id: the value of input_ids in padding.
        image_column: name of the column of images; ``"auto"`` finds the only one.
        label_column: name of the column of labels; ``"auto"`` finds it, None leaves labels out.
        token_columns: names of the columns of texts; ``"auto"`` takes all lists of numbers.
        image_root: the only folder that paths may lead into; None follows every path, as in
            `pack`.
        seed: which permutation of examples and rows.
        epoch: which of the seed's permutations.
        output: local folder to write, with a folder ``images`` and a folder ``texts``; None writes
            to the `datasets` cache.
        num_workers: processes that decode; 0 decodes in this one.
        image_seconds: processor time that decoding an image may take in such a process.
        on_error: ``"quarantine"`` lists a bad example in `rejects`; ``"raise"`` allows none.
        max_bad_fraction: a larger share of rejects stops the build.
        max_consecutive_bad: this many rejects in a row stop the build.
        progress: show a progress bar (where `datasets` shows its own).
        **options: the options of `PackConfig`, but ``views``.

    Raises:
        TypeError, ValueError: an argument, a column or an example is bad; or a text is too long.
    """
    check_dataset(dataset)
    target = None if output is None else checks.local_path("output", output)
    # No value columns: rows of texts hold tokens alone, and labels go with the images.
    columns = AskedColumns(
        image_column, label_column, None, image_root, token_columns, value_columns=[]
    )
    config = config_from(seq_len, dict(options))
    if config.num_views > 1:
        remedy = "a text is beside one segment; pack the images alone"
        raise ValueError(checks.sentence("views", config.num_views, "1, of pairs", remedy))
    # Texts are cut to max_text, which fits into a row, so this overflow is never applied.
    text_config = TokenConfig(seq_len=text_seq_len, overflow="error", pad_token_id=pad_token_id)
    remedy = "a text must fit into a row"
    max_text = checks.whole_number("max_text", max_text, 1, text_seq_len, remedy)
    checks.choice("overflow", overflow, TEXT_OVERFLOWS, "choose what too long ones become")
    key = checked_key(seed, epoch)
    tolerance = tolerance_of(len(dataset), on_error, max_bad_fraction, max_consecutive_bad)
    of_tokens = columns.of_tokens(dataset, text_config)
    texts = Sequences(dataset, of_tokens, text_config, key)
    images = Images(
        dataset,
        columns.of_images(dataset, beside_texts=True),
        config,
        key,
        num_workers=checks.whole_number("num_workers", num_workers, 0, 1024, "0 decodes here"),
        image_seconds=checks.positive_number("image_seconds", image_seconds, "60 is usual"),
        texts=_paired(texts, max_text, overflow),
    )
    job = image_job(images)
    # Planned before anything is written: rows of texts follow the packs of the images.
    planned = job.plan()
    beside = replace(
        texts,
        images=cast(EpochPlan, planned.plan),
        longest=max_text,
        rejects=tuple(planned.rejects),
    )

    def written(some: Job, name: str) -> Dataset:
        folder = None if target is None else target / name
        return build_or_open(some, folder, tolerance, on_error=on_error, progress=progress)

    return written(job, "images"), written(token_job(beside), "texts")


def _paired(texts: Sequences, max_text: int, overflow: str) -> PairedTexts:
    """Return the texts' lengths and rejects, which the plan of the images takes into account.

    Raises:
        ValueError: a text is too long, with ``overflow="error"``.
    """
    lens = texts.source.lens
    long = np.flatnonzero(lens > max_text)
    if overflow == "error" and long.size:
        name, expected = f"text lengths[{long[0]}]", f"at most {max_text} (max_text)"
        remedy = f"pass overflow='truncate', or raise max_text ({long.size} are too long)"
        raise ValueError(checks.sentence(name, int(lens[long[0]]), expected, remedy))
    # Texts decide which images share a row, so the images' record names the texts, too.
    return PairedTexts(
        lens=np.minimum(lens, max_text),
        seq_len=texts.config.seq_len,
        rejects=texts.source.rejects,
        record={**token_record(texts), "max_text": max_text},
    )
