"""Refuses a loader's state that is none, or that belongs to other batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from packpipe import checks
from packpipe.philox import Key
from packpipe.planning.image_options import BEFORE

# What every state says of itself.
FORM = {"version": 1, "unit": "packs"}

_RETURNED = "pass what state_dict returned"
_REMEDIES = {
    "seed": "use the seed of the state",
    "global_batch": "choose batch_size so that batch_size times world_size is the state's",
    "fingerprint": "the packs are others: use the data, options and seed of the state",
    "transform": "make the packs with the transform of the state",
}


def check_form(state: Any) -> None:
    """Raise TypeError or ValueError unless this is a state that a loader of this version wrote."""
    if not isinstance(state, dict):
        raise TypeError(checks.sentence("state", type(state).__name__, "a dict", _RETURNED))
    for name, expected in FORM.items():
        _check_equal(state, name, expected, _RETURNED)


def check_agrees(
    state: dict[str, Any], own: dict[str, Any], former: Callable[[Any], str | None]
) -> None:
    """Raise ValueError if a state belongs to other batches than a loader's.

    Args:
        state: the state.
        own: what decides the loader's batches, by name.
        former: `former_options` of the loader's packs, which takes a fingerprint.
    """
    # A state says nothing of what there was none of.
    for name, expected in {"augment": None, "transform": None, **own}.items():
        remedy = _REMEDIES.get(name, "make the loader with the options of the state")
        options = former(state.get(name)) if name == "fingerprint" else None
        if options is not None:
            remedy = f"it comes from before some options were there: pass {options}"
        _check_equal(state, name, expected, remedy)


def former_options(packs: Any, key: Key, fingerprint: Any) -> str | None:
    """Return, as text, the options that make packs those of a state saved before they existed.

    Args:
        packs: the loader's packs.
        key: (seed, epoch) of the state.
        fingerprint: of the state.

    Returns:
        None if the state's packs are others, or packs of this kind had no options before.
    """
    former = getattr(packs, "former_fingerprint", None)
    if former is None or fingerprint != former(key):
        return None
    before = {name: old for name, old in BEFORE.items() if getattr(packs.config, name) != old}
    return ", ".join(f"{name}={old!r}" for name, old in before.items())


def packs_taken(state: dict[str, Any], most: int, global_batch: int) -> int:
    """Return how many packs were taken before a state, in whole steps.

    Raises:
        TypeError, ValueError: it is no whole number up to most, or no multiple of global_batch.
    """
    taken = checks.whole_number("state['packs']", state.get("packs"), 0, most, _RETURNED)
    if taken % global_batch:
        expected = f"a multiple of {global_batch} (batch_size times world_size)"
        raise ValueError(checks.sentence("state['packs']", taken, expected, _RETURNED))
    return taken


def _check_equal(state: dict[str, Any], name: str, expected: Any, remedy: str) -> None:
    if (found := state.get(name)) != expected:
        raise ValueError(checks.sentence(f"state[{name!r}]", found, repr(expected), remedy))
