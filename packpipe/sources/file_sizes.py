"""Sizes of the images of `ImageFiles`: read once, block by block, and kept in one mapped file.

The file is an array of NumPy, int32[rows, 2], 8 bytes an image, and after it a text of JSON: the
rejects, whose size is (0, 0), and digests of the sizes and of labels and weights. It is written
under another name and renamed when it is whole. A digest of all that sizes depend on is part of its
name: the source's fingerprint, the versions of its files, the columns, the limit on pixels and the
versions of packages. So another source, or one that was written anew, has a file of its own.

What its rows name by paths is looked at once: an image that could not be read stays a reject, of
which each opening warns, and one that is replaced keeps its size, until the file of sizes is
removed.

Of several processes on one file system, such as the ranks of a training, the first reads the
source, and the others wait for it. To read headers the whole column of images is read, since
Parquet stores it in one piece; to read columns of sizes, only those of Parquet files. Blocks of tar
and Arrow files are always read whole, and what was not asked for is let go of.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from sys import intern
from typing import Any, BinaryIO, NamedTuple

import datasets
import numpy as np
import PIL
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import durable
from packpipe._version import __version__
from packpipe.images.bad_images import SizeChanged
from packpipe.images.pillow_settings import changed_settings
from packpipe.rows.digests import hexdigest, labels_digest
from packpipe.rows.rejects import NAMED, Reject, Tally, Tolerance
from packpipe.sources.blocks import Block
from packpipe.sources.image_columns import ImageColumns
from packpipe.sources.image_files import BlockReader, ImageFiles
from packpipe.sources.image_source import ImageSource
from packpipe.sources.labels import labels_of, weights_of
from packpipe.sources.sizes import column_sizes
from packpipe.sources.survey import probe_sizes, survey

log = logging.getLogger(__name__)

_VERSION = 3
# Blocks that are read before the sizes of earlier ones are written.
_AHEAD = 64


@dataclass(frozen=True, eq=False)
class FileSizes:
    """The sizes of all images of a source, in a file.

    Attributes:
        path: the file.
        digest: 32 hexadecimal digits, of the sizes.
        values: 32 hexadecimal digits, of the labels and weights of all rows that are no rejects.
        rejects: rows that have none, by row: their header, size, label or weight is bad.
        by_path: how many of them are images that their rows name by paths, and whose header is bad.
        num_rows: rows of the source.
    """

    path: Path
    digest: str
    values: str
    rejects: list[Reject]
    by_path: int
    num_rows: int

    @cached_property
    def image_hw(self) -> NDArray[np.int32]:
        """int32[rows, 2], upright (height, width), mapped; (0, 0) of a reject."""
        # Nothing can be mapped of a file without rows.
        found: NDArray[np.int32] = np.load(self.path, mmap_mode="r" if self.num_rows else None)
        return found

    @contextmanager
    def forgotten_if_wrong(self) -> Iterator[None]:
        """Remove the file if the block finds that an image has another size."""
        try:
            yield
        except SizeChanged:
            self.path.unlink(missing_ok=True)
            raise

    # A mapped array would be copied; it is mapped again.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "image_hw"}


def file_sizes(
    source: ImageFiles,
    columns: ImageColumns,
    folder: Path,
    *,
    max_pixels: int,
    tolerance: Tolerance,
    executor: Executor,
) -> FileSizes:
    """Return the sizes of a source: those that are kept in a folder, or read and then kept.

    Args:
        source: the files.
        columns: those of images, labels, weights and sizes.
        folder: where the file is kept.
        max_pixels: larger images are rejected.
        tolerance: how many rejects there may be.
        executor: reads blocks, several at once.

    Raises:
        TooManyRejects: there are more; nothing is kept if that is found while they are read.
    """
    known = _known(source, columns, max_pixels)
    path = folder / f"packpipe-sizes-{known[:32]}.npy"
    reader = source.reader

    def read() -> FileSizes | None:
        return _read(path, known, len(source))

    def write(file: BinaryIO) -> None:
        log.info("reading the sizes of %d images, to keep them in %s", len(source), path)
        shape = {"descr": "<i4", "fortran_order": False, "shape": (len(source), 2)}
        np.lib.format.write_array_header_1_0(file, shape)
        digest, values, rejects, by_path = hashlib.sha256(), hashlib.sha256(), list[Reject](), 0
        blocks = map(source.block, range(len(source.block_rows)))
        bar = datasets.utils.tqdm(
            desc="Reading sizes", total=len(source), unit=" images", disable=None
        )
        with bar:
            for one in _in_order(executor, reader, blocks, columns, max_pixels):
                content = np.ascontiguousarray(one.image_hw, "<i4").data
                file.write(content)
                digest.update(content)
                values.update(one.values.encode())
                rejects += one.rejects
                by_path += one.by_path
                if one.rejects:
                    # Runs of bad ones are seen within blocks, and of all blocks at the end.
                    tolerance.check(one.rejects)
                    tally = Tally(tolerance.num_examples, len(rejects))
                    tolerance.check_so_far(tally, rejects[-NAMED:], ended=True)
                bar.update(len(one.image_hw))
        end = {
            "known": known,
            "digest": digest.hexdigest()[:32],
            "values": values.hexdigest()[:32],
            "rejects": rejects,
            "by_path": by_path,
        }
        file.write(json.dumps(end).encode())

    found = durable.made_once(path, read, write)
    tolerance.check(found.rejects)
    if found.by_path:
        text = "%d images that rows name by paths could not be read and are left out as long as %s "
        log.warning(text + "is kept: remove it if they can be read by now", found.by_path, path)
    return found


class BlockSizes(NamedTuple):
    """The sizes of a block's images; the others as in `FileSizes`."""

    image_hw: NDArray[np.int32]
    rejects: list[Reject]
    by_path: int
    values: str


def block_sizes(
    reader: BlockReader, block: Block, columns: ImageColumns, max_pixels: int
) -> BlockSizes:
    """Return the sizes of a block's images, (0, 0) for rejects, and what else is known of them."""
    named = [*(columns.sizes or [columns.image]), columns.label, columns.weight]
    names = list(dict.fromkeys(name for name in named if name is not None))
    dataset, by_path = reader.dataset([block], names), 0
    if columns.sizes is None:
        images = dataset.select_columns([columns.image]).with_format("arrow")
        read = ImageSource(images, columns.root)
        sizes = probe_sizes(read, len(dataset), max_pixels=max_pixels)
        by_path = sum(read.file_of(one.example_index) is not None for one in sizes.rejects)
    else:
        sizes = column_sizes(dataset, columns.sizes, max_pixels=max_pixels)
    labels, weights = labels_of(dataset, columns.label), weights_of(dataset, columns.weight)
    bad = [reject for one in (labels, weights) if one is not None for reject in one.rejects]
    found = survey(sizes, bad)
    sizes.image_hw[[reject.example_index for reject in found.rejects]] = 0
    values = [
        None if labels is None else labels_digest(labels.values.take(pa.array(found.index))),
        None if weights is None else hexdigest(weights.values[found.index].data),
    ]
    rejects = [r._replace(example_index=block.first + r.example_index) for r in found.rejects]
    return BlockSizes(sizes.image_hw, rejects, by_path, repr(values))


def _in_order(
    executor: Executor,
    reader: BlockReader,
    blocks: Iterator[Block],
    columns: ImageColumns,
    max_pixels: int,
) -> Iterator[BlockSizes]:
    """Yield the sizes of blocks in order; some are read ahead."""
    waiting: deque[Future[BlockSizes]] = deque()
    try:
        for block in blocks:
            waiting.append(executor.submit(block_sizes, reader, block, columns, max_pixels))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _known(source: ImageFiles, columns: ImageColumns, max_pixels: int) -> str:
    """Return a digest of all that the sizes and rejects depend on."""
    known = {
        "version": _VERSION,
        # Another Pillow or packpipe may read headers differently, or reject other images.
        "packpipe": __version__,
        "pillow": PIL.__version__,
        "fingerprint": source.fingerprint,
        "versions": source.versions,
        "columns": [columns.image, columns.sizes, columns.label, columns.weight, columns.root],
        "features": repr(source.features),  # names of classes: they say which labels are bad
        "max_pixels": max_pixels,
        **changed_settings(),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _read(path: Path, known: str, num_rows: int) -> FileSizes | None:
    """Return the sizes in a file; None without one, or if it is not as written."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            file.seek(num_rows * 8, 1)
            end = json.loads(file.read())
        if (shape, dtype, end["known"]) != ((num_rows, 2), np.dtype("<i4"), known):
            raise ValueError(f"{shape} of {dtype}, or of another source")
        # Most of their texts are the same few.
        rejects = [
            Reject(row, intern(stage), intern(reason), intern(exception), view)
            for row, stage, reason, exception, view in end["rejects"]
        ]
        return FileSizes(path, end["digest"], end["values"], rejects, end["by_path"], num_rows)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is broken (%s); reading the sizes again", path, error)
        return None
