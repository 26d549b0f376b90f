"""`Layout`: images as packed rows or, for comparison, as padded, bucketed or square ones.

`EncoderLayout`: images as rows for a model that was trained before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any

from datasets import Dataset

from packpipe import checks
from packpipe.cli.options import between_given
from packpipe.loading.epochs import EpochPacks
from packpipe.planning.crops import Crop
from packpipe.planning.distributions import Constant
from packpipe.planning.evaluation import evaluation_of
from packpipe.planning.image_config import PackConfig
from packpipe.planning.resolution import Side, Square

LAYOUTS = ("packed", "padded", "bucketed", "square")


@dataclass(frozen=True)
class Layout:
    """How images become rows: packed, or in one of the ways packing is compared with.

    Attributes:
        name: ``"packed"``: NaViT's. ``"padded"``: one image a row, all rows as long as the largest.
            ``"bucketed"``: one image a row, rows of a batch of like length and cut to it.
            ``"square"``: a plain ViT's, all images squares of one size.
        seq_len: tokens a row of ``"packed"``; the other layouts take it from sides.
        sides: (low, high); an image gets as many pixels as a square of a side drawn between them.
            ``"square"`` takes high.
        drop_rate: share of tokens dropped, in ``"packed"`` alone.
        max_bad_fraction: a larger share of images that cannot be read stops the training.
        pixels: options of `PackConfig` that decide how pixels are made, by name.
        crop: the random box of each image that is shown, another one every epoch; of ``"square"``
            it has the shapes of squares, so that images stay undistorted.
        prefix_tokens: of the model; rows of the other layouts are longer by them.
    """

    name: str
    seq_len: int
    sides: tuple[int, int]
    drop_rate: float
    max_bad_fraction: float = 0.01
    pixels: dict[str, Any] = field(default_factory=dict)
    crop: Crop | None = None
    prefix_tokens: int = 0

    def packs(
        self, dataset: Dataset, patch_size: int, num_workers: int, **columns: Any
    ) -> EpochPacks:
        """Return the packs of a dataset in this layout, planned anew every epoch.

        Args:
            dataset: images, with what they are compared with.
            patch_size: of the model.
            num_workers: threads that read the headers.
            **columns: what it is, as options of `EpochPacks`.
        """
        checks.choice("layout", self.name, LAYOUTS, "choose a layout")
        drawn = Side(between_given("--sides", self.sides))
        options: dict[str, Any] = {"resolution": drawn, "drop_rate": self.drop_rate}
        seq_len = self.seq_len
        if self.name != "packed":
            options = {"resolution": drawn, "max_segments": 1}
            # The patches of the largest square; an image whose grid has more of them is shrunk.
            seq_len = self._most_tokens(patch_size) + self.prefix_tokens
        if self.name == "square":
            options["resolution"] = Square(Constant(self.sides[1]))
        if self.crop is not None:
            options["crop"] = _shaped(self.crop, square=self.name == "square")
        return EpochPacks(
            dataset,
            seq_len,
            patch_size=patch_size,
            num_workers=max(1, num_workers),
            max_bad_fraction=self.max_bad_fraction,
            prefix_tokens=self.prefix_tokens,
            **options | self.pixels | columns,
        )

    def evaluation(self, patch_size: int, max_tokens: int | None = None) -> PackConfig:
        """Return how images become rows when the model is evaluated: nothing is drawn or dropped.

        Args:
            patch_size: of the model.
            max_tokens: an image gets the largest size within so many tokens; None takes the tokens
                of the largest square that is trained on.
        """
        packed, most = self.name == "packed", self._most_tokens(patch_size)
        slots = self.prefix_tokens
        fit = min(most, self.seq_len - slots) if packed else most
        tokens = fit if max_tokens is None else max_tokens
        options: dict[str, Any] = {"resolution": "budget", "max_tokens": tokens}
        if self.name == "square":
            options = {"resolution": Square(Constant(isqrt(tokens) * patch_size))}
        if not packed:
            options["max_segments"] = 1
        seq_len = self.seq_len if packed else tokens + slots
        options |= {"patch_size": patch_size, "prefix_tokens": slots}
        return PackConfig(seq_len=seq_len, **options | self.pixels)

    def _most_tokens(self, patch_size: int) -> int:
        """Return the patches of the largest square."""
        return max(1, self.sides[1] // patch_size) ** 2


@dataclass(frozen=True)
class EncoderLayout:
    """How images become rows for a pretrained model: as in its own training.

    Attributes:
        packing: its options.
        seq_len: tokens a row; None is as many as it had.
        sides: (low, high) in which sizes are drawn in training, of squares if its images were
            squares; None trains on the sizes at which the model is evaluated.
        drop_rate: share of tokens dropped in training.
        max_bad_fraction: a larger share of images that cannot be read stops the training.
        crop: the random box of each image that is trained on, in place of the whole image.
    """

    packing: PackConfig
    seq_len: int | None = None
    sides: tuple[int, int] | None = None
    drop_rate: float = 0.0
    max_bad_fraction: float = 0.01
    crop: Crop | None = None

    name = "packed"

    def packs(
        self, dataset: Dataset, patch_size: int, num_workers: int, **columns: Any
    ) -> EpochPacks:
        """Return the packs of a dataset, planned anew every epoch; arguments as of `Layout`."""
        packing = self.evaluation(patch_size)
        square = isinstance(packing.resolution, Square)
        changes: dict[str, Any] = {"drop_rate": self.drop_rate}
        if self.sides is not None:
            drawn = between_given("--sides", self.sides)
            changes["resolution"] = Square(drawn) if square else Side(drawn)
            changes["max_tokens"] = None
        if self.crop is not None:
            changes["crop"] = _shaped(self.crop, square=square)
        found = replace(packing, **changes)
        allowed = self.max_bad_fraction
        return packs_of(dataset, found, num_workers, max_bad_fraction=allowed, **columns)

    def evaluation(self, patch_size: int, max_tokens: int | None = None) -> PackConfig:
        """Return how images become rows when the model is evaluated: as the encoder expects."""
        del patch_size, max_tokens  # the encoder's
        seq_len = self.packing.seq_len if self.seq_len is None else self.seq_len
        return evaluation_of(replace(self.packing, seq_len=seq_len))


def _shaped(crop: Crop, *, square: bool) -> Crop:
    """Return a crop that leaves images undistorted."""
    return replace(crop, shape="square") if square else crop


def packs_of(dataset: Dataset, config: PackConfig, num_workers: int, **options: Any) -> EpochPacks:
    """Return the packs of a dataset by a whole configuration.

    Args:
        dataset: images, with labels or without.
        config: how they become rows.
        num_workers: threads that read the headers; 0 is one.
        **options: further ones of `EpochPacks`.
    """
    every = {**config.to_options(), **options}
    return EpochPacks(dataset, num_workers=max(1, num_workers), **every)
