"""How images become rows: packed, or one of the ways it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from packpipe import checks
from packpipe.loading.epochs import EpochPacks
from packpipe.planning.distributions import Constant, Uniform
from packpipe.planning.resolution import Side, Square

LAYOUTS = ("packed", "padded", "bucketed", "square")


@dataclass(frozen=True)
class Layout:
    """How images become rows: NaViT's way, or one of those it is compared with.

    Attributes:
        name: ``"packed"``; ``"padded"``, one image a row as long as the largest; ``"bucketed"``,
            the same with rows of like length in a batch, cut to it; ``"square"``, a plain ViT's.
        seq_len: tokens a row, of packed.
        sides: images have as many pixels as squares of a side drawn between these; square takes
            the second.
        drop_rate: share of tokens dropped, of packed.
        max_bad_fraction: a larger share of images that cannot be read stops the training.
    """

    name: str
    seq_len: int
    sides: tuple[int, int]
    drop_rate: float
    max_bad_fraction: float = 0.01

    def packs(self, dataset: Dataset, patch_size: int, num_workers: int) -> EpochPacks:
        """Return the packs of a dataset."""
        checks.choice("layout", self.name, LAYOUTS, "choose a layout")
        low, high = self.sides
        drawn = Side(Uniform(low, high) if low < high else Constant(high))
        options: dict[str, Any] = {"resolution": drawn, "drop_rate": self.drop_rate}
        seq_len = self.seq_len
        if self.name != "packed":
            options = {"resolution": drawn, "max_segments": 1}
            seq_len = max(1, high // patch_size) ** 2
        if self.name == "square":
            options["resolution"] = Square(Constant(high))
        return EpochPacks(
            dataset,
            seq_len,
            patch_size=patch_size,
            num_workers=max(1, num_workers),
            max_bad_fraction=self.max_bad_fraction,
            **options,
        )
