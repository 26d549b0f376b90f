"""The precision in which a trained model runs: bfloat16 where it is fast, or float32."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch

from packpipe import checks
from packpipe.loading.ranks import rank_of_world

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "float32", "bfloat16")
# What processors have for products in bfloat16: two kinds of x86's, and Arm's. Without, they are
# several times as slow as in float32 (5 times on an AMD EPYC of the third generation).
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def is_half(precision: str, device: torch.device) -> bool:
    """Return whether matrix products run in bfloat16 on a device.

    Args:
        precision: ``"float32"``; ``"bfloat16"``; or ``"auto"``, which is bfloat16 on a GPU and
            float32 on a CPU, where it moves no answer.
        device: of the model.

    Raises:
        ValueError: the precision is unknown, or bfloat16 on a CPU without instructions for it.
    """
    checks.choice("precision", precision, PRECISIONS, "choose a precision")
    if (slow := _slow(precision, device)) is not None:
        raise ValueError(slow)
    return _means_half(precision, device)


def asks_for_half(precision: str, device: torch.device) -> bool:
    """Return whether a precision means bfloat16 on a device; where it is slow, rank 0 warns."""
    slow = _slow(precision, device)
    if slow is not None and rank_of_world()[0] == 0:
        log.warning(slow)
    return _means_half(precision, device)


def _means_half(precision: str, device: torch.device) -> bool:
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def _slow(precision: str, device: torch.device) -> str | None:
    """Return the warning about bfloat16 on a CPU without instructions for it; else None."""
    if precision != "bfloat16" or device.type != "cpu" or has_instructions():
        return None
    expected = f"'float32' on a CPU that has none of {', '.join(_INSTRUCTIONS)}"
    remedy = "pass 'float32', or 'auto': bfloat16 is slower there"
    return checks.sentence("precision", precision, expected, remedy)


def has_instructions() -> bool:
    """Return whether this machine's CPU has instructions for products in bfloat16.

    A torch from before `torch.cpu.get_capabilities` knows those of AVX-512 alone.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu._is_avx512_bf16_supported())
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _INSTRUCTIONS)


def in_precision(precision: str | None, device: torch.device) -> AbstractContextManager[object]:
    """Return what a model is called in: `torch.autocast` as `is_half` says; None changes nothing.

    Raises:
        ValueError: see `is_half`.
    """
    if precision is None:
        return nullcontext()
    half = is_half(precision, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=half)
