"""`packpipe`, the command line: its commands, with examples for their ``--help``.

Exit status: 0 if all is well, 1 if something is wrong with the data, 2 with the call, 130 after
Ctrl-C, 141 if nobody reads the output any more. An error is one line, unless ``--debug`` asks for
its traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

try:
    import typer  # an extra: the package itself runs without it
except ModuleNotFoundError:
    raise SystemExit("typer is not installed; pip install 'packpipe[cli]'") from None

from packpipe.cli import errors
from packpipe.cli.errors import name_of
from packpipe.cli.folder_commands import show, stats, verify
from packpipe.cli.model_commands import embed, eval_, export, predict, zero_shot
from packpipe.cli.pack_commands import pack, plan
from packpipe.cli.train_commands import bench, demo, train

_EXAMPLES: dict[Callable[..., None], tuple[str, ...]] = {
    pack: (
        "packpipe pack photos packed --num-workers 4",
        "packpipe pack train.parquet packed --seq-len 256 --resolution budget --max-tokens 128",
        "packpipe pack tokenized packed --seq-len 4096 --overflow split",
        "packpipe pack 's3://bucket/train/*.parquet' s3://bucket/rows --ray auto",
        "packpipe pack 'train/*.parquet' rows --part 3/100",
    ),
    plan: (
        "packpipe plan photos --seq-len 1024",
        "packpipe plan photos --sides 64 256 --drop-rate 0.5 --seq-len 256 --json",
    ),
    stats: (
        "packpipe stats packed",
        "packpipe stats packed --html report.html",
    ),
    show: (
        "packpipe show packed",
        "packpipe show packed 0 7 --output rows_0_and_7.png",
        "packpipe show photos 7 --augment three --crop-area 0.08 1 --max-tokens 128",
    ),
    verify: (
        "packpipe verify packed",
        "packpipe verify packed --source train.parquet --sample 1000",
    ),
    bench: (
        "packpipe bench photos --model Ti/16",
        "packpipe bench train.parquet --model B/16 --batch-size 16 --steps 30 --json",
    ),
    train: (
        "packpipe train pictures.parquet runs/navit --steps 5000",
        "packpipe train pictures.parquet runs/cropped --crop-area 0.08 1",
        "packpipe train photos runs/navit --val 0.1 --val-every 200 --patience 5",
        "packpipe train photos runs/tuned --init google/siglip2-base-patch16-naflex --freeze 6",
        "packpipe train pictures.parquet runs/vit --layout square",
        "torchrun --nproc-per-node 8 -m packpipe train pictures.parquet runs/navit",
    ),
    eval_: (
        "packpipe eval runs/navit test.parquet",
        "packpipe eval runs/navit photos --split test --budgets 64,128,256 --json",
    ),
    predict: (
        "packpipe predict runs/navit a.jpg b.png",
        "packpipe predict runs/navit holidays --top 1 --json",
    ),
    embed: (
        "packpipe embed runs/navit photos vectors.parquet",
        "packpipe embed google/siglip2-base-patch16-naflex photos vectors.parquet",
        "packpipe embed runs/navit photos maps.parquet --tokens --dtype float16",
        "packpipe embed runs/navit big.parquet vectors.parquet --dtype float16 --columns label",
    ),
    zero_shot: (
        "packpipe zero-shot google/siglip2-base-patch16-naflex photos",
        "packpipe zero-shot google/siglip2-base-patch16-naflex photos --classes names.txt --json",
    ),
    export: (
        "packpipe export runs/navit model.onnx",
        "packpipe export runs/navit small.onnx --max-tokens 64 --seq-len 256 --batch-size 4",
    ),
    demo: ("packpipe demo packpipe-demo",),
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `errors` prints them; with --debug Python's own traceback
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    del version  # its callback has printed it and ended the program
    errors.debug(debug)


# typer joins the lines of a paragraph, so every example is a paragraph of its own.
for _command, _lines in _EXAMPLES.items():
    app.command(name_of(_command), epilog="\n\n".join(["[b]Examples[/b]", *_lines]))(_command)

if __name__ == "__main__":
    app()
