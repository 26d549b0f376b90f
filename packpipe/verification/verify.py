"""`verify`: whether a folder is what `pack` wrote and holds every example once.

What can be made again is not taken from the manifest: the checksum of a file, what a row says of
its tokens (`invariants`), counts and fill. A file whose checksum is wrong is not looked into.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from numpy.typing import NDArray

from packpipe import checks
from packpipe.building.shards import MANIFEST, REJECTS, read_manifest
from packpipe.packing.quality import fill
from packpipe.planning.image_config import PackConfig
from packpipe.planning.token_config import TokenConfig
from packpipe.rows import files
from packpipe.verification import image_checks, token_checks
from packpipe.verification.problems import Broken, FoundRows, Held, Problem, named, rows_of

_KEYS = ("config", "seed", "epoch", "complete", "files")
_COMPLETE = ("counts", "fill")
_TYPES: dict[str, type] = {"files": dict, "counts": dict, "seed": int, "epoch": int}


def verify(
    folder: str | Path, dataset: Dataset | None = None, *, sample: int | None = 100
) -> list[Problem]:
    """Return what is wrong with the folder of a packed dataset; an empty list if nothing is.

    Every checksum, row and count is checked, and that each source example is in exactly one row
    or in the rejects. Given the source, some of its images are decoded again and compared with
    their tokens; sequences all are, piece by piece. Takes about as long as reading the files.

    Args:
        folder: what `pack` was given as ``output``.
        dataset: what it packed, or None.
        sample: images, of the dataset if there is one, that are decoded again; None for all.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: folder is no folder; or sample is negative.
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


class Kind(Protocol):
    """What is known of rows of one kind: `image_verification`, `token_verification`."""

    KEYS: tuple[str, ...]
    VERSION_KEY: str
    VERSION: int

    def config_of(self, values: dict[str, Any], /) -> PackConfig | TokenConfig:
        """Return the options of a manifest."""

    def columns(self, manifest: dict[str, Any]) -> list[str]:
        """Return the columns that stored rows must have."""

    def broken_rows(self, rows: pa.Table, manifest: dict[str, Any]) -> Iterator[Broken]:
        """Yield what is wrong with which rows of a table, from what they say alone."""

    def held(self, rows: pa.Table) -> Held:
        """Return which examples rows hold."""

    def counts(self, found: Held) -> dict[str, int]:
        """Return the manifest's counts that only rows of this kind have."""

    def total_problems(self, found: Held, manifest: dict[str, Any]) -> Iterator[Problem]:
        """Yield what is wrong with all rows together."""

    def source_columns(self, manifest: dict[str, Any]) -> list[str]:
        """Return the columns of the source that rows were made from."""

    def source_problems(
        self, dataset: Dataset, sample: int | None, manifest: dict[str, Any], found: FoundRows
    ) -> Iterator[Problem]:
        """Yield how rows differ from their source."""


def _problems(folder: Path, dataset: Dataset | None, sample: int | None) -> Iterator[Problem]:
    manifest = _manifest(folder)
    if isinstance(manifest, str):
        yield Problem(MANIFEST, manifest)
        return
    kind, found, rejects = _kind_of(manifest), FoundRows(), None
    for name, record in manifest["files"].items():
        damage = _damage(folder / name, record)
        if damage is not None:
            yield Problem(name, damage)
            found.whole &= name == REJECTS
        elif name != REJECTS:
            yield from _row_problems(kind, folder / name, record, manifest, found)
        else:
            rejects = rows_of(folder / name).to_pylist()
    for pattern in ("data-*.arrow", "*.partial"):
        for stray in sorted(folder.glob(pattern)):
            if stray.name not in manifest["files"]:
                yield Problem(stray.name, "is not in the manifest")
    if not manifest["complete"]:
        what = "says that the build is not complete; call pack again, and it continues"
        yield Problem(MANIFEST, what)
        return
    held = found.held()
    if found.whole and rejects is not None:
        yield from _total_problems(kind, manifest, held, rejects)
        yield from _opening_problems(folder, found, held)
    if dataset is not None:
        yield from _source_problems(kind, dataset, sample, manifest, found)


def _kind_of(manifest: dict[str, Any]) -> Kind:
    if token_checks.VERSION_KEY in manifest:
        return token_checks
    return image_checks


def _manifest(folder: Path) -> dict[str, Any] | str:
    """Return the manifest of a folder, or what is wrong with it."""
    try:
        manifest = read_manifest(folder)
        kind = _kind_of(manifest)
        missing = [key for key in (kind.VERSION_KEY, *_KEYS, *kind.KEYS) if key not in manifest]
        if not missing and manifest["complete"]:
            missing = [key for key in _COMPLETE if key not in manifest]
        if missing:
            return f"lacks {', '.join(missing)}"
        if manifest[kind.VERSION_KEY] != kind.VERSION:
            return f"{kind.VERSION_KEY} is {manifest[kind.VERSION_KEY]!r}, expected {kind.VERSION}"
        kind.config_of(manifest["config"])
        for key, expected in _TYPES.items():
            if not isinstance(manifest.get(key, expected()), expected):
                return f"{key} is {manifest[key]!r}, expected {expected.__name__}"
        if manifest["complete"] and REJECTS not in manifest["files"]:
            return f"files lacks {REJECTS}"
        for name, record in manifest["files"].items():
            if Path(name).name != name or not {"rows", "bytes", files.CHECKSUM} <= record.keys():
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
    checksum = files.checksum_of(path)
    if checksum != record[files.CHECKSUM]:
        return f"{files.CHECKSUM} is {checksum}, expected {record[files.CHECKSUM]}"
    return None


def _row_problems(
    kind: Kind, path: Path, record: dict[str, Any], manifest: dict[str, Any], found: FoundRows
) -> Iterator[Problem]:
    """Look into a file of rows, batch by batch, and add what it holds to what was found."""
    stored = rows_of(path)
    if stored.num_rows != record["rows"]:
        yield Problem(path.name, f"holds {stored.num_rows} rows, expected {record['rows']}")
    if missing := [name for name in kind.columns(manifest) if name not in stored.column_names]:
        yield Problem(path.name, f"lacks the columns {', '.join(missing)}")
        found.whole = False
        return
    start = 0
    for batch in stored.to_batches():
        rows = pa.Table.from_batches([batch])
        readable = True
        for broken in kind.broken_rows(rows, manifest):
            where = f"{path.name}, {named('row', (broken.rows + start).tolist())}"
            yield Problem(where, broken.what)
            readable &= broken.readable
        if readable:
            numbers = range(start, start + batch.num_rows)
            found.places += [(path.name, stored, number) for number in numbers]
            found.parts.append(kind.held(rows))
        found.whole &= readable
        start += batch.num_rows


def _total_problems(
    kind: Kind, manifest: dict[str, Any], held: Held, rejects: list[dict[str, Any]]
) -> Iterator[Problem]:
    """Look for each example, and count."""
    counts, config = manifest["counts"], kind.config_of(manifest["config"])
    packed = held.example_index[held.fragment == 0]
    rejected = np.array([reject["example_index"] for reject in rejects], np.int64)
    every = np.concatenate([packed, rejected])
    num_packs, num_tokens = len(held.offsets) - 1, int(held.seq_lens.sum(dtype=np.int64))
    expected = {
        "read": len(every),
        "packed": len(packed),
        "rejected": len(rejected),
        "rejected_by_reason": dict(Counter(reject["reason"] for reject in rejects)),
        "packs": num_packs,
        "tokens": num_tokens,
        **kind.counts(held),
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
            yield Problem(named("example", examples.tolist()), what)
    yield from kind.total_problems(held, manifest)
    for name, number in expected.items():
        if counts.get(name) != number:
            yield Problem(MANIFEST, f"counts.{name} is {counts.get(name)!r}, expected {number!r}")
    share = fill(num_tokens, num_packs, config.seq_len)
    if manifest["fill"] != share:
        yield Problem(MANIFEST, f"fill is {manifest['fill']!r}, expected {share!r}")


def _opening_problems(folder: Path, found: FoundRows, held: Held) -> Iterator[Problem]:
    """Open the folder as `datasets` does."""
    try:
        opened = datasets.load_from_disk(str(folder))
    except Exception as error:  # noqa: BLE001 whatever a damaged sidecar makes it raise
        yield Problem("state.json, dataset_info.json", f"do not open: {error}")
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
    kind: Kind, dataset: Dataset, sample: int | None, manifest: dict[str, Any], found: FoundRows
) -> Iterator[Problem]:
    """Compare rows with the dataset they were made from."""
    expected = manifest["counts"].get("read")
    if len(dataset) != expected:
        yield Problem("dataset", f"holds {len(dataset)} examples, expected {expected}")
        return
    for column in kind.source_columns(manifest):
        if column not in dataset.column_names:
            yield Problem("dataset", f"has no column {column!r}")
            return
    yield from kind.source_problems(dataset, sample, manifest, found)
