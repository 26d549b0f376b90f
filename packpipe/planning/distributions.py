"""Distributions from which resolutions and drop rates are drawn.

Frozen values with one method, ``quantile``, that turns uniform numbers in [0, 1), float64[n], into
values. With `philox.uniform` an example's draw is a function of (seed, epoch, index) alone:

    distribution.quantile(uniform(key, index=index, stream=stream))

`Constant`, `Uniform` and `Choice` add, multiply and compare only, which IEEE 754 fixes to the last
bit, so they give the same values on every machine. `TruncatedNormal` and `Beta` ask SciPy and the
C library for logarithms and the like, whose last bits depend on the processor and the versions.
Values then differ by about 1e-15 of their size. What is decided from them is a whole number, which
differs only if a value lies that close to where rounding turns: one image in 10**12, to judge by
the size of the difference. The plan's fingerprint tells.

Source: NaViT 2.2, A.1, A.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import special

from packpipe import checks

_CELLS = 2**14  # of the table of Beta quantiles: 128 KiB


@dataclass(frozen=True)
class Constant:
    """Gives the same value at every draw."""

    value: float

    def __post_init__(self) -> None:
        checks.real_attributes(self, "value")

    @property
    def support(self) -> tuple[float, float]:
        """(least, largest) value."""
        return self.value, self.value

    def quantile(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return float64[n]: the value, once for each number in u."""
        return np.full(len(u), self.value, np.float64)


@dataclass(frozen=True)
class Uniform:
    """The uniform distribution from low to high.

    >>> Uniform(64, 256).quantile(np.array([0.0, 0.5])).tolist()
    [64.0, 160.0]
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self)

    @property
    def support(self) -> tuple[float, float]:
        """(least, largest) value."""
        return self.low, self.high

    def quantile(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return float64[n], the quantiles at u."""
        # Rounding may take the sum a little above high.
        return np.minimum(self.low + u * (self.high - self.low), self.high)


@dataclass(frozen=True)
class TruncatedNormal:
    """A normal distribution truncated to low..high.

    Attributes:
        mean, deviation: those of the normal distribution before it is truncated.
        low, high: the range that is left.
    """

    mean: float
    deviation: float
    low: float
    high: float

    def __post_init__(self) -> None:
        checks.real_attributes(self, "mean", "deviation")
        if self.deviation <= 0:
            remedy = "pass Constant(mean) for none"
            raise ValueError(checks.sentence("deviation", self.deviation, "above 0", remedy))
        _check_range(self)
        # Far from the mean both shares round to the same number: nothing could be drawn.
        start, stop, _ = self._shares()
        if not start < stop:
            expected = "a range that holds a share of the distribution"
            remedy = "move the mean towards it, or raise the deviation"
            raise ValueError(checks.sentence("(low, high)", self.support, expected, remedy))

    @property
    def support(self) -> tuple[float, float]:
        """(least, largest) value."""
        return self.low, self.high

    def quantile(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return float64[n], the quantiles at u."""
        start, stop, sign = self._shares()
        share = start + (u if sign > 0 else 1 - u) * (stop - start)
        return np.clip(self.mean + sign * self.deviation * special.ndtri(share), *self.support)

    def _shares(self) -> tuple[float, float, int]:
        """Return (share below low, share below high, sign).

        If low is above the mean, the shares are those of the mirrored distribution and sign is -1:
        shares close to 0 are precise, shares close to 1 are not.
        """
        low, high = (
            (self.low - self.mean) / self.deviation,
            (self.high - self.mean) / self.deviation,
        )
        sign = 1
        if low > 0:
            low, high, sign = -high, -low, -1
        return float(special.ndtr(low)), float(special.ndtr(high)), sign


@dataclass(frozen=True)
class Beta:
    """The drop rates of NaViT A.4: maximum · Beta(α, β) with the given mean.

    With u = mean ÷ maximum the variance is 0.3·u·(1 - u), so that α + β = 7/3 and α = 7/3·u.

    Attributes:
        mean: of the values, above 0 and below maximum.
        maximum: largest value.
    """

    mean: float
    maximum: float

    def __post_init__(self) -> None:
        checks.real_attributes(self, "mean", "maximum")
        if not 0 < self.mean < self.maximum:
            expected = f"above 0 and below {self.maximum!r} (maximum)"
            raise ValueError(checks.sentence("mean", self.mean, expected, "pass a mean within"))

    @property
    def support(self) -> tuple[float, float]:
        """(least, largest) value."""
        return 0.0, self.maximum

    def quantile(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return float64[n], the quantiles at u; see `beta_quantile`."""
        alpha = 7 / 3 * self.mean / self.maximum
        return self.maximum * beta_quantile(alpha, 7 / 3 - alpha, u)


def beta_quantile(alpha: float, beta: float, u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return float64[n], the quantiles of Beta(alpha, beta) at u, interpolated in a table.

    Linear between the exact quantiles at 0, 2**-14, ..., 1, so the error in u is below 2**-14.
    Takes 0.02 µs per value; the exact inverse takes 2.4 µs.
    """
    table = _beta_quantiles(alpha, beta)
    place = u * _CELLS
    cell = np.minimum(place.astype(np.int64), _CELLS - 1)
    left = table[cell]
    values: NDArray[np.float64] = left + (place - cell) * (table[cell + 1] - left)
    return values


@lru_cache(maxsize=16)
def _beta_quantiles(alpha: float, beta: float) -> NDArray[np.float64]:
    shares = np.arange(_CELLS + 1) / _CELLS
    table: NDArray[np.float64] = special.betaincinv(alpha, beta, shares)
    return table


@dataclass(frozen=True)
class Choice:
    """Gives one of several values.

    Attributes:
        values: the values.
        weights: relative frequency of each value, in any unit; None for equal frequencies.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _numbers("values", self.values))
        if self.weights is None:
            return
        object.__setattr__(self, "weights", _numbers("weights", self.weights))
        if len(self.weights) != len(self.values):
            expected = f"{len(self.values)} (values)"
            name = "len(weights)"
            raise ValueError(checks.sentence(name, len(self.weights), expected, "one a value"))
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            expected = "0 or more each, above 0 together"
            raise ValueError(checks.sentence("weights", self.weights, expected, "pass shares"))

    @property
    def support(self) -> tuple[float, float]:
        """(least, largest) value."""
        return min(self.values), max(self.values)

    def quantile(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return float64[n]: the values in the order given, each for its share of [0, 1)."""
        weights = np.array(self.weights or (1.0,) * len(self.values), np.float64)
        ends = np.cumsum(weights)
        # "right": at the end of a range the next begins, so a value of weight 0 is skipped.
        drawn: NDArray[np.int64] = np.searchsorted(ends, u * ends[-1], side="right")
        # u just below 1 may round up to the sum of the weights: that is the last one above 0.
        last = np.flatnonzero(weights)[-1]
        values: NDArray[np.float64] = np.array(self.values, np.float64)[np.minimum(drawn, last)]
        return values


Distribution: TypeAlias = Constant | Uniform | TruncatedNormal | Beta | Choice
DISTRIBUTIONS = (Constant, Uniform, TruncatedNormal, Beta, Choice)


def between(low: float, high: float) -> Uniform | Constant:
    """Return the uniform distribution from low to high; of two equal numbers, the one number."""
    return Constant(high) if low == high else Uniform(low, high)  # which refuses an empty range


def distribution(name: str, value: Any) -> Distribution:
    """Return a distribution as it is, a number as a Constant, and a list or tuple as a Choice.

    Args:
        name: the value's name in an error.
        value: a distribution, a number, or a list or tuple of numbers.
    """
    if isinstance(value, DISTRIBUTIONS):
        return value
    if isinstance(value, list | tuple):
        return Choice(tuple(value))
    remedy = "or pass a distribution, such as Uniform(64, 256)"
    return Constant(checks.real_number(name, value, remedy))


def _check_range(values: Uniform | TruncatedNormal) -> None:
    checks.real_attributes(values, "low", "high")
    if values.low >= values.high:
        expected = f"above {values.low!r} (low)"
        raise ValueError(checks.sentence("high", values.high, expected, "change them"))
    if not math.isfinite(values.high - values.low):
        expected = "a finite number above low"
        raise ValueError(
            checks.sentence("high - low", math.inf, expected, "choose a smaller range")
        )


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(checks.sentence(name, values, "a tuple of numbers", "pass one or more"))
    return tuple(
        checks.real_number(f"{name}[{place}]", value, "pass a number")
        for place, value in enumerate(values)
    )
