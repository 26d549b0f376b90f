"""The command line, `packpipe` (floor 3)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit("typer is not installed; pip install 'packpipe[cli]'") from None

if TYPE_CHECKING:
    from datasets import Dataset

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Pack images of any size into rows of exactly seq_len tokens.

    Exit status: 0 if all is well, 1 for something wrong with the data, 2 with the call.
    """


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="What pack wrote.")],
    source: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="The dataset that was packed: a Parquet file, a folder of images, or what "
            "save_to_disk wrote. Some of its images are decoded again and compared.",
        ),
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="How many of them.")] = 100,
) -> None:
    """Check every file, row and count of a packed folder, and that no example is lost.

    Examples: packpipe verify packed; packpipe verify packed --source train.parquet --sample 1000
    """
    import packpipe

    dataset = None if source is None else _opened(source)
    problems = packpipe.verify(folder, dataset, sample=sample)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{folder}: nothing is wrong")


@app.command()
def train(
    source: Annotated[
        Path,
        typer.Argument(
            exists=True, help="Images and labels: a Parquet file, a folder, or save_to_disk's."
        ),
    ],
    output: Annotated[Path, typer.Argument(file_okay=False, help="Checkpoints, log and plot.")],
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 1000,
    model: Annotated[str, typer.Option(help="Ti, S, B, L or So400m, and the patch size.")] = "S/16",
    layout: Annotated[
        str,
        typer.Option(
            help="packed: NaViT. padded: one image a row. bucketed: the same, rows cut to like "
            "lengths. square: a plain ViT."
        ),
    ] = "packed",
    seq_len: Annotated[int, typer.Option(help="Tokens a row, of packed.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step of each rank.")] = 8,
    sides: Annotated[
        tuple[int, int],
        typer.Option(
            help="Images are of as many pixels as "
            "squares of a side drawn between these; square takes the second."
        ),
    ] = (64, 256),
    drop_rate: Annotated[float, typer.Option(help="Share of tokens dropped, of packed.")] = 0.0,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 8e-4,
    loss: Annotated[str, typer.Option(help="sigmoid or softmax.")] = "sigmoid",
    position: Annotated[str, typer.Option(help="Position embedding.")] = "factorised_absolute_sum",
    pooling: Annotated[str, typer.Option(help="Of an image's tokens.")] = "attention",
    attention: Annotated[str, typer.Option(help="Backend; auto is the fastest.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    num_workers: Annotated[int, typer.Option(min=0, help="Threads that decode ahead.")] = 4,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 1000,
    log_every: Annotated[int, typer.Option(min=1, help="Steps a record speaks of.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and resolutions.")] = 0,
    tensorboard: Annotated[bool, typer.Option(help="Log for TensorBoard, too.")] = False,
) -> None:
    """Train a NaViT on a dataset of labelled images; started again, it goes on.

    Examples: packpipe train pictures.parquet runs/navit --steps 5000; packpipe train
    pictures.parquet runs/vit --layout square; torchrun --nproc-per-node 8 -m packpipe.cli train ...
    """
    from packpipe.running import Layout, run_training

    dataset = _opened(source, "SOURCE")
    try:
        run_training(
            dataset,
            output,
            layout=Layout(layout, seq_len, sides, drop_rate),
            model=model,
            shape={"position": position, "pooling": pooling, "attention": attention},
            batch_size=batch_size,
            training={
                "steps": steps,
                "learning_rate": learning_rate,
                "loss": loss,
                "precision": precision,
                "save_every": save_every,
                "log_every": log_every,
            },
            num_workers=num_workers,
            seed=seed,
            tensorboard=tensorboard,
        )
    except (TypeError, ValueError) as error:
        typer.echo(f"packpipe train: {error}", err=True)
        raise typer.Exit(2) from None


def _opened(source: Path, name: str = "--source") -> Dataset:
    import datasets

    datasets.disable_progress_bars()
    try:
        if source.is_file():
            return datasets.load_dataset("parquet", data_files=str(source), split="train")
        if (source / "state.json").is_file():
            return datasets.load_from_disk(str(source))
        return datasets.load_dataset("imagefolder", data_dir=str(source), split="train")
    except Exception as error:
        message = f"datasets cannot load {source}: {error}"
        raise typer.BadParameter(message, param_hint=name) from error
