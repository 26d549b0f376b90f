"""Small sources for loader tests, and digests of batches; as a script, it loads until killed."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from strategies import encode, random_image

import packpipe
from packpipe import Beta, EpochPacks, OverTraining, PackedLoader, Side, Uniform
from packpipe.loading.batch import Batch

OPTIONS: dict[str, Any] = {
    "patch_size": 8,
    "resolution": Side(Uniform(12, 44)),
    "drop_rate": OverTraining(Beta(mean=0.3, maximum=0.6), 0.7, 0.5, -0.2),
    "epochs": 50,
    "fit_last": "drop_rate",
    "window": 40,
    "max_segments": 6,
}


def environment() -> dict[str, str]:
    """What a subprocess of the tests runs in; what it leaves lies where conftest.py says."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def source(num_images: int = 270) -> datasets.Dataset:
    """Labelled images of 8 to 48 pixels a side."""
    rng = np.random.default_rng(5)
    sizes = rng.integers(8, 49, (num_images, 2)).tolist()
    images = [
        {"bytes": encode(random_image("RGB", height, width, seed), "PNG"), "path": None}
        for seed, (height, width) in enumerate(sizes)
    ]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    return datasets.Dataset.from_dict(
        {"image": images, "label": rng.integers(0, 9, num_images).tolist()}, features=features
    )


def packs_of(kind: str, folder: Path, *, epochs: int = 50) -> Any:
    """Packs of that source: ``"stored"``, ``"computed"`` when read, or ``"planned"`` each epoch."""
    if kind == "planned":
        return EpochPacks(source(), 24, num_workers=1, **{**OPTIONS, "epochs": epochs})
    options = {**OPTIONS, "materialize": kind == "stored", "progress": False}
    return packpipe.pack(source(), 24, output=folder / kind, **options)


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    """The tensors of a batch by name; of a batch of pairs, those of its images and its texts."""
    found = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors_of(value).items()}
    return found


def digest(batch: Batch) -> str:
    """A digest of every byte of a batch, and of shapes and dtypes."""
    return digest_of([batch])


def digest_of(parts: Iterable[Batch]) -> str:
    """The digest of the ranks' batches of a step, laid end to end."""
    columns = [tensors_of(part) for part in parts]
    found = hashlib.sha256()
    for name in columns[0]:
        tensor = torch.cat([column[name] for column in columns])
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def steps_of(ranks: list[PackedLoader]) -> list[str]:
    """The digest of every step of one pass, over all ranks."""
    return [digest_of(parts) for parts in zip(*map(list, ranks), strict=True)]


def load_until_killed(arguments: dict[str, Any]) -> None:
    """Write a line for every batch: its digest and the loader's state after it.

    Args:
        arguments: among them how many lines the log may hold at most, or None. After these it
            waits to be killed, which is never too late then.
    """
    packs = packs_of(arguments["kind"], Path(arguments["folder"]))
    world_size = arguments["world_size"]
    loaders = [
        PackedLoader(
            packs, 8 // world_size, rank=rank, world_size=world_size, **arguments["options"]
        )
        for rank in range(world_size)
    ]
    log = Path(arguments["log"])
    # A line may have been cut short: its batch counts as not taken.
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    log.write_text("".join(whole))
    for loader in loaders if whole else []:
        loader.load_state_dict(json.loads(whole[-1])["state"])
    written = len(whole)
    with log.open("a") as file:
        for epoch in range(loaders[0].epoch, arguments["epochs"]):
            for loader in loaders:
                loader.set_epoch(epoch)
            for parts in zip(*loaders, strict=True):
                line = {"digest": digest_of(parts), "state": loaders[0].state_dict()}
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
                written += 1
                time.sleep(3600 if written == arguments["most"] else arguments["pause"])


if __name__ == "__main__":
    load_until_killed(json.loads(sys.argv[1]))
