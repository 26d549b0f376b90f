"""`Compared`: the columns of masks and of weights that a user names, for a loss or a measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image

from packpipe import checks
from packpipe.cli.labels import names_in

_NO_CLASS = 255  # of a mask of 8 bits


@dataclass(frozen=True)
class Compared:
    """What images are compared with besides labels.

    Attributes:
        mask: name of the column of class maps, which stand in the place of labels; None for none.
        stride: pixels a side of a target; None is a patch.
        num_classes: of the masks.
        names: of their classes, 0 first; None if nobody told.
        weight: name of the column of what each image counts in the loss; None is 1 for all.
    """

    mask: str | None = None
    stride: int | None = None
    num_classes: int | None = None
    names: tuple[str, ...] | None = None
    weight: str | None = None

    @property
    def classes(self) -> ClassLabel | None:
        """The classes of masks, by number; None if they have no names."""
        return None if self.names is None else ClassLabel(names=list(self.names))

    @property
    def shape(self) -> dict[str, Any]:
        """What a model needs for it, as options of `NaViTConfig`."""
        return {} if self.mask is None else {"pooling": "none", "target_stride": self.stride}

    @property
    def measured(self) -> dict[str, Any]:
        """What packs need when a model is measured, as options of `EpochPacks`."""
        if self.mask is None:
            return {}
        return {"label_column": None, "mask_column": self.mask, "target_stride": self.stride}

    @property
    def trained(self) -> dict[str, Any]:
        """What packs need when a model is trained, as options of `EpochPacks`."""
        weights = {} if self.weight is None else {"weight_column": self.weight}
        return {**self.measured, **weights}

    def telling(self, dataset: Dataset) -> Dataset:
        """Return a dataset whose masks say that they have classes above 255, if they do.

        Raises:
            ValueError: there is no image.
        """
        if not len(dataset):
            expected, remedy = "one at least", "the source holds none"
            raise ValueError(checks.sentence("examples", 0, expected, remedy))
        is_wide = self.num_classes is not None and self.num_classes > _NO_CLASS
        if is_wide and self.mask is not None and isinstance(dataset.features[self.mask], Image):
            # A PNG says how many bits it has only when it is read; the plan asks before.
            return dataset.cast_column(self.mask, Image(mode="I;16"))
        return dataset


LABELS = Compared()


def compared_of(
    mask_column: str | None, target_stride: int | None, classes: str | None, weight: str | None
) -> Compared:
    """Return what the options of a command say.

    Args:
        mask_column: ``--mask-column``.
        target_stride: ``--target-stride``.
        classes: ``--classes``: how many classes masks have, or a file of their names.
        weight: ``--weight-column``.

    Raises:
        ValueError: masks have no classes, or there are options of masks without masks.
    """
    for name, value in (("--target-stride", target_stride), ("--classes", classes)):
        if mask_column is None and value is not None:
            expected, remedy = "left out without --mask-column", "pass the column of masks"
            raise ValueError(checks.sentence(name, value, expected, remedy))
    if mask_column is None:
        return Compared(weight=weight)
    if classes is None:
        expected = "how many classes masks have, with --mask-column"
        remedy = "such as --classes 3, or a file of their names, a line each"
        raise ValueError(checks.sentence("--classes", None, expected, remedy))
    names = (
        None
        if classes.isdecimal()
        else names_in(Path(classes), "a whole number, or a file of text in UTF-8")
    )
    # 65535 is no class in a mask of 16 bits.
    number = int(classes) if names is None else len(names)
    checks.whole_number("--classes", number, 2, 2**16 - 1, "count class 0, too")
    told = None if names is None else tuple(names)
    return Compared(mask_column, target_stride, number, told, weight)


def class_weights_of(text: str | None) -> str | list[float] | None:
    """Return what ``--class-weights`` says, as `TrainConfig` takes it.

    Raises:
        ValueError: it is neither a word nor numbers.
    """
    if text is None or text == "balanced":
        return text
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        expected = "balanced, or a number for each class"
        raise ValueError(
            checks.sentence("--class-weights", text, expected, "such as 1,2.5,0.5")
        ) from None
