"""`verify`: whether a folder is what `pack` wrote and holds every example once (floor 2).

What can be made again is not taken from the manifest: the checksum of a file, what a row says of
its tokens (`invariants`), counts and fill. A file whose checksum is wrong is not looked into.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from numpy.typing import NDArray

from packpipe import checks, schema, table
from packpipe.config import PackConfig
from packpipe.images import BadImage, pixel_rules, probe
from packpipe.invariants import broken_rows
from packpipe.orders import Failure, Order, fill_row
from packpipe.quality import fill
from packpipe.shards import MANIFEST, REJECTS, read_manifest
from packpipe.source import ImageSource, labels_of

_NAMED = 3  # rows, or examples, of one problem
_KEYS = (
    *("schema_version", "config", "seed", "epoch", "materialized", "complete", "files"),
    *("image_column", "label_column", "image_root"),
)
_COMPLETE = ("counts", "fill")
_KINDS: dict[str, type] = {"files": dict, "counts": dict, "seed": int, "epoch": int}


class Problem(NamedTuple):
    """Something that is not as `pack` wrote it: in which file or row, and what is wrong there."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(
    folder: str | Path, dataset: Dataset | None = None, *, sample: int | None = 100
) -> list[Problem]:
    """Return what is wrong with the folder of a packed dataset; an empty list if nothing is.

    Every checksum, row and count is checked, and that each source example is in exactly one row
    or in the rejects. Given the source, some of its images are decoded again and compared with
    their tokens. Takes about as long as reading the files does.

    Args:
        folder: what `pack` was given as ``output``.
        dataset: what it packed, or None.
        sample: images that are decoded again if there is a dataset; None for all.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: folder is no folder, or holds rows of tokens; or sample is negative.
    """
    remedy = "pass the folder that pack was given as output"
    if not isinstance(folder, str | Path):
        raise TypeError(checks.sentence("folder", folder, "a path", remedy))
    if not Path(folder).is_dir():
        raise ValueError(checks.sentence("folder", str(folder), "a folder", remedy))
    if _holds_tokens(Path(folder)):
        expected, remedy = "rows of images", "rows of tokens are not verified yet"
        raise ValueError(checks.sentence("folder", str(folder), expected, remedy))
    if dataset is not None and not isinstance(dataset, Dataset):
        remedy = "pass the dataset that was packed"
        raise TypeError(checks.sentence("type(dataset)", type(dataset).__name__, "Dataset", remedy))
    if sample is not None:
        sample = checks.whole_number("sample", sample, 0, 2**62, "None takes all images")
    return list(_problems(Path(folder), dataset, sample))


@dataclass
class _Contents:
    """What the sound files of rows hold, in their order.

    Attributes:
        places: file, table and number of each row.
        segments: how many each row holds.
        example_index: int64[segments] of each batch.
        tokens: kept, of all rows.
        whole: whether every file could be read.
    """

    places: list[tuple[str, pa.Table, int]] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    example_index: list[NDArray[np.int64]] = field(default_factory=list)
    tokens: int = 0
    whole: bool = True


def _problems(folder: Path, dataset: Dataset | None, sample: int | None) -> Iterator[Problem]:
    manifest = _manifest(folder)
    if isinstance(manifest, str):
        yield Problem(MANIFEST, manifest)
        return
    contents, rejects = _Contents(), None
    for name, record in manifest["files"].items():
        damage = _damage(folder / name, record)
        if damage is not None:
            yield Problem(name, damage)
            contents.whole &= name == REJECTS
        elif name != REJECTS:
            yield from _row_problems(folder / name, record, manifest, contents)
        else:
            rejects = _rows_of(folder / name).to_pylist()
    for pattern in ("data-*.arrow", "*.partial"):
        for stray in sorted(folder.glob(pattern)):
            if stray.name not in manifest["files"]:
                yield Problem(stray.name, "is not in the manifest")
    if not manifest["complete"]:
        what = "says that the build is not complete; call pack again, and it continues"
        yield Problem(MANIFEST, what)
        return
    if contents.whole and rejects is not None:
        yield from _total_problems(manifest, contents, rejects)
        yield from _opening_problems(folder, contents)
    if dataset is not None:
        yield from _source_problems(dataset, sample, manifest, contents)


def _holds_tokens(folder: Path) -> bool:
    try:
        return "token_schema_version" in read_manifest(folder)
    except (OSError, ValueError):
        return False


def _manifest(folder: Path) -> dict[str, Any] | str:
    """Return the manifest of a folder, or what is wrong with it."""
    try:
        manifest = read_manifest(folder)
        missing = [key for key in _KEYS if key not in manifest]
        if not missing and manifest["complete"]:
            missing = [key for key in _COMPLETE if key not in manifest]
        if missing:
            return f"lacks {', '.join(missing)}"
        if manifest["schema_version"] != schema.VERSION:
            return f"schema_version is {manifest['schema_version']!r}, expected {schema.VERSION}"
        PackConfig.from_dict(manifest["config"])
        for key, kind in _KINDS.items():
            if not isinstance(manifest.get(key, kind()), kind):
                return f"{key} is {manifest[key]!r}, expected {kind.__name__}"
        if manifest["complete"] and REJECTS not in manifest["files"]:
            return f"files lacks {REJECTS}"
        for name, record in manifest["files"].items():
            if Path(name).name != name or not {"rows", "bytes", table.CHECKSUM} <= record.keys():
                return f"files[{name!r}] is {record!r}, expected rows, bytes and checksum"
    except FileNotFoundError:
        return "is missing: the folder is none that pack wrote"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"cannot be read: {type(error).__name__}: {error}"
    return manifest


def _damage(path: Path, record: dict[str, Any]) -> str | None:
    """Return what is wrong with the bytes of a file, None if nothing is."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"holds {size} bytes, expected {record['bytes']}"
    checksum = table.checksum_of(path)
    if checksum != record[table.CHECKSUM]:
        return f"{table.CHECKSUM} is {checksum}, expected {record[table.CHECKSUM]}"
    return None


def _rows_of(path: Path) -> pa.Table:
    """Return a file's table, mapped into memory."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.read_all()


def _row_problems(
    path: Path, record: dict[str, Any], manifest: dict[str, Any], contents: _Contents
) -> Iterator[Problem]:
    """Look into a file of rows, batch by batch, and add what it holds to the contents."""
    config = PackConfig.from_dict(manifest["config"])
    wanted = schema.segment_schema(None).names
    if manifest["materialized"]:
        wanted = schema.row_schema(config, None).names
    stored = _rows_of(path)
    if stored.num_rows != record["rows"]:
        yield Problem(path.name, f"holds {stored.num_rows} rows, expected {record['rows']}")
    if missing := [name for name in wanted if name not in stored.column_names]:
        yield Problem(path.name, f"lacks the columns {', '.join(missing)}")
        contents.whole = False
        return
    start = 0
    for batch in stored.to_batches():
        rows = pa.Table.from_batches([batch])
        readable = True
        for broken in broken_rows(rows, config, seed=manifest["seed"], epoch=manifest["epoch"]):
            where = f"{path.name}, {_named('row', (broken.rows + start).tolist())}"
            yield Problem(where, broken.what)
            readable &= broken.readable
        if readable:
            segments = schema.table_segments(rows)
            numbers = range(start, start + len(segments))
            contents.places += [(path.name, stored, number) for number in numbers]
            contents.segments += np.diff(segments.offsets).tolist()
            contents.example_index.append(segments.example_index)
            contents.tokens += int(segments.seq_lens.sum())
        contents.whole &= readable
        start += batch.num_rows


def _total_problems(
    manifest: dict[str, Any], contents: _Contents, rejects: list[dict[str, Any]]
) -> Iterator[Problem]:
    """Look for each example, and count."""
    counts, config = manifest["counts"], PackConfig.from_dict(manifest["config"])
    packed = np.concatenate([np.empty(0, np.int64), *contents.example_index])
    rejected = np.array([reject["example_index"] for reject in rejects], np.int64)
    every = np.concatenate([packed, rejected])
    found = {
        "read": len(every),
        "packed": len(packed),
        "rejected": len(rejected),
        "rejected_by_reason": dict(Counter(reject["reason"] for reject in rejects)),
        "packs": len(contents.places),
        "tokens": contents.tokens,
    }
    num_examples = counts.get("read", 0)
    inside = every[(every >= 0) & (every < num_examples)]
    times = np.bincount(inside, minlength=num_examples)
    for what, examples in (
        ("is in no row and not in the rejects", np.flatnonzero(times == 0)),
        ("is in more than one row, or in a row and in the rejects", np.flatnonzero(times > 1)),
        ("is none of the source", np.setdiff1d(every, inside)),
    ):
        if len(examples):
            yield Problem(_named("example", examples.tolist()), what)
    for name, number in found.items():
        if counts.get(name) != number:
            yield Problem(MANIFEST, f"counts.{name} is {counts.get(name)!r}, expected {number!r}")
    share = fill(contents.tokens, len(contents.places), config.seq_len)
    if manifest["fill"] != share:
        yield Problem(MANIFEST, f"fill is {manifest['fill']!r}, expected {share!r}")


def _opening_problems(folder: Path, contents: _Contents) -> Iterator[Problem]:
    """Open the folder as `datasets` does."""
    try:
        opened = datasets.load_from_disk(str(folder))
    except Exception as error:  # noqa: BLE001 whatever a damaged sidecar makes it raise
        yield Problem("state.json, dataset_info.json", f"do not open: {error}")
        return
    if len(opened) != len(contents.places):
        what = f"opens {len(opened)} rows, expected {len(contents.places)}"
        yield Problem("state.json", what)
        return
    found = opened.data.column("example_index").combine_chunks().flatten().to_numpy()
    if not np.array_equal(found, np.concatenate([np.empty(0, np.int64), *contents.example_index])):
        yield Problem("state.json", "opens other rows than the files hold, or in another order")
    for _, stored, _ in contents.places[:1]:
        if opened.features != Features.from_arrow_schema(stored.schema):
            what = f"has the features {opened.features}, expected those of the files"
            yield Problem("dataset_info.json", what)


def _source_problems(
    dataset: Dataset, sample: int | None, manifest: dict[str, Any], contents: _Contents
) -> Iterator[Problem]:
    """Decode some images again, and compare them with their tokens."""
    expected = manifest["counts"].get("read")
    if len(dataset) != expected:
        yield Problem("dataset", f"holds {len(dataset)} examples, expected {expected}")
        return
    image_column, label_column = manifest["image_column"], manifest["label_column"]
    for column in (image_column, label_column):
        if column is not None and column not in dataset.column_names:
            yield Problem("dataset", f"has no column {column!r}")
            return
    rows = dataset.select_columns([image_column]).with_format("arrow")
    source = ImageSource(rows, manifest["image_root"])
    labels = labels_of(dataset, label_column)
    stored_type = _label_type(contents)
    if labels is not None and stored_type not in (None, labels.type):
        yield Problem("dataset", f"has labels of type {labels.type}, expected {stored_type}")
        labels = None
    ends = np.cumsum(contents.segments, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    number = total if sample is None else min(sample, total)
    chosen = np.random.default_rng(0).choice(total, number, replace=False)
    for at in np.sort(chosen).tolist():
        pack = int(np.searchsorted(ends, at, side="right"))
        name, stored, row = contents.places[pack]
        segment = at - int(ends[pack]) + contents.segments[pack]
        found = _segment_of(stored.slice(row, 1), segment)
        where = f"{name}, row {row}, segment {segment + 1} (example {found.example_index})"
        for what in _differences(found, source, labels, manifest):
            yield Problem(where, what)


def _label_type(contents: _Contents) -> pa.DataType | None:
    """Return the type of the stored labels, None if there are none."""
    for _, stored, _ in contents.places[:1]:
        if "labels" in stored.column_names:
            return stored.schema.field("labels").type.value_type
    return None


class _Segment(NamedTuple):
    """What a row holds of an example; no patches and no kept tokens where none are stored."""

    example_index: int
    image_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    label: Any
    patches: NDArray[np.uint8] | None
    kept: NDArray[np.int32] | None


def _segment_of(row: pa.Table, number: int) -> _Segment:
    segments = schema.table_segments(row)
    height, width = segments.image_hw[number].tolist()
    rows, columns = segments.grid_hw[number].tolist()
    patches = kept = None
    if "patches" in row.column_names:
        tokens = schema.table_rows(row)
        start = int(segments.seq_lens[:number].sum())
        span = slice(start, start + int(segments.seq_lens[number]))
        patches = tokens.patches[0, span]
        kept = (tokens.coords[0, span] @ np.array([columns, 1])).astype(np.int32)
    label = None if segments.labels is None else segments.labels[number].as_py()
    example = int(segments.example_index[number])
    return _Segment(example, (height, width), (rows, columns), label, patches, kept)


def _differences(
    found: _Segment, source: ImageSource, labels: pa.Array | None, manifest: dict[str, Any]
) -> Iterator[str]:
    """Yield how a segment differs from its example."""
    example = found.example_index
    if not 0 <= example < len(source.rows):  # said before
        return
    if labels is not None and labels[example].as_py() != found.label:
        yield f"its label is {found.label!r}, expected {labels[example].as_py()!r}"
    config = PackConfig.from_dict(manifest["config"])
    try:
        data = source(example)
        image_hw = probe(data, max_pixels=config.max_pixels).image_hw
    except BadImage as error:
        yield f"its image cannot be read again: {error}"
        return
    if image_hw != found.image_hw:
        yield f"image_hw is {found.image_hw}, expected {image_hw}"
        return
    if found.patches is None:
        return
    order = Order(example, data, image_hw, found.grid_hw, found.kept)
    expected = np.empty_like(found.patches)
    (failure,) = fill_row([order], expected, pixel_rules(config))
    if isinstance(failure, Failure):
        yield f"its image cannot be decoded again: {failure.exception}"
        return
    apart = np.abs(found.patches.astype(np.int16) - expected)
    if apart.any():
        yield (
            f"{np.count_nonzero(apart):,} of {apart.size:,} pixel values differ from the image's, "
            f"by {apart.max()} at most"
        )


def _named(what: str, numbers: list[int]) -> str:
    """Return rows or examples by their numbers, the first of them if there are many."""
    named = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED:,} more" if len(numbers) > _NAMED else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {named}{more}"
