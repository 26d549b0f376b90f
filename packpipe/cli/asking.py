"""Loads a trained model and runs it on images: for the commands eval, predict and embed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from datasets import ClassLabel, Dataset, Image

from packpipe import checks
from packpipe.cli.compared import Compared
from packpipe.cli.layouts import packs_of
from packpipe.cli.measured import measured_packs
from packpipe.cli.starting import trained_model
from packpipe.cli.training_run import device_of_this_rank
from packpipe.hub.files import CONFIG
from packpipe.hub.meaning import meaning_of
from packpipe.loading.loader import PackedLoader
from packpipe.loading.stored import StoredPacks
from packpipe.model.navit import NaViT
from packpipe.model.precision import is_half
from packpipe.model.predict import predict_packs
from packpipe.rows import rejects
from packpipe.rows.own_columns import holds_rows
from packpipe.rows.rejects import Reject
from packpipe.training.evaluation import Measures, measure
from packpipe.training.losses import LOSSES
from packpipe.training.objective import is_dense, is_regression
from packpipe.training.run_folder import RunOptions, load_model

ALL_MAY_BE_BAD = {"max_bad_fraction": 1.0, "max_consecutive_bad": 2**62}


def evaluate(
    run: Path,
    dataset: Dataset,
    budgets: list[int] | None,
    *,
    batch_size: int,
    num_workers: int,
    max_bad_fraction: float,
    precision: str = "auto",
    mask_column: str | None = None,
) -> tuple[list[tuple[int | None, Measures]], list[Reject]]:
    """Return how good a trained model is on labelled images, for each budget of tokens an image.

    And the images whose header or label is bad. Of packed rows, which are measured as they are, the
    most tokens are None.

    Args:
        run: a training's folder.
        dataset: labelled images, or rows of them.
        budgets: most tokens; None is the budget of the training's validation.
        batch_size: rows a step.
        num_workers: threads that decode ahead.
        max_bad_fraction: a larger share of images that cannot be read is an error.
        precision: see `packpipe.model.precision`.
        mask_column: of class maps, for a model that answers for every cell.
    """
    model, options = loaded(run)
    compared = _compared_with(model, mask_column)
    names = options.class_names
    classes = None if names is None else ClassLabel(names=list(names))
    are_rows = holds_rows(dataset.column_names)
    if are_rows and budgets is not None:
        expected, remedy = "left out for packed rows", "measure on their images"
        raise ValueError(checks.sentence("budgets", budgets, expected, remedy))
    half = is_half(precision, next(model.parameters()).device)
    found, rejected = [], []
    for asked in [options] if budgets is None else [options.at(budget) for budget in budgets]:
        packs = measured_packs(
            dataset,
            classes,
            asked.packing,
            loss=options.loss,
            num_workers=num_workers,
            max_bad_fraction=max_bad_fraction,
            compared=compared,
        )
        rejected = [] if isinstance(packs, StoredPacks) else packs.rejects
        loader = PackedLoader(packs, batch_size, tail="pad", num_workers=num_workers)
        measured = measure(model, loader, LOSSES[options.loss], half=half)
        found.append((None if are_rows else asked.max_tokens, measured))
    return found, rejected


def _compared_with(model: NaViT, mask_column: str | None) -> Compared:
    """Return what a model is compared with; ValueError if it gives no such outputs."""
    config = model.config
    if is_dense(config) and mask_column is None:
        expected = "a column of class maps, since the model answers for every cell"
        remedy = "pass --mask-column, as in training"
        raise ValueError(checks.sentence("mask_column", None, expected, remedy))
    if not is_dense(config) and mask_column is not None:
        expected, remedy = "None, since the model answers for images", "leave --mask-column out"
        raise ValueError(checks.sentence("mask_column", mask_column, expected, remedy))
    return Compared(mask_column, config.target_stride, config.num_classes)


class Prediction(NamedTuple):
    """The classes of an image, the likeliest first, each with its probability.

    Of a regression, the outputs in their order, and what they are; says is ``"value"`` then.
    """

    image: str
    classes: list[tuple[str, float]]
    says: str = "probability"


def predictions(
    run: Path,
    images: list[str],
    *,
    top: int,
    batch_size: int,
    num_workers: int,
    precision: str = "auto",
) -> tuple[list[Prediction], list[tuple[str, Reject]]]:
    """Return what a trained model says of images, and those that cannot be read; in their order.

    Args:
        run: a training's folder.
        images: paths.
        top: classes an image, the likeliest.
        batch_size: rows a step.
        num_workers: threads that decode ahead.
        precision: see `packpipe.model.precision`.
    """
    model, options = _classifier(run)
    dataset = Dataset.from_dict({"image": images}).cast_column("image", Image())
    packs = packs_of(dataset, options.packing, num_workers, **ALL_MAY_BE_BAD)
    with in_rejects_alone():
        answers = predict_packs(
            model, packs, batch_size=batch_size, num_workers=num_workers, precision=precision
        )
    logits = answers.outputs.double()
    regresses = is_regression(LOSSES[options.loss])
    if regresses:
        shares, says = logits, "value"
    else:
        says = "probability"
        shares = logits.sigmoid() if options.loss == "sigmoid" else logits.softmax(-1)
    names = options.class_names or tuple(map(str, range(shares.shape[1])))
    # Stable, so that of equal ones the first class is the first.
    order = shares.argsort(dim=-1, descending=True, stable=True)[:, :top].tolist()
    if regresses:
        order = [list(range(shares.shape[1]))] * len(shares)
    found = [
        Prediction(images[number], [(names[k], float(row[k])) for k in ranked], says)
        for number, row, ranked in zip(answers.example_index.tolist(), shares, order, strict=True)
    ]
    bad = sorted([*packs.rejects, *packs.undecodable])
    return found, [(images[reject.example_index], reject) for reject in bad]


@contextmanager
def in_rejects_alone() -> Iterator[None]:
    """Log no image that is left out, since the caller is given the rejects."""
    before = rejects.log.level
    rejects.log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        rejects.log.setLevel(before)


def _classifier(run: Path) -> tuple[NaViT, RunOptions]:
    """Return a trained model that gives an output an image; ValueError if it gives maps."""
    model, options = loaded(run)
    if is_dense(model.config):
        expected = "one that gives an output an image, for commands"
        remedy = "call packpipe.predict, and class_map of each output"
        raise ValueError(checks.sentence("pooling of the model", "none", expected, remedy))
    return model, options


def loaded(run: Path) -> tuple[NaViT, RunOptions]:
    """Return a trained model, on this machine's device, and how it is asked.

    Args:
        run: a training's folder, or one that `packpipe.save_pretrained` wrote of a model with a
            head.

    Raises:
        ValueError: the model has no head, or nobody knows what its outputs are: of their softmax
            and their sigmoids one gives the probabilities, and the other one something like them.
    """
    is_there = run.is_dir()
    model, options = trained_model(str(run), "RUN") if is_there else load_model(run)
    if model.config.num_classes is None:
        expected = "a model with a head, which answers"
        remedy = "train one with packpipe train --init, or ask this for vectors by packpipe embed"
        raise ValueError(checks.sentence("RUN", f"{run}, an encoder", expected, remedy))
    if is_there and (run / CONFIG).exists():
        remedy = "write that of the training there, which save_pretrained does if it is passed"
        checks.choice(f"loss in {run / CONFIG}", meaning_of(run).loss, LOSSES, remedy)
    return model.to(device_of_this_rank()).eval(), options
