"""Rows of encoded images as they are read: decoded, by the options in the manifest beside them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from packpipe import checks
from packpipe.images.pillow_settings import check_settings
from packpipe.images.rules import pixel_rules
from packpipe.images.versions import decoder_versions
from packpipe.philox import Key
from packpipe.planning.image_config import PackConfig
from packpipe.rows import schema
from packpipe.rows.computed import computed_columns
from packpipe.rows.digests import files_digest, hexdigest
from packpipe.rows.encoded import COLUMNS, ENCODED, Encoded, encoded_in, encoded_schema
from packpipe.rows.files import MANIFEST
from packpipe.rows.fill_images import fill_rows
from packpipe.rows.from_arrow import table_segments
from packpipe.rows.own_columns import PLACES, ROW, holds_tokens
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows

_REMEDY = "verify the folder, and pack it again"
# Manifests of folders that are open, with what tells whether a file has been written again.
_MANIFESTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedRows:
    """Computes packed rows from rows of encoded images.

    A transform of a `datasets.Dataset`: called with a batch of stored rows, returns whole rows.

    Attributes:
        folder: of the rows.
        config, key: the options and (seed, epoch) they were packed with.
        label: type of the labels, or None.
        weighted: whether the rows have weights.
        where: returns text that names the row of (example, view); None looks in the folder.
    """

    folder: str
    config: PackConfig
    key: Key
    label: pa.DataType | None = None
    weighted: bool = False
    where: Callable[[int, int], str] | None = None

    def rows(self, stored: pa.Table) -> Rows:
        """Return the rows that `pack` would have stored as pixels.

        Raises:
            ValueError: an image is not as it was packed, or cannot be decoded here; names its row.
        """
        check_settings()
        # One a segment, in the order in which they are asked for.
        images = iter([self._checked(one) for one in self._encoded_in(stored)])
        planned = table_segments(stored)
        config = _of_sound_images(self.config)
        rows, rejects, _ = fill_rows(planned, lambda _: next(images), config, self.key)
        for reject in rejects:
            raise ValueError(self._undecodable(reject))
        return rows

    def contents(self) -> dict[str, str | None]:
        """Return what decides the pixels: digests of the files and of the options, and versions."""
        options = json.dumps([self.config.to_dict(), *self.key], sort_keys=True)
        files = files_digest(map(str, self._files()))
        versions = ", ".join(map(" ".join, _flat(decoder_versions(self.config)).items()))
        return {"files": files, "options": hexdigest(options.encode()), "decoders": versions}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns of packed rows: a NumPy array a row, its dtype kept."""
        segments = schema.segment_schema(self.label, self.config, weighted=self.weighted)
        whole = schema.row_schema(self.config, self.label, weighted=self.weighted)
        return computed_columns(batch, encoded_schema(segments), whole, self.rows)

    def _encoded_in(self, stored: pa.Table) -> Iterator[Encoded]:
        try:
            yield from encoded_in(stored)
        except pa.ArrowInvalid as error:
            what = f"rows of {self.folder}"
            expected = "rows that packpipe has written"
            raise ValueError(checks.sentence(what, str(error), expected, _REMEDY)) from error

    def _checked(self, one: Encoded) -> memoryview:
        if one.image is None:
            where = self._where(one.example, one.view)
            what, expected = (
                f"image of example {one.example} ({where})",
                "the bytes that were packed",
            )
            raise ValueError(checks.sentence(what, "damaged", expected, _REMEDY))
        return one.image

    def _undecodable(self, reject: Reject) -> str:
        where = self._where(reject.example_index, reject.view)
        why = reject.exception.partition("; ")[0]  # its remedy is for those who pack
        found = f"undecodable here ({reject.reason}: {why})"
        remedy = "install the packages and versions that its manifest names"
        what = f"image of example {reject.example_index} ({where})"
        return checks.sentence(what, found, "one that decodes, as when it was packed", remedy)

    def _files(self) -> list[Path]:
        paths = Path(self.folder).glob("data-*.arrow")
        return sorted(paths, key=lambda path: (len(path.name), path.name))

    def _where(self, example: int, view: int) -> str:
        """Return text that names the row of a segment, which is looked for in all files."""
        if self.where is not None:
            return self.where(example, view)
        for path in self._files():
            first = 0
            # Another file may be damaged, too.
            with suppress(pa.ArrowException, OSError), pa.memory_map(str(path)) as file:
                for batch in pa.ipc.open_stream(file):
                    row = row_with(pa.Table.from_batches([batch]), example, view)
                    if row is not None:
                        return f"row {first + row} of {path}"
                    first += batch.num_rows
        return self.folder


def row_with(table: pa.Table, example: int, view: int) -> int | None:
    """Return the first row that holds a view of an example; None if none does."""
    rows = table_segments(table)
    at = np.flatnonzero((rows.example_index == example) & (rows.views == view))
    return int(np.searchsorted(rows.offsets, at[0], side="right")) - 1 if len(at) else None


def decoding(dataset: Any) -> Any:
    """Return rows of encoded images with the transform that computes them; others as they are.

    Raises:
        ValueError: see `reader_of`.
    """
    reader = reader_of(dataset)
    return dataset if reader is None else dataset.with_transform(reader)


def reader_of(dataset: Any) -> EncodedRows | None:
    """Return what computes rows of encoded images; None of others, or if their transform does.

    The options are those of the manifest in the folder that the rows lie in.

    Raises:
        ValueError: columns are missing, or there are pixels, too; the rows lie in no such folder,
            or in several; or they are decoded by an engine that is not installed.
    """
    names = getattr(dataset, "column_names", ())
    if holds_tokens(names) or not COLUMNS.keys() & {*names} or "seq_lens" not in names:
        return None
    if {ROW, PLACES} & {*names}:  # in a store, with a transform of their own
        return None
    missing = sorted({*schema.IMAGE_SEGMENTS, *COLUMNS} - {*names})
    if missing or "patches" in names:
        found = f"without {missing}" if missing else "joined with rows of pixels"
        expected, remedy = (
            "all their columns, and no others' patches",
            "read them as they were opened",
        )
        raise ValueError(checks.sentence("rows of encoded images", found, expected, remedy))
    if not hasattr(dataset, "with_transform"):  # a pyarrow.Table
        expected, remedy = "rows with their folder", "pass the Dataset that it is a table of"
        raise ValueError(checks.sentence("rows", "a table of encoded images", expected, remedy))
    return None if dataset.format["type"] == "custom" else decoder_of(dataset)


def decoder_of(dataset: Any) -> EncodedRows:
    """Return what computes rows of encoded images, by the manifest in their folder.

    Args:
        dataset: their segments, with the images or without.

    Raises:
        ValueError: the rows lie in no such folder, or in several; or they are decoded by an engine
            that is not installed.
    """
    kinds, names = dataset.data.schema, dataset.column_names
    label = kinds.field("labels").type.value_type if "labels" in names else None
    folder, manifest = _folder_of(dataset)
    config = PackConfig.from_dict(manifest["config"])
    pixel_rules(_of_sound_images(config))  # raises if they need a package that is not installed
    key = Key(manifest["seed"], manifest["epoch"])
    return EncodedRows(folder, config, key, label, weighted="weight" in names)


def _of_sound_images(config: PackConfig) -> PackConfig:
    """Return the options for bytes that were packed, so have passed the search for damage."""
    return replace(config, damaged_scans="keep")


def _folder_of(dataset: Any) -> tuple[str, dict[str, Any]]:
    """Return the one folder of encoded images that rows lie in, and its manifest."""
    folders = sorted({os.path.dirname(file["filename"]) for file in dataset.cache_files})
    found = [(folder, manifest) for folder in folders if (manifest := _manifest(folder))]
    if len(found) != 1:
        value = [folder for folder, _ in found] or folders
        expected = "one that packpipe.pack wrote, with its manifest"
        remedy = "open it with datasets.load_from_disk; encoded rows are not joined or saved again"
        raise ValueError(checks.sentence("folders of encoded rows", value, expected, remedy))
    return found[0]


def _manifest(folder: str) -> dict[str, Any] | None:
    """Return the manifest of rows of encoded images, None of anything else.

    It is read again when it changes. One that is gone is as it was: rows that are open can be read
    after their folder has moved.
    """
    known = _MANIFESTS.get(folder)
    with suppress(OSError, ValueError):
        path = Path(folder, MANIFEST)
        status = path.stat()
        stamp = status.st_ino, status.st_mtime_ns, status.st_size
        if known is None or known[0] != stamp:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.get("store") != ENCODED:
                return None
            known = _MANIFESTS[folder] = stamp, found
            _warn_of_versions(folder, found)
    return None if known is None else known[1]


def _warn_of_versions(folder: str, manifest: dict[str, Any]) -> None:
    """Say so if pixels are made by other versions here than `pack` checked the images with."""
    own = _flat(decoder_versions(PackConfig.from_dict(manifest["config"])))
    packed = _flat({name: manifest.get(name) for name in ("packpipe", "pillow", "codecs")})
    differing = [
        f"{name} {own.get(name, 'missing')} instead of {packed.get(name, 'none')}"
        for name in sorted(own.keys() | packed.keys())
        if own.get(name) != packed.get(name)
    ]
    if differing:
        log.warning(
            "the images in %s are decoded here by %s: pixels may differ from those of the versions "
            "in its manifest",
            folder,
            ", ".join(differing),
        )


def _flat(versions: dict[str, Any]) -> dict[str, Any]:
    """Return versions by the names of all packages."""
    return {"packpipe": versions["packpipe"], "pillow": versions["pillow"], **versions["codecs"]}
