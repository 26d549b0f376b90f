"""The commands eval, predict, embed, zero-shot and export: what is done with a trained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packpipe import checks
from packpipe.cli.errors import one_line_errors
from packpipe.cli.open_source import file_of, naming_files, open_source, say_rejected, with_files
from packpipe.cli.options import (
    AsJson,
    CacheBytes,
    ImageColumn,
    LabelColumn,
    MaskColumn,
    MaxBadFraction,
    Source,
    Split,
)
from packpipe.cli.output import print_json, print_table, saying

if TYPE_CHECKING:
    from packpipe.training.evaluation import Measures

Run = Annotated[
    Path, typer.Argument(help="A folder that train wrote, or save_pretrained of a whole model.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows a step.")]
NumWorkers = Annotated[int, typer.Option(min=0, help="Threads that decode ahead.")]
Precision = Annotated[
    str, typer.Option(help="float32, bfloat16, or auto: bfloat16 on a GPU alone.")
]


@one_line_errors
def eval_(
    run: Run,
    source: Source,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Most tokens of an image, by turns, such as 64,128,256.  \\[as in validation]"
        ),
    ] = None,
    batch_size: BatchSize = 8,
    num_workers: NumWorkers = 4,
    precision: Precision = "auto",
    max_bad_fraction: MaxBadFraction = 0.01,
    cache_bytes: CacheBytes = None,
    image_column: ImageColumn = "auto",
    label_column: LabelColumn = "auto",
    mask_column: MaskColumn = None,
    split: Split = "train",
    as_json: AsJson = False,
) -> None:
    """Measure a trained model on labelled images: accuracy, loss, calibration error (ECE).

    Of a regression, its mean absolute error; of masks, the mean IoU; of several labels an image,
    the mean average precision (mAP).
    """
    with saying("importing torch"):
        from packpipe.cli.asking import evaluate
        from packpipe.cli.labels import chosen

    asked = None if budgets is None else _numbers(budgets)
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    columns |= {"mask_column": mask_column}
    found = open_source(source, split, **columns, rows=True, texts=True, cache_bytes=cache_bytes)
    dataset = chosen(found, **columns)
    with naming_files(dataset), saying(f"measuring {run} on {source}"):
        found, rejected = evaluate(
            run,
            dataset,
            asked,
            batch_size=batch_size,
            num_workers=num_workers,
            precision=precision,
            max_bad_fraction=max_bad_fraction,
            mask_column=mask_column,
        )
    say_rejected(with_files(dataset, rejected))
    if as_json:
        lines = [{"max_tokens": tokens, **measured._asdict()} for tokens, measured in found]
        print_json({"run": str(run), "source": source, "budgets": lines})
        return
    rows = [
        (
            "as packed" if tokens is None else f"{tokens} tokens",
            _figures(measured),
        )
        for tokens, measured in found
    ]
    print_table(f"{run} on {found[0][1].num_images:,} images of {source}", rows)


@one_line_errors
def predict(
    run: Run,
    images: Annotated[list[str], typer.Argument(help="Files, also behind a scheme; or folders.")],
    top: Annotated[int, typer.Option(min=1, help="Classes an image, the likeliest.")] = 5,
    batch_size: BatchSize = 8,
    num_workers: NumWorkers = 4,
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Ask a trained model for the classes of images; status 1 if one cannot be read."""
    with saying("importing torch"):
        from packpipe.cli.asking import predictions

    paths = [path for image in images for path in _files(image)]
    with saying(f"asking {run} about {len(paths):,} images"):
        found, rejects = predictions(
            run,
            paths,
            top=top,
            batch_size=batch_size,
            num_workers=num_workers,
            precision=precision,
        )
    if as_json:
        print_json(
            {
                "predictions": [
                    {
                        "image": one.image,
                        "classes": [{"name": n, one.says: p} for n, p in one.classes],
                    }
                    for one in found
                ],
                "rejects": [
                    {"image": image, "reason": reject.reason, "exception": reject.exception}
                    for image, reject in rejects
                ],
            }
        )
    elif found:
        texts = [(n.image, "  ".join(f"{name} {p:.3f}" for name, p in n.classes)) for n in found]
        print_table(str(run), [(checks.plain(image), said) for image, said in texts])
    if rejects:
        for image, reject in rejects:
            typer.echo(checks.plain(f"{image}: {reject.reason}: {reject.exception}"), err=True)
        raise typer.Exit(1)


@one_line_errors
def embed(
    run: Annotated[
        str,
        typer.Argument(
            help="A folder that train wrote, or of a pretrained encoder, or its name on the Hub."
        ),
    ],
    source: Source,
    output: Annotated[Path, typer.Argument(dir_okay=False, help="A Parquet file.")],
    columns: Annotated[
        str | None,
        typer.Option(
            help="Kept of the source, such as label,path.  \\[all but images; of files, their "
            "path; of packed rows labels]"
        ),
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="The vectors of each image's tokens, in place of one.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    part_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images that a kill may cost.  [4096; 256 with --tokens]"),
    ] = None,
    batch_size: BatchSize = 8,
    num_workers: NumWorkers = 4,
    precision: Precision = "auto",
    max_bad_fraction: MaxBadFraction = 0.01,
    cache_bytes: CacheBytes = None,
    image_column: ImageColumn = "auto",
    split: Split = "train",
    as_json: AsJson = False,
) -> None:
    """Write the features of each image to a Parquet file; killed, the same command goes on.

    Images of packed rows are taken as they were packed.
    """
    with saying("importing torch"):
        from packpipe.cli.embedding import embed as write_vectors
        from packpipe.cli.embedding import rejects_path
        from packpipe.cli.labels import with_one_image
        from packpipe.cli.measured import num_images

    opened = open_source(
        source, split, image_column=image_column, rows=True, cache_bytes=cache_bytes
    )
    dataset = with_one_image(opened, image_column)
    with naming_files(dataset):
        rejects = write_vectors(
            run,
            dataset,
            output,
            columns=None if columns is None else columns.split(","),
            tokens=tokens,
            dtype=dtype,
            part_size=part_size,
            batch_size=batch_size,
            num_workers=num_workers,
            precision=precision,
            max_bad_fraction=max_bad_fraction,
        )
    number = num_images(dataset) - len(rejects)
    if as_json:
        print_json({"output": str(output), "images": number, "rejects": len(rejects)})
    else:
        what = "images' tokens" if tokens else "vectors"
        typer.echo(f"{number:,} {what} are in {checks.plain(output)}")
        typer.echo(f"{len(rejects):,} rejects are in {checks.plain(rejects_path(output))}")


@one_line_errors
def zero_shot(
    model: Annotated[
        str, typer.Argument(help="A folder of a SigLIP with both towers, or its name on the Hub.")
    ],
    source: Source,
    classes: Annotated[
        Path | None,
        typer.Option(help="A file of the classes' names, a line each.  \\[the labels' own]"),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="A text with {} for the name; of several the mean.  [This is a photo of {}.]"
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes an image, without labels.")] = 1,
    batch_size: BatchSize = 8,
    num_workers: NumWorkers = 4,
    precision: Precision = "auto",
    max_bad_fraction: MaxBadFraction = 0.01,
    image_column: ImageColumn = "auto",
    label_column: LabelColumn = "auto",
    split: Split = "train",
    as_json: AsJson = False,
) -> None:
    """Classify images by the names of classes alone: accuracy, or without labels their classes.

    The classes are in the order of the labels' numbers: of folders, by name.
    """
    with saying("importing torch"):
        from packpipe.cli.labels import chosen, names_in
        from packpipe.cli.zero_shot import TEMPLATE
        from packpipe.cli.zero_shot import zero_shot as ask

    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    dataset = chosen(open_source(source, split, **columns), **columns)
    with naming_files(dataset), saying(f"asking {model} about {source}"):
        found = ask(
            model,
            dataset,
            None if classes is None else names_in(classes),
            template or [TEMPLATE],
            batch_size=batch_size,
            num_workers=num_workers,
            precision=precision,
            max_bad_fraction=max_bad_fraction,
        )
    say_rejected(with_files(dataset, found.rejects))
    title, said = f"{model} on {source}, zero-shot", {"model": model, "source": source}
    if found.accuracy is not None:
        counts = {"images": found.num_labelled, "classes": len(found.names)}
        if as_json:
            print_json({**said, "accuracy": found.accuracy, **counts})
        else:
            rows = [(name, f"{number:,}") for name, number in counts.items()]
            print_table(title, [("accuracy", f"{found.accuracy:.4f}"), *rows])
        return
    indices = found.example_index.tolist()
    images = [file_of(dataset, number) or f"example {number}" for number in indices]
    best = list(zip(images, found.best(top), strict=True))
    if as_json:
        lines = [
            {"image": image, "classes": [{"name": name, "share": share} for name, share in ranked]}
            for image, ranked in best
        ]
        print_json({**said, "images": lines})
    else:
        texts = ["  ".join(f"{name} {share:.3f}" for name, share in ranked) for _, ranked in best]
        print_table(title, list(zip(map(checks.plain, images), texts, strict=True)))


@one_line_errors
def export(
    run: Run,
    output: Annotated[Path, typer.Argument(dir_okay=False, help="An ONNX file.")],
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens a row.  \\[as in training]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an image.  \\[as in validation]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a call.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Write a trained model as an ONNX file, once onnxruntime gives the model's outputs with it."""
    with saying("importing torch"):
        from packpipe.cli.asking import loaded
        from packpipe.training.export import export_onnx

    model, options = loaded(run)
    model = model.cpu()
    asked = options if max_tokens is None else options.at(max_tokens)
    seq_len = asked.packing.seq_len if seq_len is None else seq_len
    with saying(f"writing {output}, and comparing its outputs with the model's"):
        difference = export_onnx(model, asked, output, batch_size=batch_size, seq_len=seq_len)
    written = replace(asked, packing=replace(asked.packing, seq_len=seq_len))
    shape = {"seq_len": seq_len, "max_tokens": written.max_tokens, "batch_size": batch_size}
    if as_json:
        print_json({"run": str(run), "output": str(output), **shape, "difference": difference})
        return
    rows = [
        ("rows", f"{batch_size} of {seq_len} tokens a call"),
        ("images", f"at most {written.max_tokens} tokens each"),
        ("checked", f"onnxruntime's outputs are the model's to {difference:.0e} of the largest"),
    ]
    print_table(str(output), rows)


def _files(image: str) -> list[str]:
    """Return a file, or the images of a folder."""
    from packpipe.cli.image_folder import files_of

    if not Path(image).is_dir():
        return [image]
    found = files_of(Path(image)).images
    if not found:
        remedy = "pass files, or a folder of them"
        raise ValueError(checks.sentence("IMAGES", f"{image}, without any image", "images", remedy))
    return found


def _figures(measured: Measures) -> str:
    """Return the figures of a model that it has, ready to print."""
    named = {"accuracy": measured.accuracy, "error": measured.error, "loss": measured.loss}
    named |= {"ECE": measured.ece, "IoU": measured.iou, "mAP": measured.mean_ap}
    return "  ".join(f"{name} {value:.4f}" for name, value in named.items() if value is not None)


def _numbers(budgets: str) -> list[int]:
    try:
        return [int(number) for number in budgets.split(",")]
    except ValueError:
        expected, remedy = "whole numbers and commas", "such as 64,128,256"
        raise ValueError(checks.sentence("budgets", budgets, expected, remedy)) from None
