"""Calls a function of the caller's own on the pixels of an image, between decoding and patches.

It gets the pixels in the planned size, and random numbers that are a function of (seed, epoch,
example, view), so that what it draws does not depend on workers, ranks or where a run was resumed.
It returns pixels of the same shape: what changes an image's size is decided by the plan.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from packpipe import checks, philox
from packpipe.philox import Key

# f(pixels, rng) -> pixels, both uint8[height, width, 3].
PixelFunction: TypeAlias = Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]


def checked_transform(function: Any) -> PixelFunction | None:
    """Return a function of pixels, or None if it is.

    Raises:
        TypeError: it is no function of (pixels, rng), or cannot be sent to another process.
    """
    if function is None:
        return None
    expected, remedy = "None or a function f(pixels, rng)", "it returns uint8 pixels"
    if not callable(function):
        raise TypeError(checks.sentence("transform", function, expected, remedy))
    try:
        inspect.signature(function).bind(None, None)
    except ValueError:  # some functions written in C do not say what they take
        pass
    except TypeError as error:
        raise TypeError(
            checks.sentence("transform", name_of(function), expected, remedy)
        ) from error
    try:
        pickle.dumps(function)
    except Exception as error:  # whatever the objects raise that it holds
        expected = "a function that can be sent to another process"
        remedy = "define it with def at the top level of a module, not as a lambda or in a function"
        raise TypeError(
            checks.sentence("transform", name_of(function), expected, remedy)
        ) from error
    checked: PixelFunction = function
    return checked


def name_of(function: Any) -> str:
    """Return the qualified name of a function, or of the class of a callable object.

    >>> name_of(partial(checked_transform, None))
    'checked_transform'
    """
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def transformed(
    function: PixelFunction, key: Key, pixels: NDArray[np.uint8], example: int, view: int = 0
) -> NDArray[np.uint8]:
    """Return what a function makes of the pixels of an example, checked.

    Args:
        function: called with a copy of pixels, which it may change, and a generator.
        key: (seed, epoch).
        pixels: uint8[height, width, 3].
        example: row in the source.
        view: which of its views the pixels are.

    Raises:
        RuntimeError: the function raised an error, which is the cause.
        TypeError, ValueError: it returned something else than pixels of that shape.
    """
    name = f"transform {name_of(function)} of example {example}"
    try:
        rng = philox.generator(key, example, stream=philox.TRANSFORM, view=view)
        found = function(pixels.copy(), rng)
    except Exception as error:  # the caller's function may raise anything
        raise RuntimeError(f"{name} raised {type(error).__name__}: {error}") from error
    expected = f"{_kind(pixels)} as it was given"
    if not isinstance(found, np.ndarray):
        remedy = "return an array of NumPy"
        raise TypeError(checks.sentence(name, type(found).__name__, expected, remedy))
    if found.dtype != np.uint8 or found.shape != pixels.shape:
        remedy = "return levels of 0..255 in the same size; crops and sizes belong to the plan"
        raise ValueError(checks.sentence(name, _kind(found), expected, remedy))
    return np.ascontiguousarray(found)


def _kind(pixels: NDArray[Any]) -> str:
    return f"{pixels.dtype}{list(pixels.shape)}"
