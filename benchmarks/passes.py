"""How long does the first batch of a pass take, when processes fill batches? Kept and new ones.

    python benchmarks/passes.py [--passes 6]

Seconds from ``iter(loader)`` to the first batch, for two processes that are kept from pass to pass
(``persistent=True``) and for two that every pass starts anew, started by fork and by spawn. Each
loader has a Python of its own; what it is compared with runs right after it. Of the passes after
the first, the table has the median and the extremes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
KINDS = ("stored rows", "EpochPacks")
STARTS = ("fork", "spawn")


def measure(start: str, kind: str, persistent: bool, passes: int) -> list[float]:
    """Return the seconds until the first batch of each pass."""
    import datasets
    import torch

    import packpipe
    from packpipe.samples import images_folder

    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    torch.multiprocessing.set_start_method(start)
    images = datasets.load_dataset("imagefolder", data_dir=str(images_folder()), split="train")
    images = images.class_encode_column("label")
    options = {"resolution": "budget", "max_tokens": 100}
    with tempfile.TemporaryDirectory() as folder:
        packs = (
            packpipe.EpochPacks(images, 256, **options)
            if kind == "EpochPacks"
            else packpipe.pack(images, 256, output=f"{folder}/rows", progress=False, **options)
        )
        loader = packpipe.PackedLoader(
            packs, 2, num_workers=2, workers="processes", persistent=persistent
        )
        taken = []
        for _ in range(passes):
            started = time.perf_counter()
            batches = iter(loader)
            next(batches)
            taken.append(time.perf_counter() - started)
            for _ in batches:  # to the pass's end
                pass
            del batches
    return taken


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--one", nargs=3, metavar=("START", "KIND", "PERSISTENT"))
    arguments = parser.parse_args()
    if arguments.one:
        start, kind, persistent = arguments.one
        print(json.dumps(measure(start, kind, persistent == "True", arguments.passes)))
        return
    print("| start, packs | first pass, s | later passes, new processes, s | kept, s | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for start in STARTS:
        for kind in KINDS:
            taken = {}
            for persistent in (False, True):
                one = ["--one", start, kind, str(persistent), "--passes", str(arguments.passes)]
                command = [sys.executable, "-W", "ignore", __file__, *one]
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                done = subprocess.run(  # noqa: S603 (this script)
                    command, env=environment, check=True, capture_output=True, text=True
                )
                taken[persistent] = json.loads(done.stdout.splitlines()[-1])
            new, kept = (taken[persistent][1:] for persistent in (False, True))
            ratio = statistics.median(new) / statistics.median(kept)
            cells = [f"{taken[True][0]:.2f}", shown(new), shown(kept), f"{ratio:.0f}"]
            print(f"| {start}, {kind} | {' | '.join(cells)} |", flush=True)


def shown(taken: list[float]) -> str:
    """Return a median and the extremes."""
    return f"{statistics.median(taken):.3f} ({min(taken):.3f} to {max(taken):.3f})"


if __name__ == "__main__":
    main()
