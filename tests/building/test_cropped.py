"""Cropped images on every way from a source to batches: the same boxes, the same pixels."""

from __future__ import annotations

import pickle
import re
import shutil
from dataclasses import replace
from functools import cache
from io import BytesIO

import harming
import loading
import numpy as np
import pictures
import pyarrow as pa
import pytest
from PIL import Image

import packpipe
from packpipe import CenterCrop, Crop, EpochPacks, PackedLoader, PackedStream, Packer, Side, Uniform
from packpipe.images.patches import unpatchify
from packpipe.philox import Key
from packpipe.planning.crops import crop_boxes
from packpipe.planning.image_config import PackConfig
from packpipe.rows.from_arrow import table_rows
from packpipe.rows.schema import row_schema
from packpipe.rows.to_arrow import rows_table

CROP = Crop(Uniform(0.1, 0.9))
STREAMED = {
    "patch_size": 4,
    "crop": CROP,
    "resolution": Side(Uniform(10, 24)),
    "reducing_gap": None,
}
OPTIONS = {**STREAMED, "fit_last": "resolution"}
SEQ_LEN = 40
BOXES = pa.list_(pa.list_(pa.int32(), 4))


@cache
def files():
    """Images as they are, and as cameras that were turned store them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = [
        pictures.encoded_image(height, width, seed, "JPEG", exif=exif)
        for seed, (height, width) in enumerate(pictures.SIZES)
    ]
    return [*pictures.encoded_images(), *turned]


@pytest.fixture(scope="module")
def dataset():
    return pictures.dataset_of(files())


@pytest.fixture(scope="module")
def packed(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cropped") / "packed"
    options = {**OPTIONS, "num_workers": 0, "progress": False, "seed": 3, "epoch": 2}
    return folder, packpipe.pack(dataset, SEQ_LEN, output=folder, **options)


def upright(example):
    image = Image.open(BytesIO(files()[example]))
    turned = image.getexif().get(0x0112) == 6
    rgb = image.convert("RGB")
    return rgb.transpose(Image.Transpose.ROTATE_270) if turned else rgb


def check_rows(rows, law, key):
    """Every segment is its box of its image, resized; and there are many, and some are cut."""
    index = rows.example_index
    wanted = crop_boxes(law, rows.image_hw, Key(*key), index=index)
    assert rows.box.tolist() == wanted.tolist()
    assert (rows.box[:, 2:] < rows.image_hw).sum() > len(index)
    assert len(index) > 10
    for row in range(len(rows)):
        end = 0
        for segment in range(*rows.offsets[row : row + 2].tolist()):
            start, end = end, end + int(rows.seq_lens[segment])
            grid = tuple(rows.grid_hw[segment].tolist())
            found = unpatchify(rows.patches[row, start:end], rows.coords[row, start:end], grid)
            top, left, height, width = rows.box[segment].tolist()
            image = upright(int(index[segment]))
            assert [image.height, image.width] == rows.image_hw[segment].tolist()
            box = image.crop((left, top, left + width, top + height))
            resized = box.resize(found.shape[1::-1], Image.Resampling.BICUBIC)
            assert found.tolist() == np.asarray(resized).tolist()


def bytes_of(rows):
    return [*pictures.row_bytes(rows), rows.box.tolist()]


def test_rows_hold_the_boxes_of_the_plan_and_what_was_in_them(packed):
    _, found = packed
    rows = packpipe.read_rows(found)
    assert sorted(rows.example_index.tolist()) == list(range(18))
    check_rows(rows, CROP, (3, 2))
    assert found.features.arrow_schema.field("box").type == BOXES
    again = table_rows(
        rows_table(rows, row_schema(PackConfig(seq_len=SEQ_LEN, **OPTIONS), pa.int64()))
    )
    assert bytes_of(again) == bytes_of(rows)


def test_processes_and_rows_computed_when_read_give_the_same_bytes(dataset, packed, tmp_path):
    _, found = packed
    wanted = bytes_of(packpipe.read_rows(found))
    options = {**OPTIONS, "progress": False, "seed": 3, "epoch": 2}
    for name, one in (
        ("process", packpipe.pack(dataset, SEQ_LEN, output=tmp_path / "1", **options)),
        (
            "computed",
            packpipe.pack(
                dataset, SEQ_LEN, output=tmp_path / "2", materialize=False, num_workers=0, **options
            ),
        ),
    ):
        assert bytes_of(packpipe.read_rows(one)) == wanted, name
    assert one[0]["box"].tolist() == found[0]["box"]


def test_every_epoch_crops_anew_and_as_pack_does(dataset, packed):
    packs = EpochPacks(dataset, SEQ_LEN, **OPTIONS)
    rows = {}
    for epoch in (2, 3):
        key = Key(3, epoch)
        rows[epoch] = packs.rows(key, np.arange(packs.num_packs(key)))
        check_rows(rows[epoch], CROP, key)
    stored = packpipe.read_rows(packed[1])
    assert bytes_of(rows[2]) == bytes_of(stored)
    by_image = [rows[epoch].box[np.argsort(rows[epoch].example_index)].tolist() for epoch in (2, 3)]
    assert sum(a != b for a, b in zip(*by_image, strict=True)) > 15
    copy = pickle.loads(pickle.dumps(packs))  # noqa: S301
    sent = pickle.loads(pickle.dumps(packs.planned(Key(3, 2), np.arange(2))))  # noqa: S301
    assert bytes_of(copy.rows(Key(3, 2), sent)) == bytes_of(packs.rows(Key(3, 2), np.arange(2)))


def test_a_stream_crops_each_example_by_its_number(dataset):
    stream = PackedStream(dataset.to_iterable_dataset(), SEQ_LEN, **STREAMED)
    for key in (Key(3, 0), Key(3, 1)):
        packs = list(stream.stream_packs(key, None, 0))
        check_rows(stream.rows(key, packs), CROP, key)


def test_batches_of_map_crop_by_their_indices_and_random_crops_need_them(dataset):
    options = {"batched": True, "batch_size": 18, "remove_columns": dataset.column_names}
    packer = Packer(SEQ_LEN, seed=3, epoch=2, **OPTIONS)
    rows = packpipe.read_rows(dataset.map(packer, with_indices=True, **options))
    check_rows(rows, CROP, (3, 2))
    message = (
        "with_indices is False, expected True for options that draw, since every image draws by "
        "its row; use map(packer, batched=True, with_indices=True)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        packer(dataset.data.table[:3])
    middle = Packer(SEQ_LEN, patch_size=4, crop=CenterCrop(0.25), max_tokens=9)
    found = table_rows(middle(dataset.data.table[:3]))
    assert found.example_index.tolist() == [-1] * 3
    assert sorted(found.box[:, 2:].tolist()) == [[8, 8], [20, 30], [45, 16]]


@pytest.mark.parametrize("kind", ["planned", "stored", "streamed"])
def test_batches_of_cropped_images_go_on_where_they_stopped(dataset, packed, kind):
    def make():
        packs = {
            "planned": lambda: EpochPacks(dataset, SEQ_LEN, **OPTIONS),
            "stored": lambda: packed[1],
            "streamed": lambda: PackedStream(
                dataset.to_iterable_dataset(), SEQ_LEN, window=7, **STREAMED
            ),
        }[kind]()
        return PackedLoader(packs, 2, seed=3, num_workers=0)

    wanted, states, loader = [], [], make()
    for _ in range(2):
        for batch in loader:
            assert "box" not in batch
            wanted.append(loading.digest(batch))
            states.append(loader.state_dict())
    assert len(wanted) > 4
    for step in range(0, len(wanted), 2):
        again = make()
        again.load_state_dict(states[step])
        rest = [loading.digest(batch) for _ in range(2) for batch in again]
        assert rest[: len(wanted) - step - 1] == wanted[step + 1 :]


def test_pairs_have_boxes_beside_their_images_only(dataset, tmp_path):
    texts = dataset.add_column("input_ids", [[row + 1] * (1 + row % 3) for row in range(18)])
    images, beside = packpipe.pack_pairs(
        texts,
        SEQ_LEN,
        text_seq_len=8,
        max_text=8,
        output=tmp_path / "pairs",
        num_workers=0,
        progress=False,
        **OPTIONS,
    )
    check_rows(packpipe.read_rows(images), CROP, (0, 0))
    assert "box" not in beside.column_names
    batch = next(iter(PackedLoader((images, beside), 1)))
    assert batch.images.example_index.tolist()[0][:2] == batch.texts.example_index.tolist()[0][:2]
    assert packpipe.verify(tmp_path / "pairs", texts) == []


def test_nothing_is_wrong_with_cropped_rows_compared_with_their_source(packed, dataset):
    folder, _ = packed
    assert packpipe.verify(folder) == []
    assert packpipe.verify(folder, dataset, sample=None) == []


@pytest.mark.parametrize(
    ("where", "change", "what"),
    [
        (0, -1000, "a box that is not within its image"),
        (3, 10**9, "a box that is not within its image"),
        (2, -1, "a box that is not the plan's"),
    ],
)
def test_a_box_that_is_not_the_plans_is_found(packed, tmp_path, where, change, what):
    folder = shutil.copytree(packed[0], tmp_path / "packed")
    name = next(iter(harming.data(folder)))
    table = harming.read(folder / name)
    rows = table_rows(table)
    assert rows.box[0, 2] > 1
    box = rows.box.copy()
    box[0, where] += change
    segments = {**rows.segments, "box": box}
    harming.write(folder / name, rows_table(replace(rows, segments=segments), table.schema))
    harming.agree(folder)
    said = [str(problem) for problem in packpipe.verify(folder)]
    assert any(what in one and "row 0" in one for one in said), said


def test_a_column_named_box_of_somebody_elses_is_left_alone(packed, dataset, tmp_path):
    whole = packpipe.pack(
        dataset,
        SEQ_LEN,
        patch_size=4,
        max_tokens=30,
        num_workers=0,
        progress=False,
        output=tmp_path / "whole",
    )
    assert "box" not in whole.column_names
    named = whole.add_column("box", ["a"] * len(whole))
    assert "box" not in packpipe.read_rows(named).segments
    table = packed[1].data.table
    place = table.schema.get_field_index("box")
    nulls = pa.array([None] * table.num_rows, BOXES)
    message = (
        "column 'box' is 'incomplete', expected one box a segment; "
        "join rows of one configuration, or rename it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        packpipe.read_rows(table.set_column(place, "box", nulls))
