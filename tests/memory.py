"""What calls of the package add to the memory of a process; as a script, in one of its own.

Memory is what is allocated, and what the kernel counts as resident: also pages of files that were
mapped and looked at, and others around them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import loading
import numpy as np
import pictures
from PIL import Image

import packpipe
from packpipe import EpochPacks, PackedLoader, PackedStream
from packpipe.loading.stored import StoredPacks
from packpipe.philox import Key

LENGTH = 100_000
ROWS = range(10)  # of images; there are ten times as many of texts
MOST = 32 * 2**20  # bytes that a call may add; 16 MB of data are digested
CLEAR = Path("/proc/self/clear_refs")
SIDE = 2048
IMAGES: dict[str, Any] = {"seq_len": (SIDE // 16) ** 2, "resolution": "native", "max_segments": 4}


def images(number: int) -> datasets.Dataset:
    """Images of 12.6 MB each, not compressed."""
    buffer = BytesIO()
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(buffer, "BMP")
    return pictures.dataset_of([buffer.getvalue()] * number).select_columns(["image", "label"])


def tokens(number: int) -> datasets.Dataset:
    """Sequences of 100,000 tokens, which take 1.2 MB each in rows."""
    return datasets.Dataset.from_dict({"input_ids": np.zeros((number, LENGTH), np.int32)})


def make(folder: Path, number: int) -> None:
    """Save so many images, ten times as many texts, and the rows of both."""
    for name, dataset, options in (
        ("images", images(number), {**IMAGES, "num_workers": 0}),
        ("tokens", tokens(10 * number), {"seq_len": LENGTH}),
    ):
        dataset.save_to_disk(folder / name)
        dataset = datasets.load_from_disk(folder / name)
        packpipe.pack(dataset, output=folder / f"rows of {name}", progress=False, **options)
        if name == "images":
            options["store"] = "encoded"
            packpipe.pack(dataset, output=folder / "rows of encoded", progress=False, **options)
    EpochPacks(datasets.load_from_disk(folder / "images"), **IMAGES)  # its sizes are kept


def status(name: str) -> int:
    """Bytes that the kernel tells of this process under a name."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


def added(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and by how many bytes the process was larger meanwhile.

    Raises:
        MemoryError: it allocated more than MOST.
    """
    CLEAR.write_text("5")  # the largest size so far is the present one
    before, limits = status("VmRSS"), resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + MOST, limits[1]))
    try:
        found = call()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    return found, status("VmHWM") - before


def calls(folder: Path) -> dict[str, int]:
    """What each call adds that need not read the data, and at last what reading it adds."""
    measured: dict[str, int] = {}

    def measure(name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        found, measured[name] = added(lambda: call(*arguments, **options))
        return found

    for kind in ("images", "encoded", "tokens"):
        place = folder / f"rows of {kind}"
        rows = measure(f"{kind}: load_from_disk", datasets.load_from_disk, place)
        dataset = datasets.load_from_disk(folder / ("tokens" if kind == "tokens" else "images"))
        options = {"seq_len": LENGTH} if kind == "tokens" else IMAGES
        if kind == "encoded":
            options = {**options, "store": "encoded"}
            rows = measure("encoded: open_packed", packpipe.open_packed, place)
        measure(f"{kind}: pack again", packpipe.pack, dataset, output=place, **options)
        measure(f"{kind}: summarize", packpipe.summarize, place)
        measure(f"{kind}: rejects", packpipe.rejects, rows)
        found = {"rows": rows, "shuffled": rows.shuffle(seed=1)}
        if kind != "encoded":  # whose row takes what its image does, and whose table is refused
            measure(f"{kind}: read_rows", packpipe.read_rows, rows, 0)
            found["table"] = rows.data.table
        for name, some in found.items():
            packs = measure(f"{kind}: {name}: StoredPacks", StoredPacks, some)
            of_packs(f"{kind}: {name}", packs, measure)
        if kind == "images":
            packs = measure("EpochPacks", EpochPacks, dataset, **IMAGES)
            of_packs("EpochPacks", packs, measure)
            plan = measure("EpochPacks.plan", packs.plan, 0, 0)
            measure("explain", plan.explain, 0)
            measure("save", plan.save, folder / "plan")
            measure("load", packpipe.EpochPlan.load, folder / "plan")
            stream = dataset.to_iterable_dataset()
            packs = measure("PackedStream", PackedStream, stream, **IMAGES)
            loader = measure("PackedStream: PackedLoader", PackedLoader, packs, 1)
            state = measure("PackedStream: state_dict", loader.state_dict)
            measure("PackedStream: load_state_dict", loader.load_state_dict, state)
    return measured


def of_packs(name: str, packs: Any, measure: Callable[..., Any]) -> None:
    """Measure what is asked of packs and of a loader between batches."""
    key = Key(0, 0)
    for method in ("fingerprint", "contents"):
        measure(f"{name}: {method}", getattr(packs, method), *[key] * (method == "fingerprint"))
    measure(f"{name}: work", packs.work, key)
    measure(f"{name}: num_packs", packs.num_packs, key)
    loader = measure(f"{name}: PackedLoader", PackedLoader, packs, 1, balance=True)
    measure(f"{name}: len", len, loader)
    state = measure(f"{name}: state_dict", loader.state_dict)
    measure(f"{name}: load_state_dict", loader.load_state_dict, state)
    measure(f"{name}: set_epoch", loader.set_epoch, 3)
    measure(f"{name}: state_dict of another epoch", loader.state_dict)


def main(small: Path, large: Path) -> None:
    """Print what each call adds, what reading everything adds, and what a copy of it gives."""
    calls(small)  # modules and kernels are loaded by now
    found = calls(large)
    rows = datasets.load_from_disk(large / "rows of images")
    _, everything = added(lambda: sum(int(packpipe.read_rows(rows, n).patches.sum()) for n in ROWS))
    try:
        added(lambda: packpipe.read_rows(rows).patches.copy())
        copied = "fits"
    except MemoryError:
        copied = "does not fit"
    print(json.dumps([found, everything, copied]))  # noqa: T201


def measured(small: Path, large: Path) -> tuple[dict[str, int], int, str]:
    """Return that of a process of its own, of two folders that `make` has made."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(small), str(large)],
        # The allocators that Arrow comes with reserve a gigabyte beforehand.
        env={**loading.environment(), "ARROW_DEFAULT_MEMORY_POOL": "system"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    calls, everything, copied = json.loads(found.stdout.splitlines()[-1])
    return calls, everything, copied


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
