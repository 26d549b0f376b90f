"""`summarize`: the figures of a folder of packed rows.

Counts come from the manifest, lengths from the rows' segment columns; no token is read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.building.opened import packed_at
from packpipe.packing.picture import html
from packpipe.packing.quality import Quality
from packpipe.planning.image_config import PackConfig
from packpipe.rows.from_arrow import table_segments
from packpipe.rows.rejects import Reject


@dataclass(frozen=True, eq=False)
class Summary:
    """The figures of a folder of packed rows; prints as a table.

    Attributes:
        folder: the folder, or its URL.
        manifest: configuration, counts and checksums; see `packpipe.manifest`.
        unit: ``"image"`` or ``"sequence"``.
        seq_lens: int32[segments], tokens of each, row by row.
        offsets: int64[rows + 1]; row r holds the segments offsets[r]..offsets[r + 1] - 1.
        image_hw: int32[segments, 2], size in pixels; None for sequences.
        rejects: examples that are in no row.
    """

    folder: Path | str
    manifest: dict[str, Any]
    unit: str
    seq_lens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    image_hw: NDArray[np.int32] | None
    rejects: list[Reject]

    @property
    def quality(self) -> Quality:
        """Fill, bound, gap and the other figures."""
        return Quality(
            num_examples=len(self.seq_lens),
            num_tokens=int(self.seq_lens.sum(dtype=np.int64)),
            num_packs=len(self.offsets) - 1,
            seq_len=self.manifest["config"]["seq_len"],
            bound=self.manifest["counts"]["bound"],
            most_segments=int(self.segments.max(initial=0)),
        )

    @property
    def segments(self) -> NDArray[np.int64]:
        """int64[rows], how many segments each holds."""
        return np.diff(self.offsets)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """int64[rows], how many tokens each holds."""
        ends = np.concatenate([[0], np.cumsum(self.seq_lens, dtype=np.int64)])
        return np.diff(ends[self.offsets])

    @property
    def padding_alone(self) -> float:
        """Share of slots that would be padding if every row held one segment."""
        quality = self.quality
        slots = quality.num_examples * quality.seq_len
        return 1.0 - quality.num_tokens / slots if slots else 0.0

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) of each figure, ready to print."""
        counts, quality = self.manifest["counts"], self.quality
        found = [
            (f"{self.unit}s", f"{counts['packed']:,} of {counts['read']:,}"),
            *self._views(),
            ("rejected", self._rejected()),
            *quality.rows("row")[1:],
            ("alone", f"{self.padding_alone:.3%} padding with one {self.unit} a row"),
            ("lengths", _spread(self.seq_lens, "tokens")),
        ]
        for name, key, what in (
            ("shrunk", "shrunk", "images shrunk to fit"),
            ("cut", "cut", "sequences cut"),
            ("masked", "masked_tokens", "tokens of padding in the source left out"),
        ):
            if counts.get(key):
                found.append((name, f"{counts[key]:,} {what}"))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        quality = self.quality
        return {
            "folder": str(self.folder),
            "unit": self.unit,
            "counts": self.manifest["counts"],
            "seq_len": quality.seq_len,
            "fill": quality.fill,
            "padding": quality.padding,
            "padding_alone": self.padding_alone,
            "gap": quality.gap,
            "segments_a_pack": quality.packing_factor,
            "most_segments": quality.most_segments,
            "lengths": dict(zip(*histogram_of(self.seq_lens), strict=True)),
            "config": self.manifest["config"],
        }

    def __str__(self) -> str:
        return "\n".join(f"{name:<9} {value}" for name, value in self.rows())

    def _repr_html_(self) -> str:
        return html(self.rows(), self.seq_lens, self.offsets, self.quality.seq_len, "row")

    def _views(self) -> list[tuple[str, str]]:
        if "segments" not in self.manifest["counts"]:
            return []
        views = PackConfig.from_dict(self.manifest["config"]).num_views
        return [("views", f"{views} of each {self.unit}, {len(self.seq_lens):,} segments")]

    def _rejected(self) -> str:
        reasons = Counter(reject.reason for reject in self.rejects)
        why = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
        return f"{len(self.rejects):,}" + (f" ({why})" if why else "")


def summarize(folder: str | Path, *, storage_options: dict[str, Any] | None = None) -> Summary:
    """Return the figures of the folder of a packed dataset.

    Of one in a store, what the rows hold is read, about a thousandth of it.

    Args:
        folder: the folder that `pack` was given as ``output``, or its URL.
        storage_options: for fsspec, of a URL: credentials, for example.

    Raises:
        TypeError: folder is no path.
        ValueError: `pack` has not written this folder, or not completed it.
        ConnectionError, FileNotFoundError: as of `open_packed`.
    """
    remedy = "pass the folder that pack was given as output"
    if not isinstance(folder, str | Path):
        raise TypeError(checks.sentence("folder", folder, "a path", remedy))
    found = packed_at(folder, storage_options=storage_options)
    # Files are mapped into memory: reading the segment columns leaves the tokens on the disk.
    rows = table_segments(found.rows(may_copy=False).data.table)
    return Summary(
        folder=Path(folder) if found.storage is None else found.place,
        manifest=found.manifest,
        unit="sequence" if rows.of_tokens else "image",
        seq_lens=rows.seq_lens,
        offsets=rows.offsets,
        image_hw=rows.segments.get("image_hw"),
        rejects=found.rejects(),
    )


def histogram_of(lens: NDArray[np.int32]) -> tuple[list[int], list[int]]:
    """Return the distinct lengths, ascending, and how many segments have each."""
    found, counts = np.unique(lens, return_counts=True)
    return found.tolist(), counts.tolist()


def _spread(lens: NDArray[np.int32], what: str) -> str:
    if not len(lens):
        return "none"
    low, middle, high = np.percentile(lens, [0, 50, 100]).astype(int).tolist()
    return f"{low:,} to {high:,} {what}, median {middle:,}"
