"""Colours are torchvision's, with mid-grey as the pivot of contrast; no image sees another's."""

from __future__ import annotations

import pickle
from dataclasses import replace

import laws
import naive_augment
import numpy as np
import packed
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from packpipe import Augment, PackedBatch
from packpipe.augmenting import colours
from packpipe.augmenting.augment import Draws
from packpipe.loading.columns import batch_columns
from packpipe.loading.exports import to_naflex
from packpipe.model.attention import flatten
from packpipe.philox import Key

KEY = Key(2, 4)
THREE = Augment.preset("three")
CASE = packed.RowSet(lens=[[4, 1, 6], [5, 3], [12]], seq_len=12, max_segments=4)
LEVELS = st.lists(st.integers(0, 255), min_size=3, max_size=3)


def draws_of(**options) -> Draws:
    """The draws of one picture, as given, and nothing besides."""
    nothing = Augment(flip=0).drawn(KEY, np.arange(1))
    given = {name: np.array([value]) for name, value in options.items()}
    return nothing._replace(**given)


def batch_with(draws: Draws, pixels: list[list[int]]) -> PackedBatch:
    """A row of one picture of one patch a pixel, and a token of padding."""
    number = len(pixels)
    patches = torch.zeros(1, number + 1, 3, dtype=torch.uint8)
    patches[0, :number] = torch.tensor(pixels)
    return PackedBatch(
        patches=patches,
        segment_ids=(torch.arange(number + 1) < number).int()[None],
        coords=torch.zeros(1, number + 1, 2, dtype=torch.int16),
        seq_lens=torch.tensor([[number, 0]], dtype=torch.int32),
        grid_hw=torch.zeros(1, 2, 2, dtype=torch.int16),
        example_index=torch.tensor([[0, -1]]),
        colours=torch.cat([torch.from_numpy(colours.matrices(draws)), torch.zeros(1, 3, 4)])[None],
        solarize=torch.tensor([[colours.inverted_from(draws)[0], 0]]),
    )


def differences(pixels, **options):
    """Between the colours of a batch and the naive ones, on levels of 0..1."""
    names = {"grey": "is_grey", "solarize": "is_solarized"}
    naive = {names.get(name, name): value for name, value in options.items()}
    found = batch_with(draws_of(**options), pixels).pixels()[0] / 255
    assert not found[-1].any()
    wanted = [naive_augment.coloured([level / 255 for level in one], **naive) for one in pixels]
    return (found[:-1].double() - torch.tensor(wanted, dtype=torch.float64)).abs()


FACTORS = st.floats(0, 2)


@given(
    st.lists(LEVELS, min_size=1, max_size=5),
    st.one_of(
        st.fixed_dictionaries({"brightness": FACTORS}),
        st.fixed_dictionaries({"contrast": FACTORS}),
        st.fixed_dictionaries({"saturation": FACTORS}),
        st.just({"grey": True}),
        st.just({"solarize": True}),
    ),
)
def test_each_change_is_torchvision_s(pixels, options):
    assert differences(pixels, **options).max() < 2e-6


@given(
    st.lists(st.lists(st.integers(60, 180), min_size=3, max_size=3), min_size=1, max_size=5),
    st.fixed_dictionaries({name: st.floats(0.8, 1.2) for name in ("brightness", "contrast")}),
    st.fixed_dictionaries({"saturation": st.floats(0.8, 1.2)}),
    st.fixed_dictionaries({name: st.booleans() for name in ("grey", "solarize")}),
)
def test_all_changes_are_torchvision_s_one_after_the_other_where_none_is_clamped_between(
    pixels, factors, saturation, switches
):
    assert differences(pixels, **factors, **saturation, **switches).max() < 2e-5


def case_batch(augment=THREE, case=CASE) -> PackedBatch:
    return packed.batch_of(case, augment=augment)


def test_numpy_s_colours_are_those_of_tensors_to_a_level():
    rows = packed.rows_of(CASE, augment=THREE)
    columns = batch_columns(rows, CASE.max_segments)
    assert {"colours", "solarize"} <= columns.keys()
    found = colours.coloured(columns)
    batch = case_batch()
    wanted = batch.coloured().patches.numpy()
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert (found == wanted).mean() > 0.99
    assert (found != columns["patches"]).mean() > 0.5
    assert not found[batch.segment_ids.numpy() == 0].any()


@pytest.mark.parametrize("augment", [Augment(), Augment(flip=0, brightness=0, erase=0)])
def test_without_colours_there_is_no_new_column_and_the_batch_is_its_own_colour(augment):
    batch = case_batch(augment)
    assert batch.colours is None
    assert batch.solarize is None
    assert not {"colours", "solarize"} & batch.keys()
    assert batch.coloured() is batch
    columns = batch_columns(packed.rows_of(CASE, augment=augment), 4)
    assert colours.coloured(columns) is columns["patches"]


def test_images_that_can_only_be_jittered_carry_no_threshold():
    batch = case_batch(Augment(brightness=0.4))
    assert batch.colours.shape == (3, 4, 3, 4)
    assert batch.solarize is None
    assert "solarize" not in batch


def test_factors_of_one_leave_every_byte():
    pixels = [[0, 128, 255], [3, 7, 200]]
    batch = batch_with(draws_of(), pixels)
    assert batch.coloured().patches[0, :2].tolist() == pixels


def test_colours_move_with_the_batch_as_its_other_columns_do():
    batch = case_batch()
    names = list(case_batch(Augment()))
    assert list(batch) == [*names, "colours", "solarize"]
    trimmed = batch.trim(4)
    assert torch.equal(trimmed.colours, batch.colours)
    leaves, spec = pytree.tree_flatten(batch)
    others = [
        batch.to("cpu"),
        pickle.loads(pickle.dumps(batch)),  # noqa: S301  what was written here
        type(batch)({name: tensor.clone() for name, tensor in batch.items()}),
        pytree.tree_unflatten(leaves, spec),
    ]
    for other in others:
        assert list(other) == list(batch)
        assert all(torch.equal(other[name], batch[name]) for name in batch)
    done = batch.coloured()
    assert list(done) == names
    assert done.patches.dtype == torch.uint8


def test_a_model_reads_what_a_batch_in_its_colours_would_show():
    batch, model = case_batch(), packed.model_of(dtype=torch.float32)
    shown = replace(batch, patches=batch.pixels(), colours=None, solarize=None)
    with torch.no_grad():
        found, wanted, plain = (
            model(one)[batch.present] for one in (batch, shown, case_batch(Augment()))
        )
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(found, plain, atol=1e-2)
    naflex = to_naflex(batch)
    real = batch.pixels()[batch.segment_ids > 0] / 127.5 - 1
    assert torch.equal(naflex["patches"][naflex["patch_valid"]], real)


def test_half_precision_rounds_no_colour():
    batch = case_batch()
    exact = batch.pixels()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(batch.pixels(), exact)


@pytest.mark.parametrize("attention", ["reference", "segments"])
@pytest.mark.parametrize("pooling", ["attention", "none", "first"])
def test_packed_equals_alone_and_every_parameter_learns(attention, pooling):
    setting = laws.Augmented(attention, pooling=pooling)
    batch = setting.batch(laws.MANY)
    assert (batch.solarize == 128).any()
    gradients = laws.packed_equals_alone(setting, laws.MANY, 1e-10)
    laws.every_gradient_learns(gradients, laws.MANY)


@pytest.mark.parametrize("attention", ["reference", "segments"])
def test_no_image_reaches_another(attention):
    # Not solarized, since an image and its negative then are the same.
    setting = laws.Augmented(
        attention, augment=Augment(brightness=0.3, contrast=0.3, saturation=0.3)
    )
    laws.others_keep_every_bit(setting, laws.MANY)
    laws.no_gradient_crosses(setting, laws.MANY)


@pytest.mark.parametrize("keep_padding", [False, True])
def test_padding_stays_what_it_is_without_colours(keep_padding):
    batch, model = case_batch(), packed.model_of("segments")
    model.keep_padding = keep_padding
    plain = replace(batch, colours=None, solarize=None)
    read = []
    for one in (batch, plain):
        tokens = flatten(one, "segments", keep_padding=keep_padding)
        read.append(model.read(one, tokens)[0])
    padding = tokens.segments == batch.seq_lens.numel()
    assert bool(padding.any()) == keep_padding
    assert torch.equal(read[0][padding], read[1][padding])
    assert not torch.equal(read[0], read[1])
