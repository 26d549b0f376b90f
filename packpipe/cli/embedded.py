"""What `packpipe embed` asks a model about: images of a dataset, or packed rows of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, Value

from packpipe import checks
from packpipe.cli.asking import ALL_MAY_BE_BAD, in_rejects_alone
from packpipe.cli.layouts import packs_of
from packpipe.cli.measured import check_patches, num_images, segments_of
from packpipe.images.remote import is_remote
from packpipe.loading.image_packs import check_whole
from packpipe.loading.stored import StoredPacks
from packpipe.model.predict import Answers
from packpipe.philox import Key
from packpipe.planning.image_config import PackConfig
from packpipe.rows.digests import hexdigest
from packpipe.rows.rejects_table import REJECTS_SCHEMA, rejects_table

# Rejects, each with the path of its file.
REJECTED = REJECTS_SCHEMA.append(pa.field("path", pa.string()))
_LOOKED_AT = 100  # first examples, by which a dataset is one of files

# Numbers first..last - 1 of examples, or of packed rows.
_Span: TypeAlias = tuple[int, int]
# What a model answers, the columns that are known of each answer, and the rejects.
_Found: TypeAlias = tuple[Answers, dict[str, pa.Array], pa.Table]


@dataclass(frozen=True)
class EmbeddedImages:
    """Images, which are packed for the model.

    Attributes:
        dataset: the images.
        packing: how they become rows.
        num_workers: threads that read the headers.
    """

    dataset: Dataset
    packing: PackConfig
    num_workers: int

    def check_whole(self) -> None:
        """Raise ValueError unless each image is one segment with all of its tokens."""
        check_whole(self.packing)

    def step(self, part_size: int) -> int:
        """Return the examples of a part of so many images."""
        return part_size

    @property
    def fingerprint(self) -> str:
        """What the vectors depend on, beside the model."""
        found: str = self.dataset._fingerprint
        return found

    @property
    def features(self) -> dict[str, Any]:
        """The columns that can be kept; of files, their path."""
        found = dict(self.dataset.features)
        if any(_files(self._examples((0, min(_LOOKED_AT, len(self.dataset)))))):
            found.setdefault("path", Value("string"))
        return found

    def states(self, span: _Span) -> dict[str, list[int] | None]:
        """Return [bytes, time of change] of each local file; None of one that is not there."""
        found: dict[str, list[int] | None] = {}
        for path in _files(self._examples(span)):
            if path is not None and not is_remote(path):
                try:
                    about = os.stat(path)
                    found[path] = [about.st_size, about.st_mtime_ns]
                except OSError:
                    found[path] = None
        return found

    def answered(self, span: _Span, ask: Callable[[Any], Answers]) -> _Found:
        """Return what a model says of some neighbouring images."""
        first, _ = span
        images = self._examples(span)
        packs = packs_of(
            images, self.packing, self.num_workers, label_column=None, **ALL_MAY_BE_BAD
        )
        with in_rejects_alone():
            answers = ask(packs)
        index = pa.array(answers.example_index.numpy())
        kept, paths = images.with_format("arrow")[:], pa.array(_files(images), pa.string())
        own = {"path": paths.take(index)}
        own |= {name: kept.column(name).take(index) for name in kept.column_names}
        own["example_index"] = pc.add(index, first)
        rejects = [*packs.rejects, *packs.undecodable]
        bad = rejects_table([r._replace(example_index=first + r.example_index) for r in rejects])
        files = paths.take(pc.subtract(bad["example_index"], first).combine_chunks())
        return answers, own, bad.append_column("path", files)

    def _examples(self, span: _Span) -> Dataset:
        return self.dataset.select(range(*span))


@dataclass(frozen=True)
class EmbeddedRows:
    """Packed rows, which the model sees as they are.

    Attributes:
        dataset: the rows, here or in a store.
        packing: what the model expects.
    """

    dataset: Dataset
    packing: PackConfig

    def __post_init__(self) -> None:
        check_patches(self.dataset, self.packing.patch_size, "of the model")
        numbers = segments_of(self.dataset).example_index
        if len(numbers) and numbers.min() < 0:
            expected = "the number of each image in its source"
            remedy = "pack with map(packer, batched=True, with_indices=True), or packpipe.pack"
            where = "example_index of the rows"
            raise ValueError(checks.sentence(where, int(numbers.min()), expected, remedy))

    def check_whole(self) -> None:
        """Raise ValueError unless the rows hold all tokens of each image."""
        known = segments_of(self.dataset)
        patches = known.grid_hw.astype(np.int64).prod(axis=1)
        lacking = np.flatnonzero(known.seq_lens - self.packing.prefix_tokens != patches)
        if len(lacking):
            one = lacking[0]
            where = f"tokens of example {known.example_index[one]} in the rows"
            expected = f"all {patches[one]} of its grid"
            remedy = "pass images, or rows that were packed without dropping tokens"
            found = int(known.seq_lens[one]) - self.packing.prefix_tokens
            raise ValueError(checks.sentence(where, found, expected, remedy))

    def step(self, part_size: int) -> int:
        """Return the rows of a part of about so many images."""
        return max(1, part_size * len(self.dataset) // max(1, num_images(self.dataset)))

    @cached_property
    def fingerprint(self) -> str:
        """What the vectors depend on, beside the model: the same here and in a store."""
        packs = StoredPacks(self.dataset, shuffle=False)
        known = {"rows": packs.fingerprint(Key(0, 0)), **packs.contents()}
        labels = packs.labels
        if labels is not None and known["labels"] == str(labels.type):  # texts, which batches lack
            known["labels"] = hexdigest(json.dumps(labels.to_pylist(), default=repr).encode())
        if "files" not in known:  # of pixels a sample alone is in the contents
            known["dataset"] = self.dataset._fingerprint
        return hexdigest(json.dumps(known, sort_keys=True).encode())

    @property
    def features(self) -> dict[str, Any]:
        """The column that can be kept, if there are labels."""
        found = self.dataset.features.get("labels")
        return {} if found is None else {"labels": found.feature}

    def states(self, span: _Span) -> dict[str, list[int] | None]:  # noqa: ARG002
        """Return nothing: the fingerprint tells of all files."""
        return {}

    def answered(self, span: _Span, ask: Callable[[Any], Answers]) -> _Found:
        """Return what a model says of some neighbouring rows; rows have no rejects."""
        rows = self.dataset.select(range(*span))
        labels = StoredPacks(rows, shuffle=False).labels
        # Batches hold numbers, and labels may be texts.
        plain = rows if labels is None else rows.remove_columns("labels")
        answers = ask(StoredPacks(plain, shuffle=False))
        own = {"example_index": pa.array(answers.example_index.numpy())}
        if labels is not None:
            order = np.argsort(segments_of(rows).example_index, kind="stable")
            own["labels"] = labels.take(pa.array(order))
        return answers, own, REJECTED.empty_table()


def _files(examples: Dataset) -> list[str | None]:
    """Return the path of each image; None where the dataset itself holds the image."""
    names = [name for name, feature in examples.features.items() if isinstance(feature, Image)]
    if not names:
        return [None] * len(examples)
    column = examples.select_columns(names[:1]).with_format("arrow")[:].column(0)
    held = pc.is_valid(pc.struct_field(column, "bytes"))
    return list(pc.if_else(held, None, pc.struct_field(column, "path")).to_pylist())
