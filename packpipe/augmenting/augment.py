"""`Augment`: what is drawn for every image of a batch, anew in every epoch.

An image's draws are a function of (seed, epoch, example_index, view) alone: neither the rows it
lies in, nor workers, ranks or a resumed run change them. With whom an image is mixed is up to its
row, and how to the draws of the pair (`packpipe.augmenting.mixing`). Crops are no part of it, since
they change how many tokens an image has; they belong to the plan. Neither is blur, since a token
does not know its neighbours, of which some are dropped.

Flips, turns and erased boxes are whole numbers and square roots, colours are products and sums:
IEEE 754 fixes all of them, so they are the same on every machine. Shares of mixtures are quantiles
of Beta distributions, whose last bits are SciPy's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox
from packpipe.philox import Key, checked_key

_CHANCES = ("flip", "vertical_flip", "grey", "solarize", "erase", "mix_prob")
_JITTERS = ("brightness", "contrast", "saturation")
_SWITCHES = ("turns", "three_augment")
_ALPHAS = ("mixup", "cutmix")
_MIXING = (*_ALPHAS, "mix_prob")
SOLARIZED = 128.0  # levels from this one on are inverted
NEVER = 256.0  # such a level where none is
_MOST = 1000  # of the α of Beta(α, α), which then hardly varies
# Of an erased box: share of the image's area, and height over width for a square image.
_AREA, _ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)


class Draws(NamedTuple):
    """What is drawn for each of n images.

    Attributes:
        flip, vertical_flip: bool[n], whether it is mirrored left to right, top to bottom.
        turns: int64[n], quarter turns to the left, 0..3, after the flips.
        grey: bool[n], whether its colours are taken away.
        solarize: bool[n], whether its light levels are inverted, before all other colours.
        brightness, contrast, saturation: float64[n], factors; 1 changes nothing.
        erase: bool[n], whether a box of it becomes mid-grey.
        box: float64[n, 4], of that box: share of the area, height ÷ width (of a square image), and
            where it lies, down and across, from 0 to 1.
    """

    flip: NDArray[np.bool_]
    vertical_flip: NDArray[np.bool_]
    turns: NDArray[np.int64]
    grey: NDArray[np.bool_]
    solarize: NDArray[np.bool_]
    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    erase: NDArray[np.bool_]
    box: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How images are augmented: ``PackedLoader(packs, 8, augment=Augment(flip=0.5))``.

    Chances are in [0, 1]; a jitter of j draws a factor uniformly from 1 - j to 1 + j. Colours are
    changed in this order: solarize, grey, saturation, brightness, contrast; and clamped once, after
    all of them.

    Attributes:
        flip: chance that an image is mirrored left to right.
        vertical_flip: chance that it is mirrored top to bottom.
        turns: whether it is turned by 0, 1, 2 or 3 quarters, each as likely; its grid turns, too.
            For pictures without an upright, such as those of microscopes and satellites.
        brightness: jitter of all levels.
        contrast: jitter of the distance from mid-grey (127.5). Not from the image's own mean, which
            would depend on the tokens it keeps.
        saturation: jitter of the distance from the image in grey.
        grey: chance that an image loses its colours.
        solarize: chance that its levels from 128 on are inverted.
        three_augment: one of three for every image, each as likely: grey, solarize, or nothing.
            Nothing stands where the recipe blurs, since tokens cannot be blurred.
        erase: chance that a box of whole tokens becomes mid-grey (128), before the colours change.
            It has about 2 to 40 % of the area, in whole tokens, one at least, and 0.3 to 3.3 times
            the image's shape, cut to fit. An image that it would cover stays as it is.
        mixup: α: neighbours in a row are blended with a weight from Beta(α, α), labels, too; 0 is
            none. See `packpipe.augmenting.mixing`.
        cutmix: α: they swap a box of tokens instead, of 1 - λ of the area, λ from Beta(α, α). If
            both are above 0, either is as likely. Boxes lie within the images; timm's may stick
            out, and are smaller then.
        mix_prob: chance that a pair of neighbours is mixed at all.

    Raises:
        TypeError, ValueError: an option is of a wrong type or out of range, or both three_augment
            and one of what it chooses from are asked for.

    Source: Zhong et al., arXiv 1708.04896, algorithm 1 (erasing); torchvision's ColorJitter, with
    another pivot for contrast; Zhang et al., arXiv 1710.09412 (mixup); Yun et al., arXiv 1905.04899
    (CutMix). Names of the last three are those of timm's training script.
    """

    flip: float = 0.5
    vertical_flip: float = 0.0
    turns: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    grey: float = 0.0
    solarize: float = 0.0
    three_augment: bool = False
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0

    def __post_init__(self) -> None:
        remedies = dict.fromkeys(_CHANCES, "pass a share of the images") | dict.fromkeys(
            _JITTERS, "0.3 is usual, 0 is none"
        )
        for name, remedy in remedies.items():
            number = checks.real_number(name, getattr(self, name), remedy)
            if not 0 <= number <= 1:
                raise ValueError(checks.sentence(name, number, "a number in [0, 1]", remedy))
            object.__setattr__(self, name, float(number))  # the dataclass is frozen
        for name in _ALPHAS:
            remedy = "timm uses mixup=0.8 and cutmix=1, 0 is none"
            number = checks.real_number(name, getattr(self, name), remedy)
            if not 0 <= number <= _MOST:
                raise ValueError(checks.sentence(name, number, f"a number in [0, {_MOST}]", remedy))
            object.__setattr__(self, name, float(number))
        if self.mix_prob != 1 and not (self.mixup or self.cutmix):
            expected, remedy = "1 without mixup and cutmix", "pass one of them, too"
            raise ValueError(checks.sentence("mix_prob", self.mix_prob, expected, remedy))
        for name in _SWITCHES:
            object.__setattr__(self, name, checks.boolean(name, getattr(self, name)))
        for name in ("grey", "solarize"):
            if self.three_augment and getattr(self, name):
                expected, remedy = "0 with three_augment", "it chooses grey and solarize itself"
                raise ValueError(checks.sentence(name, getattr(self, name), expected, remedy))

    @classmethod
    def preset(cls, name: str) -> Augment:
        """Return what a published recipe does besides its crop, which belongs to the plan.

        * ``"three"``: flips, ``three_augment``, and colour jitters of 0.3: DeiT III, whose third
          choice, a blur, becomes no change.
        * ``"inception"``: flips alone. big_vision's recipes call their crop "inception" and change
          no colours.

        Source: Touvron et al., arXiv 2204.07118, 3 (3-Augment), and ``augment.py`` of
        facebookresearch/deit; ``pp_train`` of google-research/big_vision's configurations
        (``inception_crop|flip_lr``).

        Raises:
            ValueError: there is no such preset.
        """
        three = cls(three_augment=True, brightness=0.3, contrast=0.3, saturation=0.3)
        presets = {"three": three, "inception": cls()}
        return presets[checks.choice("preset", name, presets, "choose a recipe")]

    @property
    def moves(self) -> bool:
        """Whether tokens may be moved: flipped or turned."""
        return bool(self.flip or self.vertical_flip or self.turns)

    @property
    def solarizes(self) -> bool:
        """Whether levels may be inverted."""
        return bool(self.solarize or self.three_augment)

    @property
    def colours(self) -> bool:
        """Whether colours may be changed."""
        jitters = self.brightness or self.contrast or self.saturation
        return bool(jitters or self.grey or self.solarizes)

    @property
    def mixes(self) -> bool:
        """Whether neighbours in a row may be mixed."""
        return bool((self.mixup or self.cutmix) and self.mix_prob)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        # Those of mixing came later: states from before it do not name them.
        later = {field.name: field.default for field in fields(self) if field.name in _MIXING}
        options = asdict(self)
        return {name: value for name, value in options.items() if later.get(name) != value}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Augment:
        """Return the augmentation that `to_dict` described.

        Raises:
            TypeError: an option has a name that is unknown here.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                expected = "one of " + ", ".join(known)
                remedy = "use the packpipe that wrote it"
                raise TypeError(checks.sentence("option", name, expected, remedy))
        return cls(**options)

    def draws(self, seed: int, epoch: int, example_index: int, view: int = 0) -> dict[str, Any]:
        """Return what is drawn for one example in an epoch, by name.

        ``erase`` is None, or the box's ``area``, ``aspect``, ``top`` and ``left``; see `Draws`.

        >>> Augment(vertical_flip=0.5, grey=0.2).draws(0, 0, 17)["vertical_flip"]
        False

        Raises:
            TypeError, ValueError: seed, epoch, example_index or view is no whole number of 0 or
                more.
        """
        key = checked_key(seed, epoch)
        remedy = "pass a row of the source"
        index = checks.whole_number("example_index", example_index, 0, 2**63 - 1, remedy)
        # One alone is drawn as among others, since a draw is a function of its own index.
        found = self.drawn(key, np.array([index]), view)
        plain = {name: values[0].tolist() for name, values in found._asdict().items()}
        box = dict(zip(("area", "aspect", "top", "left"), plain.pop("box"), strict=True))
        return {**plain, "erase": box if plain["erase"] else None}

    def drawn(self, key: Key, index: NDArray[np.int64], view: ArrayLike = 0) -> Draws:
        """Return the draws of some examples; each is a function of the key, its index and view.

        Args:
            key: (seed, epoch).
            index: int64[n], examples, 0 or more.
            view: int[n], which of an example's views; one number for all.
        """

        def uniform(stream: int) -> NDArray[np.float64]:
            return philox.uniform(key, index=index, stream=stream, view=view)

        # Every kind of change has a stream of its own, so that one that is left out alters no
        # other.
        def happens(chance: float, stream: int) -> NDArray[np.bool_]:
            return uniform(stream) < chance if chance else np.zeros(len(index), np.bool_)

        def factor(jitter: float, stream: int) -> NDArray[np.float64]:
            return 1 + jitter * (2 * uniform(stream) - 1) if jitter else np.ones(len(index))

        def whole(choices: int, stream: int) -> NDArray[np.int64]:
            return (uniform(stream) * choices).astype(np.int64)

        grey, solarize = happens(self.grey, philox.GREY), happens(self.solarize, philox.SOLARIZE)
        if self.three_augment:
            one_of_three = whole(3, philox.ONE_OF_THREE)
            grey, solarize = one_of_three == 0, one_of_three == 1
        erase = happens(self.erase, philox.ERASE)
        box = np.zeros((len(index), 4))
        if self.erase:
            # For all images, erased or not: what is drawn for one does not depend on the chance.
            ranges = (_AREA, _ASPECT, (0.0, 1.0), (0.0, 1.0))
            for column, (low, high) in enumerate(ranges):
                box[:, column] = low + (high - low) * uniform(philox.ERASED_BOX[column])
        return Draws(
            flip=happens(self.flip, philox.FLIP),
            vertical_flip=happens(self.vertical_flip, philox.VERTICAL_FLIP),
            turns=whole(4, philox.TURNS) if self.turns else np.zeros(len(index), np.int64),
            grey=grey,
            solarize=solarize,
            brightness=factor(self.brightness, philox.BRIGHTNESS),
            contrast=factor(self.contrast, philox.CONTRAST),
            saturation=factor(self.saturation, philox.SATURATION),
            erase=erase,
            box=box,
        )
