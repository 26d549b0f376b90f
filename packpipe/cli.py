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


def _opened(source: Path) -> Dataset:
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
        raise typer.BadParameter(message, param_hint="--source") from error
