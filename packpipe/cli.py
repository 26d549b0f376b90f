"""The command line, `packpipe` (floor 3): each command is a view of a public call.

Exit status: 0 if all is well, 1 for something wrong with the data, 2 with the call, 130 if
somebody stopped it. An error is one line, unless ``--debug`` asks for its traceback.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit("typer is not installed; pip install 'packpipe[cli]'") from None

from packpipe.opening import open_source
from packpipe.telling import call_is_wrong, in_a_line, print_json, print_table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_Given = ParamSpec("_Given")
_debug = False

Source = Annotated[
    str,
    typer.Argument(
        help="A folder of images (one folder a class), a Parquet file or folder, what save_to_disk "
        "wrote, or a name that datasets.load_dataset knows."
    ),
]
Folder = Annotated[Path, typer.Argument(help="What pack wrote.")]
SeqLen = Annotated[int, typer.Option(help="Tokens a row.")]
PatchSize = Annotated[int | None, typer.Option(help="Pixels a side of a patch.  [16]")]
Sizes = Annotated[
    str | None,
    typer.Option(
        "--resolution", help="native: its own size. budget: the largest within --max-tokens."
    ),
]
Sides = Annotated[
    tuple[int, int] | None,
    typer.Option(help="Draw each image's size: the pixels of a square with a side between these."),
]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an image.")]
DropRate = Annotated[float | None, typer.Option(help="Share of an image's tokens that is dropped.")]
MaxSegments = Annotated[int | None, typer.Option(help="Most images or sequences a row.")]
Strategy = Annotated[str | None, typer.Option(help="Packing rule, such as ffd, bfd, balanced.")]
Overflow = Annotated[
    str | None,
    typer.Option(help="Of a sequence longer than a row: error, split, truncate, drop."),
]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Epoch = Annotated[int, typer.Option(help="Likewise.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def told(command: Callable[_Given, None]) -> Callable[_Given, None]:
    """Return a command whose errors are one line and an exit status."""

    @functools.wraps(command)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if _debug:
                raise
            typer.echo(f"packpipe {command.__name__}: {in_a_line(error)}", err=True)
            raise typer.Exit(2 if call_is_wrong(error) else 1) from None

    return run


def _print_version(asked: bool) -> None:
    if asked:
        import packpipe

        typer.echo(packpipe.__version__)
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Errors with their traceback.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Pack images of any size, or token sequences, into rows of exactly seq_len tokens.

    Exit status: 0 if all is well, 1 for something wrong with the data, 2 with the call.
    """
    global _debug
    _debug = debug
    del version


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "packpipe pack photos packed --num-workers 4\n\n"
    "packpipe pack train.parquet packed --seq-len 256 --resolution budget --max-tokens 128\n\n"
    "packpipe pack tokenized packed --seq-len 4096 --overflow split"
)
@told
def pack(
    source: Source,
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    seq_len: SeqLen = 1024,
    patch_size: PatchSize = None,
    resolution: Sizes = None,
    sides: Sides = None,
    max_tokens: MaxTokens = None,
    drop_rate: DropRate = None,
    max_segments: MaxSegments = None,
    strategy: Strategy = None,
    image_column: Annotated[str, typer.Option(help="Its name; auto finds the only one.")] = "auto",
    label_column: Annotated[str, typer.Option(help="Its name; auto finds it, none is none.")] = (
        "auto"
    ),
    image_root: Annotated[
        Path | None, typer.Option(help="The only folder that paths may lead into.")
    ] = None,
    token_column: Annotated[
        list[str] | None, typer.Option(help="A column of tokens; may be given again.")
    ] = None,
    overflow: Overflow = None,
    layout: Annotated[str | None, typer.Option(help="Of tokens: fixed or ragged.")] = None,
    pad_token_id: Annotated[int | None, typer.Option(help="What padding holds.")] = None,
    mask_first_label: Annotated[
        bool | None, typer.Option("--mask-first-label", help="Labels that nothing predicts.")
    ] = None,
    split: Split = "train",
    seed: Seed = 0,
    epoch: Epoch = 0,
    num_workers: Annotated[int, typer.Option(help="Processes that decode.")] = 1,
    on_error: Annotated[str, typer.Option(help="Of bad images: quarantine, raise.")] = (
        "quarantine"
    ),
    max_bad_fraction: Annotated[float, typer.Option(help="More rejects stop it.")] = 0.01,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Pack a dataset into a folder; stopped or killed, the same command goes on.

    Every example is in exactly one row, or in the rejects with its reason.
    """
    import packpipe

    options = _given(
        patch_size=patch_size,
        resolution=_resolution(resolution, sides),
        max_tokens=max_tokens,
        drop_rate=drop_rate,
        max_segments=max_segments,
        strategy=strategy,
        overflow=overflow,
        layout=layout,
        pad_token_id=pad_token_id,
        mask_first_label=mask_first_label,
    )
    where: dict[str, Any] = {
        "image_column": image_column,
        "label_column": None if label_column == "none" else label_column,
        "image_root": image_root,
        "token_columns": token_column or "auto",
        "seed": seed,
        "epoch": epoch,
        "num_workers": num_workers,
    }
    dataset = open_source(source, split)
    if dry_run:
        _print_plan(dataset, seq_len, where, options, as_json)
        return
    packpipe.pack(
        dataset,
        seq_len,
        **where,
        output=output,
        on_error=on_error,
        max_bad_fraction=max_bad_fraction,
        progress=sys.stderr.isatty(),
        **options,
    )
    found = packpipe.summarize(output)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(f"{output}", found.rows())


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "packpipe plan photos --seq-len 1024\n\n"
    "packpipe plan photos --sides 64 256 --drop-rate 0.5 --seq-len 256 --json"
)
@told
def plan(
    source: Source,
    seq_len: SeqLen = 1024,
    patch_size: PatchSize = None,
    resolution: Sizes = None,
    sides: Sides = None,
    max_tokens: MaxTokens = None,
    drop_rate: DropRate = None,
    max_segments: MaxSegments = None,
    strategy: Strategy = None,
    overflow: Overflow = None,
    split: Split = "train",
    seed: Seed = 0,
    epoch: Epoch = 0,
    as_json: AsJson = False,
) -> None:
    """Say how a dataset would be packed, from its sizes alone, and which seq_len suits it."""
    options = _given(
        patch_size=patch_size,
        resolution=_resolution(resolution, sides),
        max_tokens=max_tokens,
        drop_rate=drop_rate,
        max_segments=max_segments,
        strategy=strategy,
        overflow=overflow,
    )
    where: dict[str, Any] = {"seed": seed, "epoch": epoch}
    _print_plan(open_source(source, split), seq_len, where, options, as_json)


@app.command(
    epilog="[b]Examples[/b]\n\npackpipe stats packed\n\npackpipe stats packed --html report.html"
)
@told
def stats(
    folder: Folder,
    html: Annotated[Path | None, typer.Option(help="Write a report that opens offline.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what packed rows hold: padding, gap, segments a row, lengths, rejects."""
    import packpipe

    found = packpipe.summarize(folder)
    if html is not None:
        from packpipe.report import write_report

        write_report(found, html)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(str(folder), found.rows())
        if html is not None:
            typer.echo(f"report: {html}")


@app.command(
    epilog="[b]Examples[/b]\n\npackpipe show packed 0 3\n\npackpipe show packed 7 --output row.png"
)
@told
def show(
    folder: Folder,
    rows: Annotated[list[int] | None, typer.Argument(help="Numbers of rows.  [0]")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write.")] = Path(
        "rows.png"
    ),
    mask: Annotated[
        bool, typer.Option("--mask", help="Draw the first one's attention mask instead.")
    ] = False,
) -> None:
    """Draw packed rows: patches in place, segments coloured, padding hatched."""
    from packpipe.report import draw_rows

    draw_rows(folder, rows or [0], mask=mask).savefig(output, dpi=110)
    typer.echo(output)


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "packpipe verify packed\n\npackpipe verify packed --source train.parquet --sample 1000"
)
@told
def verify(
    folder: Folder,
    source: Annotated[
        str | None,
        typer.Option(
            help="The dataset that was packed. Some of its images are decoded again and compared; "
            "sequences all are."
        ),
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="How many images.")] = 100,
    split: Split = "train",
    as_json: AsJson = False,
) -> None:
    """Check every file, row and count of a packed folder, and that no example is lost."""
    import packpipe

    dataset = None if source is None else open_source(source, split)
    problems = packpipe.verify(folder, dataset, sample=sample)
    if as_json:
        print_json([problem._asdict() for problem in problems])
    else:
        for problem in problems:
            typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    if not as_json:
        typer.echo(f"{folder}: nothing is wrong")


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "packpipe bench photos --model Ti/16\n\n"
    "packpipe bench train.parquet --model B/16 --batch-size 16 --steps 30 --json"
)
@told
def bench(
    source: Source,
    model: Annotated[str, typer.Option(help="Ti, S, B, L or So400m, and the patch size.")] = (
        "Ti/16"
    ),
    seq_len: SeqLen = 1024,
    sides: Annotated[tuple[int, int], typer.Option(help="Of the images; see pack.")] = (64, 256),
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Measured, of each layout.")] = 10,
    num_workers: Annotated[int, typer.Option(min=0, help="Threads that decode.")] = 2,
    split: Split = "train",
    as_json: AsJson = False,
) -> None:
    """Train on your own images, packed and padded by turns: images/s, tokens/s, fill, MFU."""
    from packpipe.bench import compare_layouts

    found = compare_layouts(
        open_source(source, split),
        model=model,
        seq_len=seq_len,
        sides=sides,
        batch_size=batch_size,
        steps=steps,
        num_workers=num_workers,
    )
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(found)


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "packpipe train pictures.parquet runs/navit --steps 5000\n\n"
    "packpipe train pictures.parquet runs/vit --layout square\n\n"
    "torchrun --nproc-per-node 8 -m packpipe train pictures.parquet runs/navit"
)
@told
def train(
    source: Source,
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
    split: Split = "train",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained; train nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a NaViT on labelled images; stopped or killed, the same command goes on."""
    from packpipe.running import Layout, Training

    training = Training(
        open_source(source, split),
        layout=Layout(layout, seq_len, sides, drop_rate),
        model=model,
        shape={"position": position, "pooling": pooling, "attention": attention},
        batch_size=batch_size,
        options={
            "steps": steps,
            "learning_rate": learning_rate,
            "loss": loss,
            "precision": precision,
            "save_every": save_every,
            "log_every": log_every,
        },
        num_workers=num_workers,
        seed=seed,
    )
    if dry_run:
        found = training.described()
        if as_json:
            print_json(found)
        else:
            print_table(str(source), [(name, f"{value:,}") for name, value in found.items()])
    elif not training.run(output, tensorboard=tensorboard, as_json=as_json):
        raise KeyboardInterrupt


@app.command(epilog="[b]Example[/b]\n\npackpipe demo packpipe-demo")
@told
def demo(
    folder: Annotated[Path, typer.Argument(help="Everything goes into it, caches too.")] = Path(
        "packpipe-demo"
    ),
    seq_len: SeqLen = 1024,
    steps: Annotated[int, typer.Option(min=0, help="Training steps; 0 trains nothing.")] = 200,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that decode.")] = 2,
) -> None:
    """Pack the bundled images, draw some rows and train a small NaViT, in about a minute."""
    from packpipe.demo import prepare, run

    prepare(folder)
    run(folder.absolute(), seq_len, steps, num_workers)


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that were given: the others have defaults of their own."""
    return {name: value for name, value in options.items() if value is not None}


def _resolution(name: str | None, sides: tuple[int, int] | None) -> Any:
    if sides is None:
        return name
    if name is not None:
        raise ValueError(f"--sides is {sides}, expected none beside --resolution; pass one of them")
    from packpipe import Constant, Side, Uniform

    low, high = sides
    return Side(Uniform(low, high) if low != high else Constant(high))


def _print_plan(
    dataset: Any, seq_len: int, where: dict[str, Any], options: dict[str, Any], as_json: bool
) -> None:
    from packpipe.dataset import contents_of
    from packpipe.seq_lens import suggest_seq_len
    from packpipe.shards import in_bytes

    planned = contents_of(dataset, seq_len, **where, options=options).plan()
    quality, size = planned.quality, planned.stored_bytes([range(planned.num_packs)])
    if as_json:
        figures = {"fill": quality.fill, "padding": quality.padding, "gap": quality.gap}
        counts = {"read": len(dataset), **planned.counts(planned.rejects)}
        counts["rejected"] = len(planned.rejects)
        print_json({"seq_len": seq_len, "counts": counts, **figures, "bytes": size})
        return
    found = [*quality.rows(), ("rejected", f"{len(planned.rejects):,}"), ("rows", in_bytes(size))]
    print_table(planned.what, found)
    if len(planned.seq_lens):
        typer.echo(f"\nother seq_len for these token counts:\n{suggest_seq_len(planned.seq_lens)}")


if __name__ == "__main__":
    app()
