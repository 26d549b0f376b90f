"""Dense targets: every pixel of a class map comes back at its place."""

import re
from functools import partial
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Array2D, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

import packpipe
from packpipe import Augment, Crop, EpochPacks, PackConfig, PackedLoader
from packpipe.augmenting.rows import augmented
from packpipe.images.masks import TargetRules, cells_of
from packpipe.loading.batch import PackedBatch
from packpipe.philox import Key
from packpipe.planning.plan import plan_epoch
from packpipe.rows import digests
from packpipe.rows.fill_images import Masks, fill_rows, planned_images
from packpipe.rows.rejects import TooManyRejects

FIRST = Key(0, 0)
SIZES = [(40, 61), (16, 16), (33, 90), (64, 48), (8, 100), (57, 23)]
P = 8


def ids_of(image_hw):
    """A class map in which every pixel has a class of its own."""
    return np.arange(image_hw[0] * image_hw[1], dtype=np.uint16).reshape(image_hw)


def naive_cells(mask, grid_hw, box, stride):
    """The class of each cell of an image, by a plain loop over its rows and columns."""
    top, left, height, width = box or (0, 0, *mask.shape)
    side = P // stride
    rows, columns = grid_hw[0] * side, grid_hw[1] * side
    down = [top + (2 * i + 1) * height // (2 * rows) for i in range(rows)]
    across = [left + (2 * j + 1) * width // (2 * columns) for j in range(columns)]
    return mask[down][:, across]


def laid(cells, draw):
    """The cells of an image as its augmentation lays it."""
    cells = cells[:, ::-1] if draw["flip"] else cells
    cells = cells[::-1] if draw["vertical_flip"] else cells
    return np.rot90(cells, draw["turns"])


def assert_targets_are_at_their_places(rows, masks, config, stride, augment=None, key=FIRST):
    """Every cell of every kept token has the class of its pixel; padding has none."""
    places, seen = rows.first_places(config.seq_len), 0
    targets = rows.targets.reshape(-1, rows.targets.shape[-1])
    coords = rows.coords.reshape(-1, 2)
    boxes = rows.segments.get("box")
    for segment, example in enumerate(rows.example_index.tolist()):
        own = slice(places[segment], places[segment] + rows.seq_lens[segment])
        grid = tuple(rows.grid_hw[segment].tolist())
        draw = {"flip": False, "vertical_flip": False, "turns": 0}
        draw = draw if augment is None else augment.draws(*key, example)
        stood = grid[::-1] if draw["turns"] % 2 else grid
        box = None if boxes is None else boxes[segment].tolist()
        wanted = laid(naive_cells(masks[example], stood, box, stride), draw)
        none = np.iinfo(targets.dtype).max
        found = cells_of(targets[own], coords[own], grid, ignore=none)
        kept = np.zeros(grid, bool)
        kept[tuple(coords[own].T)] = True
        shown = kept.repeat(P // stride, 0).repeat(P // stride, 1)
        assert np.array_equal(found[shown], wanted[shown])
        seen += int(shown.sum())
    assert seen == rows.seq_lens.sum() * (P // stride) ** 2 > 0
    assert (rows.targets[rows.segment_ids == 0] == none).all()


LAWS = {
    "whole": {},
    "resized": {"resolution": "budget", "max_tokens": 30},
    "cropped": {"crop": Crop(area=(0.2, 0.9))},
    "dropped": {"drop_rate": 0.5},
    "all": {"crop": Crop(area=(0.1, 1.0)), "drop_rate": 0.3, "max_tokens": 40},
}


@given(
    law=st.sampled_from([*LAWS]),
    stride=st.sampled_from([1, 2, 4, 8]),
    epoch=st.integers(0, 1000),
    flips=st.sampled_from([None, {"flip": 0.5}, {"vertical_flip": 0.5, "turns": True}]),
    picked=st.lists(st.integers(0, len(SIZES) - 1), min_size=1, max_size=4),
)
def test_every_pixel_of_a_mask_comes_back_at_its_place(law, stride, epoch, flips, picked):
    config = PackConfig(seq_len=96, patch_size=P, **LAWS[law])
    sizes = [SIZES[one] for one in picked]
    key, masks = Key(3, epoch), [ids_of(size) for size in sizes]
    images = [np.zeros((*size, 3), np.uint8) for size in sizes]
    plan = plan_epoch(sizes, config, **key._asdict())
    planned = planned_images(plan, range(len(plan)), None)
    given = Masks(masks.__getitem__, TargetRules(stride, "uint16"))
    rows, rejects, _ = fill_rows(planned, images.__getitem__, config, key, masks=given)
    assert not rejects
    check = partial(assert_targets_are_at_their_places, masks=masks, config=config, stride=stride)
    check(rows)
    if flips is not None:
        augment = Augment(**{"flip": 0.0, **flips})
        check(augmented(rows, augment, key), augment=augment, key=key)


def png(values):
    buffer = BytesIO()
    PillowImage.fromarray(values).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def packs_of(source):
    return EpochPacks(source, 16, patch_size=P, mask_column="mask", target_stride=1)


def picture_of(number, image_hw):
    """An image whose levels are its classes, and the class map."""
    rng = np.random.default_rng(number)
    classes = rng.integers(0, 200, image_hw).astype(np.uint8)
    return np.repeat(classes[..., None], 3, 2), classes


def source_of(sizes=SIZES, **changed):
    pairs = [picture_of(number, size) for number, size in enumerate(sizes)]
    columns = {
        "image": [png(pixels) for pixels, _ in pairs],
        "mask": [png(classes) for _, classes in pairs],
    }
    features = Features({"image": Image(), "mask": Image()})
    for row, mask in changed.items():
        columns["mask"][int(row[1:])] = mask
    return datasets.Dataset.from_dict(columns, features=features)


def packed_in(folder, source, **options):
    options = {"num_workers": 0, "progress": False, "patch_size": P, **options}
    options = {"mask_column": "mask", "target_stride": 1, "max_bad_fraction": 0.5, **options}
    return packpipe.pack(source, 96, output=folder, **options)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    wrong = {"_1": None, "_3": png(np.zeros((64, 47), np.uint8))}
    source = source_of(**wrong)
    return packed_in(folder / "out", source, drop_rate=0.4), source, folder / "out"


def test_rows_hold_classes_beside_pixels(packed):
    rows = packpipe.read_rows(packed[0])
    assert rows.targets.dtype == np.uint8
    assert rows.targets.shape == (*rows.patches.shape[:2], P * P)
    sizes_kept = (rows.image_hw % P == 0).all(1)  # others are resized, and their colours blended
    assert not sizes_kept.any()
    masks = [picture_of(number, size)[1] for number, size in enumerate(SIZES)]
    config = PackConfig(seq_len=96, patch_size=P, drop_rate=0.4)
    assert_targets_are_at_their_places(rows, masks, config, 1)


def test_pixels_that_are_not_resized_are_their_classes(tmp_path):
    rows = packpipe.read_rows(packed_in(tmp_path / "out", source_of([(16, 24), (40, 8)])))
    real = rows.segment_ids > 0
    red = rows.patches.reshape(*rows.patches.shape[:2], -1, 3)[..., 0]
    assert np.array_equal(rows.targets[real], red[real])
    assert real.sum() == 11


def test_images_without_a_fitting_mask_are_rejects_with_the_reason(packed):
    found = [(one["example_index"], one["reason"]) for one in packpipe.rejects(packed[0])]
    assert found == [(1, "mask missing"), (3, "mask size")]
    (size,) = [one["exception"] for one in packpipe.rejects(packed[0]) if one["example_index"] == 3]
    assert size == "BadImage: the mask is 64x47, expected 64x48 as its image"


def test_the_folder_is_verified_with_its_masks(packed):
    rows, source, folder = packed
    assert packpipe.verify(folder, source) == []
    assert packpipe.manifest(rows)["targets"] == {"stride": 1, "dtype": "uint8"}
    _, classes = picture_of(0, SIZES[0])
    other = source_of(_0=png(classes[::-1]), _1=None, _3=png(np.zeros((64, 47), np.uint8)))
    (problem,) = packpipe.verify(folder, other)
    assert re.search(r"targets differ from the mask's$", problem.what)


def test_processes_write_the_same_bytes(packed, tmp_path):
    _, source, folder = packed
    again = packed_in(tmp_path / "out", source, num_workers=1, drop_rate=0.4)
    one, other = packpipe.read_rows(packed[0]), packpipe.read_rows(again)
    for name in one.tokens:
        assert np.array_equal(one.tokens[name], other.tokens[name]), name
    files = [sorted(Path(place).glob("*.arrow")) for place in (folder, tmp_path / "out")]
    for ours, theirs in zip(*files, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_packs_that_are_planned_anew_have_targets_too(packed):
    rows, source, _ = packed
    options = {"patch_size": P, "drop_rate": 0.4, "max_bad_fraction": 0.5}
    packs = EpochPacks(source, 96, mask_column="mask", target_stride=1, **options)
    assert packs.has_targets
    stored = packpipe.read_rows(rows)
    found = packs.rows(Key(0, 0), np.arange(packs.num_packs(Key(0, 0))))
    for name in found.tokens:
        assert np.array_equal(found.tokens[name], stored.tokens[name]), name


def test_batches_show_targets_and_padding_has_none(packed):
    (batch,) = PackedLoader(packed[0], len(packed[0]) + 1, tail="pad", shuffle=False)
    assert isinstance(batch, PackedBatch)
    padding = batch.segment_ids == 0
    assert (batch.targets[padding] == 255).all()
    assert (batch.targets[~padding] < 200).all()
    trimmed = batch.trim(8)
    assert trimmed.targets.shape[1] == trimmed.patches.shape[1]


def test_a_state_is_kept_from_rows_whose_targets_alone_are_others(packed, monkeypatch):
    # A sample that the pixels fill; of files, whose checksums would tell, nothing is known.
    monkeypatch.setattr(digests, "_SAMPLE_BYTES", 640)
    rows = packed[0].data.table

    def loader_of(change):
        place = rows.schema.get_field_index("targets")
        cells = np.asarray(rows.column(place).combine_chunks().flatten()) + np.uint8(change)
        length = rows.schema.field(place).type.list_size
        column = pa.FixedSizeListArray.from_arrays(pa.array(cells), length)
        changed = rows.set_column(place, rows.schema.field(place), column)
        return PackedLoader(changed, 1)

    state = loader_of(0).state_dict()
    loader_of(0).load_state_dict(state)
    other = loader_of(1)
    assert other.state_dict()["contents"]["rows"] == state["contents"]["rows"]
    message = r"^state\['contents'\]\['targets'\] is '\w+', .*; class maps are others, of 16 MB "
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    del state["contents"]["targets"]  # as of earlier versions
    other.load_state_dict(state)


@pytest.mark.parametrize(
    "feature", [Array2D((16, 24), "uint16"), List(List(Value("uint16"))), Image(), Value("binary")]
)
def test_masks_of_16_bits_have_more_classes(feature):
    masks = [np.arange(384, dtype=np.uint16).reshape(16, 24) + 300] * 2
    if encoded := isinstance(feature, Image | Value):
        masks = [png(mask) if isinstance(feature, Image) else png(mask)["bytes"] for mask in masks]
    columns = {"image": [png(np.zeros((16, 24, 3), np.uint8))] * 2, "mask": masks}
    features = Features({"image": Image(), "mask": feature})
    source = datasets.Dataset.from_dict(columns, features=features)
    if encoded:
        message = r"class 300, expected 0..255; cast_column the masks to Image\(mode='I;16'\)"
        with pytest.raises(TooManyRejects, match=message):
            list(PackedLoader(packs_of(source), 1))
        source = source.cast_column("mask", Image(mode="I;16"))
    packs = packs_of(source)
    (batch,) = PackedLoader(packs, 1)
    real = batch.segment_ids > 0
    assert batch.targets[real].min() == 300
    assert batch.targets[real].max() == 683
    assert (batch.targets[~real] == 65535).all()


def test_a_state_of_other_masks_is_refused():
    def loader_of(source, stride=1):
        packs = EpochPacks(
            source, 96, patch_size=P, mask_column="mask", target_stride=stride, max_bad_fraction=0.5
        )
        return PackedLoader(packs, 1)

    state = loader_of(source_of()).state_dict()
    loader_of(source_of()).load_state_dict(state)
    _, classes = picture_of(0, SIZES[0])
    for other in (loader_of(source_of(_0=png(classes[::-1]))), loader_of(source_of(), 2)):
        with pytest.raises(ValueError, match=r"^state\['contents'\]\['masks'\] is "):
            other.load_state_dict(state)


def test_rows_with_targets_are_not_mixed(packed):
    message = "^packs is 'rows with targets', expected rows without targets, for mixup and cutmix;"
    with pytest.raises(ValueError, match=message):
        PackedLoader(packed[0], 1, augment=Augment(mixup=0.8))
    rows = packpipe.read_rows(packed[0])
    with pytest.raises(ValueError, match=message):
        augmented(rows, Augment(cutmix=1.0), Key(0, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_column": "masks"}, "mask_column is 'masks', expected one of ['image', 'mask'], or"),
        ({"mask_column": None}, "target_stride is 1, expected None without mask_column; pass mask"),
        ({"target_stride": 3}, "target_stride is 3, expected a divisor of 8 (patch_size); 1 gives"),
        (
            {"materialize": False},
            "materialize is False, expected True with mask_column; EpochPacks",
        ),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
    options = {"image_column": "image", **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        packed_in(tmp_path / "out", source_of(), **options)
