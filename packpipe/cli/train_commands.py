"""The commands bench, train and demo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from packpipe import checks
from packpipe.cli.errors import one_line_errors
from packpipe.cli.open_source import is_packed, manifest_in, naming_files, open_source, say_rejected
from packpipe.cli.options import (
    AsJson,
    CacheBytes,
    CropArea,
    CropAspect,
    DamagedScans,
    ImageColumn,
    LabelColumn,
    MaskColumn,
    MaxBadFraction,
    Pixels,
    Profiles,
    SeqLen,
    Source,
    Split,
    ValueRange,
    crop_of,
    given,
)
from packpipe.cli.output import print_json, print_table, say_what_is_done_once, saying
from packpipe.cli.validation_source import check_validates, validation_of

# Options of `train` that decide how images become rows: packed rows have their own.
_OF_IMAGES = (
    *("layout", "seq_len", "sides", "crop_area", "crop_aspect", "drop_rate"),
    *("profiles", "damaged_scans", "pixels", "value_range", "image_column", "label_column"),
    *("mask_column", "target_stride", "classes", "weight_column"),
)
# Those that say how images are measured: where none are, there are rows to be measured, if any.
_OF_MEASURED_IMAGES = ("val_tokens", "max_bad_fraction")
# Those that a trained model brings: its shape, and how images become rows for it.
_OF_SHAPE = ("model", "position", "pooling")
_OF_ENCODER = ("layout", "profiles", "damaged_scans", "pixels", "value_range", "val_tokens")


@one_line_errors
def bench(
    source: Source,
    model: Annotated[str, typer.Option(help="Ti, S, B, L or So400m, and the patch size.")] = (
        "Ti/16"
    ),
    seq_len: SeqLen = 1024,
    sides: Annotated[tuple[int, int], typer.Option(help="Of the images; see pack.")] = (64, 256),
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows a step.  [8 on a GPU, 1 on a CPU]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Measured, of each layout.  [10, or what 6 s hold]")
    ] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Threads that decode.")] = 2,
    max_bad_fraction: MaxBadFraction = 0.01,
    split: Split = "train",
    as_json: AsJson = False,
) -> None:
    """Train on your own images, packed and padded by turns, and say what an epoch takes."""
    with saying("importing torch", after=0):  # the first seconds, in which all else is silent
        from packpipe.cli.bench import compare_layouts  # imported by commands that need it

    say_what_is_done_once()
    dataset = open_source(source, split)
    with naming_files(dataset):
        found = compare_layouts(
            dataset,
            model=model,
            seq_len=seq_len,
            sides=sides,
            batch_size=batch_size,
            steps=steps,
            num_workers=num_workers,
            max_bad_fraction=max_bad_fraction,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(found)


@one_line_errors
def train(
    context: typer.Context,
    source: Source,
    output: Annotated[Path, typer.Argument(file_okay=False, help="Checkpoints, log and plot.")],
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 1000,
    model: Annotated[str, typer.Option(help="Ti, S, B, L or So400m, and the patch size.")] = "S/16",
    init: Annotated[
        str | None,
        typer.Option(
            help="Begin with a trained model and a new head: a folder that train wrote, or of a "
            "pretrained encoder, or its name on the Hub. Shape and sizes of images are its own."
        ),
    ] = None,
    freeze: Annotated[
        int,
        typer.Option(min=0, help="First blocks of --init that keep their weights, with positions."),
    ] = 0,
    layout: Annotated[
        str,
        typer.Option(
            help="packed: NaViT. padded: one image a row. bucketed: the same, rows cut to like "
            "lengths. square: a plain ViT."
        ),
    ] = "packed",
    seq_len: Annotated[
        int, typer.Option(help="Tokens a row, of packed; with --init as there, unless given.")
    ] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step of each rank.")] = 8,
    sides: Annotated[
        tuple[int, int],
        typer.Option(
            help="Images are of as many pixels as "
            "squares of a side drawn between these; square takes the second. With --init none is "
            "drawn, unless given."
        ),
    ] = (64, 256),
    crop_area: CropArea = None,
    crop_aspect: CropAspect = None,
    drop_rate: Annotated[float, typer.Option(help="Share of tokens dropped, of packed.")] = 0.0,
    profiles: Profiles = None,
    damaged_scans: DamagedScans = None,
    pixels: Pixels = None,
    value_range: ValueRange = None,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Batches whose gradients a step adds up.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 8e-4,
    layer_decay: Annotated[
        float, typer.Option(help="Of the rate, from each layer to the one before it; 1: none.")
    ] = 1.0,
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of gradients; 0: any.")] = 1.0,
    ema: Annotated[
        float | None,
        typer.Option(
            help="Average the weights, which then are validated and used; such as 0.999, the share "
            "that a step keeps."
        ),
    ] = None,
    drop_path: Annotated[
        float, typer.Option(help="Share of images that go around the last block's parts; 0: none.")
    ] = 0.0,
    loss: Annotated[str, typer.Option(help="sigmoid, softmax, mse or l1.")] = "sigmoid",
    label_smoothing: Annotated[
        float, typer.Option(help="Share of a target spread over all classes, of softmax.")
    ] = 0.0,
    augment: Annotated[
        str | None,
        typer.Option(help="three: flips, grey or solarized, colours. inception: flips."),
    ] = None,
    mixup: Annotated[
        float, typer.Option(help="Neighbours in a row are blended, by Beta(mixup, mixup); 0: none.")
    ] = 0.0,
    cutmix: Annotated[
        float, typer.Option(help="They swap a box of tokens, by Beta(cutmix, cutmix); 0: none.")
    ] = 0.0,
    position: Annotated[str, typer.Option(help="Position embedding.")] = "factorised_absolute_sum",
    pooling: Annotated[str, typer.Option(help="Of an image's tokens.")] = "attention",
    attention: Annotated[str, typer.Option(help="Backend; auto is the fastest.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    num_workers: Annotated[int, typer.Option(min=0, help="Threads that decode ahead.")] = 4,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 1000,
    log_every: Annotated[
        int, typer.Option(min=1, help="Steps of a line, whose figures are means over them.")
    ] = 10,
    val: Annotated[
        str | None,
        typer.Option(
            help="Validate: the share of each class that is held out, such as 0.1, or a source of "
            "other images with the same classes."
        ),
    ] = None,
    val_split: Annotated[
        str | None,
        typer.Option(
            help="Split of the source of --val.  \\[train; of SOURCE itself validation or test]"
        ),
    ] = None,
    val_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between validations.  [100]")
    ] = None,
    val_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most tokens of a validation image.  \\[those of the largest square]"
        ),
    ] = None,
    keep_last: Annotated[int, typer.Option(min=2, help="Last checkpoints that are kept.")] = 2,
    keep_best: Annotated[
        int | None,
        typer.Option(min=0, help="Checkpoints kept of the lowest validation losses.  [1]"),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="End after so many validations without a lower loss."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    tensorboard: Annotated[bool, typer.Option(help="Log for TensorBoard, too.")] = False,
    wandb: Annotated[
        str | None, typer.Option(help="Log to this project of Weights & Biases, too.")
    ] = None,
    max_bad_fraction: MaxBadFraction = 0.01,
    cache_bytes: CacheBytes = None,
    image_column: ImageColumn = "auto",
    label_column: LabelColumn = "auto",
    mask_column: MaskColumn = None,
    target_stride: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels a side of what a mask is told by.  \\[a patch]"),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Of masks: how many, or a file of their names, a line each, 0 first."),
    ] = None,
    weight_column: Annotated[
        str | None, typer.Option(help="Name of the column of what an image counts in the loss.")
    ] = None,
    class_weights: Annotated[
        str | None,
        typer.Option(
            help="What a class counts in the loss: balanced, or a number for each, such as 1,2.5,1."
        ),
    ] = None,
    split: Split = "train",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained; train nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a NaViT on images with labels or masks, or on packed rows.

    Stopped, the same command resumes.
    """
    with saying("importing torch"):
        from datasets import Dataset

        from packpipe.building.pack import manifest as record_of
        from packpipe.cli.compared import class_weights_of, compared_of
        from packpipe.cli.labels import chosen
        from packpipe.cli.layouts import EncoderLayout, Layout
        from packpipe.cli.starting import start_of
        from packpipe.cli.trained_images import TrainedImages
        from packpipe.cli.trained_rows import TrainedRows
        from packpipe.cli.training_run import Training
        from packpipe.images.remote import is_remote
        from packpipe.model.config import NaViTConfig
        from packpipe.rows.own_columns import holds_rows

    say_what_is_done_once()
    checks.local_path("OUTPUT", output)
    validation = {
        "val_split": val_split,
        "val_every": val_every,
        "val_tokens": val_tokens,
        "keep_best": keep_best,
        "patience": patience,
    }
    check_validates(
        val, {f"--{name.replace('_', '-')}": value for name, value in validation.items()}
    )
    compared = compared_of(mask_column, target_stride, classes, weight_column)
    if compared.mask is not None:
        expected = f"left out beside --mask-column {mask_column}"
        _refuse(context, ("label_column", "pooling"), expected, "a mask is of the tokens' cells")
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    columns |= {"mask_column": mask_column, "weight_column": weight_column}
    found = open_source(source, split, **columns, rows=True, texts=True, cache_bytes=cache_bytes)
    dataset = chosen(found, **columns)
    are_rows = holds_rows(dataset.column_names)
    if init is not None:
        own = _OF_SHAPE if are_rows else (*_OF_SHAPE, *_OF_ENCODER)
        expected = f"left out beside --init {init}, which has its own"
        _refuse(context, own, expected, "drop it, or train without --init")
    elif freeze:
        expected, remedy = "0 without --init", "pass --init: weights that are drawn have to learn"
        raise ValueError(checks.sentence("--freeze", freeze, expected, remedy))
    start = start_of(init, output, dense=compared.mask is not None)
    shape = NaViTConfig.preset(model, num_classes=None) if start is None else start.model.config
    patch_size = shape.patch_size
    measured = (
        None
        if val is None
        else validation_of(
            val, val_split, dataset=dataset, source=source, split=split, columns=columns
        )
    )
    where: dict[str, Any] = {"num_workers": num_workers, "seed": seed}
    where |= {"val": measured, "val_tokens": val_tokens, "loss": loss}
    data: TrainedImages | TrainedRows
    if are_rows:
        measures_images = isinstance(measured, Dataset) and not holds_rows(measured.column_names)
        more = () if measures_images else _OF_MEASURED_IMAGES
        expected = f"left out, since the rows in {source} are packed already"
        remedy = "train on their images, or pack them with it"
        _refuse(context, (*_OF_IMAGES, *more), expected, remedy)
        are_stored = is_remote(source) and is_packed(source)
        data = TrainedRows(
            dataset,
            record_of(dataset) if are_stored else manifest_in(Path(source)),
            patch_size,
            max_bad_fraction=max_bad_fraction,
            **where,
        )
    elif start is not None:
        encoder_layout = EncoderLayout(
            start.packing,
            seq_len if _is_given(context, "seq_len") else None,
            sides if _is_given(context, "sides") else None,
            drop_rate,
            max_bad_fraction,
            crop_of(crop_area, crop_aspect),
        )
        data = TrainedImages(dataset, encoder_layout, patch_size, compared=compared, **where)
    else:
        layout_of_images = Layout(
            layout,
            seq_len,
            sides,
            drop_rate,
            max_bad_fraction,
            pixels=given(
                profiles=profiles,
                damaged_scans=damaged_scans,
                pixels=pixels,
                value_range=value_range,
            ),
            crop=crop_of(crop_area, crop_aspect),
            prefix_tokens=shape.prefix_tokens,
        )
        data = TrainedImages(dataset, layout_of_images, patch_size, compared=compared, **where)
    training = Training(
        data,
        model=model,
        shape={"position": position, "pooling": pooling, "attention": attention},
        batch_size=batch_size,
        options={
            "steps": steps,
            "accumulate": accumulate,
            "learning_rate": learning_rate,
            "layer_decay": layer_decay,
            "freeze": freeze,
            "clip": clip or None,
            "ema": ema,
            "drop_path": drop_path,
            "loss": loss,
            "label_smoothing": label_smoothing,
            "class_weights": class_weights_of(class_weights),
            "precision": precision,
            "save_every": save_every,
            "log_every": log_every,
            "val_every": 100 if val is not None and val_every is None else val_every,
            "keep_last": keep_last,
            "keep_best": 1 if keep_best is None else keep_best,
            "patience": patience,
        },
        num_workers=num_workers,
        seed=seed,
        augment=augment,
        mixing={"mixup": mixup, "cutmix": cutmix},
        start=start,
    )
    with naming_files(data.labelled.trained):
        if os.environ.get("RANK", "0") == "0":
            say_rejected(data.rejected)
        if not dry_run:
            # Ctrl-C, and a checkpoint is saved: `one_line_errors` says so, and exits with 130.
            if not training.run(output, tensorboard=tensorboard, wandb=wandb, as_json=as_json):
                raise KeyboardInterrupt
            return
        found = training.described()
    if as_json:
        print_json(found)
    else:
        print_table(source, [(name, f"{value:,}") for name, value in found.items()])


def _is_given(context: typer.Context, name: str) -> bool:
    """Return whether an option was given, be it at its default."""
    given = context.get_parameter_source(name)
    return given is not None and given.name == "COMMANDLINE"


def _refuse(context: typer.Context, names: tuple[str, ...], expected: str, remedy: str) -> None:
    """Raise ValueError if one of these options was given."""
    for name in names:
        if _is_given(context, name):
            option, value = f"--{name.replace('_', '-')}", context.params[name]
            raise ValueError(checks.sentence(option, value, expected, remedy))


@one_line_errors
def demo(
    folder: Annotated[Path, typer.Argument(help="Everything goes into it, caches too.")] = Path(
        "packpipe-demo"
    ),
    seq_len: SeqLen = 1024,
    steps: Annotated[int, typer.Option(min=0, help="Training steps; 0 trains nothing.")] = 200,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that decode.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Pack the bundled images, draw some rows and train a small NaViT, in about a minute."""
    from packpipe.demo import prepare, run

    prepare(folder)  # before `run` imports the packages whose caches it moves
    run(folder.absolute(), seq_len, steps, num_workers, as_json=as_json)
