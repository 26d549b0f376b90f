"""Image sizes of a source: from columns, or from headers that are read once and kept.

Probing opens every image; later epochs, builds and runs read the file of kept sizes, which lies
beside the data. A digest of all that sizes depend on is part of its name: the dataset's
fingerprint, the files it refers to by path (name, size, time of change), the limit on pixels and
the versions. If any of them differs, sizes are probed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from concurrent.futures import Executor
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from packpipe import checks
from packpipe._version import __version__
from packpipe.planning.plan import MAX_SIDE
from packpipe.rows.files import write_table
from packpipe.rows.rejects import Reject
from packpipe.sources.image_source import ImageSource
from packpipe.sources.survey import Sizes, probe_sizes

log = logging.getLogger(__name__)

_VERSION = 1
_SCHEMA = pa.schema(
    [
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("broken_exif", pa.bool_()),
        ("reason", pa.string()),
        ("exception", pa.string()),
    ]
)


def sizes_of(
    dataset: Dataset,
    source: ImageSource,
    size_columns: tuple[str, str] | None,
    *,
    max_pixels: int,
    executor: Executor | None = None,
) -> Sizes:
    """Return the sizes of a dataset's images: from two columns, or else from their headers, kept.

    Args:
        dataset: the source.
        source: its images.
        size_columns: names of the columns of upright heights and widths; None reads headers.
        max_pixels: larger images are rejected.
        executor: runs the probes; None runs them here.
    """
    if size_columns is not None:
        return column_sizes(dataset, size_columns, max_pixels=max_pixels)
    return kept_sizes(source, max_pixels=max_pixels, executor=executor)


def kept_sizes(source: ImageSource, *, max_pixels: int, executor: Executor | None = None) -> Sizes:
    """Return the sizes of a source: from the file of kept sizes, or probed and then kept.

    Args:
        source: the images.
        max_pixels: larger images are rejected.
        executor: runs the probes; None runs them here.
    """
    # Another Pillow or packpipe may read headers differently, or reject other images.
    known = {
        "version": _VERSION,
        "packpipe": __version__,
        "pillow": PIL.__version__,
        "fingerprint": source.rows._fingerprint,
        "files": source.files_digest(),
        "max_pixels": max_pixels,
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    folder = _folder(source.rows)
    path = folder / f"packpipe-sizes-{digest}.arrow"
    kept = _read(path, len(source.rows))
    if kept is not None:
        return kept
    sizes = probe_sizes(source, len(source.rows), max_pixels=max_pixels, executor=executor)
    # Written under another name, then renamed: several processes may probe the source at once.
    own = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_table(own, _SCHEMA, [_table(sizes)])
        own.replace(path)
    except OSError as error:
        log.warning("sizes are not kept, they will be probed again: %s", error)
    return sizes


def checked_columns(dataset: Dataset, columns: Any) -> tuple[str, str]:
    """Return the names of the columns of heights and widths, checked to exist and be integers."""
    remedy = "pass the names of the columns of heights and widths, or None to read headers"
    if not isinstance(columns, tuple | list) or len(columns) != 2:
        expected = "(height column, width column)"
        raise ValueError(checks.sentence("size_columns", columns, expected, remedy))
    for name in columns:
        if name not in dataset.column_names:
            expected = f"one of {dataset.column_names}"
            raise ValueError(checks.sentence("size_columns", name, expected, remedy))
        kind = dataset.features.arrow_schema.field(name).type
        if not pa.types.is_integer(kind):
            name = f"features[{name!r}]"
            raise TypeError(checks.sentence(name, str(kind), "an integer type", remedy))
    height, width = columns
    return height, width


def column_sizes(dataset: Dataset, columns: tuple[str, str], *, max_pixels: int) -> Sizes:
    """Return the sizes that two columns of a dataset hold; no header is read.

    Args:
        dataset: the source.
        columns: names of the columns of upright heights and widths in pixels.
        max_pixels: larger images are rejected.

    Raises:
        TypeError, ValueError: a column is missing, or does not hold integers.
    """
    sides, stored = [], []
    for name in checked_columns(dataset, columns):
        values = dataset.select_columns([name]).with_format("arrow")[:].column(0)
        sides.append(_filled(values))
        stored.append(values)  # as they are, for the message about a bad size
    image_hw = np.stack(sides, axis=1)
    # Nulls became 0, and what exceeds int64 became negative, so both are outside, too.
    bad = np.flatnonzero(((image_hw < 1) | (image_hw > MAX_SIDE)).any(axis=1)).tolist()
    rejects = [
        Reject(
            row,
            "size",
            "bad size",
            checks.sentence(
                "(height, width)",
                tuple(values[row].as_py() for values in stored),
                f"1..{MAX_SIDE}",
                "mend it, or pass size_columns=None to read headers",
            ),
        )
        for row in bad
    ]
    image_hw[bad] = 0
    # Sides are below 2**31 by now, so their product fits into int64.
    for row in np.flatnonzero(image_hw.prod(axis=1) > max_pixels).tolist():
        height, width = image_hw[row].tolist()
        message = f"{height}x{width} pixels, expected at most {max_pixels}"
        rejects.append(Reject(row, "size", "too many pixels", message))
        image_hw[row] = 0
    return Sizes(image_hw.astype(np.int32), np.zeros(len(image_hw), np.bool_), rejects)


def _read(path: Path, num_rows: int) -> Sizes | None:
    """Return the sizes in a file; None if it is missing or broken, since it can be made again."""
    if not path.is_file():
        return None
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
            if table.schema == _SCHEMA and table.num_rows == num_rows:
                return _sizes(table)
        what = f"{table.num_rows} rows of {table.schema.names}"
    except (pa.ArrowException, OSError) as error:
        what = str(error)
    log.warning("%s is broken (%s); probing again", path, what)
    return None


def _filled(values: pa.ChunkedArray) -> NDArray[np.int64]:
    filled: NDArray[np.int64] = pc.fill_null(values, 0).to_numpy().astype(np.int64)
    return filled


def _folder(rows: Dataset) -> Path:
    """Return the folder of the dataset's files, or one in the cache if none can be written to."""
    for file in rows.cache_files:
        folder = Path(file["filename"]).parent
        if os.access(folder, os.W_OK):
            return folder
    return Path(datasets.config.HF_DATASETS_CACHE) / "packpipe"


def _table(sizes: Sizes) -> pa.Table:
    reasons: list[Any] = [None] * len(sizes.image_hw)
    exceptions = reasons.copy()
    for reject in sizes.rejects:
        reasons[reject.example_index] = reject.reason
        exceptions[reject.example_index] = reject.exception
    columns = [*sizes.image_hw.T, sizes.broken_exif, reasons, exceptions]
    return pa.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA)


def _sizes(table: pa.Table) -> Sizes:
    image_hw = np.stack([table.column(name).to_numpy() for name in ("height", "width")], axis=1)
    rejected = np.flatnonzero(np.asarray(table.column("reason").is_valid()))
    found = table.take(pa.array(rejected)).select(["reason", "exception"]).to_pylist()
    rejects = [
        Reject(row, "probe", **reject) for row, reject in zip(rejected.tolist(), found, strict=True)
    ]
    return Sizes(image_hw, table.column("broken_exif").to_numpy(), rejects)
