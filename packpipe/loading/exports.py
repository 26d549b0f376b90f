"""Packed rows under the names that other libraries know.

===================  ==========================================================================
here                 there
===================  ==========================================================================
seq_lens             ``cu_seq_lens_q/k``, ``max_length_q/k`` (transformers); ``cu_seqlens_q/k``,
                     ``max_seqlen_q/k`` (flash-attention); ``seq_lengths`` (TRL)
segment_ids          ``inputs_segment_ids`` (seqio, grain); document ids (FlexAttention);
                     a 4-D ``attention_mask`` (transformers without flash-attention)
position_ids         ``position_ids`` (transformers); ``inputs_positions`` (seqio, grain)
coords               ``patch_coord`` (timm's NaFlexViT)
grid_hw              ``spatial_shapes`` (SigLIP 2); ``image_grid_thw`` (Qwen-VL)
===================  ==========================================================================

Shape letters: B rows, L tokens a row, T tokens without padding, N images, M tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packpipe import checks
from packpipe.loading.batch import PackedBatch, TokenBatch
from packpipe.loading.colouring import segment_numbers
from packpipe.rows.rows import NO_LABEL

MASKS = ("completion_mask", "assistant_masks")  # of tokens that are trained on, in TRL
# Qwen2-VL's and Qwen2.5-VL's, which are CLIP's.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")  # of attention in transformers, with a mask


def to_transformers(batch: TokenBatch, *, position_ids_start: int = 0) -> dict[str, Any]:
    """Return the arguments of a transformers model for the batch's segments, without padding.

    They are what ``DataCollatorWithFlattening`` returns for the sequences, and ``use_cache``. (Do
    not give that collator rows: it takes each for one sequence, in silence.) Pass all of them to a
    decoder, ``model(**to_transformers(batch))``, with any ``attn_implementation``: flash-attention
    takes the bounds, the others see that positions restart. Encoders (BERT and its like) do not see
    that without flash-attention; give them padded rows and `to_attention_mask`.

    Where gradients accumulate, or ranks share a step, pass ``num_items_in_batch`` to the model,
    too: the `packpipe.training.losses.global_count` of labels that are not -100.

    Args:
        batch: the batch. Labels are its token column ``labels``, else the input_ids; they are -100
            where a ``completion_mask`` or ``assistant_masks`` column is 0. If the source's
            ``labels`` have one value a sequence, these are the labels, for classification.
        position_ids_start: position of first tokens; 2 for RoBERTa and its like (padding_idx + 1).

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` int64[1, T]; ``cu_seq_lens_q`` and
        ``cu_seq_lens_k`` int32[segments + 1]; ``max_length_q``, ``max_length_k``; ``use_cache``,
        False, since a model with a cache ignores that positions restart, and mixes the sequences.
        Labels of first tokens are -100. For classification ``labels`` are [segments].
    """
    start = checks.whole_number("position_ids_start", position_ids_start, 0, 2**31 - 1, "0 or 2")
    real = batch.segment_ids > 0
    positions = batch.position_ids[real].long()
    bounds, longest = _bounds(batch)
    return {
        "input_ids": _column(batch, "input_ids")[real].long()[None],
        "labels": _labels(batch),
        "position_ids": positions[None] + start,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }


def _labels(batch: TokenBatch) -> Tensor:
    """Return the labels of tokens, int64[1, T], or of sequences, [segments]."""
    of_sequences = batch.segments.get("labels")
    if isinstance(of_sequences, Tensor):
        return of_sequences[batch.present]
    if of_sequences is not None:
        remedy = "class_encode_column it before packing, or leave it out with value_columns"
        raise TypeError(checks.sentence("segments['labels']", of_sequences, "numbers", remedy))
    real = batch.segment_ids > 0
    name = "labels" if "labels" in batch.tokens else "input_ids"
    labels = _column(batch, name)[real].long()
    # The models shift labels by one, so a first token would be predicted from the sequence before.
    hidden = batch.position_ids[real] == 0
    for mask in MASKS:
        if mask in batch.tokens:
            hidden = hidden | (batch.tokens[mask][real] == 0)
    return labels.masked_fill(hidden, NO_LABEL)[None]


def to_attention_mask(
    batch: TokenBatch | PackedBatch,
    *,
    causal: bool = False,
    implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Return the 4-D mask of transformers for padded rows: which query sees which key.

    A padding token sees itself, since a softmax over nothing is NaN in some of its backends.

    Args:
        batch: the batch.
        causal: whether a token sees no later token.
        implementation: the model's ``attn_implementation``, which decides what a mask is.
        dtype: of the model; the mask of ``"eager"`` has it.

    Returns:
        [B, 1, L, L], query before key. ``"sdpa"``: bool, True where a query sees a key;
        ``"eager"``: 0 there and the least number of dtype elsewhere, which eager attention adds to
        its scores; ``"flex_attention"``: a ``BlockMask`` of torch.
    """
    remedy = "flash-attention takes `to_transformers`"
    checks.choice("implementation", implementation, IMPLEMENTATIONS, remedy)
    if not dtype.is_floating_point:
        remedy = "pass that of the model, model.dtype"
        raise ValueError(checks.sentence("dtype", dtype, "a floating type", remedy))
    ids = batch.segment_ids
    seq_len = ids.shape[1]
    if implementation == "flex_attention":
        return _block_mask(ids, causal)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, None, :]
    if causal:
        same = same & torch.ones(seq_len, seq_len, dtype=torch.bool, device=ids.device).tril()
    seen = (same | torch.eye(seq_len, dtype=torch.bool, device=ids.device))[:, None]
    if implementation == "sdpa":
        return seen
    # Not -inf, as transformers does: a row of it alone would be NaN.
    return torch.zeros(seen.shape, dtype=dtype, device=ids.device).masked_fill(
        ~seen, torch.finfo(dtype).min
    )


def _block_mask(ids: Tensor, causal: bool) -> Any:
    """Return FlexAttention's mask of int32[B, L] segment numbers, 0 in padding."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head  # all heads have the same mask
        same = (ids[row, query] == ids[row, key]) & (ids[row, key] > 0)
        if causal:
            same = same & (query >= key)
        return same | (query == key)

    rows, seq_len = ids.shape
    return create_block_mask(sees, rows, None, seq_len, seq_len, device=str(ids.device))


def to_flash_attention(batch: TokenBatch | PackedBatch) -> dict[str, Any]:
    """Return the arguments of ``flash_attn_varlen_func`` for the tokens without padding.

    Returns:
        ``cu_seqlens_q``, ``cu_seqlens_k`` int32[segments + 1]; ``max_seqlen_q``, ``max_seqlen_k``.
        They are bounds within ``values[batch.segment_ids > 0]``.
    """
    bounds, longest = _bounds(batch)
    return {
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


def to_document_ids(batch: TokenBatch | PackedBatch) -> Tensor:
    """Return int32[B, L] for FlexAttention: tokens see each other where the numbers are equal.

    Numbers are those of the batch's segments, 0, 1, ...; no two rows share one, so that rows may
    be flattened. Padding of row b has -1 - b.
    """
    ids = batch.segment_ids
    held = (batch.seq_lens > 0).sum(1)
    row = torch.arange(len(ids), device=ids.device)
    before = (held.cumsum(0) - held)[:, None]
    # Padding has numbers too, since a softmax over no token may be NaN, and other ones in each row,
    # so that padding of two rows stays apart when rows are flattened.
    found: Tensor = torch.where(ids > 0, before + ids - 1, -1 - row[:, None]).to(torch.int32)
    return found


def to_seqio(batch: TokenBatch, feature: str = "inputs") -> dict[str, Tensor]:
    """Return a batch under the names of seqio and grain.

    Args:
        batch: the batch.
        feature: their name for input_ids.

    Returns:
        [B, L]: ``inputs``, ``inputs_segment_ids`` (0 in padding) and ``inputs_positions``.
    """
    return {
        feature: _column(batch, "input_ids"),
        f"{feature}_segment_ids": batch.segment_ids,
        f"{feature}_positions": batch.position_ids,
    }


def to_trl(packed: Any, config: Any = None) -> Any:
    """Return ragged rows as TRL's ``pack_dataset`` returns them, for ``SFTTrainer``.

    They need ``SFTConfig(padding_free=True, max_length=None)``. By its defaults the trainer takes a
    row for one sequence, without a word, and with ``packing=True`` it packs the rows once more.
    So pass the config here, too: it is looked at, and changed in nothing.

    Args:
        packed: a Dataset of `pack` with ``layout="ragged"``. Where it has no ``labels``, the
            trainer obeys ``assistant_masks``, and ``completion_mask`` if ``completion_only_loss``.
        config: the trainer's ``SFTConfig``; None if it is made elsewhere.

    Returns:
        Dataset of the token columns and ``seq_lengths``.

    Raises:
        ValueError: rows have padding, which TRL's collators would take for tokens; the config
            would mix sequences, or leave a mask out.
    """
    if "segment_ids" in packed.column_names:
        remedy = "pack with layout='ragged'"
        raise ValueError(checks.sentence("layout", "fixed", "rows without padding", remedy))
    # Token columns stand before seq_lens in the schema.
    kept = packed.column_names[: packed.column_names.index("seq_lens")]
    masks = [name for name in MASKS if name in kept]
    if masks and "labels" in kept:
        expected = "labels or masks, since TRL leaves masks out where there are labels"
        remedy = "write -100 into labels before packing, and remove_columns the masks"
        raise ValueError(checks.sentence("packed.column_names", kept, expected, remedy))
    if config is not None:
        _check_sft_config(config, masks)
    return packed.select_columns([*kept, "seq_lens"]).rename_column("seq_lens", "seq_lengths")


def _check_sft_config(config: Any, masks: list[str]) -> None:
    """Raise if TRL's trainer would mix the sequences of ragged rows, or leave a mask out."""
    wanted = [
        ("packing", False, "the rows are packed already"),
        ("padding_free", True, "or else the sequences of a row see each other"),
        ("max_length", None, "no row is longer than its seq_len"),
    ]
    for name, value, remedy in wanted:
        found = getattr(config, name)
        if found != value:
            raise ValueError(checks.sentence(f"config.{name}", found, repr(value), remedy))
    if config.eval_packing:
        remedy = "rows to evaluate on are packed, too"
        raise ValueError(checks.sentence("config.eval_packing", True, "None or False", remedy))
    if "completion_mask" in masks and config.completion_only_loss is None:
        remedy = "None leaves the rows' completion_mask out"
        raise ValueError(
            checks.sentence("config.completion_only_loss", None, "True or False", remedy)
        )


def to_naflex(batch: PackedBatch) -> dict[str, Tensor]:
    """Return the images of a batch as timm's NaFlexViT takes them: one a row, padded.

    Without prefix tokens, which that model adds itself.

    Returns:
        ``patches`` float32[N, M, P·P·3] in -1..1, ``patch_coord`` int64[N, M, 2] (y, x),
        ``patch_valid`` bool[N, M]; N in the order of ``batch.example_index[batch.present]``.
    """
    real = (batch.segment_ids > 0) & (batch.coords[..., 0] >= 0)
    lens = _patch_lens(batch)
    valid = torch.arange(int(lens.max()) if len(lens) else 0, device=lens.device) < lens[:, None]
    patches = batch.patches.new_zeros(*valid.shape, batch.patches.shape[-1], dtype=torch.float32)
    # 0..255 to -1..1: mean and standard deviation 0.5, which SigLIP 2's processor uses, too.
    patches[valid] = batch.pixels()[real] / 127.5 - 1
    coords = batch.coords.new_zeros(*valid.shape, 2, dtype=torch.int64)
    coords[valid] = batch.coords[real].long()
    return {"patches": patches, "patch_coord": coords, "patch_valid": valid}


def to_siglip2(batch: PackedBatch) -> dict[str, Tensor]:
    """Return the images of a batch as transformers' SigLIP 2 takes them: one a row, padded.

    Without prefix tokens, which that model has none of.

    Returns:
        ``pixel_values`` float32[N, M, P·P·3] in -1..1, ``pixel_attention_mask`` int32[N, M],
        ``spatial_shapes`` int64[N, 2]; N in the order of ``batch.example_index[batch.present]``.

    Raises:
        ValueError: tokens were dropped; SigLIP 2 computes positions of whole grids only.
    """
    shapes = _whole_grids(batch)
    found = to_naflex(batch)
    return {
        "pixel_values": found["patches"],
        "pixel_attention_mask": found["patch_valid"].to(torch.int32),
        "spatial_shapes": shapes,
    }


def to_qwen_vl(
    batch: PackedBatch,
    *,
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
) -> dict[str, Tensor]:
    """Return the images of a batch as the models of Qwen2-VL, 2.5 and 3 take them, unpadded.

    They are to the byte what transformers' processor of Pillow makes of the same pictures, of rows
    packed with its patch_size (14; Qwen3-VL 16), ``resolution=PixelRange(min_pixels, max_pixels)``,
    ``max_tokens`` of at least max_pixels ÷ patch_size², ``reducing_gap=None`` and
    ``profiles="ignore"``. A placeholder of the prompt stands for merge_size² tokens: image n has
    ``image_grid_thw[n].prod() // merge_size**2`` of them.

    Args:
        batch: the batch; rows and columns of its grids are multiples of merge_size.
        mean: the processor's ``image_mean``; (0.5, 0.5, 0.5) for Qwen3-VL.
        std: the processor's ``image_std``; (0.5, 0.5, 0.5) for Qwen3-VL.
        merge_size: patches a side of a block that the model merges; blocks stand row by row, the
            patches of each one after the other.
        temporal_patch_size: frames of a patch; an image is repeated in all of them.

    Returns:
        ``pixel_values`` float32[T, 3·frames·P·P], channel first, then frame, row, column;
        ``image_grid_thw`` int64[N, 3], (1, rows, columns); N in the order of
        ``batch.example_index[batch.present]``.

    Raises:
        TypeError: mean or std holds no numbers.
        ValueError: tokens were dropped, or a grid cannot be merged; or mean or std is not of three
            numbers, or a std is not above 0.
    """
    merge = checks.whole_number("merge_size", merge_size, 1, 128, "2 is usual")
    frames = checks.whole_number("temporal_patch_size", temporal_patch_size, 1, 128, "2 is usual")
    colours = [
        _of_colours("mean", mean, checks.real_number),
        _of_colours("std", std, checks.positive_number),
    ]
    shapes = _whole_grids(batch)
    apart = (shapes % merge).any(1).nonzero()[:, 0]
    if len(apart):
        first = int(apart[0])
        name, expected = f"grid_hw[{first}]", f"multiples of {merge} (merge_size)"
        remedy = "pack with resolution=PixelRange(...)"
        raise ValueError(checks.sentence(name, shapes[first].tolist(), expected, remedy))
    real = (batch.segment_ids > 0) & (batch.coords[..., 0] >= 0)  # prefix tokens are taken off
    lens = _patch_lens(batch)
    columns = shapes[:, 1].repeat_interleave(lens)
    y, x = batch.coords[real].long().unbind(-1)
    block = (y // merge) * (columns // merge) + x // merge
    place = (block * merge + y % merge) * merge + x % merge
    # Tokens of an image stand together, and may stand in any order; here in that of their blocks.
    start = (lens.cumsum(0) - lens).repeat_interleave(lens)
    shown = batch.pixels()[real]
    levels = torch.empty_like(shown)
    levels[start + place] = shown
    side = int((levels.shape[1] // 3) ** 0.5)
    pixels = levels.view(-1, side, side, 3) / 255
    means, stds = (torch.tensor(values, device=levels.device) for values in colours)
    pixels = ((pixels - means) / stds).permute(0, 3, 1, 2)
    values = pixels[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)
    return {
        "pixel_values": values,
        "image_grid_thw": torch.nn.functional.pad(shapes, (1, 0), value=1),
    }


def _of_colours(
    name: str, values: Sequence[float], check: Callable[[str, Any, str], float]
) -> list[float]:
    """Return three checked numbers, of red, green and blue."""
    remedy = f"pass the processor's image_{name}"
    if not isinstance(values, Sequence | np.ndarray) or len(values) != 3:
        raise ValueError(checks.sentence(name, values, "three numbers", remedy))
    return [check(f"{name}[{k}]", value, remedy) for k, value in enumerate(values)]


def _whole_grids(batch: PackedBatch) -> Tensor:
    """Return int64[N, 2], the grids of a batch's images.

    Raises:
        ValueError: tokens were dropped.
    """
    shapes = batch.grid_hw[batch.present].long()
    lens = _patch_lens(batch)
    dropped = (shapes.prod(1) != lens).nonzero()[:, 0]
    if len(dropped):
        first = int(dropped[0])
        name = f"seq_lens[{first}]" if (batch.coords >= 0).all() else f"patches of image {first}"
        expected = f"{int(shapes[first].prod())} (all of its grid)"
        raise ValueError(
            checks.sentence(name, int(lens[first]), expected, "pack without a drop rate")
        )
    return shapes


def _patch_lens(batch: PackedBatch) -> Tensor:
    """Return int64[N], the tokens of each image that are patches."""
    numbers = segment_numbers(batch.segment_ids, batch.seq_lens.shape[1])
    prefix = numbers[(batch.coords[..., 0] < 0).flatten()]
    lens = batch.seq_lens.flatten().long() - prefix.bincount(minlength=batch.seq_lens.numel())
    return lens[batch.present.flatten()]


def _bounds(batch: TokenBatch | PackedBatch) -> tuple[Tensor, int]:
    """Return int32[segments + 1], the bounds of segments without padding, and the longest."""
    lens = batch.seq_lens[batch.seq_lens > 0].long()
    # int32 is the type that flash-attention's kernels take.
    bounds = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).to(torch.int32)
    return bounds, int(lens.max()) if len(lens) else 0


def _column(batch: TokenBatch, name: str) -> Tensor:
    if name not in batch.tokens:
        remedy = "rename the column before packing"
        found = sorted(batch.tokens)
        raise ValueError(checks.sentence("batch.tokens", found, f"a column {name}", remedy))
    return batch.tokens[name]
