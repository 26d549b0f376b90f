"""Compile the kernels and keep them on disk, before test processes need them.

Test processes that start together would each compile the same kernels; and numba's cache is not
made for several writers of one kernel, which may put one's code under the other's name. So this
may be run beside the tests: who comes second waits, and finds all of them compiled.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from filelock import FileLock

import packpipe
from packpipe import philox
from packpipe.augmenting.turning import move_patches
from packpipe.images.resize import resize
from packpipe.packing.packs import STRATEGIES
from packpipe.philox import Key
from packpipe.rows import copy as copying

HOME = Path(__file__).resolve().parent.parent / ".pytest_tmp_home"  # as in conftest.py


def compile_all() -> None:
    """Call every kernel, by what calls it in the package."""
    for dtype in (np.int32, np.int64):
        lengths = np.array([5, 3, 7, 2, 2, 9, 4, 4, 6, 1], dtype)
        for strategy in STRATEGIES:
            packpipe.pack_lengths(lengths, 10, strategy=strategy, max_segments=3)
        for strategy in ("ffd", "bfd"):
            packpipe.pack_lengths(lengths, 10, strategy=strategy, also=(lengths, 12))
        packer = packpipe.OnlinePacker(10, open_packs=2)
        packer.push(lengths)
        packer.flush()
        plan = packpipe.plan_histogram(packpipe.count_lengths(lengths, 10), 10)
        plan.pack_numbers(lengths)
        plan.expand(lengths, seed=0)
    sizes = [(20, 30), (64, 64), (48, 90)] * 4
    config = packpipe.PackConfig(
        seq_len=24, patch_size=8, resolution="budget", max_tokens=12, drop_rate=0.3
    )
    packpipe.plan_epoch(sizes, config)
    uneven = np.random.default_rng(0).integers(20, 60, 100)
    packpipe.pack_lengths(uneven, 100, strategy="optimal")
    philox.subsets(Key(0, 0), index=np.arange(2), stream=0, num_items=[5, 6], num_chosen=[2, 3])
    move_patches(np.zeros((2, 12), np.uint8), np.ones(1, int), np.zeros(1, int), [2], np.arange(2))
    lens, places = np.array([2, 3], np.int32), np.array([0, 2])
    for dtype in (np.int32, np.int64):
        tokens = np.arange(5, dtype=dtype)
        copying.copy_tokens(tokens, places, lens, places, tokens.copy())
        copying.kept_runs(tokens, places, lens.astype(np.int64))
    copying.kept_runs(np.ones(5, np.int8), places, lens.astype(np.int64))
    square, tiles = np.zeros((1, 1), np.uint8), np.empty((1, 1, 1, 1, 3), np.uint8)
    resize(square, (0, 0, 1, 1), tiles, downscale_filter="bicubic", upscale_filter="bicubic")
    copying.number_tokens(lens, lens, places, *np.zeros((2, 5), np.int32))


if __name__ == "__main__":
    HOME.mkdir(exist_ok=True)
    with FileLock(HOME / "kernels.lock"):
        compile_all()
