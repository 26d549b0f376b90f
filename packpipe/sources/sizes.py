"""Image sizes of a source: from columns, or from headers that are read once and kept.

Probing opens every image; later epochs, builds and runs read the file of kept sizes, which lies
beside the data. A digest of all that sizes depend on is part of its name: the dataset's
fingerprint, the files it refers to by path (name, size, time of change), the limit on pixels and
the versions. If any of them differs, sizes are probed again.

Only sizes are kept. An image without one is probed again each time, so that one that could not be
read for a while is no reject for ever; and a size that turns out to be wrong is forgotten.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from packpipe import checks
from packpipe._version import __version__
from packpipe.durable import first_alone, remove_abandoned, write_shared
from packpipe.images.bad_images import SizeChanged
from packpipe.images.pillow_settings import changed_settings
from packpipe.planning.plan import MAX_SIDE
from packpipe.rows.rejects import Reject
from packpipe.sources.image_source import ImageSource
from packpipe.sources.survey import Sizes, probe_sizes

log = logging.getLogger(__name__)

_VERSION = 3
_MANY = 1000  # images whose headers take about a tenth of a second
_SCHEMA = pa.schema([("height", pa.int32()), ("width", pa.int32()), ("broken_exif", pa.bool_())])
_SEAL = b"packpipe"  # key of the schema's metadata that holds a file's `_seal`


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

    Of several processes on one file system, such as the ranks of a training, the first one probes.
    The others wait, and read what it has kept; if it failed, each of them probes.

    Args:
        source: the images.
        max_pixels: larger images are rejected.
        executor: runs the probes; None runs them here.
    """
    path, known = _place(source, max_pixels)
    remove_abandoned(path.parent, "packpipe-sizes-*.arrow.*")
    image_hw, broken_exif = _read(path, known, len(source.rows))
    if image_hw.all():
        return Sizes(image_hw, broken_exif, [])
    # Its name is not one of those that are removed above.
    with first_alone(path.with_suffix(".lock")) as is_first:
        if is_first:
            return _completed(source, path, known, max_pixels, executor)
    return _completed(source, path, known, max_pixels, executor)


def _completed(
    source: ImageSource, path: Path, known: str, max_pixels: int, executor: Executor | None
) -> Sizes:
    """Return the sizes of a source: those that are kept, and the others probed and then kept."""
    image_hw, broken_exif = _read(path, known, len(source.rows))
    # Where there is no size: everywhere, or where there was none the last time.
    asked = np.flatnonzero(image_hw[:, 0] == 0)
    if not asked.size:
        return Sizes(image_hw, broken_exif, [])
    if len(asked) >= _MANY:
        log.info("reading the sizes of %s images ...", f"{len(asked):,}")
    found = probe_sizes(
        lambda place: source(int(asked[place])),
        len(asked),
        max_pixels=max_pixels,
        executor=executor,
    )
    image_hw[asked], broken_exif[asked] = found.image_hw, found.broken_exif
    if len(found.rejects) < len(asked):
        _keep(path, known, image_hw, broken_exif)
    return Sizes(
        image_hw,
        broken_exif,
        [one._replace(example_index=int(asked[one.example_index])) for one in found.rejects],
    )


@contextmanager
def forgetting_wrong_sizes(source: ImageSource, max_pixels: int) -> Iterator[None]:
    """Remove the kept sizes of a source if the block finds that an image has another one.

    A file that was replaced by one of equal length and time of change is not noticed before; the
    next plan is made from sizes that are probed again.
    """
    try:
        yield
    except SizeChanged:
        with suppress(OSError):  # they may be where nothing can be written any more
            _place(source, max_pixels)[0].unlink(missing_ok=True)
        raise


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


def _place(source: ImageSource, max_pixels: int) -> tuple[Path, str]:
    """Return where the sizes of a source are kept, and a digest of all that they depend on."""
    # Another Pillow or packpipe may read headers differently, or reject other images.
    known = {
        "version": _VERSION,
        "packpipe": __version__,
        "pillow": PIL.__version__,
        "fingerprint": source.rows._fingerprint,
        "files": source.files_digest(),
        "max_pixels": max_pixels,
        **changed_settings(),
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return _folder(source.rows) / f"packpipe-sizes-{digest[:32]}.arrow", digest


def _read(path: Path, known: str, num_rows: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return (image_hw, broken_exif) of a file; zeros without one, or if it is not as written."""
    if path.is_file():
        try:
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_stream(file).read_all()
            if table.schema == _SCHEMA and table.num_rows == num_rows:
                height, width, broken = (column.to_numpy() for column in table.columns)
                image_hw, broken_exif = np.stack([height, width], axis=1), broken.copy()
                seal = (table.schema.metadata or {}).get(_SEAL)
                if seal == _seal(known, image_hw, broken_exif):
                    return image_hw, broken_exif
            what = f"{table.num_rows} rows of {table.schema.names}, or of another source"
        except (pa.ArrowException, OSError) as error:
            what = str(error)
        log.warning("%s is broken (%s); probing again", path, what)
    return np.zeros((num_rows, 2), np.int32), np.zeros(num_rows, np.bool_)


def _keep(
    path: Path, known: str, image_hw: NDArray[np.int32], broken_exif: NDArray[np.bool_]
) -> None:
    schema = _SCHEMA.with_metadata({_SEAL: _seal(known, image_hw, broken_exif)})
    columns = dict(zip(_SCHEMA.names, [*image_hw.T, broken_exif], strict=True))

    def write(file: BinaryIO) -> None:
        with pa.ipc.new_stream(file, schema) as stream:
            stream.write_table(pa.table(columns, schema=schema))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shared(path, write)  # several processes may probe the source at once
    except OSError as error:
        log.warning("sizes are not kept, they will be probed again: %s", error)


def _seal(known: str, image_hw: NDArray[Any], broken_exif: NDArray[Any]) -> bytes:
    """Return a digest of sizes and of what they depend on: those of another source are refused."""
    digest = hashlib.sha256(known.encode())
    for array in (image_hw, broken_exif):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest().encode()


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
