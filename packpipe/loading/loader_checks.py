"""Checks what a loader is given: an augmentation that fits the packs, torch for tensors alone."""

from __future__ import annotations

from typing import Any

from packpipe import checks
from packpipe.augmenting.augment import Augment
from packpipe.augmenting.rows import refuse_pairs, refuse_targets, refuse_tokens
from packpipe.loading.pairs import StoredPairs


def check_without_torch(workers: str, pin_memory: bool) -> None:
    """Raise ValueError if batches of arrays are asked for, and something that is torch's."""
    free = {"workers": (workers, "threads"), "pin_memory": (pin_memory, False)}
    for name, (value, expected) in free.items():
        if value != expected:
            remedy = "the other is for tensors"
            raise ValueError(checks.sentence(name, value, f"{expected!r} with as_numpy", remedy))


def check_augment(augment: Any, packs: Any) -> None:
    """Raise TypeError or ValueError unless these packs can be augmented in this way."""
    if not isinstance(augment, Augment):
        expected, remedy = "an Augment, or None", "such as Augment.preset('three')"
        raise TypeError(checks.sentence("augment", augment, expected, remedy))
    refuse_tokens(getattr(packs, "of_tokens", False))
    if isinstance(packs, StoredPairs):
        refuse_pairs(augment)
    if augment.mixes:
        refuse_targets(getattr(packs, "has_targets", False))
    if augment.mixes and getattr(packs, "max_segments", None) == 1:
        expected, remedy = "2 or more, for mixup and cutmix", "put several into a row"
        raise ValueError(checks.sentence("packs.max_segments", 1, expected, remedy))


def imported_torch() -> Any:
    """Return torch, which `as_numpy` does without.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        expected = "installed for batches of tensors"
        remedy = "pip install 'packpipe[torch]', or pass as_numpy=True"
        said = checks.sentence("torch", "missing", expected, remedy)
        raise ModuleNotFoundError(said, name="torch") from error
    return torch
