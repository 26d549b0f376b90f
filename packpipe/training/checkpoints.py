"""Checkpoints: a folder a step, written whole or not at all.

    step-00001000/  model.safetensors      the weights, by the names of ``state_dict``
                    optimizer.safetensors  AdamW's moments, as name of weight, dot, name of moment
                    state.json             step, the loader's state, the model's shape

A folder is filled under another name, synced, then renamed; to be removed, it is renamed first.
The last two are kept.
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

KEPT = 2
_VERSION = 1


def save_checkpoint(
    folder: Path, model: NaViT, optimizer: torch.optim.Optimizer, loader: PackedLoader, step: int
) -> None:
    """Write the checkpoint of a step; of several ranks the first one does."""
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
    for path in (*partial.iterdir(), partial):
        _sync(path)
    if whole.exists():
        _remove(whole)
    partial.rename(whole)
    _sync(folder)
    for old in checkpoints(folder)[:-KEPT]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, half of which must not be taken for one."""
    half = checkpoint.with_name(checkpoint.name + ".old.partial")
    checkpoint.rename(half)
    shutil.rmtree(half)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that are whole, the oldest first."""
    return sorted(path for path in Path(folder).glob("step-*") if path.suffix != ".partial")


def load_checkpoint(
    folder: Path, model: NaViT, optimizer: torch.optim.Optimizer, loader: PackedLoader
) -> int:
    """Return the step of the last checkpoint, which everything is set to; 0 if there is none.

    Raises:
        ValueError: it is of a model of another shape, or the loader's batches would be others.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    from safetensors.torch import load_file

    state = _state(found[-1])
    own = asdict(model.config)
    for name, value in state["model"].items():
        if own.get(name) != value and name != "attention":
            remedy = "give the model of the checkpoint, or another folder"
            raise ValueError(checks.sentence(name, own.get(name), f"{value!r}", remedy))
    loader.load_state_dict(state["loader"])
    _weights_into(model, found[-1])
    parameters = dict(model.named_parameters())
    for name, value in load_file(found[-1] / "optimizer.safetensors").items():
        weight, _, moment = name.rpartition(".")
        optimizer.state[parameters[weight]][moment] = value.to(parameters[weight].device)
    return int(state["step"])


def load_model(folder: Path | str, **options: Any) -> NaViT:
    """Return the model of the last checkpoint in a folder, on the CPU.

    Args:
        folder: where a training kept its checkpoints.
        **options: changes of its `NaViTConfig` that leave the weights as they are, such as
            ``attention="reference"``.

    Raises:
        FileNotFoundError: there is none.
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
