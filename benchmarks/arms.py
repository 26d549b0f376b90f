"""The same images as input of several models, for model.py (CPU) and gpu.py (GPU).

An *arm* is a model, a layout of the images in batches and a way to a loss. All arms see images of
the same sizes with random pixels, keep every token, and count images and useful FLOPs alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from packpipe import PackConfig, PackedBatch, Side, Uniform, plan_epoch, samples
from packpipe.model.attention import FlatTokens
from packpipe.model.config import NaViTConfig
from packpipe.model.flops import forward_flops
from packpipe.model.navit import NaViT
from packpipe.rows.fill_images import token_columns
from packpipe.rows.rows import Rows
from packpipe.training.losses import segment_cross_entropy

PATCH = 16
NUM_CLASSES = 1000
BUCKETS = 4


@dataclass(frozen=True)
class Images:
    """Sizes of images in patches, and the packs they are put into.

    Attributes:
        grid_hw: int[images, 2].
        packs: numbers of the images of each pack, shuffled.
        seq_len: tokens a pack holds.
    """

    grid_hw: NDArray[np.int64]
    packs: list[NDArray[np.int64]]
    seq_len: int

    @property
    def lens(self) -> NDArray[np.int64]:
        """Tokens of each image."""
        return self.grid_hw.prod(1)


def drawn_images(num_images: int, seq_len: int, sides: tuple[int, int]) -> Images:
    """Return images of the sizes of real pictures, r ~ U(sides), no token dropped."""
    sizes = samples.image_sizes("pictures")
    sizes = sizes[np.random.default_rng(0).integers(0, len(sizes), num_images)]
    config = PackConfig(seq_len=seq_len, patch_size=PATCH, resolution=Side(Uniform(*sides)))
    plan = plan_epoch(sizes, config)
    grids = np.empty((num_images, 2), np.int64)
    grids[plan.index] = plan.grid_hw
    packs = [plan.index[plan.order[a:b]] for a, b in pairwise(plan.offsets)]
    return Images(grids, packs, seq_len)


@dataclass(frozen=True)
class Step:
    """A batch as a model takes it, and what it is worth."""

    inputs: Any
    labels: Any
    seq_lens: Tensor
    slots: int

    @property
    def images(self) -> int:
        """Images in the batch."""
        return int((self.seq_lens > 0).sum())

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.seq_lens.sum())


def packed_steps(images: Images, rows: int, steps: int, most: int) -> Iterator[Step]:
    """Yield batches of packs."""
    for step in range(steps):
        groups = images.packs[step * rows : (step + 1) * rows]
        yield _step(batch_of(images, groups, images.seq_len, most, step))


def padded_steps(images: Images, rows: int, steps: int) -> Iterator[Step]:
    """Yield batches of one image a row, in rows of the longest."""
    longest = int(images.lens.max())
    for step in range(steps):
        groups = [np.array([n]) for n in range(step * rows, (step + 1) * rows)]
        yield _step(batch_of(images, groups, longest, 1, step))


def bucketed_steps(images: Images, slots: int, rounds: int) -> Iterator[Step]:
    """Yield batches of one image a row, rows of four lengths, about as many slots each."""
    longest = int(images.lens.max())
    lengths = [-(-longest * (bucket + 1) // BUCKETS) for bucket in range(BUCKETS)]
    bucket = np.searchsorted(lengths, images.lens)
    # As often as images fall into it, in an order that mixes them.
    share = np.bincount(bucket, minlength=BUCKETS) * np.array(lengths)
    steps = np.maximum(1, np.round(share / share.sum() * BUCKETS * rounds)).astype(int)
    plan = [(b, n) for b in range(BUCKETS) for n in range(steps[b])]
    for b, n in sorted(plan, key=lambda item: (item[1] / steps[item[0]], item[0])):
        members = np.flatnonzero(bucket == b)
        rows = max(1, slots // lengths[b])
        chosen = members[np.arange(n * rows, (n + 1) * rows) % len(members)]
        yield _step(batch_of(images, [np.array([i]) for i in chosen], lengths[b], 1, n))


def batch_of(
    images: Images, groups: list[NDArray[np.int64]], seq_len: int, most: int, seed: int
) -> PackedBatch:
    """Return rows that hold some images each, random pixels in them."""
    members = np.concatenate(groups)
    grids = images.grid_hw[members]
    lens = grids.prod(1)
    planned = Rows(
        np.cumsum([0, *map(len, groups)]),
        {
            "seq_lens": lens.astype(np.int32),
            "grid_hw": grids.astype(np.int16),
            "image_hw": (grids * PATCH).astype(np.int32),
            "example_index": members,
        },
    )
    tokens = np.concatenate([np.arange(n) for n in lens]).astype(np.int32)
    segment_ids, coords = token_columns(planned, tokens, seq_len)
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (len(groups), seq_len, PATCH * PATCH * 3), np.uint8)
    patches[segment_ids == 0] = 0
    columns = {"patches": patches, "segment_ids": segment_ids, "coords": coords}
    rows = replace(planned, tokens=columns)
    batch = PackedBatch.from_rows(rows, max_segments=most, copy=False)
    labels = torch.from_numpy(rng.integers(0, NUM_CLASSES, batch.seq_lens.shape))
    return replace(batch, labels=torch.where(batch.present, labels, -100))


def _step(batch: PackedBatch) -> Step:
    return Step(batch, batch.labels, batch.seq_lens, batch.segment_ids.numel())


def ours(model: NaViT, step: Step) -> Tensor:
    """Return the loss of a `NaViT`."""
    return segment_cross_entropy(model(step.inputs).float(), step.labels)


def limit(model: NaViT, step: Step) -> Tensor:
    """Return the loss of the same trunk, one SDPA call a segment, no padding anywhere."""
    batch: PackedBatch = step.inputs
    places = batch.segment_ids.flatten().nonzero()[:, 0]
    lens = [n for n in batch.seq_lens.flatten().tolist() if n]
    most = batch.seq_lens.shape[1]
    row = torch.arange(len(batch.segment_ids))[:, None] * most
    segments = (row + batch.segment_ids - 1).flatten()[places]
    flat = batch.seq_lens.flatten().long()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.transpose(0, 1)[None].split(lens, 2) for x in (q, k, v)), strict=True)
        seen = [F.scaled_dot_product_attention(*part) for part in parts]
        return torch.cat(seen, 2)[0].transpose(0, 1)

    tokens = FlatTokens(places, segments, flat.cumsum(0) - flat, attend)
    x, turn = model.read(batch, tokens)
    for block in model.blocks:
        x = block(x, attend, turn)
    return segment_cross_entropy(model.answer(x, batch, tokens).float(), step.labels)


def lucidrains_model(config: NaViTConfig, side: int) -> nn.Module:
    """Return vit-pytorch's `na_vit` of a shape."""
    from vit_pytorch.na_vit import NaViT as Peer

    return Peer(
        image_size=side * PATCH,
        patch_size=PATCH,
        num_classes=NUM_CLASSES,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        mlp_dim=config.mlp_width,
        dim_head=config.dim // config.heads,
    )


def lucidrains_step(step: Step) -> Step:
    """Return packs as it takes them: a list of images a pack."""
    packs = []
    generator = torch.Generator().manual_seed(0)
    for grids in step.inputs.grid_hw.tolist():
        sizes = [(h * PATCH, w * PATCH) for h, w in grids if h]
        packs.append([torch.rand(3, h, w, generator=generator) * 2 - 1 for h, w in sizes])
    return replace(step, inputs=packs, labels=step.labels[step.labels >= 0])


def lucidrains(model: nn.Module, step: Step) -> Tensor:
    """Return its loss: its logits are those of all images, pack by pack."""
    return F.cross_entropy(model(step.inputs).float(), step.labels)


def timm_model(config: NaViTConfig, side: int) -> nn.Module:
    """Return timm's NaFlexViT of a shape, as it comes."""
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    return NaFlexVit(
        NaFlexVitCfg(
            patch_size=PATCH,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_width / config.dim,
            qk_norm=True,
            pos_embed="factorized",
            pos_embed_grid_size=(side, side),
        ),
        num_classes=NUM_CLASSES,
    )


def timm_step(step: Step) -> Step:
    """Return one image a row as it takes them."""
    batch: PackedBatch = step.inputs
    inputs = {
        "patches": batch.patches.float() / 127.5 - 1,
        "patch_coord": batch.coords.long(),
        "patch_valid": batch.segment_ids > 0,
    }
    return replace(step, inputs=inputs, labels=step.labels[:, 0])


def timm(model: nn.Module, step: Step) -> Tensor:
    """Return its loss."""
    return F.cross_entropy(model(step.inputs).float(), step.labels)


def moved(step: Step, device: torch.device | str) -> Step:
    """Return a step whose tensors are on a device."""

    def to(value: Any) -> Any:
        if isinstance(value, list):
            return [to(one) for one in value]
        if isinstance(value, dict):
            return {name: to(one) for name, one in value.items()}
        return value.to(device)

    return replace(step, inputs=to(step.inputs), labels=step.labels.to(device))


@dataclass(frozen=True)
class Arm:
    """A model, its batches and its loss."""

    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[Any, Step], Tensor]
    steps: Callable[[], list[Step]]


def useful_flops(config: NaViTConfig, steps: list[Step]) -> int:
    """Return the FLOPs of one forward pass over all steps, padding not counted."""
    return sum(forward_flops(config, step.seq_lens) for step in steps)
