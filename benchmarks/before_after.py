"""Is a change slower? The same work by two checkouts in turn, and the ratio of their times.

    python benchmarks/before_after.py --before CHECKOUT [--after CHECKOUT] --rounds 15

Each checkout has one process that is asked for one piece of work after the other, so that both are
warm and a busy machine slows both down. A round is one piece by each, in changing order; the ratio
is the median over the rounds of after ÷ before, since neighbours in time share their disturbances.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORK = {
    "pack_lengths": "pack_lengths, 1,000,000 lengths, balanced",
    "pack_images": "pack, 176 bundled images, no processes",
    "pack_tokens": "pack, 50,000 sequences, fixed rows",
    "table_to_batch": "stored rows to batches, 22 of 2 rows",
    "stream": "PackedStream to batches, 88 images",
    "train_step": "a training step of NaViT, 4 rows of 256 tokens",
}


def pieces(folder: Path) -> dict[str, Callable[[], object]]:
    """Return each piece of work, ready to be done again and again."""
    import datasets
    import numpy as np
    import torch

    import packpipe
    from packpipe.samples import images_folder

    datasets.disable_progress_bars()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 700, 1_000_000)
    images = datasets.load_dataset("imagefolder", data_dir=str(images_folder()), split="train")
    images = images.class_encode_column("label")
    sizes = rng.integers(5, 400, 50_000)
    flat = rng.integers(0, 30_000, int(sizes.sum()), np.int32)
    sequences = datasets.Dataset.from_dict(
        {"input_ids": np.split(flat, np.cumsum(sizes)[:-1]), "label": np.arange(50_000)}
    )
    limits = {"resolution": "budget", "max_tokens": 100}
    stored = packpipe.pack(images, 256, output=folder / "stored", num_workers=0, **limits)
    config = packpipe.NaViTConfig(num_classes=10, dim=192, depth=4, heads=3)
    model = packpipe.NaViT(config)
    batch = next(iter(packpipe.PackedLoader(stored, 4)))
    numbers = iter(range(10**6))

    def built(source: datasets.Dataset, seq_len: int, **options: Any) -> None:
        output = folder / f"built-{next(numbers)}"
        packpipe.pack(source, seq_len, output=output, progress=False, **options)

    def stream() -> None:
        some = images.select(range(0, 176, 2)).to_iterable_dataset()
        for _ in packpipe.PackedLoader(packpipe.PackedStream(some, 256, **limits), 2):
            pass

    def train_step() -> None:
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model(batch).flatten(0, 1), batch.labels.flatten(), ignore_index=-100
        )
        loss.backward()

    return {
        "pack_lengths": lambda: packpipe.pack_lengths(lengths, 1024, strategy="balanced"),
        "pack_images": lambda: built(images, 256, num_workers=0, **limits),
        "pack_tokens": lambda: built(sequences, 1024),
        "table_to_batch": lambda: list(packpipe.PackedLoader(stored, 2)),
        "stream": stream,
        "train_step": train_step,
    }


def serve() -> None:
    """Do the pieces that are named on standard input, and say how long each took."""
    # What the work prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        work = pieces(Path(folder))
        for one in work.values():
            one()  # kernels, caches of sizes
        answers.write("ready\n")
        for line in sys.stdin:
            began = time.perf_counter()
            work[line.strip()]()
            answers.write(f"{time.perf_counter() - began}\n")


class Checkout:
    """A process in which packpipe is that of a checkout."""

    def __init__(self, folder: Path, home: str) -> None:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-W", "ignore", __file__, "--serve"],
            env={
                **os.environ,
                "PYTHONPATH": str(folder.resolve()),
                "HF_HOME": home,
                "HF_HUB_OFFLINE": "1",
                "NUMBA_CACHE_DIR": f"{home}/numba",
                # glibc gives batches back to the system, or keeps them, as the heap happens to lie:
                # a third of the time of reading small batches, and not what is asked here.
                "MALLOC_MMAP_THRESHOLD_": f"{2**26}",
                "MALLOC_TRIM_THRESHOLD_": f"{2**28}",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if process.stdin is None or process.stdout is None:
            raise OSError("the process has no pipes")
        self._process, self._asked, self._answers = process, process.stdin, process.stdout

    def answer(self) -> str:
        """Return the next line that the process writes."""
        return self._answers.readline().strip()

    def seconds(self, name: str) -> float:
        """Return how long a piece of work takes."""
        self._asked.write(f"{name}\n")
        self._asked.flush()
        return float(self.answer())

    def end(self) -> None:
        """Let the process end."""
        self._asked.close()
        self._process.wait()


def main() -> None:
    """Print a row for each piece of work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout without the change")
    parser.add_argument("--after", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=list(WORK), choices=list(WORK))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    with tempfile.TemporaryDirectory() as home:
        pair = [
            Checkout(folder, f"{home}/{number}")
            for number, folder in enumerate((options.before, options.after))
        ]
        if [one.answer() for one in pair] != ["ready", "ready"]:
            raise SystemExit("a checkout cannot do the work; see above")
        print("| work | before, ms | after, ms | after ÷ before, median (middle half) |")
        print("| --- | ---: | ---: | ---: |")
        for name in options.only:
            times: list[tuple[float, float]] = []
            for number in range(options.rounds):
                turn = [0, 1] if number % 2 else [1, 0]
                found = {which: pair[which].seconds(name) for which in turn}
                times.append((found[0], found[1]))
            ratios = [after / before for before, after in times]
            low, middle, high = statistics.quantiles(ratios, n=4)
            before, after = (statistics.median(side) for side in zip(*times, strict=True))
            print(
                f"| {WORK[name]} | {before * 1e3:,.1f} | {after * 1e3:,.1f} "
                f"| {middle:.3f} ({low:.3f} to {high:.3f}) |",
                flush=True,
            )
        for one in pair:
            one.end()


if __name__ == "__main__":
    main()
