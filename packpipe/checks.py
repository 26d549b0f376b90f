"""Front-door checks: one sentence for every wrong argument.

Each check returns the value in its one canonical form or raises with
``name is VALUE, expected REQUIREMENT; remedy``.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_WORD = 2**64 - 1


def sentence(name: str, value: object, expected: str, remedy: str) -> str:
    """Return the error sentence every packpipe error is built from."""
    return f"{name} is {value!r}, expected {expected}; {remedy}"


def whole_number(name: str, value: Any, low: int, high: int, remedy: str) -> int:
    """Return value as an int in low..high; bools, floats and strings are refused."""
    expected = f"an integer in {low}..{high}"
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(sentence(name, value, expected, remedy))
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(sentence(name, value, expected, remedy)) from None
    if not low <= number <= high:
        raise ValueError(sentence(name, number, expected, remedy))
    return number


def real_number(name: str, value: Any, remedy: str) -> float:
    """Return value as an int or a float; bools, strings and what is not finite are refused."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(sentence(name, value, "a number", remedy))
    if not math.isfinite(value):
        raise ValueError(sentence(name, value, "a finite number", remedy))
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def positive_number(name: str, value: Any, remedy: str) -> float:
    """Return value as an int or a float above 0."""
    number = real_number(name, value, remedy)
    if number <= 0:
        raise ValueError(sentence(name, value, "a number above 0", remedy))
    return number


def real_attributes(values: Any, *names: str) -> None:
    """Make attributes of a frozen value ints or floats, or refuse them."""
    for name in names:
        number = real_number(name, getattr(values, name), "pass a number")
        object.__setattr__(values, name, number)


def boolean(name: str, value: Any) -> bool:
    """Return value if it is a bool; "no" and 0 are refused."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(sentence(name, value, "True or False", "pass a bool"))
    return bool(value)


def choice(name: str, value: Any, options: Collection[str], remedy: str) -> str:
    """Return value if it is one of the options."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(sentence(name, value, "one of " + ", ".join(map(repr, options)), remedy))
    return value


def seed_and_epoch(seed: Any, epoch: Any) -> tuple[int, int]:
    """Return (seed, epoch) as the two 64-bit words of a Philox key."""
    remedy = "pass a non-negative integer below 2**64"
    return (
        whole_number("seed", seed, 0, MAX_WORD, remedy),
        whole_number("epoch", epoch, 0, MAX_WORD, remedy),
    )


def integer_array(name: str, values: ArrayLike, ndim: int, remedy: str) -> NDArray[Any]:
    """Return values as an integer array of ndim dimensions, not copied if it is one.

    An empty list counts as integers, since NumPy would make it float64.
    """
    if np.ma.is_masked(values):
        raise ValueError(sentence(name, "masked", "values without a mask", "fill or leave out"))
    try:
        array = np.asarray(values)
    except ValueError:
        expected = f"an integer array of {ndim} dimension{'s' * (ndim > 1)}"
        raise ValueError(sentence(name, "ragged", expected, remedy)) from None
    if array.size == 0 and array.dtype.kind not in "iu":
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":  # NumPy counts time spans as integers, too
        raise TypeError(sentence(f"{name}.dtype", str(array.dtype), "an integer dtype", remedy))
    if array.ndim != ndim:
        raise ValueError(sentence(f"{name}.ndim", array.ndim, str(ndim), remedy))
    return array
