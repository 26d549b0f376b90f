"""Packs the bundled images, prints figures, draws some rows and trains a small NaViT.

``python -m packpipe.demo [FOLDER]`` writes everything, caches included, into one folder.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from packpipe import checks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Training stops here on a slow or busy machine, whatever steps are left.
TRAINING_SECONDS = 55
# What the table calls figures whose names do not say it.
_SAID = {
    "packs": "rows",
    "shrunk": "images shrunk to fit",
    "padding": "padding, packed",
    "padding_alone": "padding, one image a row",
    "padding_batches": "padding, batches of 8 padded",
    "images_per_s": "images/s, decoded and written",
}


def main(arguments: list[str] | None = None) -> None:
    """Pack the bundled images, print the table, draw some rows and train a small NaViT."""
    parser = argparse.ArgumentParser(prog="python -m packpipe.demo", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("packpipe-demo"))
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a row (1024)")
    parser.add_argument("--steps", type=int, default=200, help="training steps; 0 trains nothing")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    prepare(options.folder)
    try:
        run(options.folder.absolute(), options.seq_len, options.steps, options.num_workers)
    except BrokenPipeError:
        from packpipe.cli.output import nobody_reads

        if not nobody_reads():
            raise
        raise SystemExit(141) from None  # as the command's


def prepare(folder: Path) -> None:
    """Put caches into folder. Call it first: packages read these variables when imported."""
    folder = checks.local_path("FOLDER", folder).absolute()
    os.environ.setdefault("HF_HOME", str(folder / "cache"))
    os.environ.setdefault("MPLCONFIGDIR", str(folder / "cache" / "matplotlib"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache" / "inductor"))


def run(folder: Path, seq_len: int, steps: int, num_workers: int, *, as_json: bool = False) -> None:
    """Pack the bundled images, print figures, draw some rows and train; 0 steps train nothing.

    As JSON the figures are one object; what is meant for a person goes to stderr then.
    """
    import datasets

    import packpipe
    from packpipe import samples
    from packpipe.cli.output import console as console_of
    from packpipe.cli.output import print_json, say_what_is_done_once, saying, without_bars
    from packpipe.plots import plot_rows, rows_of_many

    console = console_of(stderr=as_json)
    say_what_is_done_once()
    with without_bars(), saying("reading the bundled images"):
        images = datasets.load_dataset(
            "imagefolder", data_dir=str(samples.images_folder()), split="train"
        ).class_encode_column("label")
    # Compile the kernels first, so that the rate below is the rate of the work.
    packpipe.plan_epoch([[16, 16]], packpipe.PackConfig(seq_len=seq_len))

    started = time.perf_counter()
    output = folder / f"packed-{seq_len}"
    fresh = not output.exists()  # else `pack` opens what is there, and a rate would mean nothing
    packed = packpipe.pack(images, seq_len, output=output, num_workers=num_workers)
    seconds = time.perf_counter() - started if fresh else None

    rows = packpipe.read_rows(packed)
    # For the table: batches of a padded ViT take images as they come.
    in_source_order = rows.seq_lens[np.argsort(rows.example_index)]
    figures = _figures(packpipe.manifest(packed), in_source_order, seconds)
    console.print(_table(figures, seq_len))
    chosen = rows_of_many(rows.num_segments)
    picture = folder / "rows.png"
    names = images.features["label"].names
    drawn = plot_rows(packpipe.read_rows(packed, chosen), class_names=names, numbers=chosen)
    drawn.savefig(picture, dpi=100)
    console.print(f"rows     {output}\npicture  {picture}")
    figures |= {"folder": str(output), "picture": str(picture)}
    if steps:
        num_classes = images.features["label"].num_classes
        figures["training"] = _train(packed, num_classes, steps, folder, console)
    if as_json:
        print_json(figures)


def _figures(
    manifest: dict[str, Any], seq_lens: NDArray[np.int32], seconds: float | None
) -> dict[str, Any]:
    """Return a build's figures, and the padding if the same images were not packed."""
    counts, seq_len = manifest["counts"], manifest["config"]["seq_len"]
    batches = [seq_lens[i : i + 8] for i in range(0, len(seq_lens), 8)]
    slots_by_batch = sum(len(batch) * int(batch.max()) for batch in batches)
    return {
        "images": counts["packed"],
        "rejected": counts["rejected"],
        "shrunk": counts["shrunk"],
        "tokens": counts["tokens"],
        "packs": counts["packs"],
        "bound": counts["bound"],
        "padding": 1 - manifest["fill"],
        "padding_alone": 1 - counts["tokens"] / (counts["packed"] * seq_len),
        "padding_batches": 1 - counts["tokens"] / slots_by_batch,
        "images_per_s": None if seconds is None else counts["packed"] / seconds,
    }


def _table(figures: dict[str, Any], seq_len: int) -> Table:
    """Return a table of `_figures`."""
    from rich.table import Table

    read = figures["images"] + figures["rejected"]
    table = Table(title=f"packpipe on {read} real images, seq_len {seq_len}")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in figures.items():
        if name == "bound":
            gap = f"{figures['packs'] - value} of {value} rows"
            table.add_row("gap to the lower bound", gap)
        elif name.startswith("padding"):
            table.add_row(_SAID[name], f"{value:.2%}")
        else:
            table.add_row(
                _SAID.get(name, name), "written before" if value is None else f"{value:,.0f}"
            )
    return table


def _train(
    packed: Any, num_classes: int, steps: int, folder: Path, console: Console
) -> dict[str, Any]:
    """Train a small NaViT on the rows and draw its loss; return how it went."""
    import torch
    from rich.progress import track

    import packpipe
    from packpipe.plots import plot_losses
    from packpipe.training.loop import TrainConfig, train

    torch.manual_seed(0)
    config = packpipe.NaViTConfig(num_classes=num_classes, dim=64, depth=2, heads=2)
    model = packpipe.NaViT(config)
    batch_size = min(4, len(packed))  # a long seq_len leaves few rows
    started = time.perf_counter()
    losses: list[float] = []
    loader = packpipe.PackedLoader(packed, batch_size)
    training = TrainConfig(steps=steps, learning_rate=2e-3, loss="softmax", log_every=1)
    run = train(model, loader, training)
    for record in track(run, description="Training", total=steps, console=console):
        losses.append(record.loss)
        if time.perf_counter() - started > TRAINING_SECONDS:
            break
    seconds = time.perf_counter() - started
    per_epoch = len(packed) // batch_size
    picture = folder / "loss.png"
    plot_losses(losses, per_epoch).savefig(picture, dpi=100)
    width, first, last = ends(losses, per_epoch)
    console.print(
        f"training loss, mean over {width} steps: {first:.3f} at first, {last:.3f} at last "
        f"({len(losses)} steps in {seconds:.0f} s; chance is {np.log(num_classes):.3f})\n"
        f"picture  {picture}"
    )
    return {
        "steps": len(losses),
        "first_loss": first,
        "last_loss": last,
        "seconds": seconds,
        "picture": str(picture),
    }


def ends(losses: list[float], most: int) -> tuple[int, float, float]:
    """Return over how many losses the means of the first and the last are, and both means.

    At most half of them, so that no loss is in both, but for a single one.

    >>> ends([4.0, 3.0, 2.0, 1.0, 0.0], 8)
    (2, 3.5, 0.5)
    """
    width = max(1, min(most, len(losses) // 2))
    return width, float(np.mean(losses[:width])), float(np.mean(losses[-width:]))


if __name__ == "__main__":
    main()
