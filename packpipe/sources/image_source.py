"""Reads images of a dataset by row number, without decoding them.

`datasets` decodes image columns when they are read; here the Arrow storage is read instead, so
an image stays what it was stored as, bytes, path or array, until a row needs its pixels. Decoded
images that are put into a dataset are bytes, too, since `datasets` encodes them.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Image
from numpy.typing import NDArray

from packpipe import checks
from packpipe.images.bad_images import BadImage, rejecting
from packpipe.images.image_data import Confined, ImageData
from packpipe.images.regular_files import first_bytes
from packpipe.images.remote import fetched, is_remote, local_file, version_of
from packpipe.rows.digests import hexdigest, sample_digest


def checked_root(image_root: Any) -> str | None:
    """Return the real path of the folder that paths are confined to; None if there is none."""
    if image_root is None:
        return None
    remedy = "pass the folder that holds the images, or None to follow every path"
    if not isinstance(image_root, str | Path):
        raise TypeError(checks.sentence("image_root", image_root, "a folder", remedy))
    if not Path(image_root).is_dir():
        raise ValueError(checks.sentence("image_root", str(image_root), "a folder", remedy))
    return os.path.realpath(image_root)


@dataclass(frozen=True)
class ImageSource:
    """Images by row number: ``source(i)`` is the bytes, the path or the pixels of row i.

    Attributes:
        rows: a Dataset with just the image column, in Arrow format.
        root: the only folder that paths may lead into, as `checked_root` returns it; None for any.
    """

    rows: Any
    root: str | None = None

    def __call__(self, example: int) -> ImageData:
        """Return the image of a row, undecoded.

        Raises:
            BadImage: the row holds no image, a ragged array, or a path that leads out of root.
        """
        # A dataset that was selected from or shuffled maps its rows to those of the Arrow table.
        where = example if self._indices is None else self._indices[example]
        return image_data(self._column[int(where)], self.root)

    def file_of(self, example: int) -> str | None:
        """Return the path of a row's image, as it is written; None if the row holds the image."""
        where = example if self._indices is None else self._indices[example]
        value = self._column[int(where)]
        if pa.types.is_struct(value.type) and value.is_valid and not value["bytes"].is_valid:
            value = value["path"]
        return str(value) if pa.types.is_string(value.type) and value.is_valid else None

    # `datasets` takes some 100 µs to hand out a row; Arrow's own column, some 5.
    @cached_property
    def _column(self) -> pa.ChunkedArray:
        return self.rows.data.column(self.rows.column_names[0])

    @cached_property
    def _indices(self) -> NDArray[np.int64] | None:
        indices = self.rows._indices
        return None if indices is None else indices.column(0).to_numpy()

    # Workers get the dataset, not the cached columns, which they read again themselves.
    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "root": self.root}

    def _allows(self, path: str) -> bool:
        try:
            return bool(confined(path, self.root))
        except BadImage:
            return False

    def files_digest(self) -> str | None:
        """Return a digest of the files that images are stored in by path; None if there are none.

        Of path, size, time of change and whether they may be read, since a dataset's own
        fingerprint knows paths alone. Of a file on another machine (``s3://``, ``https://``) it is
        the path: to ask for more costs a request each.
        """
        column = self.rows.features[self.rows.column_names[0]]
        if not isinstance(column, Image):
            return None
        digest, found = hashlib.sha256(), False
        for batch in self.rows.iter(batch_size=1000):
            # Images with bytes keep the path they came from, which is never opened.
            by_path = pc.is_null(pc.struct_field(batch.column(0), "bytes"))
            for path in pc.struct_field(batch.column(0), "path").filter(by_path).to_pylist():
                found = True
                if path is not None and self._allows(path):
                    if is_remote(path):
                        known = f"{path} {_known(local_file(path))} {version_of(path)}"
                    else:
                        file = os.path.abspath(os.path.join(self.root or "", path))
                        known = f"{file} {_known(file)}"
                    # Paths may hold lone surrogates, which UTF-8 does not encode otherwise.
                    digest.update(f"{known}\n".encode(errors="surrogatepass"))
        return digest.hexdigest() if found else None

    def contents_digest(self) -> str:
        """Return a digest of the images: how many bytes each has, and 16 MB of them, evenly spread.

        So another image is found if its file has another length, or lies in what is read. The same
        images give the same digest wherever they lie, as bytes or in files. Costs one call of the
        operating system for each image in a file, and next to nothing for others.
        """
        sizes = self.num_bytes()
        return hexdigest(sizes.data, sample_digest(len(sizes), self._first_bytes).encode())

    def same_files(self) -> NDArray[np.int64]:
        """Return int64[rows], of each image the first row with the same file, or the same bytes.

        Files are told apart by their paths, links are not followed; images in the dataset itself by
        a digest of their bytes, read only of those that are as long as others. An image of pixels,
        or one that is missing, is the same as no other.
        """
        sizes, rows = self.num_bytes(), np.arange(len(self.rows))
        found, first = rows.copy(), dict[Any, int]()
        _, number, counts = np.unique(sizes, return_inverse=True, return_counts=True)
        for row in np.flatnonzero(counts[number] > 1).tolist():
            known = self._known_by(row)
            if known is not None:
                found[row] = first.setdefault(known, row)
        return found

    def _known_by(self, row: int) -> str | bytes | None:
        """Return a row's path, or a digest of its bytes; None if it has neither."""
        where = row if self._indices is None else int(self._indices[row])
        encoded = None if self._encoded is None else self._encoded.slice(where, 1).chunk(0)
        if encoded is not None and not encoded.null_count:
            return hashlib.sha256(_bytes_of(encoded)).digest()
        path = self.file_of(row)
        return None if path is None else os.path.normpath(path)

    @cached_property
    def _encoded(self) -> pa.ChunkedArray | None:
        """The encoded images, null for one in a file; None if the column holds arrays."""
        values = self._column
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, "bytes")
        is_binary = pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)
        return values if is_binary else None

    def num_bytes(self) -> NDArray[np.int64]:
        """Return int64[rows], how many bytes encode each image; 0 for arrays, -1 for none."""
        if self._encoded is None:
            return np.zeros(len(self.rows), np.int64)
        # From Arrow's offsets: the bytes are not read.
        lengths = pc.fill_null(pc.binary_length(self._encoded), -1)
        sizes: NDArray[np.int64] = lengths.to_numpy().astype(np.int64)
        where = np.arange(len(sizes)) if self._indices is None else self._indices
        sizes = sizes[where]
        rest = np.flatnonzero(sizes < 0)
        if len(rest) and pa.types.is_struct(self._column.type):
            paths = pc.struct_field(self._column, "path").take(pa.array(where[rest]))
            for row, path in zip(rest.tolist(), paths.to_pylist(), strict=True):
                with suppress(BadImage, OSError, ValueError):
                    if path is not None:
                        file = confined(path, self.root)
                        sizes[row] = _file_bytes(file if isinstance(file, str) else file.path)
        return sizes

    def _first_bytes(self, start: int, stop: int, most: int) -> Iterator[Any]:
        """Yield the bytes of images one after the other, nothing of one that cannot be read."""
        for row in range(start, stop):
            where = row if self._indices is None else int(self._indices[row])
            encoded = None if self._encoded is None else self._encoded.slice(where, 1).chunk(0)
            if encoded is not None and not encoded.null_count:
                yield _bytes_of(encoded)
                continue
            with suppress(BadImage, OSError, ValueError):
                image = self(row)
                if isinstance(image, np.ndarray):
                    yield f"{image.dtype}{image.shape}".encode()
                    image = np.ascontiguousarray(image)
                yield first_bytes(image, most) if isinstance(image, str | Confined) else image


def _bytes_of(one: pa.Array) -> pa.Buffer:
    """Return the bytes of the only value of an array, where Arrow has them; a scalar copies."""
    _, offsets, data = one.buffers()
    dtype = np.dtype(np.int64 if pa.types.is_large_binary(one.type) else np.int32)
    start, stop = np.frombuffer(offsets, dtype, 2, one.offset * dtype.itemsize).tolist()
    return pa.py_buffer(b"") if data is None else data.slice(start, stop - start)


def _file_bytes(file: str) -> int:
    """Return how many bytes a regular file has, -1 for anything else, such as a folder."""
    status = os.stat(file)
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _known(file: str) -> tuple[int, int] | None:
    """Return size and time of change of a file, None if it cannot be found or not be read."""
    try:
        status = os.stat(file)
        return (status.st_size, status.st_mtime_ns) if os.access(file, os.R_OK) else None
    except (OSError, ValueError):
        return None


def image_data(value: pa.Scalar, root: str | None = None) -> ImageData:
    """Return the bytes, the path or the pixels that an image column's Arrow value holds.

    Args:
        value: of a column of images.
        root: the only folder that its path may lead into, as `checked_root` returns it, or None.

    Raises:
        BadImage: there is no image; its array is ragged; its path leads out of root.
    """
    kind = value.type
    if not value.is_valid:
        raise BadImage("missing", "the image is null")
    if pa.types.is_struct(kind):
        # Bytes first, as `datasets` reads an Image column: with bytes the path is only a name.
        stored = {field.name: value[field.name] for field in kind}
        for name in ("bytes", "path"):
            if name in stored and stored[name].is_valid:
                return image_data(stored[name], root)
        raise BadImage("missing", "the image has neither bytes nor path")
    if isinstance(kind, pa.ExtensionType):  # Array2D and Array3D: lists below
        return image_data(value.value, root)
    if hasattr(value, "values"):
        return _pixels(value.values)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return image_at(value.as_py(), root)
    return memoryview(value.as_buffer())  # the bytes where Arrow has them, not a copy


def image_at(path: str, root: str | None) -> ImageData:
    """Return the image at a path: the path of its file or, with a scheme, the bytes it leads to.

    Raises:
        BadImage: it leads out of root, there is no such file, or no file can have such a name.
    """
    found = confined(path, root)
    return fetched(found) if root is None else found


def confined(path: str, root: str | None) -> str | Confined:
    """Return the path of a file; if there is a root, resolved, and to be opened within root only.

    Raises:
        BadImage: it leads out of root, or no file can have such a name.
    """
    if root is None:
        return path
    if is_remote(path):
        what = f"the path {path!r} has a scheme, expected one that stays in image_root"
        raise BadImage("outside image_root", what)
    with rejecting(path):  # links may come and go while they are resolved
        try:
            # With links resolved: a link inside root may lead out of it.
            found = os.path.realpath(os.path.join(root, path))
        except ValueError as error:  # a NUL
            raise BadImage("unreadable", f"the path {path!r}: {error}") from error
    if os.path.commonpath([root, found]) != root:
        raise BadImage("outside image_root", f"the path {path!r} leads out of image_root")
    return Confined(found, root)


def _pixels(rows: pa.Array) -> NDArray[Any]:
    """Return the pixels of nested lists: [height, width] or [height, width, channels]."""
    shape, values = [len(rows)], rows
    while hasattr(values, "flatten") and pa.types.is_nested(values.type):
        # All lists of a level must be of one length, which is the size of an axis.
        lengths = pc.unique(pc.list_value_length(values)).to_pylist() or [0]
        if len(lengths) > 1 or None in lengths:
            raise BadImage("unreadable", f"an array whose rows hold {lengths} values each")
        shape.append(lengths[0])
        values = values.flatten()
    if values.null_count:
        raise BadImage("unreadable", f"an array with {values.null_count} values missing")
    found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return found.reshape(shape)
