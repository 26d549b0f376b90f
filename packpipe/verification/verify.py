"""`verify`: checks that a folder is as `pack` wrote it and holds every example once.

All that can be computed again is compared with the manifest: checksums, counts and fill. The tokens
of a row are compared with its segments (`row_checks`). A file with a wrong checksum is not opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from numpy.typing import NDArray

from packpipe import checks
from packpipe.building.shards import MANIFEST, REJECTS, read_manifest
from packpipe.packing.quality import fill
from packpipe.philox import checked_key
from packpipe.rows import files
from packpipe.rows.rows import Rows
from packpipe.rows.schema import REJECTS as REJECTS_SCHEMA
from packpipe.rows.schema import table_segments
from packpipe.verification.image_checks import ImageChecks
from packpipe.verification.problems import FoundRows, Problem, named, rows_of
from packpipe.verification.row_checks import RowChecks, has_nulls
from packpipe.verification.token_checks import TokenChecks

_KEYS = ("config", "seed", "epoch", "complete", "files")
_COMPLETE = ("counts", "fill")
_TYPES: dict[str, tuple[type, ...]] = {
    "files": (dict,),
    "counts": (dict,),
    "seed": (int,),
    "epoch": (int,),
    "materialized": (bool,),
    "image_column": (str,),
    "label_column": (str, type(None)),
    "image_root": (str, type(None)),
    "token_columns": (list,),
    "value_columns": (list,),
    "longest": (int,),
}


def verify(
    folder: str | Path, dataset: Dataset | None = None, *, sample: int | None = 100
) -> list[Problem]:
    """Return what is wrong with the folder of a packed dataset; an empty list if nothing is.

    Every checksum, row and count is checked, and that each source example is in exactly one row
    or in the rejects. Given the source, some of its images are decoded again and compared with
    their tokens; of token sequences all pieces are compared. Takes about as long as reading files.

    Args:
        folder: the folder that `pack` was given as ``output``.
        dataset: the dataset that was packed; None checks the folder alone.
        sample: how many images of dataset are decoded again; None for all.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: folder is not a folder, or sample is negative.
    """
    remedy = "pass the folder that pack was given as output"
    if not isinstance(folder, str | Path):
        raise TypeError(checks.sentence("folder", folder, "a path", remedy))
    if not Path(folder).is_dir():
        raise ValueError(checks.sentence("folder", str(folder), "a folder", remedy))
    if dataset is not None and not isinstance(dataset, Dataset):
        remedy = "pass the dataset that was packed"
        raise TypeError(checks.sentence("type(dataset)", type(dataset).__name__, "Dataset", remedy))
    if sample is not None:
        sample = checks.whole_number("sample", sample, 0, 2**62, "None takes all images")
    return list(_problems(Path(folder), dataset, sample))


def _problems(folder: Path, dataset: Dataset | None, sample: int | None) -> Iterator[Problem]:
    manifest = _manifest(folder)
    if isinstance(manifest, str):
        yield Problem(MANIFEST, manifest)
        return
    row_checks, found = _checks_of(manifest)(manifest), FoundRows()
    rejects: list[dict[str, Any]] | None = None
    for name, record in manifest["files"].items():
        damage = _damage(folder / name, record)
        if damage is not None:
            yield Problem(name, damage)
            # Totals need all files of rows; without rejects they are left out, too (below).
            found.whole &= name == REJECTS
        elif name != REJECTS:
            yield from _row_problems(row_checks, folder / name, record, found)
        else:
            read = _rejects(folder / name)
            if isinstance(read, str):
                yield Problem(name, read)
            else:
                rejects = read
    for pattern in ("data-*.arrow", "*.partial"):
        for stray in sorted(folder.glob(pattern)):
            if stray.name not in manifest["files"]:
                yield Problem(stray.name, "is not in the manifest")
    # Counts and the files that `datasets` opens are written at the end of a build.
    if not manifest["complete"]:
        what = "says that the build is not complete; call pack again, and it continues"
        yield Problem(MANIFEST, what)
        return
    held = found.held()
    if found.whole and rejects is not None:
        yield from _total_problems(row_checks, held, rejects)
        yield from _opening_problems(folder, found, held)
    if dataset is not None:
        yield from _source_problems(row_checks, dataset, sample, found)


def _checks_of(manifest: dict[str, Any]) -> type[RowChecks]:
    return TokenChecks if TokenChecks.VERSION_KEY in manifest else ImageChecks


def _manifest(folder: Path) -> dict[str, Any] | str:
    """Return the manifest of a folder, or what is wrong with it."""
    try:
        manifest = read_manifest(folder)
        kind = _checks_of(manifest)
        missing = [key for key in (kind.VERSION_KEY, *_KEYS, *kind.KEYS) if key not in manifest]
        if not missing and manifest["complete"]:
            missing = [key for key in _COMPLETE if key not in manifest]
        if missing:
            return f"lacks {', '.join(missing)}"
        if manifest[kind.VERSION_KEY] != kind.VERSION:
            return f"{kind.VERSION_KEY} is {manifest[kind.VERSION_KEY]!r}, expected {kind.VERSION}"
        kind.config_of(manifest["config"])
        for key, expected in _TYPES.items():
            value = manifest.get(key)
            if key in manifest and not isinstance(value, expected):
                return f"{key} is {value!r}, expected {expected[0].__name__}"
            if isinstance(value, list) and not all(isinstance(name, str) for name in value):
                return f"{key} is {value!r}, expected names"
        checked_key(manifest["seed"], manifest["epoch"])
        if manifest.get("token_columns") == []:
            return "token_columns is [], expected one name at least"
        if manifest["complete"] and REJECTS not in manifest["files"]:
            return f"files lacks {REJECTS}"
        read = manifest.get("counts", {}).get("read", 0)
        if type(read) is not int or read < 0:  # True is an int, too
            return f"counts.read is {read!r}, expected a whole number"
        # A manifest may come from anywhere: its names must not lead out of the folder.
        for name, record in manifest["files"].items():
            if Path(name).name != name or not {"rows", "bytes", files.CHECKSUM} <= record.keys():
                return f"files[{name!r}] is {record!r}, expected rows, bytes and checksum"
    except FileNotFoundError:
        return "is missing: the folder is none that pack wrote"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"cannot be read: {type(error).__name__}: {error}"
    return manifest


def _rejects(path: Path) -> list[dict[str, Any]] | str:
    """Return the rejects of a folder, or what is wrong with their file."""
    try:
        table = rows_of(path)
    except (pa.ArrowInvalid, OSError) as error:
        return f"cannot be read: {error}"
    if not table.schema.equals(REJECTS_SCHEMA):
        return f"has the columns {table.schema.names}, expected {REJECTS_SCHEMA.names}"
    if any(has_nulls(column) for column in table.columns):
        return "holds nulls"
    rejects: list[dict[str, Any]] = table.to_pylist()
    return rejects


def _damage(path: Path, record: dict[str, Any]) -> str | None:
    """Return what is wrong with the bytes of a file, None if nothing is."""
    if not path.is_file():
        return "is missing"
    # The size first, since a file that was cut need not be read.
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"holds {size} bytes, expected {record['bytes']}"
    checksum = files.checksum_of(path)
    if checksum != record[files.CHECKSUM]:
        return f"{files.CHECKSUM} is {checksum}, expected {record[files.CHECKSUM]}"
    return None


def _row_problems(
    row_checks: RowChecks, path: Path, record: dict[str, Any], found: FoundRows
) -> Iterator[Problem]:
    """Check the rows of a file, batch by batch, and add them to found."""
    try:
        stored = rows_of(path)
    except (pa.ArrowInvalid, OSError) as error:
        yield Problem(path.name, f"cannot be read: {error}")
        found.whole = False
        return
    if stored.num_rows != record["rows"]:
        yield Problem(path.name, f"holds {stored.num_rows} rows, expected {record['rows']}")
    if missing := [name for name in row_checks.columns() if name not in stored.column_names]:
        yield Problem(path.name, f"lacks the columns {', '.join(missing)}")
        found.whole = False
        return
    start = 0
    for batch in stored.to_batches():
        rows = pa.Table.from_batches([batch])
        amiss = list(row_checks.broken_rows(rows))
        for broken in amiss:
            where = f"{path.name}, {named('row', (broken.rows + start).tolist())}"
            yield Problem(where, broken.what)
        readable = all(broken.readable for broken in amiss)
        if readable:
            # Numbered through all files, while a problem names the row within its file.
            for broken in amiss:
                found.broken.update((broken.rows + len(found.places)).tolist())
            numbers = range(start, start + batch.num_rows)
            found.places += [(path.name, stored, number) for number in numbers]
            found.parts.append(table_segments(rows))
        found.whole &= readable
        start += batch.num_rows


def _total_problems(
    row_checks: RowChecks, held: Rows, rejects: list[dict[str, Any]]
) -> Iterator[Problem]:
    """Yield the examples that are missing or there twice, and the counts that are wrong."""
    manifest, counts = row_checks.manifest, row_checks.manifest["counts"]
    # A sequence in several pieces counts once, by its first piece.
    packed = held.example_index[held.fragment == 0]
    rejected = np.array([reject["example_index"] for reject in rejects], np.int64)
    every = np.concatenate([packed, rejected])
    num_packs, num_tokens = len(held), int(held.seq_lens.sum(dtype=np.int64))
    expected = {
        "read": len(every),
        "packed": len(packed),
        "rejected": len(rejected),
        "rejected_by_reason": dict(Counter(reject["reason"] for reject in rejects)),
        "packs": num_packs,
        "tokens": num_tokens,
        **row_checks.counts(held),
    }
    # A count may be anything; what is too many is said of the count, not of each example.
    num_examples = min(counts.get("read", 0), 2 * len(every) + 1000)
    # np.bincount refuses negative numbers, and takes memory for as many as the largest one.
    inside = every[(every >= 0) & (every < num_examples)]
    times = np.bincount(inside, minlength=num_examples)
    for what, examples in (
        ("is in no row and not in the rejects", np.flatnonzero(times == 0)),
        ("is in more than one row, or in a row and in the rejects", np.flatnonzero(times > 1)),
        ("is none of the source", np.setdiff1d(every, inside)),
    ):
        if len(examples):
            yield Problem(named("example", examples.tolist()), what)
    yield from row_checks.total_problems(held)
    for name, number in expected.items():
        if counts.get(name) != number:
            yield Problem(MANIFEST, f"counts.{name} is {counts.get(name)!r}, expected {number!r}")
    share = fill(num_tokens, num_packs, row_checks.config.seq_len)
    if manifest["fill"] != share:
        yield Problem(MANIFEST, f"fill is {manifest['fill']!r}, expected {share!r}")


def _opening_problems(folder: Path, found: FoundRows, held: Rows) -> Iterator[Problem]:
    """Yield what is wrong with the dataset that `datasets` opens from the folder."""
    try:
        opened = datasets.load_from_disk(str(folder))
    except Exception as error:  # noqa: BLE001 whatever a damaged sidecar makes it raise
        yield Problem("state.json, dataset_info.json", f"do not open: {error}")
        return
    if not isinstance(opened, Dataset) or "example_index" not in opened.column_names:
        yield Problem("state.json", "opens no packed rows")
        return
    if len(opened) != len(found.places):
        what = f"opens {len(opened)} rows, expected {len(found.places)}"
        yield Problem("state.json", what)
        return
    examples: NDArray[np.int64] = (
        opened.data.column("example_index").combine_chunks().flatten().to_numpy()
    )
    if not np.array_equal(examples, held.example_index):
        yield Problem("state.json", "opens other rows than the files hold, or in another order")
    for _, stored, _ in found.places[:1]:
        if opened.features != Features.from_arrow_schema(stored.schema):
            what = f"has the features {opened.features}, expected those of the files"
            yield Problem("dataset_info.json", what)


def _source_problems(
    row_checks: RowChecks, dataset: Dataset, sample: int | None, found: FoundRows
) -> Iterator[Problem]:
    """Yield how rows differ from the dataset they were made from."""
    expected = row_checks.manifest["counts"].get("read")
    if len(dataset) != expected:
        yield Problem("dataset", f"holds {len(dataset)} examples, expected {expected}")
        return
    for column in row_checks.source_columns():
        if column not in dataset.column_names:
            yield Problem("dataset", f"has no column {column!r}")
            return
    yield from row_checks.source_problems(dataset, sample, found)
