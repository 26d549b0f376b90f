"""Our model beside independent ones with the same weights: what agrees, and what prevents it.

    pip install -e '.[torch]' timm vit-pytorch
    python benchmarks/agreement.py

Random weights, biases and images; ours sees the images packed, several a row, lucidrains' na_vit
packs of its own, timm's NaFlexViT one image a padded row. What ours has no counterpart for is
taken out of the peer, and said; a choice that is left in shows what it costs. Writes agreement.md.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import arms
import numpy as np
import torch
from arms import Images
from torch import Tensor, nn

from packpipe import PackedBatch
from packpipe.model.config import NaViTConfig
from packpipe.model.navit import NaViT

RESULTS = Path(__file__).parent / "results"
SHAPE = {"dim": 64, "depth": 3, "heads": 4, "mlp_dim": 96}
NUM_CLASSES = 10
HEAD_DIM = 16
SIDE = 12
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
# Grids of some images, and the packs they lie in.
GRIDS = np.array([[3, 5], [12, 12], [1, 9], [7, 4], [2, 2], [12, 3], [6, 6]])
PACKS = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6])]


def main() -> None:
    """Print the table, write it, and fail if what should agree does not."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    lines, failed = [], []
    for name, compare, choices in TRIALS:
        for dtype in TOLERANCE:
            for left_in in ("", *choices):
                difference = compare(dtype, left_in)
                precision = str(dtype).removeprefix("torch.")
                what = f"left in: {left_in}" if left_in else "equal"
                lines.append(f"| {name} | {precision} | {what} | {difference:.1e} |")
                print(lines[-1], flush=True)
                if not left_in and not difference <= TOLERANCE[dtype]:
                    failed.append(name)
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "vit-pytorch", "timm"))
    counts = GRIDS.prod(1)
    text = (
        "# Agreement with independent models\n\n"
        f"`python benchmarks/agreement.py`, {datetime.date.today()}: CPU, {versions}. {len(GRIDS)} "
        f"images of {counts.min()} to {counts.max()} patches, random weights; largest difference "
        f"of a logit ÷ largest logit.\n\n{NOTES}\n| model | precision | choice | difference |\n"
        "| --- | --- | --- | ---: |\n" + "\n".join(lines) + f"\n\n{leaks()}"
    )
    options.results.mkdir(exist_ok=True, parents=True)
    (options.results / "agreement.md").write_text(text)
    print(text)
    if failed:
        raise SystemExit(f"these differ: {failed}")


NOTES = """\
Taken out of lucidrains' na_vit, since ours has nothing like it: the layer norms around the patch
embedding; the biases of the embedding and the MLPs; `+ queries` after pooling; a query-key norm a
head (its scales are made those of the first head). Its attention has no 1/√E, which goes into our
query norm; its pool's query, whatever the input, is one vector a head, as ours. The MLP of our pool
is made 0.

Taken out of timm's NaFlexViT: all biases; its query-key norm is a layer norm, made RMS norm; its
layer norms' ε is 1e-6, made 1e-5. Of its pool (`map`), keys are normalised and the result, as ours.
Its factorised tables are interpolated with corners outside (`align_corners=False`), ours lie from
the first to the last place of a table, so they agree on grids of the table's size; its grid-sampled
table can be told to (`align_corners=True`), and agrees on all grids.
"""


def random_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter, scales and biases too, a value that matters."""
    torch.manual_seed(1)
    model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))


def ours_of(dtype: torch.dtype, **options: Any) -> NaViT:
    """Return our model."""
    config = NaViTConfig(num_classes=NUM_CLASSES, max_side=SIDE, **{**SHAPE, **options})
    model = NaViT(config)
    random_weights(model, dtype)
    return model


def answers(model: NaViT, batch: PackedBatch) -> Tensor:
    """Return the logits of all images in order."""
    with torch.no_grad():
        index, logits = batch.by_example(model(batch))
    return logits[index.argsort()]


def packed_batch(grids: np.ndarray) -> PackedBatch:
    """Return random images in packs."""
    longest = max(int(grids[pack].prod(1).sum()) for pack in PACKS)
    return arms.batch_of(Images(grids, PACKS, longest), PACKS, longest + 5, 4, 0)


def differ(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference ÷ the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def copy(target: Tensor, source: Tensor) -> None:
    """Set weights."""
    with torch.no_grad():
        target.copy_(source.reshape(target.shape))


# lucidrains' na_vit


class WithoutQueries(nn.Module):
    """Attention pooling from which the residual that follows is taken out beforehand."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, queries: Tensor, **options: Any) -> Tensor:
        """Return what, with the queries added, is the pool's own output."""
        return self.pool(queries, **options) - queries


def lucidrains_peer(dtype: torch.dtype, left_in: str) -> nn.Module:
    """Return the peer, what ours has no counterpart for taken out."""
    from vit_pytorch.na_vit import NaViT as Peer

    peer = Peer(
        image_size=SIDE * 16, patch_size=16, num_classes=NUM_CLASSES, dim_head=HEAD_DIM, **SHAPE
    )
    random_weights(peer, dtype)
    if left_in != "layer norms around the embedding":
        peer.to_patch_embedding[0] = nn.Identity()
        peer.to_patch_embedding[2] = nn.Identity()
    if left_in != "biases":
        for module in peer.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    if left_in != "scales a head":
        for attention, _ in peer.transformer.layers:
            for norm in (attention.q_norm, attention.k_norm):
                copy(norm.gamma, norm.gamma[:1].expand_as(norm.gamma).clone())
    return peer


def load_lucidrains(model: NaViT, peer: nn.Module) -> None:
    """Copy the peer's weights into ours."""
    embed = peer.to_patch_embedding[1].weight.unflatten(1, (3, 16, 16))  # (c, y, x) -> (y, x, c)
    copy(model.embed.weight, embed.permute(0, 2, 3, 1))
    copy(model.position.rows, peer.pos_embed_height)
    copy(model.position.columns, peer.pos_embed_width)
    for block, (attention, mlp) in zip(model.blocks, peer.transformer.layers, strict=True):
        copy(block.norm_attention.weight, attention.norm.gamma)
        copy(
            block.queries_keys_values.weight,
            torch.cat([attention.to_q.weight, attention.to_kv.weight]),
        )
        copy(block.norm_queries.weight, attention.q_norm.gamma[0] * HEAD_DIM**0.5)
        copy(block.norm_keys.weight, attention.k_norm.gamma[0])
        copy(block.project.weight, attention.to_out[0].weight)
        copy(block.norm_mlp.weight, mlp[0].gamma)
        copy(block.widen.weight, mlp[1].weight)
        copy(block.narrow.weight, mlp[4].weight)
    copy(model.norm.weight, peer.transformer.norm.gamma)
    pool = peer.attn_pool
    with torch.no_grad():
        query = pool.to_q(pool.norm(peer.attn_pool_queries)).reshape(SHAPE["heads"], 1, HEAD_DIM)
        query = pool.q_norm(query) * pool.k_norm.gamma
    copy(model.pool.query, query)
    copy(model.pool.norm_keys.weight, torch.ones(HEAD_DIM))
    copy(model.pool.keys_values.weight, pool.to_kv.weight)
    copy(model.pool.project.weight, pool.to_out[0].weight)
    copy(model.pool.narrow.weight, torch.zeros(SHAPE["dim"], SHAPE["mlp_dim"]))
    copy(model.pool.norm_out.weight, peer.mlp_head[0].gamma)
    copy(model.head.weight, peer.mlp_head[1].weight)


def images_of(batch: PackedBatch, dtype: torch.dtype) -> list[list[Tensor]]:
    """Return the packs as lists of images [3, height, width] in -1..1."""
    packs = []
    for row, lens in enumerate(batch.seq_lens.tolist()):
        start, pack = 0, []
        for number, length in enumerate(filter(None, lens)):
            h, w = batch.grid_hw[row, number].tolist()
            patches = batch.patches[row, start : start + length].reshape(h, w, 16, 16, 3)
            image = patches.permute(4, 0, 2, 1, 3).reshape(3, h * 16, w * 16)
            pack.append(image.to(dtype) / 127.5 - 1)
            start += length
        packs.append(pack)
    return packs


def lucidrains(dtype: torch.dtype, left_in: str) -> float:
    """Return how far the peer is from ours."""
    model, peer = ours_of(dtype), lucidrains_peer(dtype, left_in)
    load_lucidrains(model, peer)
    if left_in != "residual + queries":
        peer.attn_pool = WithoutQueries(peer.attn_pool)
    batch = packed_batch(GRIDS)
    with torch.no_grad():
        found = peer(images_of(batch, dtype))
    return differ(found, answers(model, batch))


# timm's NaFlexViT


def timm_peer(dtype: torch.dtype, left_in: str, **options: Any) -> nn.Module:
    """Return the peer, what ours has no counterpart for taken out."""
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    cfg = NaFlexVitCfg(
        patch_size=16,
        embed_dim=SHAPE["dim"],
        depth=SHAPE["depth"],
        num_heads=SHAPE["heads"],
        mlp_ratio=SHAPE["mlp_dim"] / SHAPE["dim"],
        qk_norm=True,
        pos_embed_grid_size=(SIDE, SIDE),
        **options,
    )
    peer = NaFlexVit(cfg, num_classes=NUM_CLASSES)
    if left_in != "layer norm of queries and keys":
        for block in peer.blocks:
            block.attn.q_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6)
            block.attn.k_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6)
    if peer.attn_pool is not None and left_in != "pool without norms":
        peer.attn_pool.k_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6)
        peer.fc_norm = nn.LayerNorm(SHAPE["dim"])
    random_weights(peer, dtype)
    for module in peer.modules():
        if left_in != "biases" and getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    return peer


def load_timm(model: NaViT, peer: nn.Module) -> None:
    """Copy the peer's weights into ours."""
    copy(model.embed.weight, peer.embeds.proj.weight)
    if model.config.position == "learned_2d_fractional":
        copy(model.position.table, peer.embeds.pos_embed)
    else:
        copy(model.position.rows, peer.embeds.pos_embed_y)
        copy(model.position.columns, peer.embeds.pos_embed_x)
    for block, theirs in zip(model.blocks, peer.blocks, strict=True):
        copy(block.norm_attention.weight, theirs.norm1.weight)
        copy(block.queries_keys_values.weight, theirs.attn.qkv.weight)
        copy(block.norm_queries.weight, theirs.attn.q_norm.weight)
        copy(block.norm_keys.weight, theirs.attn.k_norm.weight)
        copy(block.project.weight, theirs.attn.proj.weight)
        copy(block.norm_mlp.weight, theirs.norm2.weight)
        copy(block.widen.weight, theirs.mlp.fc1.weight)
        copy(block.narrow.weight, theirs.mlp.fc2.weight)
    copy(model.norm.weight, peer.norm.weight)
    copy(model.head.weight, peer.head.weight)
    pool = peer.attn_pool
    if pool is None:
        return
    with torch.no_grad():
        copy(model.pool.query, pool.q(pool.latent) * HEAD_DIM**-0.5)
    copy(model.pool.norm_keys.weight, getattr(pool.k_norm, "weight", torch.ones(HEAD_DIM)))
    copy(model.pool.keys_values.weight, pool.kv.weight)
    copy(model.pool.project.weight, pool.proj.weight)
    copy(model.pool.norm_mlp.weight, pool.norm.weight)
    copy(model.pool.widen.weight, pool.mlp.fc1.weight)
    copy(model.pool.narrow.weight, pool.mlp.fc2.weight)
    copy(model.pool.norm_out.weight, getattr(peer.fc_norm, "weight", torch.ones(SHAPE["dim"])))


def timm(position: str, pooling: str, grids: np.ndarray, **options: Any) -> Callable[..., float]:
    """Return a comparison with timm's model for one position embedding and pooling."""

    def compare(dtype: torch.dtype, left_in: str) -> float:
        pool = {"mean": "avg", "attention": "map"}[pooling]
        peer = timm_peer(dtype, left_in, global_pool=pool, fc_norm=False, **options)
        model = ours_of(dtype, position=position, pooling=pooling)
        load_timm(model, peer)
        chosen = GRIDS if left_in == "grids of any size" else grids
        batch = packed_batch(chosen)
        longest = int(chosen.prod(1).max())
        padded = arms.batch_of(
            Images(chosen, PACKS, longest),
            [np.array([n]) for n in range(len(chosen))],
            longest,
            1,
            0,
        )
        patches = torch.zeros_like(padded.patches)
        for row, image in enumerate(image for pack in images_flat(batch) for image in pack):
            patches[row, : len(image)] = image
        inputs = {
            "patches": patches.to(dtype) / 127.5 - 1,
            "patch_coord": padded.coords.long(),
            "patch_valid": padded.segment_ids > 0,
        }
        with torch.no_grad():
            return differ(peer(inputs), answers(model, batch))

    return compare


def images_flat(batch: PackedBatch) -> list[list[Tensor]]:
    """Return the patches of each image of each pack."""
    return [
        list(patches[: sum(lens)].split([n for n in lens if n]))
        for patches, lens in zip(batch.patches, batch.seq_lens.tolist(), strict=True)
    ]


def leaks() -> str:
    """Return whether the pixels of one image move another's logits, here and there."""
    model, peer = ours_of(torch.float64), lucidrains_peer(torch.float64, "")
    batch = packed_batch(GRIDS)
    moved = batch.patches.clone()
    moved[0, : GRIDS[0].prod()] = 255 - moved[0, : GRIDS[0].prod()]
    other = PackedBatch(**{**vars(batch), "patches": moved})
    sentences = []
    with torch.no_grad():
        for name, ask in (
            ("ours", lambda b: answers(model, b)),
            ("lucidrains", lambda b: peer(images_of(b, torch.float64))),
        ):
            changed = (ask(batch)[1:] != ask(other)[1:]).any().item()
            sentences.append(f"{name}: {'some move' if changed else 'no bit moves'}")
    return f"Logits of the other images when the pixels of one change: {'; '.join(sentences)}.\n"


SQUARE = np.full_like(GRIDS, SIDE)
TRIALS: list[tuple[str, Callable[[torch.dtype, str], float], tuple[str, ...]]] = [
    (
        "lucidrains na_vit",
        lucidrains,
        ("residual + queries", "layer norms around the embedding", "biases", "scales a head"),
    ),
    (
        "timm, grid-sampled table, avg",
        timm(
            "learned_2d_fractional",
            "mean",
            GRIDS,
            pos_embed="learned",
            pos_embed_use_grid_sample=True,
            pos_embed_interp_mode="bilinear",
            pos_embed_align_corners=True,
        ),
        ("layer norm of queries and keys", "biases"),
    ),
    (
        "timm, grid-sampled table, map",
        timm(
            "learned_2d_fractional",
            "attention",
            GRIDS,
            pos_embed="learned",
            pos_embed_use_grid_sample=True,
            pos_embed_interp_mode="bilinear",
            pos_embed_align_corners=True,
        ),
        ("pool without norms",),
    ),
    (
        f"timm, factorised, avg, grids of {SIDE} × {SIDE}",
        timm("factorised_fractional_sum", "mean", SQUARE, pos_embed="factorized"),
        ("grids of any size",),
    ),
]

if __name__ == "__main__":
    main()
