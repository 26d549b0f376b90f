"""Training: a short loop over batches of packed rows.

AdamW, a reciprocal-square-root learning rate, clipped gradients; on a GPU bf16 and compiled parts;
under ``torchrun`` DDP, where every image of all ranks counts the same. With a folder, checkpoints
that resume to the same losses, on a CPU bit for bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from packpipe import checks
from packpipe.loading.batch import PackedBatch
from packpipe.loading.loader import PackedLoader
from packpipe.loading.ranks import agree, has_group, host_group, together
from packpipe.model.attention import check_backend
from packpipe.model.config import NaViTConfig
from packpipe.model.flops import matrix_rate
from packpipe.model.navit import NaViT, compile_parts
from packpipe.model.precision import asks_for_half
from packpipe.philox import Key
from packpipe.training.averages import average, copy_of, kept_share
from packpipe.training.captured import CapturedStep
from packpipe.training.drop_path import drawn_paths
from packpipe.training.figures import Figures
from packpipe.training.figures import Record as Record  # callers import these from here, too
from packpipe.training.files import Files
from packpipe.training.log import read_log as read_log
from packpipe.training.losses import LOSSES, global_count
from packpipe.training.objective import (
    Objective,
    agreement,
    by_label,
    check_batch,
    is_regression,
    labels_in,
    objective_of,
)
from packpipe.training.optimizer import freeze, optimizer_of, set_rate
from packpipe.training.run_folder import RunOptions
from packpipe.training.train_config import TrainConfig as TrainConfig
from packpipe.training.validation import Validator

log = logging.getLogger(__name__)


def train(
    model: NaViT,
    loader: PackedLoader,
    config: TrainConfig,
    *,
    folder: Path | str | None = None,
    stop: Callable[[], bool] = lambda: False,
    validate: PackedLoader | None = None,
    run_options: RunOptions | None = None,
) -> Iterator[Record]:
    """Train a model in place; yield a record every log_every steps, and after every validation.

    A record's figures are means over the steps since the one before; the last step has one, too,
    and each step that a checkpoint is saved of, since no checkpoint holds sums that are not over:
    the records after a kill are those of a training that was not.

    Args:
        model: on the device it is trained on. With ``ema`` it has the weights of the last step; the
            averaged ones are those that are validated, and that `packpipe.load_model` loads.
        loader: batches with labels, epoch after epoch: classes, or as many numbers an image as the
            model has outputs; of a model without pooling, with targets. It augments them, if it is
            made with ``augment``; of images that it mixes both labels count, by their shares.
        config: the options.
        folder: where checkpoints and log.jsonl go, a local one; if it holds checkpoints, training
            resumes from the newest whole one. None keeps nothing.
        stop: called after every step; True makes that step the last one, and saves it. Of several
            ranks all must answer the same.
        validate: images that the model is measured on every val_every steps, such as
            ``PackedLoader(EpochPacks(held_out, 1024, resolution="budget", max_tokens=256), 8,
            tail="pad")``. Ranks measure a share each. Neither Ctrl-C nor a kill changes when.
        run_options: what model.json in the folder says for `packpipe.load_model`: names of classes,
            and how images become rows. None writes none.

    With ``freeze`` the model's first blocks have no gradients any more, after it as well: a later
    training of the same model leaves them as they are, and logs a warning.

    If a validation fails, its step is saved, and a training that goes on measures it first.

    Raises:
        ValueError: the rows have no labels, or one that does not suit the model and the loss: told
            before the first step, where packs know their labels; or validate cannot be measured
            (`Validator`), or options ask for validation without it; or the folder's checkpoint is
            of another model, of other batches, of other validation images or of classes with other
            names, or all of them are damaged; or an epoch has no batch; or the ranks do not agree
            in the checkpoint, the options or the packs. What fails on one rank, at any step before
            its forward pass, is told to every rank.
        RuntimeError: the attention backend differs from reference attention on this device.
    """
    device = next(model.parameters()).device
    half = asks_for_half(config.precision, device)
    folder = None if folder is None else checks.local_path("folder", folder)
    if has_group() and device.type == "cuda":
        torch.cuda.set_device(device)  # ranks compare what they have through the current GPU
    # Together: none is left waiting for one that refuses its options, or its images.
    objective = together(lambda: objective_of(config, loader.packs, model.config, device))
    together(lambda: freeze(model, config.freeze))
    compiled = device.type == "cuda" if config.compiled is None else config.compiled
    together(lambda: _check_captured(config))
    captured = config.captured
    optimizer = optimizer_of(model, config, captured=captured and device.type == "cuda")
    averaged = None if config.ema is None else copy_of(model)
    judged = model if averaged is None else averaged
    validator = together(lambda: _validator_of(judged, validate, config, objective, half))
    files = Files(
        folder,
        model,
        optimizer,
        loader,
        config,
        validator=validator,
        averaged=averaged,
        run_options=run_options,
    )

    def load() -> int:
        # On every rank: DDP sends rank 0's weights, but no state of the optimizer or the loader.
        first = files.load()
        _state_backend(model, device, half)
        return first

    first = together(load)
    has = {"has_folder": folder is not None, "validates": validator is not None}
    agree({"step": first, **has, **together(config.must_agree)})
    if validator:
        agree(together(validator.must_agree))
    files.begin(first)  # all ranks have loaded by now, since they agree in the step

    if validator:
        due, validator.due = validator.due, None
        if due and config.validates(first):
            record = _measured(validator, Record(**due), files)
            files.append(record)
            yield record
            files.save(first)
        if validator.is_exhausted:
            return
    run: nn.Module = model.train()
    # The averaged weights are measured in a model of their own, which is compiled, too.
    for one in (model, averaged):
        if compiled and one is not None and not one.keep_padding:  # or it is compiled already
            compile_parts(one)
    if has_group():
        run = DistributedDataParallel(model)
        if averaged is not None and not first:
            averaged.load_state_dict(model.state_dict())  # DDP has sent rank 0's just now
    rate = (
        matrix_rate(device, torch.bfloat16 if half else torch.float32)
        if device.type == "cuda"
        else None
    )
    figures = Figures(
        model.config, rate, first, device=device, regression=is_regression(objective.loss)
    )
    longest = loader.longest

    def update(parts: Sequence[_Part]) -> None:
        optimizer.zero_grad()
        for found in _backward(
            run, parts, objective, model.config, half, longest, captured=captured
        ):
            figures.add(*found)
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()

    # A captured step counts its figures inside the graph, which replays that as well.
    updated = CapturedStep(update, device) if captured else update
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    given = _together_given(loader, model, config)
    for step in range(first, config.steps):
        asked = time.perf_counter()
        # Before the first backward, whose loss is divided by the images of all.
        parts, lengths = zip(*islice(given, config.accumulate), strict=True)
        figures.waited += time.perf_counter() - asked
        if compiled and config.trim and step == first:
            _warn_of_lengths(lengths[0], config.trim, validates=bool(validator))
        # A function of the step, so a resumed training needs no state of a scheduler.
        learning_rate = config.rate(step)
        set_rate(optimizer, learning_rate)
        updated(_moved(parts, device, copies))
        for part in parts:
            figures.count(part.batch)
        if averaged is not None and config.ema:
            average(averaged, model, kept_share(config.ema, step))
        done = step + 1
        ends = stop() or done == config.steps
        # Not where stop ends the training: it may go on, as if it had not been stopped.
        measures = validator is not None and config.validates(done)
        saves = folder is not None and config.save_every and done % config.save_every == 0
        if done % config.log_every == 0 or ends or measures or saves:
            record = figures.record(done, learning_rate)
            if validator and measures:
                record = _measured(validator, record, files)
                figures.began = time.perf_counter()  # what was measured is not trained on
                ends = ends or validator.is_exhausted
            files.append(record)
            yield record
        is_best = measures and validator is not None and done in validator.best_steps
        # After the yield: a caller that stops at a record leaves without this step's checkpoint.
        if ends or is_best or saves:
            files.save(done)
        if ends:
            return


class _Part(NamedTuple):
    """A batch as it is trained on; what is drawn of paths for its images, None without any."""

    batch: PackedBatch
    paths: Tensor | None

    def to(self, device: torch.device) -> _Part:
        batch = self.batch.to(device, non_blocking=True)
        paths = self.paths
        return _Part(batch, None if paths is None else paths.to(device, non_blocking=True))


# `agreement` and loss of a batch.
_Found: TypeAlias = tuple[tuple[Tensor, Tensor], Tensor]


def _check_captured(config: TrainConfig) -> None:
    """Raise ValueError if the whole step is to be captured as one graph, and cannot be."""
    if config.captured and (has_group() or config.trim):
        expected = "False under torchrun, or with trim"
        raise ValueError(checks.sentence("captured", True, expected, "leave it out"))


def _together_given(
    loader: PackedLoader, model: NaViT, config: TrainConfig
) -> Iterator[tuple[_Part, int]]:
    """Yield batches as they are trained on, each with its tokens a row, without end.

    What fails on one rank, such as an image, or a label of a stream, is raised on every rank: the
    others would wait for its gradients. So ranks ask each other about every batch, not every step,
    since one of them may be the first of an epoch, about which they ask each other, too; and about
    the end of an epoch, at which one may fail while others have one more batch, or begin the next.
    """
    batches = loader.passes_and_ends()

    def one() -> tuple[_Part, int] | None:
        found = next(batches)
        if found is None:
            return None
        batch, key = found
        return _prepared(batch, key, model, config), batch.segment_ids.shape[1]

    with host_group() as group:
        while True:
            given = together(one, group)
            if given is not None:
                yield given


def _prepared(batch: PackedBatch, key: Key, model: NaViT, config: TrainConfig) -> _Part:
    """Return a batch as it is trained on, still on the CPU, where it is looked at without waiting.

    Raises:
        ValueError: it has no labels, or one that does not suit the model and the loss.
    """
    if config.trim:
        batch = batch.trim(config.trim)
    check_batch(batch, model.config, LOSSES[config.loss])
    if not config.drop_path:
        return _Part(batch, None)
    return _Part(batch, drawn_paths(batch, key, config.drop_path, model.config.depth))


def _moved(
    parts: Sequence[_Part], device: torch.device, copies: torch.cuda.Stream | None
) -> list[_Part]:
    """Return parts on a device; with a stream for copies, while the step before is computed.

    A training runs ahead of its GPU, so that the copy begins early, if the loader pins memory.
    """
    if copies is None:
        return [part.to(device) for part in parts]
    with torch.cuda.stream(copies):
        moved = [part.to(device) for part in parts]
    current = torch.cuda.current_stream(device)
    current.wait_stream(copies)
    for tensor in pytree.tree_leaves(moved):
        if tensor is not None:
            tensor.record_stream(current)  # or its memory might be given away too early
    return moved


def _backward(
    run: nn.Module,
    parts: Sequence[_Part],
    objective: Objective,
    shape: NaViTConfig,
    half: bool,
    longest: int | None,
    *,
    captured: bool,
) -> Iterator[_Found]:
    """Add up the gradients of a step; yield `agreement` and loss of each of its batches.

    The losses add up to that of one batch that holds all of them.
    """
    device = next(run.parameters()).device
    labels = [labels_in(part.batch, shape) for part in parts]
    count = global_count(
        *(objective.counts(part.batch, own) for part, own in zip(parts, labels, strict=True))
    )
    for number, (part, own) in enumerate(zip(parts, labels, strict=True), 1):
        # Ranks add up their gradients once a step, with its last batch.
        with _apart(run) if number < len(parts) else nullcontext():
            # A graph must cast weights anew each time, since they change.
            with torch.autocast(
                device.type, torch.bfloat16, enabled=half, cache_enabled=not captured
            ):
                outputs = run(*part, longest)
            loss = objective.of(outputs, part.batch, own, count=count)
            loss.backward()
        yield agreement(objective.loss, by_label(outputs.detach()), own), loss.detach()


def _apart(run: nn.Module) -> AbstractContextManager[None]:
    """Return a block in which ranks do not add their gradients up: they do with the last batch."""
    return run.no_sync() if isinstance(run, DistributedDataParallel) else nullcontext()


def _validator_of(
    model: NaViT,
    validate: PackedLoader | None,
    config: TrainConfig,
    objective: Objective,
    half: bool,
) -> Validator | None:
    if validate is None:
        for name in ("val_every", "patience"):
            if (value := getattr(config, name)) is not None:
                remedy = "pass a loader of the images to validate on"
                raise ValueError(checks.sentence(name, value, "None without validate", remedy))
        return None
    return Validator(
        model,
        validate,
        objective.loss,
        half=half,
        keep_best=config.keep_best,
        patience=config.patience,
    )


def _measured(validator: Validator, record: Record, files: Files) -> Record:
    """Return a record with the figures of validation; if that fails, the step is saved."""
    try:
        found = validator.measure(record.step)
    except Exception:
        # Kept in the checkpoint, so that the continued training measures this step first.
        validator.due = asdict(record)
        files.save(record.step)
        raise
    return replace(
        record,
        val_loss=found.loss,
        val_accuracy=found.accuracy,
        val_ece=found.ece,
        val_error=found.error,
        val_iou=found.iou,
        val_mean_ap=found.mean_ap,
        val_images=found.num_images,
    )


def _warn_of_lengths(seq_len: int, trim: int, *, validates: bool) -> None:
    """Log a warning if trimmed batches may have more lengths than there are graphs for."""
    # One more is of validation: its batches are not cut, and a graph without gradients is another.
    limit = max(1, torch._dynamo.config.recompile_limit - validates)
    if -(-seq_len // trim) > limit:
        expected = f"{-(-seq_len // limit)} or more, for {limit} lengths of {seq_len} tokens"
        remedy = "raise it, or torch._dynamo.config.recompile_limit: further lengths have no graph"
        log.warning(checks.sentence("trim", trim, expected, remedy))


def _state_backend(model: NaViT, device: torch.device, half: bool) -> None:
    """Check the attention backend against reference attention, and log which one runs."""
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        backend = model.backend()
    # Kernels run in the dtype of queries and keys, under autocast bfloat16.
    dtype = torch.bfloat16 if half else next(model.parameters()).dtype
    head_dim = model.config.dim // model.config.heads
    difference = check_backend(backend, device, dtype, head_dim)
    log.info("attention: %s in %s on %s, %.1e from reference", backend, dtype, device, difference)
