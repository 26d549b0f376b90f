"""Exports, each against what it is meant for: transformers, TRL, grain, FlexAttention, timm."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from packed import PATCH_SIZE, RowSet, batch_of

from packpipe import PackedLoader, PixelRange, pack
from packpipe.loading.batch import TokenBatch
from packpipe.loading.exports import (
    to_attention_mask,
    to_document_ids,
    to_flash_attention,
    to_naflex,
    to_qwen_vl,
    to_seqio,
    to_siglip2,
    to_transformers,
    to_trl,
)
from packpipe.planning.resolution import patch_grids
from packpipe.samples import images_folder

sequences = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=9)


def packed_tokens(folder: Any, rows: list[list[int]], **options: Any) -> Dataset:
    source = Dataset.from_dict({"input_ids": rows, **options.pop("columns", {})})
    return pack(source, 12, output=folder.mktemp("rows") / "packed", progress=False, **options)


def one_batch(packed: Dataset) -> TokenBatch:
    (batch,) = PackedLoader(packed, len(packed), rank=0, world_size=1)
    return batch


def segments_of(batch: TokenBatch, name: str = "input_ids") -> list[list[int]]:
    found = []
    for row, lens in enumerate(batch.seq_lens.tolist()):
        parts = batch.tokens[name][row].split([*lens, batch.segment_ids.shape[1] - sum(lens)])
        found += [part.tolist() for part, length in zip(parts, lens, strict=False) if length]
    return found


@settings(max_examples=20, deadline=None)
@given(sequences, st.booleans())
def test_transformers_flattening_collator_gives_the_same(tmp_path_factory, rows, labelled):
    from transformers import DataCollatorWithFlattening
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

    columns = {"labels": [[-100, *row[1:]] for row in rows]} if labelled else {}
    batch = one_batch(packed_tokens(tmp_path_factory, rows, columns=columns))
    names = ["input_ids", *columns]
    examples = [
        dict(zip(names, parts, strict=True))
        for parts in zip(*(segments_of(batch, name) for name in names), strict=True)
    ]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples)
    ours = to_transformers(batch)
    assert ours.pop("use_cache") is False
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours[name], value)
            assert ours[name].dtype == value.dtype
        else:
            assert ours[name] == value
    (bounds, _), (longest, _) = prepare_fa_kwargs_from_position_ids(ours["position_ids"])
    flash = to_flash_attention(batch)
    assert torch.equal(flash["cu_seqlens_q"], bounds)
    assert torch.equal(flash["cu_seqlens_k"], bounds)
    assert flash["max_seqlen_q"] == flash["max_seqlen_k"] == int(longest)


@settings(max_examples=20, deadline=None)
@given(sequences)
def test_trl_s_collator_reads_ragged_rows(tmp_path_factory, rows):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packed = to_trl(packed_tokens(tmp_path_factory, rows, layout="ragged"))
    assert packed.column_names == ["input_ids", "seq_lengths"]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    found = collator(list(packed))
    lens = [length for row in packed["seq_lengths"] for length in row]
    assert found["position_ids"][0].tolist() == [j for length in lens for j in range(length)]
    assert found["cu_seq_lens_q"].tolist() == np.cumsum([0, *lens]).tolist()
    assert sorted(map(sorted, rows)) == sorted(
        sorted(part.tolist()) for part in found["input_ids"][0].split(lens)
    )
    starts = np.cumsum([0, *lens[:-1]])
    assert (found["labels"][0][starts] == -100).all()


SFT = {"packing": False, "padding_free": True, "max_length": None, "completion_only_loss": None}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for an option of TRL's own
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "config.packing is True, expected False; the rows are packed already"),
        (
            {"padding_free": False},
            "config.padding_free is False, expected True; or else the sequences of a row see each",
        ),
        (
            {"max_length": 1024},
            "config.max_length is 1024, expected None; no row is longer than its seq_len",
        ),
        (
            {"eval_packing": True},
            "config.eval_packing is True, expected None or False; rows to evaluate on are packed",
        ),
        (
            {},
            "config.completion_only_loss is None, expected True or False; None leaves the",
        ),
    ],
)
def test_a_config_of_trl_that_does_not_fit_the_rows_is_refused(tmp_path_factory, options, message):
    from trl import SFTConfig

    columns = {"completion_mask": [[0, 1], [1]]}
    packed = packed_tokens(tmp_path_factory, [[1, 2], [3]], columns=columns, layout="ragged")
    where = {"output_dir": str(tmp_path_factory.mktemp("run")), "use_cpu": True}
    with pytest.raises(ValueError, match=re.escape(message)):
        to_trl(packed, SFTConfig(**where, **{**SFT, **options}))
    config = SFTConfig(**where, **{**SFT, "completion_only_loss": True})
    assert to_trl(packed, config).column_names == ["input_ids", "completion_mask", "seq_lengths"]


def test_masks_that_trl_would_leave_out_are_refused(tmp_path_factory):
    rows = [[1, 2], [3]]
    columns = {"labels": rows, "assistant_masks": [[0, 1], [1]]}
    packed = packed_tokens(tmp_path_factory, rows, columns=columns, layout="ragged")
    with pytest.raises(ValueError, match=r"packed.column_names is \['input_ids', 'labels', 'ass"):
        to_trl(packed)
    assert "labels" in to_trl(packed.remove_columns("assistant_masks")).column_names


def test_padding_is_refused_where_it_would_be_taken_for_tokens(tmp_path_factory):
    fixed = packed_tokens(tmp_path_factory, [[1, 2]])
    with pytest.raises(ValueError, match="layout is 'fixed', expected rows without padding"):
        to_trl(fixed)
    other = pack(
        Dataset.from_dict({"tokens": [[1, 2]]}),
        12,
        output=tmp_path_factory.mktemp("rows") / "a",
        progress=False,
    )
    with pytest.raises(ValueError, match=r"batch.tokens is \['tokens'\], expected a column input"):
        to_transformers(one_batch(other))


def test_positions_may_start_higher(tmp_path_factory):
    from transformers import DataCollatorWithFlattening

    batch = one_batch(packed_tokens(tmp_path_factory, [[5, 6, 7], [8, 9]]))
    examples = [{"input_ids": ids} for ids in segments_of(batch)]
    theirs = DataCollatorWithFlattening(position_ids_start=2)(examples)
    ours = to_transformers(batch, position_ids_start=2)
    assert torch.equal(ours["position_ids"], theirs["position_ids"])
    assert torch.equal(ours["labels"], theirs["labels"])


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
def test_prompts_are_not_trained_on(tmp_path_factory, mask):
    rows, masks = [[5, 6, 7, 8], [9, 10]], [[0, 0, 1, 1], [1, 1]]
    batch = one_batch(packed_tokens(tmp_path_factory, rows, columns={mask: masks}))
    found = to_transformers(batch)["labels"][0].tolist()
    seen = dict(zip(map(tuple, rows), [[-100, -100, 7, 8], [-100, 10]], strict=True))
    assert found == [label for ids in segments_of(batch) for label in seen[tuple(ids)]]


def test_labels_of_sequences_are_labels(tmp_path_factory):
    rows = [[5, 6, 7], [8, 9], [1] * 9]
    for values in ([2, 0, 1], [0.5, 1.5, 2.5]):
        batch = one_batch(packed_tokens(tmp_path_factory, rows, columns={"labels": values}))
        found = to_transformers(batch)["labels"].tolist()
        wanted = {tuple(ids): value for ids, value in zip(rows, values, strict=True)}
        assert found == [wanted[tuple(ids)] for ids in segments_of(batch)]
    columns = {"labels": ["a", "b", "c"]}
    named = one_batch(
        packed_tokens(tmp_path_factory, rows, columns=columns, value_columns="labels")
    )
    with pytest.raises(
        TypeError, match=r"segments\['labels'\] is \[\['.*, expected numbers; class"
    ):
        to_transformers(named)


def test_a_mask_is_refused_for_what_takes_none(tmp_path_factory):
    batch = one_batch(packed_tokens(tmp_path_factory, [[5, 6, 7]]))
    with pytest.raises(ValueError, match="implementation is 'flash_attention_2', expected one of"):
        to_attention_mask(batch, implementation="flash_attention_2")


def test_a_mask_of_whole_numbers_is_refused(tmp_path_factory):
    batch = one_batch(packed_tokens(tmp_path_factory, [[5, 6, 7]]))
    with pytest.raises(ValueError, match=r"dtype is torch\.int64, expected a floating type"):
        to_attention_mask(batch, implementation="eager", dtype=torch.int64)


def test_grain_packs_under_the_same_names(tmp_path_factory):
    grain = pytest.importorskip("grain")
    rows = [[11, 12, 13], [21, 22], [31, 32, 33, 34], [41]]
    batch = one_batch(packed_tokens(tmp_path_factory, rows))
    ours = to_seqio(batch)
    source = grain.MapDataset.source(
        [{"inputs": np.array(row, np.int64)} for row in segments_of(batch)]
    )
    packer = grain.experimental.FirstFitPackIterDataset(
        source.to_iter_dataset(), length_struct={"inputs": 12}, num_packing_bins=1
    )
    (theirs,) = packer
    assert theirs.keys() == ours.keys()
    for name, values in theirs.items():
        assert values.tolist() == ours[name][0].tolist()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=10, deadline=None)
@given(sequences, st.booleans())
def test_flex_attention_takes_document_ids(tmp_path_factory, rows, causal):
    from torch.nn.attention.flex_attention import flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    batch = one_batch(packed_tokens(tmp_path_factory, rows))
    documents = to_document_ids(batch)
    real = batch.segment_ids > 0
    assert documents[real].unique().tolist() == list(range(int((batch.seq_lens > 0).sum())))
    shape = (*batch.segment_ids.shape, 2, 8)
    seeded = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, *shape, dtype=torch.float64, generator=seeded).transpose(2, 3)

    def within(score, b, h, query, key):  # noqa: ARG001
        seen = documents[b, query] == documents[b, key]
        seen = seen & (query >= key) if causal else seen
        return torch.where(seen, score, -torch.inf)

    theirs = flex_attention(q, k, v, score_mod=within)
    mask = to_attention_mask(batch, causal=causal)
    ours = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    where = real[:, None, :, None].expand_as(ours)
    assert torch.allclose(ours[where], theirs[where], atol=1e-12)


def test_timm_s_naflex_vit_takes_the_images():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    batch = batch_of(RowSet([[6, 4], [1], [9, 4, 4]], 20, 3))
    model = timm.create_model(
        "naflexvit_base_patch16_gap",
        patch_size=PATCH_SIZE,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=3,
        pos_embed_grid_size=(4, 4),
    ).eval()
    inputs = to_naflex(batch)
    together = model(inputs)
    assert together.shape == (6, 3)
    for number in range(6):
        size = int(inputs["patch_valid"][number].sum())
        alone = {name: value[number : number + 1, :size] for name, value in inputs.items()}
        assert torch.allclose(model(alone), together[number], atol=1e-5)


def test_siglip_2_takes_the_images():
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(0)
    batch = batch_of(RowSet([[6, 4], [9, 4]], 15, 3))
    config = Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=PATCH_SIZE,
        num_patches=16,
    )
    model = Siglip2VisionModel(config).eval()
    inputs = to_siglip2(batch)
    together = model(**inputs).pooler_output
    for number in range(4):
        size = int(inputs["pixel_attention_mask"][number].sum())
        assert inputs["spatial_shapes"][number].prod() == size
        alone = {
            "pixel_values": inputs["pixel_values"][number : number + 1, :size],
            "pixel_attention_mask": inputs["pixel_attention_mask"][number : number + 1, :size],
            "spatial_shapes": inputs["spatial_shapes"][number : number + 1],
        }
        assert torch.allclose(model(**alone).pooler_output[0], together[number], atol=1e-5)


def test_dropped_tokens_are_refused_where_positions_know_nothing_of_them():
    batch = batch_of(RowSet([[6, 4]], 15, 3))
    batch.grid_hw[0, 1] = 3
    with pytest.raises(ValueError, match=r"seq_lens\[1\] is 4, expected 9 \(all of its grid\)"):
        to_siglip2(batch)
    with pytest.raises(ValueError, match=r"seq_lens\[1\] is 4, expected 9 \(all of its grid\)"):
        to_qwen_vl(batch)


SIDES = st.integers(1, 60) | st.integers(1, 6000)


@settings(deadline=None)
@given(SIDES, SIDES, st.sampled_from([14, 16]), st.integers(1, 3), st.integers(1, 10**7), st.data())
@example(28 * 10, 28 * 20, 14, 2, 3136, None)
@example(1, 200, 14, 2, 3136, None)
def test_grids_are_those_of_qwen_vl_s_processor(height, width, patch, merge, fewest, data):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    assume(max(height, width) / min(height, width) <= 200)
    most = 1003520 if data is None else data.draw(st.integers(fewest, 2 * 10**7))
    law = PixelRange(fewest, most, merge)
    found, drawn = patch_grids(law, np.array([[height, width]]), patch, 1)
    wanted = smart_resize(height, width, patch * merge, fewest, most)
    assert (patch * found[0]).tolist() == list(wanted)
    assert drawn is None


@pytest.mark.parametrize(
    ("patch", "law", "colours"),
    [
        (14, PixelRange(56 * 56, 112 * 112), {}),  # Qwen2-VL, Qwen2.5-VL
        (16, PixelRange(64 * 64, 96 * 96), {"mean": (0.5,) * 3, "std": (0.5,) * 3}),  # Qwen3-VL
        (14, PixelRange(300 * 300, 320 * 320, 3), {"merge_size": 3, "temporal_patch_size": 1}),
    ],
)
def test_real_pictures_are_to_the_byte_what_qwen_vl_s_processor_makes_of_them(
    patch, law, colours, tmp_path
):
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    files = [*sorted(images_folder().rglob("*.jpg"))[:4], *images_folder().rglob("eraser.png")]
    pictures = [Image.open(file).convert("RGB") for file in files]
    # All levels of each colour, in a picture that is not resized.
    every = np.arange(256, dtype=np.uint8).repeat(patch**2 * law.grid_multiple**2 // 32)
    every = np.resize(every, (law.grid_multiple * patch * 8, law.grid_multiple * patch, 3))
    pictures.append(Image.fromarray(np.ascontiguousarray(every)))
    names = {"mean": "image_mean", "std": "image_std"}
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch,
        min_pixels=law.min_pixels,
        max_pixels=law.max_pixels,
        **{names.get(name, name): value for name, value in colours.items()},
    )
    packed = pack(
        Dataset.from_dict({"image": pictures}),
        2 * law.max_pixels // patch**2 + 40,
        patch_size=patch,
        resolution=law,
        reducing_gap=None,
        profiles="ignore",
        prefix_tokens=2 if patch == 14 else 0,  # which the processor has not
        output=tmp_path / "packed",
        num_workers=0,
        progress=False,
    )
    (batch,) = PackedLoader(packed, len(packed), rank=0, world_size=1)
    assert batch.present.sum() == len(pictures) == 6
    assert batch.present.shape[1] > 1
    order = batch.example_index[batch.present].tolist()
    wanted = processor([pictures[number] for number in order], return_tensors="pt")
    found = to_qwen_vl(batch, **colours)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.dtype == found[name].dtype
        assert torch.equal(value, found[name]), name


def test_grids_that_cannot_be_merged_are_refused():
    batch = batch_of(RowSet([[4, 6]], 15, 3))
    message = (
        r"^grid_hw\[1\] is \[2, 3\], expected multiples of 2 \(merge_size\); pack with resolut"
    )
    with pytest.raises(ValueError, match=message):
        to_qwen_vl(batch)
    assert to_qwen_vl(batch, merge_size=1)["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 3]]
    with pytest.raises(ValueError, match=r"^temporal_patch_size is 0, expected an integer in 1"):
        to_qwen_vl(batch, temporal_patch_size=0)


@pytest.mark.parametrize(
    ("colours", "error", "message"),
    [
        (
            {"mean": (0.5,)},
            ValueError,
            "mean is (0.5,), expected three numbers; pass the processor",
        ),
        (
            {"mean": 0.5},
            ValueError,
            "mean is 0.5, expected three numbers; pass the processor's ima",
        ),
        ({"mean": "abc"}, TypeError, "mean[0] is 'a', expected a number; pass the processor's"),
        ({"std": (1, 1, 0)}, ValueError, "std[2] is 0, expected a number above 0; pass the pro"),
        ({"std": (1, -1, 1)}, ValueError, "std[1] is -1, expected a number above 0; pass the pro"),
        ({"std": (1, 1, math.nan)}, ValueError, "std[2] is nan, expected a finite number; pass t"),
    ],
)
def test_colours_that_are_no_three_numbers_are_refused(colours, error, message):
    batch = batch_of(RowSet([[4]], 15, 3))
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        to_qwen_vl(batch, merge_size=1, **colours)
