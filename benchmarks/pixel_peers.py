"""Ways from encoded images to tokens, each as its users would write it, all of the same images.

A way takes an empty folder, in which it may write, and returns the tokens it made, or the Dataset
it wrote. What it needs once (processes, a loader) is made before, and ends with the stack given.
Each of them gets encoded images that lie in memory or in the page cache.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import datasets
import numpy as np
from PIL import Image

import packpipe

PATCH = 16
PATCH_BYTES = PATCH * PATCH * 3
SEQ_LEN = 1024
BICUBIC = Image.Resampling.BICUBIC
Way = Callable[[Path], Any]


class Job(NamedTuple):
    """Images and what they become: max_tokens of None is their own size; grid_hw is as planned."""

    dataset: datasets.Dataset
    encoded: list[bytes]
    grid_hw: list[tuple[int, int]]
    max_tokens: int | None


def ways(job: Job, stack: ExitStack, names: tuple[str, ...] = ()) -> dict[str, Way]:
    """Return every way by its name, or just some of them."""
    makers = {
        "bare Pillow": lambda: partial(_floor, job),
        "bare Pillow, 2 processes": lambda: _floor_processes(job, 2, stack),
        "`packpipe.pack`, no worker": lambda: partial(pack, job, 0),
        "`packpipe.pack`, 1 worker": lambda: partial(pack, job, 1),
        "`packpipe.pack`, 2 workers": lambda: partial(pack, job, 2),
        "timm NaFlex": lambda: _naflex(job, 0),
        "timm NaFlex, 2 workers": lambda: _naflex(job, 2),
        "`datasets.map`": lambda: partial(_map, job, None),
        "`datasets.map`, `num_proc=2`": lambda: partial(_map, job, 2),
        "vit-pytorch grouping": lambda: _grouping(job),
    }
    return {name: make() for name, make in makers.items() if not names or name in names}


def resized(
    encoded: bytes,
    size: tuple[int, int],
    reducing_gap: float | None = 1.0,
    resample: Image.Resampling = BICUBIC,
) -> Image.Image:
    """Return an upright image at a size of (width, height), decoded as `Image.thumbnail` does."""
    image = Image.open(BytesIO(encoded))
    drafted = None
    if reducing_gap is not None:
        drafted = image.draft(None, (int(size[0] * reducing_gap), int(size[1] * reducing_gap)))
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return rgb.resize(size, resample, drafted and drafted[1], reducing_gap)


def _size(grid_hw: tuple[int, int]) -> tuple[int, int]:
    return grid_hw[1] * PATCH, grid_hw[0] * PATCH


def _floor(job: Job, _: Path) -> int:
    return sum(_one(job, at) for at in range(len(job.encoded)))


def _one(job: Job, at: int) -> int:
    image = resized(job.encoded[at], _size(job.grid_hw[at]))
    return image.width * image.height // PATCH**2


_forked: Job | None = None  # what the processes of the pool find when they begin


def _forked_one(at: int) -> int:
    assert _forked is not None  # noqa: S101
    return _one(_forked, at)


def _floor_processes(job: Job, num_processes: int, stack: ExitStack) -> Way:
    global _forked
    _forked = job
    pool = stack.enter_context(multiprocessing.get_context("fork").Pool(num_processes))

    def work(_: Path) -> int:
        return sum(pool.imap_unordered(_forked_one, range(len(job.encoded)), chunksize=16))

    return work


def pack(job: Job, num_workers: int, folder: Path, *, pixels: str = "pillow") -> datasets.Dataset:
    """Return the rows that packpipe writes."""
    options: dict[str, Any] = {} if job.max_tokens is None else {"max_tokens": job.max_tokens}
    options["pixels"] = pixels
    written = {"output": folder / "rows", "num_workers": num_workers, "progress": False}
    return packpipe.pack(job.dataset, SEQ_LEN, **written, **options)


class _Reader:
    """What timm's `ImageDataset` reads files from."""

    def __init__(self, encoded: list[bytes]) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        return BytesIO(self._encoded[index]), 0


def _naflex(job: Job, num_workers: int) -> Way:
    """Batches of timm's own loader, before they are moved to a GPU and normalised there."""
    import torch
    from timm.data import ImageDataset, create_naflex_loader

    torch.set_num_threads(1)
    with redirect_stdout(StringIO()):  # it prints its schedule
        loader = create_naflex_loader(
            ImageDataset("", reader=_Reader(job.encoded)),
            patch_size=PATCH,
            train_seq_lens=(job.max_tokens or SEQ_LEN,),
            is_training=True,
            no_aug=True,  # the resize alone, `ResizeToSequence`
            interpolation="bicubic",
            num_workers=num_workers,
            pin_memory=False,
            device=torch.device("cpu"),
        ).loader
    for composed in loader.dataset.transforms.values():
        composed.transforms[0].max_ratio = 1.0  # enlarge no image, which the loader cannot be told

    def work(_: Path) -> int:
        images = tokens = 0
        for batch, labels in loader:
            images += len(labels)
            tokens += int(batch["patch_valid"].sum())
        if images != len(job.encoded):  # it goes on without images that it cannot read
            raise AssertionError(f"{images} of {len(job.encoded)} images were read")
        return tokens

    return work


# 1.1 to 1.6 times as fast as 1000, the default; 100 is no faster.
MAP_BATCH = 250


def _map(job: Job, num_proc: int | None, folder: Path) -> datasets.Dataset:
    features = datasets.Features(
        patches=datasets.List(datasets.Value("uint8"), length=SEQ_LEN * PATCH_BYTES),
        segment_ids=datasets.List(datasets.Value("int32"), length=SEQ_LEN),
        coords=datasets.List(datasets.Value("int16"), length=SEQ_LEN * 2),
    )
    return job.dataset.map(
        partial(_packed_batch, grid_hw=job.grid_hw),
        batched=True,
        batch_size=MAP_BATCH,
        with_indices=True,
        num_proc=num_proc,
        remove_columns=job.dataset.column_names,
        features=features,
        load_from_cache_file=False,
        cache_file_name=str(folder / "rows.arrow"),
        new_fingerprint=uuid4().hex,
    )


def _packed_batch(
    batch: dict[str, list[Any]], indices: list[int], grid_hw: list[tuple[int, int]]
) -> dict[str, np.ndarray]:
    """Return the rows of a batch: each image in the first row with room."""
    room: list[int] = []
    places = []
    for index in indices:
        length = grid_hw[index][0] * grid_hw[index][1]
        row = next((row for row, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            room.append(SEQ_LEN)
        places.append((row, SEQ_LEN - room[row]))
        room[row] -= length
    patches = np.zeros((len(room), SEQ_LEN, PATCH_BYTES), np.uint8)
    segment_ids = np.zeros((len(room), SEQ_LEN), np.int32)
    coords = np.zeros((len(room), SEQ_LEN, 2), np.int16)
    held = [0] * len(room)
    for image, index, (row, start) in zip(batch["image"], indices, places, strict=True):
        rows, columns = grid_hw[index]
        span = slice(start, start + rows * columns)
        pixels = np.asarray(image.convert("RGB").resize(_size((rows, columns)), BICUBIC))
        grid = pixels.reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 1, 3, 4)
        patches[row, span].reshape(grid.shape)[...] = grid
        held[row] += 1
        segment_ids[row, span] = held[row]
        coords[row, span] = np.indices((rows, columns)).reshape(2, -1).T
    return {
        "patches": patches.reshape(len(room), -1),
        "segment_ids": segment_ids,
        "coords": coords.reshape(len(room), -1),
    }


class _Begun(Exception):
    """Raised where the model would begin, with the patches it would begin with."""


def _grouping(job: Job) -> Way:
    """What lucidrains' NaViT does before its first layer: images grouped, cut up and padded."""
    import torch
    from torchvision.transforms.functional import to_tensor
    from vit_pytorch.na_vit import NaViT

    torch.set_num_threads(1)
    model = NaViT(
        image_size=PATCH, patch_size=PATCH, num_classes=1, dim=1, depth=0, heads=1, mlp_dim=1
    )

    def stop(_: Any, inputs: tuple[Any]) -> None:
        raise _Begun(inputs[0])

    model.to_patch_embedding.register_forward_pre_hook(stop)

    def work(_: Path) -> int:
        tokens = 0
        for start in range(0, len(job.encoded), 128):
            images = []
            for at in range(start, min(start + 128, len(job.encoded))):
                rgb = Image.open(BytesIO(job.encoded[at])).convert("RGB")
                images.append(to_tensor(rgb.resize(_size(job.grid_hw[at]), BICUBIC)))
            try:
                model(images, group_images=True, group_max_seq_len=SEQ_LEN)
            except _Begun as begun:
                rows, longest, _ = begun.args[0].shape
            made = sum(image[0].numel() // PATCH**2 for image in images)
            if made > rows * longest:
                raise AssertionError("tokens are lost")
            tokens += made
        return tokens

    return work
