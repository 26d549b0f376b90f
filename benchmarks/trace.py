"""How far a call travels: functions, modules and moves between modules of common calls.

    python benchmarks/trace.py [--checkout CHECKOUT] [--list NAME]

A profile hook takes down each function of the package when it is first called (no lambdas and no
generator expressions, but properties and compiled kernels); a move is a change of the module from
one of them to the next. `--list` prints them for one call.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ANONYMOUS = ("<lambda>", "<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<module>")


class Journey:
    """The functions of the package that are called, in the order of their first calls."""

    def __init__(self, package: Path) -> None:
        self._package = f"{package}{os.sep}"
        self.functions: dict[tuple[str, str], None] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Take down a call."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self._package):
            return
        if not any(name in code.co_qualname for name in ANONYMOUS):
            module = code.co_filename.removeprefix(self._package).removesuffix(".py")
            self.functions.setdefault((module, code.co_qualname))

    def figures(self) -> tuple[int, int, int]:
        """Return how many functions, modules, and moves from one module to another."""
        modules = [module for module, _ in self.functions]
        moves = sum(a != b for a, b in zip([None, *modules], modules, strict=False))
        return len(modules), len(set(modules)), moves


def calls(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the calls, each made once already where a cache makes the first one longer."""
    import datasets
    import numpy as np

    import packpipe
    from packpipe.samples import images_folder

    datasets.disable_progress_bars()
    images = datasets.load_dataset("imagefolder", data_dir=str(images_folder()), split="train")
    images = images.class_encode_column("label").select(range(24))
    lists = [[1] * n for n in (5, 3, 9, 30, 4, 7)]
    texts = datasets.Dataset.from_dict({"input_ids": lists, "label": [0, 1, 0, 1, 0, 1]})
    options: dict[str, Any] = {"max_tokens": 100}
    packed = packpipe.pack(images, 256, output=folder / "a", num_workers=0, **options)
    rows = packpipe.pack(texts, 32, output=folder / "b")
    shape = packpipe.NaViTConfig(num_classes=10, dim=48, depth=1, heads=3)
    model = packpipe.NaViT(shape)

    def stream() -> None:
        found = packpipe.PackedStream(images.to_iterable_dataset(), 256, **options)
        list(packpipe.PackedLoader(found, 2))

    return {
        "pack(images)": lambda: packpipe.pack(
            images, 256, output=folder / "c", num_workers=0, seed=1, **options
        ),
        "PackedLoader to NaViT": lambda: model(next(iter(packpipe.PackedLoader(packed, 2)))),
        "pack(tokens)": lambda: packpipe.pack(texts, 16, overflow="split", output=folder / "d"),
        "PackedLoader of tokens": lambda: next(iter(packpipe.PackedLoader(rows, 2))),
        "PackedStream": stream,
        "EpochPacks": lambda: next(
            iter(packpipe.PackedLoader(packpipe.EpochPacks(images, 256, **options), 2))
        ),
        "verify": lambda: packpipe.verify(folder / "a", images),
        "map(Packer)": lambda: images.map(
            packpipe.Packer(256, **options),
            batched=True,
            with_indices=True,
            remove_columns=images.column_names,
        ),
        "predict": lambda: model.predict([np.zeros((32, 32, 3), np.uint8)]),
    }


def trace(listed: str | None) -> None:
    """Print a row for each call, or the functions of one."""
    import packpipe

    with tempfile.TemporaryDirectory() as folder:
        for name, call in calls(Path(folder)).items():
            found = Journey(Path(packpipe.__file__).parent)
            sys.setprofile(found)
            try:
                call()
            finally:
                sys.setprofile(None)
            if listed is None:
                print(f"| {name} | {' | '.join(map(str, found.figures()))} |")
            elif listed == name:
                print("\n".join(".".join(function) for function in found.functions))


def main() -> None:
    """Run in a process of its own, in which packpipe is that of a checkout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--list", metavar="NAME", help="print the functions of this call")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        trace(options.list)
        return
    print("| call | functions | modules | moves |\n| --- | ---: | ---: | ---: |", flush=True)
    listed = ["--list", options.list] if options.list else []
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "PYTHONPATH": str(options.checkout.resolve()),
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-P", "-W", "ignore", __file__, "--here", *listed]
        subprocess.run(command, env=environment, check=True)  # noqa: S603


if __name__ == "__main__":
    main()
