"""Prefix tokens: slots before an image's patches, from the plan to the model and back."""

import re
from dataclasses import replace

import numpy as np
import packed
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from laws import close

import packpipe
from packpipe import (
    EpochPacks,
    PackConfig,
    PackedLoader,
    PackedStream,
    Packer,
    pack,
    predict,
    verify,
)
from packpipe.augmenting.augment import Augment
from packpipe.augmenting.colours import coloured
from packpipe.loading import exports
from packpipe.loading.batch import PackedBatch
from packpipe.loading.read import read_rows
from packpipe.model.maps import token_maps
from packpipe.model.prefix import check_prefix

SLOTS = 3
OPTIONS = {"patch_size": 2, "drop_rate": [0.0, 0.0, 0.4], "max_tokens": 20, "profiles": "ignore"}
IMAGES = [
    np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    for seed, size in enumerate([(8, 6), (2, 2), (10, 4), (30, 12), (6, 6), (3, 17)])
]


@pytest.fixture(scope="module")
def source():
    masks = [image[..., 0] % 7 for image in IMAGES]
    columns = {"image": IMAGES, "label": [0, 1, 2, 3, 4, 0], "mask": masks}
    features = Features(image=Image(), label=Value("int64"), mask=Image())
    return Dataset.from_dict(columns, features=features)


def of(source, slots, **options):
    """Rows of the images, with room for the same patches whatever the slots, and their masks."""
    more = {"image_column": "image", "mask_column": "mask", "target_stride": 1}
    return pack(source, 40 + slots, prefix_tokens=slots, **OPTIONS | more | options)


def by_example(rows, names):
    """By example, without slots, the columns of its tokens; every slot is as it is to be."""
    found, starts = {}, rows.first_places(rows.segment_ids.shape[1])
    flat = {name: rows.tokens[name].reshape(-1, rows.tokens[name].shape[-1]) for name in names}
    for start, length, example in zip(starts, rows.seq_lens, rows.example_index, strict=True):
        own = {name: values[start : start + length] for name, values in flat.items()}
        slots = own["coords"][:, 0] < 0
        count = np.count_nonzero(slots)
        assert own["coords"][:count].tolist() == [[-1, k] for k in range(count)]
        assert not own["patches"][:count].any()
        assert "targets" not in own or (own["targets"][:count] == 255).all()
        found[int(example)] = count, {name: values[~slots] for name, values in own.items()}
    return found


NAMES = ("patches", "coords", "targets")


def same_but_for_slots(found, wanted, names=NAMES):
    """Whether rows with slots have the same tokens of every image as rows without."""
    with_slots, without = by_example(found, names), by_example(wanted, names)
    assert len(with_slots) == len(IMAGES)
    for example, (count, columns) in with_slots.items():
        none, others = without[example]
        assert (count, none) == (SLOTS, 0)
        for name in names:
            assert np.array_equal(columns[name], others[name]), (example, name)


def rows_of(packed_rows):
    return read_rows(packed_rows, range(len(packed_rows)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_have_the_patches_of_rows_without_behind_their_slots(source, num_workers):
    found, wanted = of(source, SLOTS, num_workers=num_workers), of(source, 0)
    rows = rows_of(found)
    assert rows.num_segments.max() > 1
    kept = rows.seq_lens - SLOTS
    assert (kept < rows.grid_hw.prod(1)).any(), "some image must have lost tokens"
    assert (kept == rows.grid_hw.prod(1)).any(), "some image must be whole"
    same_but_for_slots(rows, rows_of(wanted))


def test_verify_holds_rows_and_plans_against_their_source(source, tmp_path):
    of(source, SLOTS, output=tmp_path / "rows")
    assert verify(tmp_path / "rows", source) == []
    plan_only = tmp_path / "plan"
    of(source, SLOTS, output=plan_only, materialize=False, mask_column=None, target_stride=None)
    assert verify(plan_only, source) == []


def test_streams_epochs_and_map_make_the_rows_of_pack(source):
    wanted = rows_of(of(source, 0))
    options = {"seq_len": 40 + SLOTS, "prefix_tokens": SLOTS, "max_segments": 8, **OPTIONS}
    names = ("patches", "coords")
    small = source.remove_columns("mask")
    same_but_for_slots(
        rows_of(
            small.map(
                Packer(**options, label_column="label"),
                batched=True,
                with_indices=True,
                remove_columns=small.column_names,
                batch_size=None,
            )
        ),
        wanted,
        names,
    )
    for packs in (
        EpochPacks(small, label_column="label", **options),
        PackedStream(small.to_iterable_dataset(), label_column="label", **options),
    ):
        batches = list(PackedLoader(packs, 1, tail="pad"))
        found = {}
        for batch in batches:
            for _, _, one in packed.alone(batch):
                found[int(one.example_index)] = one
        assert sorted(found) == list(range(len(IMAGES)))
        for example, (_, columns) in by_example(wanted, names).items():
            one = found[example]
            assert one.coords[0, :SLOTS].tolist() == [[-1, k] for k in range(SLOTS)]
            assert not one.patches[0, :SLOTS].any()
            assert np.array_equal(one.patches[0, SLOTS:].numpy(), columns["patches"])
            assert np.array_equal(one.coords[0, SLOTS:].numpy(), columns["coords"])


EVERYTHING = replace(Augment.preset("three"), vertical_flip=0.5, turns=True, erase=1.0, flip=0.5)


def test_augmentation_leaves_slots_alone_and_changes_images_as_without(source):
    batches = [
        next(iter(PackedLoader(rows, 2, augment=EVERYTHING, shuffle=False, seed=5)))
        for rows in (of(source, slots) for slots in (SLOTS, 0))
    ]
    shown = []
    for batch in batches:
        pixels = batch.coloured()
        numbers = coloured({name: value.numpy() for name, value in batch.items()})
        assert np.abs(numbers.astype(int) - pixels.patches.numpy()).max() <= 1
        shown.append(
            {
                int(one.example_index): (one.coords[0], one.patches[0], one.grid_hw[0, 0])
                for _, _, one in packed.alone(pixels)
            }
        )
    for example, (coords, patches, grid) in shown[0].items():
        assert coords[:SLOTS].tolist() == [[-1, k] for k in range(SLOTS)]
        assert not patches[:SLOTS].any()
        if example in shown[1]:
            others = shown[1][example]
            for own, other in zip((coords[SLOTS:], patches[SLOTS:], grid), others, strict=True):
                assert torch.equal(own, other)


def test_neighbours_are_mixed_as_without_slots(source):
    rows = of(source, SLOTS, mask_column=None, target_stride=None)
    mixing = Augment(flip=0, cutmix=1.0, mix_prob=1.0)
    batch = next(iter(PackedLoader(rows, 2, augment=mixing, shuffle=False)))
    slots = batch.coords[..., 0] < 0
    meeting = batch.mix_offset != 0
    assert meeting.any()
    assert not (meeting & slots).any()
    # A mixture's label is weighed by patches: own ones ÷ all of the image's.
    row, number = [int(one[0]) for one in (batch.label_weights < 1).nonzero(as_tuple=True)]
    own = (batch.segment_ids[row] == number + 1) & ~slots[row]
    share = 1 - float((meeting[row] & own).sum() / own.sum())
    assert float(batch.label_weights[row, number]) == pytest.approx(share)


def batch_of(source, slots, **options):
    rows = of(source, slots, mask_column=None, target_stride=None, **options)
    return PackedBatch.from_rows(rows_of(rows), max_segments=8)


def test_maps_and_exports_leave_slots_out(source):
    batches = [batch_of(source, slots, drop_rate=0.0) for slots in (SLOTS, 0)]
    maps = [dict(token_maps(batch, batch.patches.float())) for batch in batches]
    assert all(torch.equal(maps[0][example], grid) for example, grid in maps[1].items())
    for name in ("to_naflex", "to_siglip2"):
        found, wanted = (getattr(exports, name)(batch) for batch in batches)
        orders = [batch.example_index[batch.present].argsort() for batch in batches]
        for key in wanted:
            assert torch.equal(found[key][orders[0]], wanted[key][orders[1]]), (name, key)
    dropped = batch_of(source, SLOTS, drop_rate=0.5)
    with pytest.raises(ValueError, match=r"patches of image \d+ is \d+, expected \d+ \(all of its"):
        exports.to_siglip2(dropped)


def test_predictions_are_those_of_each_image_alone_and_maps_have_no_slots():
    model = packed.model_of(dtype=torch.float32, prefix_tokens=2, pooling="first")
    options = {"seq_len": 64, "max_tokens": 20, "profiles": "ignore"}
    together = predict(model, IMAGES, **options)
    alone = torch.cat([predict(model, [image], **options) for image in IMAGES])
    assert close(together, alone, 1e-5)
    assert alone.std(0).min() > 1e-3
    dense = packed.model_of(dtype=torch.float32, prefix_tokens=2, pooling="none")
    assert [one.shape[:2] for one in predict(dense, IMAGES[:2], **options)] == [(4, 3), (1, 1)]


def test_a_model_and_packs_with_other_slots_are_refused_by_name(source):
    model = packed.model_of(dtype=torch.float32, prefix_tokens=1)
    message = "prefix tokens of segment 1 of row 0 is 3, expected 1 (the model's); pack with prefi"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(batch_of(source, SLOTS))
    message = "prefix tokens of segment 1 of row 0 is 0, expected 1 (the model's); pack with prefi"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(batch_of(source, 0))
    message = "prefix tokens of segment 1 of row 0 is 3, expected 0 (the model's); pack with prefi"
    with pytest.raises(ValueError, match=re.escape(message)):
        packed.model_of(dtype=torch.float32)(batch_of(source, SLOTS))
    # Of two segments that together have as many as they must.
    batch = packed.batch_of(packed.RowSet([[3, 4]], seq_len=12, max_segments=2), prefix_tokens=1)
    check_prefix(batch, 1)
    first, second = ((batch.segment_ids[0] == n).nonzero()[:, 0] for n in (1, 2))
    batch.coords[0, first] = 0
    batch.coords[0, second[:2]] = -1
    message = "prefix tokens of segment 1 of row 0 is 0, expected 1 (the model's); pack with"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_prefix(batch, 1)
    message = "prefix_tokens is 2, expected 1 (the model's); leave it out"
    with pytest.raises(ValueError, match=re.escape(message)):
        predict(model, IMAGES[:1], prefix_tokens=2)
    message = "prefix_tokens is 0, expected 1 (the model's); pass the model's packing"
    with pytest.raises(ValueError, match=re.escape(message)):
        packpipe.save_pretrained(model, PackConfig(patch_size=2), "nowhere")
