"""Token dropping: how many of an image's tokens are kept, and which.

A drop rate is a number, a distribution, or one of the two laws below. The tokens that stay are
drawn uniformly without replacement, a function of (seed, epoch, index, view) alone. The last bits
of a rate of `ByResolution` or `OverTraining` may depend on the machine, as those of a `Beta` may
(`packpipe.planning.distributions`).

Source: NaViT 2.2, 3.3, A.4, A.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from packpipe import checks, philox
from packpipe.philox import Key
from packpipe.planning.distributions import Constant, Distribution, distribution

_CUT = 2.0  # deviations at which the normal of ByResolution is truncated


@dataclass(frozen=True)
class ByResolution:
    """A drop rate that follows the image's token count (NaViT A.5).

    Normal around a mean that is linear in the token count between two points and constant outside
    of them; truncated at two deviations.

    Attributes:
        min_tokens, min_rate: an image of min_tokens tokens before dropping has mean rate min_rate.
        max_tokens, max_rate: an image of max_tokens tokens before dropping has mean rate max_rate.
        deviation: that of the normal distribution; 0 for the mean itself.
    """

    min_tokens: float
    min_rate: float
    max_tokens: float
    max_rate: float
    deviation: float = 0.02

    def __post_init__(self) -> None:
        checks.real_attributes(
            self, "min_tokens", "min_rate", "max_tokens", "max_rate", "deviation"
        )
        if not 0 <= self.min_tokens < self.max_tokens:
            expected = f"0 or more, below {self.max_tokens!r} (max_tokens)"
            raise ValueError(checks.sentence("min_tokens", self.min_tokens, expected, "swap them"))
        if self.deviation < 0:
            remedy = "0.02 is the paper's"
            raise ValueError(checks.sentence("deviation", self.deviation, "0 or more", remedy))

    @property
    def support(self) -> tuple[float, float]:
        """(least, largest) rate."""
        spread = _CUT * self.deviation
        rates = self.min_rate, self.max_rate
        return min(rates) - spread, max(rates) + spread


@dataclass(frozen=True)
class OverTraining:
    """A drop rate that changes with the images seen (NaViT A.4, A.5).

    low + (high - low)·σ((progress - midpoint) ÷ width), where progress is images seen ÷ images
    of the whole training; a negative width falls from high to low. If low and high are laws, their
    quantiles at the same uniform number are mixed.

    The paper's schedules: rising ``OverTraining(0.2, 0.8, 0.5, 0.1)``, fast falling
    ``(0.2, 0.8, 0.5, -0.1)`` and slow falling ``(0.2, 0.8, 2 / 3, -0.2)``, its best.

    Attributes:
        low, high: a number, a distribution or a ByResolution.
        midpoint: progress at which low and high have equal weights.
        width: progress over which the ratio of their weights changes by a factor of e.
    """

    low: float | Distribution | ByResolution
    high: float | Distribution | ByResolution
    midpoint: float
    width: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, canonical(name, getattr(self, name)))
        checks.real_attributes(self, "midpoint", "width")
        if self.width == 0:
            raise ValueError(checks.sentence("width", self.width, "not 0", "pass 0.001 for a step"))

    @property
    def support(self) -> tuple[float, float]:
        """(least, largest) rate."""
        (a, b), (c, d) = law("low", self.low).support, law("high", self.high).support
        return min(a, c), max(b, d)

    def share(self, progress: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return float64[n]: the weight of high in the mixture, in [0, 1]."""
        share: NDArray[np.float64] = special.expit((progress - self.midpoint) / self.width)
        return share


DropLaw: TypeAlias = Distribution | ByResolution | OverTraining


def law(name: str, value: Any) -> DropLaw:
    """Return a drop rate as a law: a number becomes a Constant, a list a Choice.

    Raises:
        TypeError: value is none of these.
        ValueError: value can give a rate outside [0, 1).
    """
    known = isinstance(value, ByResolution | OverTraining)
    found: DropLaw = value if known else distribution(name, value)
    # The ends of the support stand for every rate that can be drawn, so this is checked only once.
    least, largest = found.support
    if not 0 <= least <= largest < 1:
        remedy = "it is the share that is dropped, and one token has to stay"
        raise ValueError(checks.sentence(name, value, "rates in [0, 1)", remedy))
    return found


def canonical(name: str, value: Any) -> float | DropLaw:
    """Return a drop rate in the form in which it is stored: a float or a law.

    Raises:
        TypeError: value is no number, distribution, law or list.
        ValueError: value can give a rate outside [0, 1).
    """
    found = law(name, value)
    return found.value if isinstance(found, Constant) else found


def drop_rates(
    drop: DropLaw,
    u: NDArray[np.float64],
    num_tokens: NDArray[np.integer],
    progress: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """Return float64[images], the share of each image's tokens that is dropped.

    Args:
        drop: the law.
        u: float64[images], uniform in [0, 1).
        num_tokens: int[images], tokens before dropping.
        progress: float64[images], share of the training done; for OverTraining alone.
    """
    if isinstance(drop, OverTraining):
        assert progress is not None  # noqa: S101 (`PackConfig` sees to it)
        low = drop_rates(law("low", drop.low), u, num_tokens, progress)
        high = drop_rates(law("high", drop.high), u, num_tokens, progress)
        return low + (high - low) * drop.share(progress)
    if isinstance(drop, ByResolution):
        # A truncated normal by its quantile: u is mapped to the shares between -2 and +2
        # deviations. np.interp is constant outside of the two points.
        ends = [drop.min_tokens, drop.max_tokens], [drop.min_rate, drop.max_rate]
        below = special.ndtr(-_CUT)
        spread = special.ndtri(below + u * (1 - 2 * below))
        rates: NDArray[np.float64] = np.interp(num_tokens, *ends) + drop.deviation * spread
        # Rounding must not leave the support, which may begin at 0.
        return np.clip(rates, *drop.support)
    return drop.quantile(u)


def num_kept(num_tokens: NDArray[np.integer], drop_rate: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return int64[images]: tokens · (1 - rate), rounded to nearest (half to even), at least 1."""
    return np.maximum(1, np.rint(num_tokens * (1 - drop_rate)).astype(np.int64))


def kept_tokens(
    key: Key,
    *,
    index: NDArray[np.integer],
    num_tokens: NDArray[np.integer],
    num_keep: NDArray[np.integer],
    view: ArrayLike = 0,
) -> NDArray[np.int32]:
    """Return int32[sum(num_keep)]: which tokens stay, in raster order, image after image.

    Args:
        key: (seed, epoch) of all draws.
        index: int[images], each image's row in its source.
        num_tokens: int[images], tokens before dropping.
        num_keep: int[images], tokens that stay.
        view: int[images], which of an image's draws; one number for all.
    """
    return philox.subsets(
        key,
        index=index,
        stream=philox.KEPT_TOKENS,
        num_items=num_tokens,
        num_chosen=num_keep,
        view=view,
    )
