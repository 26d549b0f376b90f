"""What is drawn for one image is what a loader's batches show of it."""

from __future__ import annotations

import re

import numpy as np
import pictures
import pytest
from laws import EVERYTHING

import packpipe
from packpipe import Augment, Crop, EpochPacks, PackedLoader
from packpipe.augmenting.colours import coloured
from packpipe.images.patches import unpatchify
from packpipe.loading.draws import DROPPED, draws_of_rows, draws_of_source, whole_image
from packpipe.philox import Key
from packpipe.planning.image_config import PackConfig
from packpipe.plots import plot_draws
from packpipe.sources.image_source import ImageSource

OPTIONS = {"patch_size": 8, "drop_rate": 0.3, "crop": Crop(), "max_tokens": 16}
IMAGES = [pictures.encoded_image(32 + 8 * n, 64 - 4 * n, n) for n in range(6)]


@pytest.fixture(scope="module")
def source():
    return pictures.dataset_of(IMAGES)


@pytest.fixture(scope="module")
def images(source):
    return ImageSource(source.select_columns(["image"]).with_format("arrow"))


def shown(packs, epoch):
    """By example, its pixels in the batches of a loader, its grid and how many tokens it keeps."""
    loader = PackedLoader(packs, 1, seed=7, epoch=epoch, augment=EVERYTHING, as_numpy=True)
    found, most = {}, 0
    for batch in loader:
        patches = coloured(batch)[0]
        for number in np.flatnonzero(batch["seq_lens"][0]).tolist():
            own = batch["segment_ids"][0] == number + 1
            grid = tuple(batch["grid_hw"][0, number].tolist())
            coords = batch["coords"][0, own]
            pixels = unpatchify(patches[own], coords, grid)
            held = unpatchify(np.ones_like(patches[own]), coords, grid) > 0
            example = int(batch["example_index"][0, number])
            found[example] = np.where(held, pixels, DROPPED), grid, int(own.sum())
            most = max(most, number)
    assert most > 0  # some row has several images
    return found


def test_an_image_of_a_source_is_drawn_as_batches_show_it(source, images):
    packs = EpochPacks(source, 32, **OPTIONS)
    config = PackConfig(seq_len=32, **OPTIONS)
    by_epoch = [shown(packs, epoch) for epoch in range(3)]
    keys = [Key(7, epoch) for epoch in range(3)]
    for example in range(len(IMAGES)):
        draws = draws_of_source(images, example, config, EVERYTHING, keys)
        for key, batches, draw in zip(keys, by_epoch, draws, strict=True):
            pixels, grid, kept = batches[example]
            assert np.array_equal(draw.pixels, pixels)
            assert (draw.epoch, draw.grid_hw, draw.num_keep) == (key.epoch, grid, kept)
            plan = packs.plan(*key)
            assert draw.box == plan.explain(example).box
            assert draw.drawn == EVERYTHING.draws(*key, example)
        assert len({draw.box for draw in draws}) == 3


@pytest.mark.parametrize("materialize", [True, False])
def test_an_image_of_packed_rows_keeps_its_crop_and_draws_the_rest(source, tmp_path, materialize):
    packed = packpipe.pack(
        source, 32, output=tmp_path, progress=False, num_workers=0, materialize=materialize,
        **OPTIONS,
    )  # fmt: skip
    by_epoch = [shown(packed, epoch) for epoch in range(3)]
    for example in range(len(IMAGES)):
        draws = draws_of_rows(packed, example, EVERYTHING, [Key(7, epoch) for epoch in range(3)])
        for batches, draw in zip(by_epoch, draws, strict=True):
            pixels, grid, kept = batches[example]
            assert np.array_equal(draw.pixels, pixels)
            assert (draw.grid_hw, draw.num_keep) == (grid, kept)
        assert len({draw.box for draw in draws}) == 1
        assert len({draw.pixels.tobytes() for draw in draws}) > 1
    message = "example is 99, expected one that a row holds; it may be among the rejects"
    with pytest.raises(ValueError, match=f"^{message}$"):
        draws_of_rows(packed, 99, EVERYTHING, [Key(7, 0)])


def test_an_image_that_cannot_be_decoded_is_an_error(images):
    cut = pictures.dataset_of([IMAGES[0][:-200]])
    broken = ImageSource(cut.select_columns(["image"]).with_format("arrow"))
    with pytest.raises(ValueError, match=r"^example 0 .*undecodable"):
        draws_of_source(broken, 0, PackConfig(), Augment(), [Key(0, 0)])
    assert whole_image(images, 0, PackConfig()).shape == (32, 64, 3)


def test_a_figure_shows_each_box_and_what_is_drawn_of_it(images):
    keys = [Key(0, epoch) for epoch in range(10)]
    draws = draws_of_source(images, 2, PackConfig(**OPTIONS), Augment.preset("three"), keys)
    whole = whole_image(images, 2, PackConfig())
    axes = plot_draws(draws, whole, (48, 56)).axes
    assert len(axes) == 20
    for draw, above, below in zip(draws, axes[::2], axes[1::2], strict=True):
        assert above.get_title() == f"epoch {draw.epoch}"
        assert np.array_equal(above.images[0].get_array(), whole)
        (frame,) = above.patches
        top, left, height, width = draw.box
        assert frame.get_bbox().bounds == (left, top, width, height)
        assert np.array_equal(below.images[0].get_array(), draw.pixels)
        rows, columns = draw.grid_hw
        assert below.get_title() == (
            f"{height} × {width} of 48 × 56\n{draw.num_keep} of {rows} × {columns} tokens"
        )
        words = [re.sub(" .*", "", line) for line in below.get_xlabel().split("\n")]
        chosen = [name for name in ("flip", "grey", "solarize") if draw.drawn[name]]
        assert sorted(words) == sorted([*chosen, "brightness", "contrast", "saturation"])
    assert {"flip", "grey", "solarize"} <= {name for draw in draws for name in draw.changes}
    alone = plot_draws(draws[:2], None, None).axes
    assert [one.get_title().split("\n")[0] for one in alone] == ["epoch 0", "epoch 1"]
