"""Checks of arguments: one sentence for every wrong one.

Each check returns the value in its canonical form, or raises an error with the message
``name is VALUE, expected REQUIREMENT; remedy``.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_WORD = 2**64 - 1
_LOCAL = re.compile(r"(file|local):/")
# One slash is enough, since `Path` makes one of two; two letters, for Windows has drives.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def sentence(name: str, value: object, expected: str, remedy: str) -> str:
    """Return the message of an error: ``name is VALUE, expected REQUIREMENT; remedy``."""
    return f"{name} is {value!r}, expected {expected}; {remedy}"


def plain(text: object) -> str:
    """Return a text of one line without what a terminal would obey: escapes for such characters.

    Names of files may hold any; half of a broken character cannot even be printed.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text)
    )


def counted(number: int, name: str) -> str:
    """Return a number with what it counts: ``1 file``, ``2,000 files``."""
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def whole_number(name: str, value: Any, low: int, high: int, remedy: str) -> int:
    """Return value as an int in low..high; bools, floats and strings are refused."""
    expected = f"an integer in {low}..{high}"
    # operator.index accepts bools, since bool is a subclass of int; hence they are refused first.
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
    """Return value as an int or a float; bools, strings, NaN and infinities are refused."""
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
    """Replace attributes of a frozen value by ints or floats; refuse those that are no numbers."""
    # object.__setattr__, since a frozen dataclass refuses the ordinary way.
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


def known_options(options: Iterable[str], known: Collection[str], source: object) -> None:
    """Refuse names of options that were written to a file by a later version.

    Args:
        options: their names.
        known: the names that are known here.
        source: the file, or what else they were read of.
    """
    for name in options:
        choice(f"an option in {source}", name, known, "use the packpipe that wrote it")


def integer_array(name: str, values: ArrayLike, ndim: int, remedy: str) -> NDArray[Any]:
    """Return values as an integer array of ndim dimensions, not copied if it is one.

    An empty list counts as integers, since NumPy would make it float64.
    """
    if np.ma.is_masked(values):  # np.asarray would drop the mask and keep what is behind it
        raise ValueError(sentence(name, "masked", "values without a mask", "fill or leave out"))
    try:
        array = np.asarray(values)
    except ValueError:
        expected = f"an integer array of {ndim} dimension{'s' * (ndim > 1)}"
        raise ValueError(sentence(name, "ragged", expected, remedy)) from None
    if array.size == 0 and array.dtype.kind not in "iu":
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":  # not np.integer, which includes timedelta64
        raise TypeError(sentence(f"{name}.dtype", str(array.dtype), "an integer dtype", remedy))
    if array.ndim != ndim:
        raise ValueError(sentence(f"{name}.ndim", array.ndim, str(ndim), remedy))
    return array


def has_scheme(path: str) -> bool:
    """Return whether a path begins with a scheme, such as ``s3://``."""
    return _SCHEME.match(path) is not None


def url_or_path(name: str, value: str | os.PathLike[str]) -> str:
    """Return a URL as it is, and one of a local file as its path; refuse one with one slash."""
    text = os.fspath(value)
    if _LOCAL.match(text):
        return "/" + text.partition(":")[2].lstrip("/")
    if has_scheme(text) and "://" not in text:
        remedy = "pass a text, for a Path makes one slash of two"
        raise ValueError(sentence(name, text, "two slashes after its scheme", remedy))
    return text


def local_path(name: str, value: str | os.PathLike[str]) -> Path:
    """Return where to write, as a path; one with a scheme is refused, not made a folder "s3:"."""
    if has_scheme(os.fspath(value)):
        remedy = "write to a local folder, then copy it there"
        raise ValueError(sentence(name, os.fspath(value), "a path without a scheme", remedy))
    return Path(value)


def untransformed(name: str, dataset: Any) -> None:
    """Raise ValueError if a `datasets.Dataset` has a transform, for rows are read as stored."""
    transform = dataset.format["format_kwargs"].get("transform")
    if transform is not None:
        remedy = (
            "take it off with dataset.with_format(None), and apply it with map, or pass a function "
            "of pixels as transform= to EpochPacks or PackedStream"
        )
        where, expected = f"{name}.format", "no transform, which would be ignored"
        what = getattr(transform, "__qualname__", type(transform).__name__)
        raise ValueError(sentence(where, f"the transform {what}", expected, remedy))
