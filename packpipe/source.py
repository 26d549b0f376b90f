"""The source dataset: encoded images, sizes and labels, taken without decoding (floor 2).

`datasets` decodes image columns when they are read; here the Arrow storage is read instead, so
an image stays what it was stored as, bytes, path or array, until a row needs its pixels. Decoded
images that are stored in a dataset are bytes again, since `datasets` encodes them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
from numpy.typing import NDArray

from packpipe import checks
from packpipe.images import BadImage, ImageData, Probe, probe
from packpipe.rows import Reject

_LABEL_NAMES = ("label", "labels")
_PROBES_A_TASK = 256


def image_column_of(features: Features, asked: str) -> str:
    """Return the name of the image column: the one asked for, or the only one there is."""
    remedy = "pass image_column"
    images = [name for name, feature in features.items() if holds_images(feature)]
    if asked == "auto":
        if len(images) != 1:
            raise ValueError(
                checks.sentence(
                    "image columns", images, "exactly one, for image_column='auto'", remedy
                )
            )
        asked = str(images[0])
    if asked not in features:
        raise ValueError(checks.sentence("image_column", asked, f"one of {list(features)}", remedy))
    mode = getattr(features[asked], "mode", None)
    if mode not in (None, "RGB"):
        name, remedy = f"features[{asked!r}].mode", "cast_column it to Image()"
        raise ValueError(checks.sentence(name, mode, "None or 'RGB'", remedy))
    if asked not in images:
        expected = "Image(), Value('binary') or arrays of bool, uint8 or uint16"
        name = f"features[{asked!r}]"
        raise ValueError(checks.sentence(name, features[asked], expected, "cast_column it"))
    return asked


def label_column_of(features: Features, asked: str | None) -> str | None:
    """Return the name of the label column: as asked; ``"auto"`` finds one, None means none."""
    found = asked
    if asked == "auto":
        named = [name for name in _LABEL_NAMES if name in features]
        typed = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        if len(named or typed) > 1:
            expected = "one at most, for label_column='auto'"
            raise ValueError(
                checks.sentence("label columns", named or typed, expected, "pass label_column")
            )
        found = next(iter(named or typed), None)
    elif asked is not None and asked not in features:
        expected = f"one of {list(features)}, 'auto' or None"
        raise ValueError(checks.sentence("label_column", asked, expected, "check its spelling"))
    if found is not None and not isinstance(features[found], (ClassLabel, Value)):
        name, expected = f"features[{found!r}]", "a ClassLabel or a Value"
        remedy = "pass another label_column, or None"
        raise ValueError(checks.sentence(name, features[found], expected, remedy))
    return found


def holds_images(feature: Any) -> bool:
    """Return whether a feature is one of images: encoded, or arrays of pixels."""
    if isinstance(feature, Image) or feature in (Value("binary"), Value("large_binary")):
        return True
    return pixel_type(feature) is not None


def pixel_type(feature: Any) -> np.dtype[Any] | None:
    """Return the type of the pixels of an array column, None if it is no such column."""
    depth = 0
    while isinstance(feature, List | LargeList):
        feature, depth = feature.feature, depth + 1
    if isinstance(feature, Array2D | Array3D) and not depth:
        depth = len(feature.shape)
    dtype = getattr(feature, "dtype", None)
    found = depth in (2, 3) and dtype in ("bool", "uint8", "uint16")
    return np.dtype(dtype) if found else None


def check_dataset(dataset: Any) -> None:
    """Raise TypeError if it is no Dataset."""
    if not isinstance(dataset, Dataset):
        name, remedy = type(dataset).__name__, "pass one split, such as dataset['train']"
        if isinstance(dataset, IterableDataset):
            remedy = "packpipe.PackedStream packs what comes as a stream"
        raise TypeError(checks.sentence("type(dataset)", name, "Dataset", remedy))


def checked_root(image_root: Any) -> str | None:
    """Return the folder that paths are confined to, None for none."""
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
            BadImage: as `image_data`.
        """
        where = example if self._indices is None else self._indices[example]
        return image_data(self._column[int(where)], self.root)

    # `datasets` takes some 100 µs to hand out a row; Arrow's own column, some 5.
    @cached_property
    def _column(self) -> pa.ChunkedArray:
        return self.rows.data.column(self.rows.column_names[0])

    @cached_property
    def _indices(self) -> NDArray[np.int64] | None:
        indices = self.rows._indices
        return None if indices is None else indices.column(0).to_numpy()

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "root": self.root}

    def _allows(self, path: str) -> bool:
        try:
            return bool(confined(path, self.root))
        except BadImage:
            return False

    def files_digest(self) -> str | None:
        """Return a digest of the files that images are stored in by path; None if there are none.

        Path, size and time of change: a dataset's own fingerprint knows the paths alone.
        """
        column = self.rows.features[self.rows.column_names[0]]
        if not isinstance(column, Image):
            return None
        digest, found = hashlib.sha256(), False
        for batch in self.rows.iter(batch_size=1000):
            by_path = pc.is_null(pc.struct_field(batch.column(0), "bytes"))
            for path in pc.struct_field(batch.column(0), "path").filter(by_path).to_pylist():
                found = True
                if path is not None and self._allows(path):
                    file = os.path.abspath(os.path.join(self.root or "", path))
                    digest.update(f"{file} {_known(file)}\n".encode(errors="surrogatepass"))
        return digest.hexdigest() if found else None


def _known(file: str) -> tuple[int, int] | None:
    """Return size and time of change of a file, None if there is none."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def image_data(value: pa.Scalar, root: str | None = None) -> ImageData:
    """Return the bytes, the path or the pixels that an image column's Arrow value holds.

    Args:
        value: of a column of images.
        root: as for `ImageSource`.

    Raises:
        BadImage: it holds neither; its array is ragged; its path leads out of root.
    """
    kind = value.type
    if not value.is_valid:
        raise BadImage("missing", "the image is null")
    if pa.types.is_struct(kind):
        stored = {field.name: value[field.name] for field in kind}
        for name in ("bytes", "path"):
            if name in stored and stored[name].is_valid:
                return image_data(stored[name], root)
        raise BadImage("missing", "the image has neither bytes nor path")
    if isinstance(kind, pa.ExtensionType):
        return image_data(value.value, root)
    if hasattr(value, "values"):
        return _pixels(value.values)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return confined(value.as_py(), root)
    return memoryview(value.as_buffer())


def confined(path: str, root: str | None) -> str:
    """Return where a path leads, within root if there is one.

    Raises:
        BadImage: it leads out of it.
    """
    if root is None:
        return path
    try:
        found = os.path.realpath(os.path.join(root, path))
    except ValueError as error:  # a NUL
        raise BadImage("unreadable", f"the path {path!r}: {error}") from error
    if os.path.commonpath([root, found]) != root:
        raise BadImage("outside image_root", f"the path {path!r} leads out of image_root")
    return found


def _pixels(rows: pa.Array) -> NDArray[Any]:
    """Return the pixels of nested lists: [height, width] or [height, width, channels]."""
    shape, values = [len(rows)], rows
    while hasattr(values, "flatten") and pa.types.is_nested(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist() or [0]
        if len(lengths) > 1 or None in lengths:
            raise BadImage("unreadable", f"an array whose rows hold {lengths} values each")
        shape.append(lengths[0])
        values = values.flatten()
    if values.null_count:
        raise BadImage("unreadable", f"an array with {values.null_count} values missing")
    found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return found.reshape(shape)


@dataclass(frozen=True, eq=False)
class Sizes:
    """What image headers say of every row of a source.

    Attributes:
        image_hw: int32[rows, 2], upright sizes; (0, 0) for a reject.
        broken_exif: bool[rows], whether the EXIF could not be read.
        rejects: the rows without a size.
    """

    image_hw: NDArray[np.int32]
    broken_exif: NDArray[np.bool_]
    rejects: list[Reject]


def labels_of(dataset: Any, label_column: str | None) -> pa.Array | None:
    """Return the labels of a dataset as one array, or None without a label column."""
    if label_column is None:
        return None
    rows = dataset.select_columns([label_column]).with_format("arrow")
    return rows[:].column(0).combine_chunks()  # `take` searches every chunk of a column


def probe_sizes(
    read_image: Callable[[int], ImageData],
    num_examples: int,
    *,
    max_pixels: int,
    executor: Executor | None = None,
) -> Sizes:
    """Return the sizes of a source's images from their headers alone.

    Args:
        read_image: row number to encoded image.
        num_examples: rows.
        max_pixels: larger images are rejected.
        executor: runs the probes, some hundred a task; None runs them here.
    """

    def outcomes_of(examples: range) -> list[Probe | Reject]:
        return [_probe_or_reject(read_image, example, max_pixels) for example in examples]

    tasks = [
        range(num_examples)[i : i + _PROBES_A_TASK] for i in range(0, num_examples, _PROBES_A_TASK)
    ]
    run = map if executor is None else executor.map
    sizes = Sizes(np.zeros((num_examples, 2), np.int32), np.zeros(num_examples, np.bool_), [])
    for task, outcomes in zip(tasks, run(outcomes_of, tasks), strict=True):
        for row, outcome in zip(task, outcomes, strict=True):
            if isinstance(outcome, Reject):
                sizes.rejects.append(outcome)
            else:
                sizes.image_hw[row], sizes.broken_exif[row] = outcome
    return sizes


@dataclass(frozen=True, eq=False)
class Survey:
    """What headers and labels say of a source.

    Attributes:
        image_hw: int32[good, 2], upright sizes of the usable images.
        index: int64[good], their rows.
        rejects: the other examples, by row.
        broken_exif: how many had an EXIF that could not be read.
    """

    image_hw: NDArray[np.int32]
    index: NDArray[np.int64]
    rejects: list[Reject]
    broken_exif: int

    def without(self, rejects: list[Reject]) -> Survey:
        """Return the survey with more examples rejected."""
        known = {reject.example_index for reject in self.rejects}
        more = [reject for reject in rejects if reject.example_index not in known]
        good = ~np.isin(self.index, [reject.example_index for reject in more])
        return Survey(
            image_hw=self.image_hw[good],
            index=self.index[good],
            rejects=sorted(self.rejects + more),
            broken_exif=self.broken_exif,
        )


def survey(sizes: Sizes, labels: pa.Array | pa.ChunkedArray | None, label: Any) -> Survey:
    """Return the usable images of a source, and the rejects for their size or label.

    Args:
        sizes: of its images.
        labels: one value a row, or None.
        label: feature of the labels.
    """
    rejects = {reject.example_index: reject for reject in sizes.rejects}
    for reject in [] if labels is None else _bad_labels(labels, label):
        rejects.setdefault(reject.example_index, reject)
    good = np.ones(len(sizes.image_hw), np.bool_)
    good[list(rejects)] = False
    return Survey(
        image_hw=sizes.image_hw[good],
        index=np.flatnonzero(good),
        rejects=sorted(rejects.values()),
        broken_exif=int(sizes.broken_exif[good].sum()),
    )


def _probe_or_reject(
    read_image: Callable[[int], ImageData], example: int, max_pixels: int
) -> Probe | Reject:
    try:
        return probe(read_image(example), max_pixels=max_pixels)
    except BadImage as error:
        return Reject(example, "probe", error.reason, error.exception)


def _bad_labels(labels: pa.Array | pa.ChunkedArray, feature: Any) -> list[Reject]:
    """Return the examples whose label is null, or no class of its ClassLabel."""
    bad = pc.is_null(labels)
    expected, remedy = "a label", "; repair it, or pass label_column=None"
    if isinstance(feature, ClassLabel):
        outside = pc.or_(pc.less(labels, 0), pc.greater_equal(labels, feature.num_classes))
        bad = pc.or_(bad, pc.fill_null(outside, False))
        expected = f"0..{feature.num_classes - 1}"
    return [
        Reject(
            row,
            "label",
            "bad label",
            f"label is {labels[row].as_py()}, expected {expected}{remedy}",
        )
        for row in np.flatnonzero(np.asarray(bad)).tolist()
    ]
