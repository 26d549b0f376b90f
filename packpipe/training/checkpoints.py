"""Checkpoints: one folder a step, which is complete or does not count.

    step-00001000/  model.safetensors      the weights, by the names of ``state_dict``
                    optimizer.safetensors  AdamW's moments, as name of weight, dot, name of moment
                    state.json             step, the loader's state, the model's shape

A folder is filled under the name ``*.partial``, synced, then renamed; before it is removed it is
renamed back. The last two are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from packpipe import checks
from packpipe.loading.loader import PackedLoader
from packpipe.loading.ranks import has_group, rank_of_world
from packpipe.model.config import NaViTConfig
from packpipe.model.navit import NaViT

KEPT = 2  # with one, a kill while the same step is written again would leave none
_VERSION = 1


def save_checkpoint(
    folder: Path, model: NaViT, optimizer: torch.optim.Optimizer, loader: PackedLoader, step: int
) -> None:
    """Write the checkpoint of a step; of several ranks, rank 0 writes and the others wait."""
    if rank_of_world()[0] == 0:
        _save(folder, model, optimizer, loader, step)
    if has_group():
        torch.distributed.barrier()


def _save(
    folder: Path, model: NaViT, optimizer: torch.optim.Optimizer, loader: PackedLoader, step: int
) -> None:
    from safetensors.torch import save_file

    whole = folder / f"step-{step:08d}"
    partial = whole.with_name(whole.name + ".partial")
    for left in folder.glob("step-*.partial"):  # by a process that was killed
        shutil.rmtree(left)
    partial.mkdir(parents=True)
    # safetensors refuses tensors that are not contiguous.
    save_file(
        {k: v.contiguous() for k, v in _weights(model).items()}, partial / "model.safetensors"
    )
    save_file(_moments(model, optimizer), partial / "optimizer.safetensors")
    state = {
        "version": _VERSION,
        "step": step,
        "model": asdict(model.config),
        "loader": loader.state_dict(),
    }
    (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    # Synced before the rename: after a crash the new name must not stand for files without data.
    for path in (*partial.iterdir(), partial):
        _sync(path)
    if whole.exists():  # a folder that holds files cannot be renamed over
        _remove(whole)
    partial.rename(whole)
    _sync(folder)  # makes the rename itself durable
    for old in checkpoints(folder)[:-KEPT]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, renamed first, since a half-removed one must not count as one."""
    half = checkpoint.with_name(checkpoint.name + ".old.partial")
    checkpoint.rename(half)
    shutil.rmtree(half)


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the oldest first."""
    # Steps have eight digits, so names sort as the numbers do.
    return sorted(path for path in Path(folder).glob("step-*") if path.suffix != ".partial")


def load_checkpoint(
    folder: Path, model: NaViT, optimizer: torch.optim.Optimizer, loader: PackedLoader
) -> int:
    """Load the last checkpoint into model, optimizer and loader; return its step, 0 without one.

    Raises:
        ValueError: it is of a model of another shape, or the loader would give other batches.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    from safetensors.torch import load_file

    state = _state(found[-1])
    own = asdict(model.config)
    # All that may be refused comes before weights are changed. The backend may be another one,
    # since a training may go on on another device.
    for name, value in state["model"].items():
        if own.get(name) != value and name != "attention":
            remedy = "give the model of the checkpoint, or another folder"
            raise ValueError(checks.sentence(name, own.get(name), f"{value!r}", remedy))
    loader.load_state_dict(state["loader"])
    _weights_into(model, found[-1])
    parameters = dict(model.named_parameters())
    for name, value in load_file(found[-1] / "optimizer.safetensors").items():
        weight, _, moment = name.rpartition(".")  # names of weights hold dots, of moments none
        # AdamW makes the moments of a parameter only if it has none. Those of a fused AdamW, the
        # step too, are on the parameter's device.
        optimizer.state[parameters[weight]][moment] = value.to(parameters[weight].device)
    return int(state["step"])


def load_model(folder: Path | str, **options: Any) -> NaViT:
    """Return the model of the last checkpoint in a folder, on the CPU.

    Args:
        folder: where a training kept its checkpoints.
        **options: changes of its `NaViTConfig` that leave the weights as they are, such as
            ``attention="reference"``.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
    """
    found = checkpoints(Path(folder))
    if not found:
        raise FileNotFoundError(f"{folder} holds no checkpoint; train with this folder first")
    model = NaViT(NaViTConfig(**{**_state(found[-1])["model"], **options}))
    _weights_into(model, found[-1])
    return model


def _weights(model: NaViT) -> dict[str, torch.Tensor]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def _weights_into(model: NaViT, checkpoint: Path) -> None:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(checkpoint / "model.safetensors"))


def _moments(model: NaViT, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{moment}": value.contiguous()
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if state.get("version") != _VERSION:
        name, found = f"{checkpoint.name}/state.json version", state.get("version")
        raise ValueError(
            checks.sentence(name, found, str(_VERSION), "use the packpipe that wrote it")
        )
    return state


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
