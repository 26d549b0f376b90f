"""Packed rows of random pixels for the model's tests, built by plain loops."""

from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import torch
from hypothesis import strategies as st

from packpipe.augmenting.rows import augmented
from packpipe.loading.batch import PackedBatch
from packpipe.model.config import NaViTConfig
from packpipe.model.navit import NaViT
from packpipe.philox import Key
from packpipe.rows.rows import Rows

PATCH_SIZE = 2
PATCH_BYTES = PATCH_SIZE**2 * 3
NUM_CLASSES = 5


@dataclass(frozen=True)
class RowSet:
    """Token counts of the segments of some rows."""

    lens: list[list[int]]
    seq_len: int
    max_segments: int
    seed: int = field(default=0)


@st.composite
def row_sets(draw, max_rows=3):
    """Rows of one to many segments, single tokens, with and without padding."""
    seq_len = draw(st.sampled_from([1, 2, 7, 16, 33, 65]))
    rows = []
    for _ in range(draw(st.integers(1, max_rows))):
        cuts = draw(st.sets(st.integers(1, seq_len), min_size=1, max_size=6))
        ends = sorted(cuts)
        rows.append([end - start for start, end in zip([0, *ends], ends, strict=False)])
    return RowSet(rows, seq_len, max_segments=6, seed=draw(st.integers(0, 1000)))


def grid_of(length):
    """Return the most square (rows, columns) with that many tokens."""
    rows = max(d for d in range(1, int(length**0.5) + 1) if length % d == 0)
    return rows, length // rows


def rows_of(case, *, example_index=None, labels="random", augment=None, prefix_tokens=0):
    """Return Rows of random pixels for a case, augmented if so asked for.

    Rows are longer by the prefix tokens, which the lengths of a case do not count.
    """
    rng = np.random.default_rng(case.seed)
    flat = [length for lens in case.lens for length in lens]
    more = prefix_tokens * case.max_segments
    shape = (len(case.lens), case.seq_len + more)
    patches = np.zeros((*shape, PATCH_BYTES), np.uint8)
    segment_ids = np.zeros(shape, np.int32)
    coords = np.zeros((*shape, 2), np.int16)
    for row, lens in enumerate(case.lens):
        place = 0
        for number, length in enumerate(lens):
            _, columns = grid_of(length)
            for slot in range(prefix_tokens):
                segment_ids[row, place] = number + 1
                coords[row, place] = (-1, slot)
                place += 1
            for token in range(length):
                segment_ids[row, place] = number + 1
                coords[row, place] = divmod(token, columns)
                patches[row, place] = rng.integers(0, 256, PATCH_BYTES)
                place += 1
    grids = np.array([grid_of(length) for length in flat], np.int16).reshape(-1, 2)
    if isinstance(labels, str):
        labels = pa.array(rng.integers(0, NUM_CLASSES, len(flat)))
    index = np.arange(len(flat)) if example_index is None else np.array(example_index)
    segments = planned(
        offsets=np.cumsum([0, *map(len, case.lens)]),
        seq_lens=np.array(flat, np.int32) + np.int32(prefix_tokens),
        grid_hw=grids,
        image_hw=(grids * PATCH_SIZE).astype(np.int32),
        example_index=index,
        labels=labels,
    )
    rows = filled(segments, patches=patches, segment_ids=segment_ids, coords=coords)
    return rows if augment is None else augmented(rows, augment, Key(2, 4))


def planned(offsets, *, labels=None, **segments):
    """Rows without tokens yet, from columns of segments."""
    return Rows(offsets, segments if labels is None else {**segments, "labels": labels})


def filled(rows, **tokens):
    """The rows with columns of tokens."""
    return replace(rows, tokens=tokens)


def batch_of(case, **options):
    """Return the batch of a case."""
    return PackedBatch.from_rows(rows_of(case, **options), max_segments=case.max_segments)


def alone(batch):
    """Yield (row, segment number, batch of that segment alone in a row of its own length)."""
    for row, lens in enumerate(batch.seq_lens.tolist()):
        place = 0
        for number, length in enumerate(lens):
            if length:
                tokens = slice(place, place + length)
                segment = slice(number, number + 1)
                yield (
                    row,
                    number,
                    PackedBatch(
                        patches=batch.patches[row : row + 1, tokens],
                        segment_ids=torch.ones_like(batch.segment_ids[row : row + 1, tokens]),
                        coords=batch.coords[row : row + 1, tokens],
                        seq_lens=batch.seq_lens[row : row + 1, segment],
                        grid_hw=batch.grid_hw[row : row + 1, segment],
                        example_index=batch.example_index[row : row + 1, segment],
                        **{
                            name: batch[name][row : row + 1, segment]
                            for name in ("labels", "colours", "solarize")
                            if name in batch
                        },
                    ),
                )
                place += length


# What pretrained encoders need of the model, each alone and all that go together.
SWITCHES = {
    "bias": {"bias": True},
    "no norm of queries and keys": {"qk_norm": False},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "quick_gelu": {"activation": "quick_gelu"},
    "swiglu": {"activation": "silu", "gated": True},
    "norm_eps": {"norm_eps": 0.1},
    "layer_scale": {"layer_scale": 0.3},
    "class token": {"prefix_tokens": 1, "pooling": "first"},
    "registers": {"prefix_tokens": 3, "position": "resized", "resize": "bicubic", "max_side": 5},
    "mean beside registers": {"prefix_tokens": 2, "pooling": "mean"},
    "rotary beside registers": {"prefix_tokens": 2, "position": "rotary_fractional"},
    "norm_embed": {"norm_embed": True, "bias": True},
    "no norm_out": {"norm_out": False},
    "norm_pooled": {"norm_pooled": True, "pooling": "mean"},
    "aliased": {"position": "resized", "antialias": False, "max_side": 5},
    "bicubic": {"position": "resized", "resize": "bicubic", "max_side": 5},
    "bicubic aliased": {
        "position": "resized",
        "resize": "bicubic",
        "antialias": False,
        "max_side": 5,
    },
    "keep_aspect": {"position": "resized", "keep_aspect": True, "max_side": 5},
    "all": {
        "bias": True,
        "qk_norm": False,
        "activation": "silu",
        "gated": True,
        "norm_eps": 1e-6,
        "layer_scale": 0.3,
        "prefix_tokens": 2,
        "norm_embed": True,
        "norm_out": False,
        "position": "resized",
        "max_side": 5,
    },
}


def model_of(attention="auto", dtype=torch.float64, seed=0, **options):
    """Return a small model whose every weight matters (larger than the usual start)."""
    torch.manual_seed(seed)
    config = NaViTConfig(
        **{
            "num_classes": NUM_CLASSES,
            "patch_size": PATCH_SIZE,
            "dim": 16,
            "depth": 2,
            "heads": 2,
            "mlp_dim": 24,
            "max_side": 65,
            "attention": attention,
            **options,
        }
    )
    model = NaViT(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
