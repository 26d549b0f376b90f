"""Other packers behind one call each: lengths in, packs out, as their users would call them.

Each adapter is (prepare, work): prepare brings lengths into the form the peer wants, outside of
the time; work does what is timed and returns what the peer returns. A peer that is not installed
is left out and named.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int32]


class Peer(NamedTuple):
    """A packer, and the number of lengths that it gets through in a minute or so."""

    name: str
    most: int
    prepare: Callable[[Lengths, int], Any]
    work: Callable[[Any, int], Any]
    count: Callable[[Any], int]


def compiled() -> list[Peer]:
    """Return the packers that are compiled, and get all sizes."""
    found = []
    try:
        import lightbinpack

        found += [
            Peer("lightbinpack ffd", 10**6, _as_list, lightbinpack.ffd, len),
            Peer("lightbinpack obfd", 10**9, _as_list, lightbinpack.obfd, len),
        ]
    except ImportError:
        print("left out: lightbinpack is not installed")
    try:
        import seqpacker

        def seqpacker_work(lengths: list[int], seq_len: int) -> Any:
            return seqpacker.pack_sequences(lengths, seq_len).packs

        found.append(Peer("seqpacker", 10**9, _as_list, seqpacker_work, len))
    except ImportError:
        print("left out: seqpacker is not installed (it comes as source that cargo builds)")
    return found


def others() -> list[Peer]:
    """Return the packers inside other libraries, for the sizes they reach."""
    found = []
    try:
        import binpacking

        def binpacking_prepare(lengths: Lengths, _: int) -> dict[int, int]:
            return dict(enumerate(lengths.tolist()))

        found.append(
            Peer("binpacking", 10**4, binpacking_prepare, binpacking.to_constant_volume, len)
        )
    except ImportError:
        print("left out: binpacking is not installed")
    try:
        import datasets
        from trl import pack_dataset

        datasets.disable_progress_bars()

        def trl_prepare(lengths: Lengths, _: int) -> Any:
            tokens = [np.zeros(length, np.int8) for length in lengths.tolist()]
            return datasets.Dataset.from_dict({"input_ids": tokens})

        def trl_work(dataset: Any, seq_len: int) -> Any:
            whole = {"batch_size": len(dataset), "load_from_cache_file": False}
            return pack_dataset(dataset, seq_len, "bfd", whole)

        found.append(Peer("trl bfd (tokens too)", 10**6, trl_prepare, trl_work, len))
    except ImportError:
        print("left out: trl is not installed")
    try:
        from axolotl.utils.samplers.multipack import pack_parallel

        logging.getLogger("axolotl").setLevel(logging.ERROR)

        def axolotl_work(lengths: Lengths, seq_len: int) -> Any:
            # Its defaults: groups of 100,000, 200 sequences a pack at most.
            return pack_parallel(lengths, seq_len, 100_000, 200, num_processes=1)

        found.append(Peer("axolotl multipack", 10**6, _as_it_is, axolotl_work, len))
    except ImportError as error:
        print(f"left out: axolotl's multipack ({error})")
    try:
        import grain

        def grain_work(lengths: Lengths, seq_len: int) -> int:
            rows = [{"x": np.zeros(length, np.int8)} for length in lengths.tolist()]
            stream = grain.MapDataset.source(rows).to_iter_dataset()
            packing = grain.experimental.FirstFitPackIterDataset(
                stream, length_struct={"x": seq_len}, num_packing_bins=64
            )
            return sum(1 for _ in packing)

        found.append(Peer("grain first fit, 64 bins", 10**4, _as_it_is, grain_work, int))
    except (ImportError, AttributeError) as error:
        print(f"left out: grain ({error})")
    try:
        import torch

        group_images = _na_vit().group_images_by_max_seq_len

        def vit_prepare(lengths: Lengths, _: int) -> Any:
            # Patches of one pixel, so that a row of pixels has so many tokens.
            return [torch.empty(3, 1, length, device="meta") for length in lengths.tolist()]

        def vit_work(images: Any, seq_len: int) -> Any:
            return group_images(images, 1, max_seq_len=seq_len)

        found.append(Peer("vit-pytorch grouping", 10**5, vit_prepare, vit_work, len))
    except ImportError:
        print("left out: vit-pytorch is not installed")
    return found


def _as_list(lengths: Lengths, _: int) -> list[int]:
    return lengths.tolist()


def _as_it_is(lengths: Lengths, _: int) -> Lengths:
    return lengths


def _na_vit() -> Any:
    """Return vit_pytorch.na_vit without its package, which loads torchvision for other models."""
    package = importlib.util.find_spec("vit_pytorch")
    if package is None or package.origin is None:
        raise ImportError("vit_pytorch")
    path = Path(package.origin).with_name("na_vit.py")
    spec = importlib.util.spec_from_file_location("na_vit", path)
    if spec is None or spec.loader is None:
        raise ImportError("vit_pytorch.na_vit")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
