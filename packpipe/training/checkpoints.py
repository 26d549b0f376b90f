"""Checkpoints: one folder a step, which is complete or does not count.

    step-00001000/  model.safetensors      the weights, by the names of ``state_dict``; with EMA,
                                           those that are averaged
                    optimizer.safetensors  AdamW's moments, as name of weight, dot, name of moment;
                                           with EMA, the weights it changes, too: name, ".trained"
                    state.json             step, the loader's state, the model's shape; with
                                           validation, which steps were the best
                    checksums.xxh128       of the three files, as ``xxh128sum`` prints them

A folder is filled under the name ``*.partial``, synced, then renamed; before it is removed it is
renamed back. The last two are kept, or as many as are asked for, and those of the best steps.
Loading checks every file against its checksum and takes the
newest checkpoint that is whole, so a flipped bit or a file cut short costs the steps since the one
before, and never passes for weights.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from packpipe import checks
from packpipe.durable import sync
from packpipe.loading.loader import PackedLoader
from packpipe.loading.ranks import rank_of_world, together
from packpipe.model.config import NaViTConfig
from packpipe.model.navit import NaViT
from packpipe.rows.files import checksum_of
from packpipe.training.validation import Validator

log = logging.getLogger(__name__)

KEPT = 2  # with one, a kill while the same step is written again would leave none
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_CHECKSUMS = "checksums.xxh128"
_HEAD = ("head.weight", "head.bias")
_TRAINED = "trained"
_VERSION = 2
_WITHOUT_CHECKSUMS = 1  # the version before, which can still be loaded
_WITH_AVERAGES = 3  # so that a packpipe that does not know of them refuses to go on


def save_checkpoint(
    folder: Path,
    model: NaViT,
    optimizer: torch.optim.Optimizer,
    loader: PackedLoader,
    step: int,
    *,
    validator: Validator | None = None,
    averaged: NaViT | None = None,
    keep_last: int = KEPT,
) -> None:
    """Write the checkpoint of a step; of several ranks, rank 0 writes and the others wait.

    What goes wrong on rank 0 is raised on every rank. Of the others the last ones are kept, and
    those of the validator's best steps.
    """
    checks.local_path("folder", folder)

    def save() -> None:
        if rank_of_world()[0] == 0:
            _save(folder, model, optimizer, loader, step, validator, averaged)
            best = validator.best_steps if validator else ()
            for old in checkpoints(folder)[:-keep_last]:
                if _step_of(old) not in best:
                    _remove(old)

    together(save)


def _save(
    folder: Path,
    model: NaViT,
    optimizer: torch.optim.Optimizer,
    loader: PackedLoader,
    step: int,
    validator: Validator | None,
    averaged: NaViT | None,
) -> None:
    whole = folder / f"step-{step:08d}"
    partial = whole.with_name(whole.name + ".partial")
    _remove_partials(folder)
    partial.mkdir(parents=True)
    try:
        _fill(partial, model, optimizer, loader, step, validator, averaged)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # makes room, if the disk is full
        raise
    if whole.exists():  # a folder that holds files cannot be renamed over
        _remove(whole)
    partial.rename(whole)
    sync(folder)  # makes the rename itself durable


def _fill(
    partial: Path,
    model: NaViT,
    optimizer: torch.optim.Optimizer,
    loader: PackedLoader,
    step: int,
    validator: Validator | None,
    averaged: NaViT | None,
) -> None:
    """Write the files of a checkpoint, and wait until the disk has them."""
    from safetensors.torch import save_file

    # safetensors refuses tensors that are not contiguous.
    training = _moments(model, optimizer)
    if averaged is not None:
        training |= {f"{name}.{_TRAINED}": value for name, value in _weights(model).items()}
    save_file(_weights(model if averaged is None else averaged), partial / _MODEL)
    save_file(training, partial / _OPTIMIZER)
    state: dict[str, Any] = {
        "version": _VERSION if averaged is None else _WITH_AVERAGES,
        "step": step,
        "model": asdict(model.config),
        "loader": loader.state_dict(),
    }
    if validator:
        state["validation"] = validator.state_dict()
    (partial / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    (partial / _CHECKSUMS).write_bytes(b"".join(_checksums(partial).values()))
    # Synced before the rename: after a crash the new name must not stand for files without data.
    for path in (*partial.iterdir(), partial):
        sync(path)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, renamed first, since a half-removed one must not count as one."""
    half = checkpoint.with_name(checkpoint.name + ".old.partial")
    checkpoint.rename(half)
    shutil.rmtree(half)


def _remove_partials(folder: Path) -> None:
    """Remove what a process that was killed has left half-written or half-removed."""
    for left in folder.glob("step-*.partial"):
        shutil.rmtree(left)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that were written to the end, by step, the last one last.

    What became of their files since then is not looked at; `newest_whole` does.
    """
    found = (path for path in Path(folder).glob("step-*") if _step_of(path) >= 0 and path.is_dir())
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name, -1 if it is not the name of one."""
    found = re.fullmatch("step-([0-9]+)", checkpoint.name)
    return int(found[1]) if found else -1


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files are as they were written, None if there is none.

    Newer ones, which are damaged, are named in a warning. The answer depends on the files alone,
    so that ranks that see the same files go on from the same step.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damages = []
    for checkpoint in reversed(checkpoints(folder)):
        damage = _damage_of(checkpoint)
        if damage:
            damages.append(f"{checkpoint.name} is damaged ({damage})")
            continue
        if damages:
            log.warning("%s; going on from %s", ", ".join(damages), checkpoint.name)
        if not (checkpoint / _CHECKSUMS).exists():
            message = "%s was written without checksums; it is loaded unchecked"
            log.warning(message, checkpoint.name)
        return checkpoint
    if damages:
        name, remedy = f"whole checkpoints in {folder}", "restore one, or give another folder"
        remedy = f"{', '.join(damages)}: {remedy}"
        raise ValueError(checks.sentence(name, 0, "1 or more", remedy))
    return None


def _damage_of(checkpoint: Path) -> str:
    """Return what is wrong with the files of a checkpoint, "" if they are as they were written."""
    try:
        if not (checkpoint / _CHECKSUMS).exists():
            return _unreadable(checkpoint)
        found, written = _checksums(checkpoint), (checkpoint / _CHECKSUMS).read_bytes()
    except OSError as error:  # it names the file
        # Any other is of the machine, such as too many open files: the checkpoint may be whole.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
            raise
        return str(error)
    if written == b"".join(found.values()):
        return ""
    lines = written.splitlines(keepends=True)
    names = [name for name, line in found.items() if line not in lines]
    return f"{', '.join(names)} does not match {_CHECKSUMS}" if names else f"{_CHECKSUMS}: changed"


def _unreadable(checkpoint: Path) -> str:
    """Return what cannot be read of a checkpoint without checksums, "" if all can be."""
    from safetensors import SafetensorError, safe_open

    name = _STATE
    try:
        version = json.loads((checkpoint / _STATE).read_bytes())["version"]
        for name in (_MODEL, _OPTIMIZER):
            with safe_open(checkpoint / name, "pt"):  # compares the header with the file's size
                pass
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        return f"{name}: {error}"
    return f"{_CHECKSUMS} is missing" if version in (_VERSION, _WITH_AVERAGES) else ""


def _checksums(checkpoint: Path) -> dict[str, bytes]:
    """Return the line of checksums.xxh128 for each file, by its name."""
    return {
        name: f"{checksum_of(checkpoint / name)}  {name}\n".encode()
        for name in (_MODEL, _OPTIMIZER, _STATE)
    }


def begin_after(folder: Path, step: int) -> None:
    """Clear a folder for a training that goes on from a step.

    What a kill left half-done is removed. Checkpoints of later steps are damaged, since
    `load_checkpoint` takes the newest whole one: they are renamed to ``*.damaged``, so that they do
    not count among those kept, and are lost to nobody. Call it on one rank, when all have loaded.
    """
    _remove_partials(folder)
    for checkpoint in checkpoints(folder):
        if _step_of(checkpoint) > step:
            aside = checkpoint.with_name(checkpoint.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            checkpoint.rename(aside)


def load_checkpoint(
    folder: Path,
    model: NaViT,
    optimizer: torch.optim.Optimizer,
    loader: PackedLoader,
    *,
    validator: Validator | None = None,
    averaged: NaViT | None = None,
) -> int:
    """Load the newest whole checkpoint into model, optimizer, loader, validator; return its step.

    Without a checkpoint nothing is loaded, and the step is 0. One without validation is loaded with
    it, too: validation begins there. So is one without EMA: the average begins with its weights.

    Raises:
        ValueError: all checkpoints are damaged; or it is of a model of another shape, or the loader
            would give other batches; or it is of a training with validation, and there is none now,
            or one on other images.
    """
    found = newest_whole(folder)
    if found is None:
        return 0
    from safetensors.torch import load_file

    state = _state(found)
    own = asdict(model.config)
    # All that may be refused comes before weights are changed. The backend may be another one,
    # since a training may go on on another device.
    # With the defaults of options that are younger than the checkpoint.
    for name, value in asdict(NaViTConfig.from_dict(state["model"], found / _STATE)).items():
        if own.get(name) != value and name != "attention":
            remedy = "give the model of the checkpoint, or another folder"
            said = checks.sentence(name, own.get(name), f"{value!r}", remedy)
            raise ValueError(f"{found.name} is of a training of another model: {said}")
    validation = state.get("validation")
    if validation and validator is None:
        expected = "the images that the checkpoint was validated on"
        raise ValueError(checks.sentence("validate", None, expected, "pass them again"))
    if validation and validator:
        validator.load_state_dict(validation)
    try:
        loader.load_state_dict(state["loader"])
    except (TypeError, ValueError) as error:
        said = f"{found.name} is of a training on other batches: {error}; or give another folder"
        raise type(error)(said) from error
    weights, trained = load_file(found / _MODEL), {}
    if averaged is not None:
        averaged.load_state_dict(weights)
    parameters = dict(model.named_parameters())
    for name, value in load_file(found / _OPTIMIZER).items():
        weight, _, moment = name.rpartition(".")  # names of weights hold dots, of moments none
        if moment == _TRAINED:
            trained[weight] = value
            continue
        if not parameters[weight].requires_grad:  # frozen since then: it has no moments
            continue
        # AdamW makes the moments of a parameter only if it has none. Those of a fused AdamW, the
        # step too, are on the parameter's device.
        optimizer.state[parameters[weight]][moment] = value.to(parameters[weight].device)
    model.load_state_dict(trained or weights)
    return int(state["step"])


def model_of(
    folder: Path | str, *, best: bool = False, num_classes: int | None = None, **options: Any
) -> NaViT:
    """Return the model of the newest whole checkpoint in a folder, on the CPU.

    Args:
        folder: where a training kept its checkpoints.
        best: whether the one with the lowest validation loss goes first, of those that are whole.
        num_classes: a new head of so many classes; None keeps the head.
        **options: changes of its `NaViTConfig` that leave the weights as they are, such as
            ``attention="reference"``.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: all its checkpoints are damaged.
    """
    from safetensors.torch import load_file

    found = newest_whole(Path(folder))
    if found is None:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint; train with this folder first, or read a model that is "
            "pretrained with from_pretrained"
        )
    state = _state(found)
    config = replace(NaViTConfig.from_dict(state["model"], found / _STATE), **options)
    if best:
        found = _best_whole(Path(folder), state) or found
    if num_classes is not None:
        config = replace(config, num_classes=num_classes)
    model = NaViT(config)
    weights = load_file(found / _MODEL)
    if num_classes is not None:
        own = {name: value for name, value in model.state_dict().items() if name in _HEAD}
        weights = {**weights, **own}
    model.load_state_dict(weights)
    return model


def best_step(folder: Path | str) -> int | None:
    """Return the step whose weights ``model_of(folder, best=True)`` has, if it was validated."""
    newest = newest_whole(Path(folder))
    found = None if newest is None else _best_whole(Path(folder), _state(newest))
    return None if found is None else _step_of(found)


def _best_whole(folder: Path, state: dict[str, Any]) -> Path | None:
    """Return the best checkpoint by a state, of those that are there and whole; None without."""
    by_step = {_step_of(path): path for path in checkpoints(folder)}
    for one in state.get("validation", {}).get("best", []):
        path = by_step.get(one["step"])
        if path is None:  # keep_best was less
            continue
        damage = _damage_of(path)
        if not damage:
            return path
        log.warning("%s is damaged (%s)", path.name, damage)
    return None


def _weights(model: NaViT) -> dict[str, torch.Tensor]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def _moments(model: NaViT, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{moment}": value.contiguous()
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    if (version := state.get("version")) not in (_WITHOUT_CHECKSUMS, _VERSION, _WITH_AVERAGES):
        name, expected = f"{checkpoint.name}/{_STATE} version", "1, 2 or 3"
        raise ValueError(checks.sentence(name, version, expected, "use the packpipe that wrote it"))
    if (step := state["step"]) != _step_of(checkpoint):  # it would be taken for a later one
        name, expected = (
            f"{checkpoint.name}/{_STATE} step",
            f"{_step_of(checkpoint)}, as in its name",
        )
        raise ValueError(checks.sentence(name, step, expected, "give the folder its name back"))
    return state
