"""Mixup and CutMix: which tokens of neighbours meet, and that nothing else reaches anything."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace

import laws
import naive_augment
import numpy as np
import packed
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from strategies import keys

from packpipe import Augment, PackedBatch
from packpipe.augmenting.colours import coloured
from packpipe.augmenting.mixing import Mixtures, mixed, mixtures
from packpipe.augmenting.rows import augmented
from packpipe.loading.columns import batch_columns
from packpipe.loading.exports import to_naflex
from packpipe.philox import Key
from packpipe.rows.labels import as_arrow
from packpipe.rows.rows import NO_LABEL
from packpipe.training.losses import LOSSES, counted, global_count

KEY = Key(2, 4)
BOTH = Augment(flip=0, mixup=0.8, cutmix=1)
COLOURED = replace(laws.EVERYTHING, mixup=0.8, cutmix=1)
MIXUP, CUTMIX = Augment(flip=0, mixup=1), Augment(flip=0, cutmix=1)
# Pairs of many sizes, odd ones, single tokens, padding.
CASE = packed.RowSet(
    lens=[[6, 4, 12, 9, 1], [1, 1], [20, 15], [33], [9, 9, 2, 1]], seq_len=40, max_segments=6
)
MANY = 100_000


def drawn_of(augment: Augment, key: tuple[int, int], index: int) -> tuple[bool, bool, float]:
    """(happens, cut, λ) of a pair, by NumPy's Philox and SciPy's own quantile."""
    happens, cut, share = (naive_augment.uniform(*key, index, 56 + which) for which in range(3))
    by_cut = bool(augment.cutmix) and (not augment.mixup or cut < 0.5)
    alpha = augment.cutmix if by_cut else augment.mixup
    return happens < augment.mix_prob, by_cut, special.betaincinv(alpha, alpha, share)


@given(keys(), st.integers(0, 2**40), st.sampled_from([BOTH, MIXUP, CUTMIX]), st.floats(0, 1))
def test_draws_are_those_of_numpy_s_philox_and_never_move(key, example, augment, chance):
    augment = replace(augment, mix_prob=chance)
    drawn = mixtures(augment, Key(*key), np.array([example + 1, example]))
    happens, cut, share = drawn_of(augment, key, example)
    assert (drawn.happens[1], drawn.cut[1]) == (happens, cut)
    assert drawn.share[1] == pytest.approx(share, abs=1e-3)
    corner = [naive_augment.uniform(*key, example, stream) for stream in (59, 60)]
    assert drawn.corner[1].tolist() == corner


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1, 5])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_the_share_is_of_a_symmetric_beta_distribution(name, alpha):
    drawn = mixtures(Augment(**{name: alpha}), KEY, np.arange(MANY))
    assert (drawn.cut == (name == "cutmix")).all()
    wanted = stats.beta(alpha, alpha)
    for level in (0.05, 0.3, 0.5, 0.9):
        share = wanted.cdf(level)
        bound = 4 * math.sqrt(share * (1 - share) / MANY)
        assert abs((drawn.share <= level).mean() - share) <= bound
    assert abs(drawn.share.mean() - 0.5) <= 4 * wanted.std() / math.sqrt(MANY)


@pytest.mark.parametrize("chance", [0.1, 0.7])
def test_pairs_are_mixed_as_often_as_was_said_by_either_as_often(chance):
    drawn = mixtures(replace(BOTH, mix_prob=chance), KEY, np.arange(MANY))
    bound = 4 * math.sqrt(0.25 / MANY)
    assert abs(drawn.happens.mean() - chance) <= bound
    assert abs(drawn.cut.mean() - 0.5) <= bound
    assert abs((drawn.cut & drawn.happens).mean() - chance / 2) <= bound
    rank = stats.spearmanr(drawn.share, drawn.cut).statistic
    assert abs(rank) <= 4 / math.sqrt(MANY) + 0.01


@st.composite
def cases(draw):
    """Rows of a few images, of which some tokens were dropped."""
    grids = st.tuples(st.integers(1, 5), st.integers(1, 5))
    table = draw(st.lists(st.lists(grids, max_size=5), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    keep = draw(st.sampled_from([0.4, 0.8, 1.0]))
    kept = [[np.flatnonzero(rng.random(h * w) < keep) for h, w in row] for row in table]
    kept = [[one if len(one) else np.zeros(1, int) for one in row] for row in kept]
    lens = [[len(one) for one in row] for row in kept]
    case = packed.RowSet(lens, seq_len=1 + max(map(sum, lens)), max_segments=5)
    rows = packed.rows_of(case)
    place = rows.first_places(case.seq_len)
    coords = rows.coords.reshape(-1, 2)
    grids = [grid for row in table for grid in row]
    for start, numbers, (_, columns) in zip(
        place, [one for row in kept for one in row], grids, strict=True
    ):
        coords[start : start + len(numbers)] = np.stack(np.divmod(numbers, columns), 1)
    hw = np.array(grids, np.int16).reshape(-1, 2)
    return replace(rows, segments={**rows.segments, "grid_hw": hw})


def box_of(drawn: Mixtures, pair: int, common: list[int]) -> tuple[int, int, int, int]:
    """The (top, left, height, width) in which tokens of a pair meet."""
    if not drawn.cut[pair]:
        return 0, 0, *common
    side = math.sqrt(1 - drawn.share[pair])
    height, width = (round(length * side) for length in common)
    down, across = drawn.corner[pair]
    top = math.floor((common[0] - height + 1) * down)
    return top, math.floor((common[1] - width + 1) * across), height, width


@given(cases(), keys(), st.sampled_from([BOTH, replace(BOTH, mix_prob=0.5), MIXUP, CUTMIX]))
def test_tokens_meet_where_both_images_lie_and_are_counted(rows, key, augment):
    found = mixed(rows, augment, Key(*key))
    drawn = mixtures(augment, Key(*key), rows.example_index)
    labels = rows.segments["labels"].to_pylist()
    starts, lens = rows.first_places(rows.segment_ids.shape[1]), rows.seq_lens
    coords = [tuple(yx) for yx in rows.coords.reshape(-1, 2).tolist()]
    offsets = np.zeros(len(coords), int)
    weight, partner_labels = [1.0] * len(lens), [NO_LABEL] * len(lens)
    label_weights = weight.copy()
    firsts = [
        first
        for start, end in itertools.pairwise(rows.offsets.tolist())
        for first in range(start, end - 1, 2)
        if drawn.happens[first]
    ]
    for first in firsts:
        both = [first, first + 1]
        grids = [tuple(map(int, rows.grid_hw[one])) for one in both]
        common = [min(grids[0][axis], grids[1][axis]) for axis in range(2)]
        sides = [coords[starts[one] : starts[one] + lens[one]] for one in both]
        pairs = naive_augment.meeting(sides, grids, box_of(drawn, first, common))
        for here, there in pairs:
            distance = starts[first + 1] + there - starts[first] - here
            offsets[starts[first] + here] = distance
            offsets[starts[first + 1] + there] = -distance
        for one, other in (both, both[::-1]):
            weight[one] = 0.0 if drawn.cut[first] else drawn.share[first]
            label_weights[one] = 1 - (1 - weight[one]) * len(pairs) / lens[one]
            if label_weights[one] < 1:
                partner_labels[one] = labels[other]
    assert found.mix_offset.ravel().tolist() == offsets.tolist()
    assert found.partner_labels.tolist() == partner_labels
    assert np.array_equal(found.mix_weight, np.array(weight, np.float32))
    assert np.array_equal(found.label_weights, np.array(label_weights, np.float32))
    assert found.patches is rows.patches


@pytest.mark.parametrize("augment", [MIXUP, CUTMIX])
def test_both_images_of_a_pair_are_mixed_and_an_odd_last_one_is_not(augment):
    batch = packed.batch_of(CASE, augment=augment)
    assert (batch.mix_offset != 0).any()
    alone = torch.zeros(5, 6, dtype=torch.bool)
    alone[[0, 3], [4, 0]] = True  # the fifth of the first row, the only one of the fourth
    assert (batch.partner_labels[alone] == NO_LABEL).all()
    assert (batch.label_weights[alone] == 1).all()
    rows, places = batch.mix_offset.nonzero().T
    there = places + batch.mix_offset[rows, places]
    ids = batch.segment_ids
    # The first and the second, the third and the fourth; and each of the other.
    assert torch.equal((ids[rows, places] - 1) ^ 1, ids[rows, there] - 1)
    assert torch.equal(batch.mix_offset[rows, there], -batch.mix_offset[rows, places])


@pytest.mark.parametrize("weights", [[0.0, 3.0], [2.0, 0.0], [0.5, 7.0], [0.0, 0.0], [1.0, 1.0]])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("listed", [False, True])
def test_each_half_of_a_mixed_loss_weighs_what_its_own_image_does(name, listed, weights):
    rows = packed.rows_of(packed.RowSet(lens=[[6, 4]], seq_len=12, max_segments=2))
    of_classes = [1.0, 1.0] if listed else [3.0, 0.5]
    labels = as_arrow(np.eye(2, dtype=np.float32)) if listed else pa.array([0, 1])
    plain = replace(rows, segments={**rows.segments, "labels": pa.array([0, 1])})
    segments = {**rows.segments, "labels": labels, "weight": np.array(weights, np.float32)}
    shares = mixed(plain, MIXUP, KEY).label_weights.tolist()
    assert max(shares) < 1
    batch = PackedBatch.from_rows(
        mixed(replace(rows, segments=segments), MIXUP, KEY), max_segments=2
    )
    outputs = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(0))
    given = {"partners": batch.partners, "class_weights": torch.tensor(of_classes)}
    given = {"weights": batch.weight, **({} if listed else given)}
    found, whole, counts = LOSSES[name](outputs, batch.labels, **given), 0.0, 0.0
    for image, share in enumerate(shares):
        for label, part in ((image, share), (1 - image, 1 - share)):
            part *= weights[label] * of_classes[label]
            loss = LOSSES[name](outputs[:, image : image + 1], torch.tensor([[label]]))
            whole, counts = whole + part * loss.item(), counts + part
    assert found.item() == pytest.approx(whole / (counts or 1), rel=1e-5)
    total = global_count(counted(LOSSES[name], batch.labels, **given)).item()
    assert total == pytest.approx(counts or 1, rel=1e-5)


def test_images_without_a_label_are_not_mixed():
    rows = packed.rows_of(CASE)
    labels = rows.segments["labels"].to_pylist()
    labels[1] = labels[7] = NO_LABEL
    rows = replace(rows, segments={**rows.segments, "labels": pa.array(labels)})
    found = mixed(rows, MIXUP, KEY)
    pairs = found.partner_labels != NO_LABEL
    assert not pairs[[0, 1, 7, 8]].any()
    assert pairs[[2, 3]].all()
    rows.segments.pop("labels")
    message = (
        "labels is 'missing', expected a label an image, for mixup and cutmix; pack with label_"
    )
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        augmented(rows, MIXUP, KEY)


def with_shares(batch: PackedBatch, share: float) -> PackedBatch:
    """The batch with another λ."""
    meets = batch.mix_weight.new_full(batch.mix_weight.shape, share)
    return replace(batch, mix_weight=meets)


def test_a_share_of_one_changes_nothing_and_of_nothing_swaps():
    batch, model = packed.batch_of(CASE, augment=MIXUP), packed.model_of("segments")
    plain = replace(batch, mix_weight=None, mix_offset=None)
    with torch.no_grad():
        assert torch.equal(model(with_shares(batch, 1)), model(plain))
        assert not torch.equal(model(batch)[batch.present], model(plain)[batch.present])
    assert torch.equal(with_shares(batch, 1).coloured().patches, batch.patches)
    swapped = with_shares(batch, 0)
    twice = replace(swapped, patches=swapped.coloured().patches).coloured()
    assert torch.equal(twice.patches, batch.patches)
    assert not torch.equal(swapped.coloured().patches, batch.patches)


@pytest.mark.parametrize("augment", [BOTH, COLOURED])
def test_a_mixed_token_is_a_blend_of_both_in_their_own_colours(augment):
    batch = packed.batch_of(CASE, augment=augment)
    apart = replace(batch, mix_weight=None, mix_offset=None).pixels().double()
    found, wanted = batch.pixels().double(), apart.clone()
    for row, place in batch.mix_offset.nonzero().tolist():
        weight = float(batch.mix_weight[row, batch.segment_ids[row, place] - 1])
        there = place + int(batch.mix_offset[row, place])
        wanted[row, place] = weight * apart[row, place] + (1 - weight) * apart[row, there]
    assert not torch.equal(apart, wanted)
    assert (found - wanted).abs().max() < 1e-4
    assert not found[batch.segment_ids == 0].any()
    columns = batch_columns(packed.rows_of(CASE, augment=augment), CASE.max_segments)
    shown = coloured(columns)
    assert np.abs(shown - wanted.numpy()).max() < 0.5 + 1e-3
    assert batch.coloured().coloured().mix_offset is None
    assert batch.coloured().partners is not None
    naflex = to_naflex(batch)
    real = batch.pixels()[batch.segment_ids > 0] / 127.5 - 1
    assert torch.equal(naflex["patches"][naflex["patch_valid"]], real)


def test_the_columns_move_with_the_batch():
    batch = packed.batch_of(CASE, augment=BOTH)
    added = ["mix_weight", "partner_labels", "label_weights", "mix_offset"]
    assert list(batch) == [*packed.batch_of(CASE), *added]
    for other in (batch.to("cpu"), type(batch)(dict(batch)), batch.trim(8)):
        assert list(other) == list(batch)
        assert torch.equal(other.partner_labels, batch.partner_labels)
    model = packed.model_of("segments")
    with torch.no_grad():
        assert torch.equal(model(batch.trim(8)), model(batch))
    absent = ~batch.present
    assert (batch.partner_labels[absent] == NO_LABEL).all()
    assert not batch.label_weights[absent].any()
    assert not batch.mix_offset[batch.segment_ids == 0].any()


@dataclass(frozen=True)
class Mixed(laws.Augmented):
    """Batches of mixed pairs."""

    augment: Augment = COLOURED


def pairs_alone(batch):
    """Yield (row, first segment, batch of that pair alone in a row of its own length)."""
    for row, lens in enumerate(batch.seq_lens.tolist()):
        for first in range(0, len(lens), 2):
            start, number = sum(lens[:first]), sum(lens[first : first + 2])
            if not number:
                continue
            columns = {}
            for name, values in batch.items():
                of_tokens = values.shape[1] == batch.segment_ids.shape[1]
                own = slice(start, start + number) if of_tokens else slice(first, first + 2)
                columns[name] = values[row : row + 1, own].clone()
            columns["segment_ids"] -= first
            yield row, first, PackedBatch(**columns)


def loss_of(setting, outputs, batch):
    return laws.LOSSES[setting.loss](outputs, batch.labels, partners=batch.partners)


def results_of(setting, forward, batch):
    model = setting.model()
    outputs = forward(model, batch)
    loss = loss_of(setting, outputs, batch)
    loss.backward()
    return outputs.detach(), loss.detach(), [p.grad for p in model.parameters()]


def one_pair_at_a_time(model, batch):
    found = None
    for row, first, pair in pairs_alone(batch):
        outputs = model(pair)[0]
        if found is None:
            found = outputs.new_zeros(*batch.seq_lens.shape, outputs.shape[-1])
        number = torch.arange(len(outputs))
        found = found.index_put((torch.full_like(number, row), first + number), outputs)
    return found


@pytest.mark.parametrize("keep_padding", [False, True])
@pytest.mark.parametrize("attention", ["reference", "segments"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_packed_equals_the_pair_alone(attention, loss, keep_padding):
    setting = Mixed(attention, loss=loss)
    batch = setting.batch(CASE)
    assert (batch.mix_offset != 0).any()
    assert (batch.partner_labels != NO_LABEL).sum() > 4

    def whole(model, batch):
        model.keep_padding = keep_padding
        return model(batch)

    found = results_of(setting, whole, batch)
    wanted = results_of(replace(setting, attention="reference"), one_pair_at_a_time, batch)
    assert laws.close(found[0][batch.present], wanted[0][batch.present], 1e-10)
    assert laws.close(found[1], wanted[1], 1e-10)
    assert len(found[2]) == len(wanted[2]) > 9
    for gradient, alone in zip(found[2], wanted[2], strict=True):
        assert gradient.abs().sum() > 0
        assert laws.close(gradient, alone, 1e-10)


@pytest.mark.parametrize("attention", ["reference", "segments"])
@pytest.mark.parametrize("augment", [MIXUP, CUTMIX])
def test_an_image_reaches_itself_and_its_partner_only(attention, augment):
    setting = Mixed(attention, augment=augment)
    batch, model = setting.batch(CASE), setting.model()
    reached = set()
    for row, lens in enumerate(CASE.lens):
        for number in range(len(lens)):
            pixels = batch.patches.clone()
            own = batch.segment_ids[row] == number + 1
            pixels[row, own] = 255 - pixels[row, own]
            with torch.no_grad():
                before, after = model(batch), model(replace(batch, patches=pixels))
            others = batch.present.clone()
            others[row, number] = False
            if number ^ 1 < len(lens):
                others[row, number ^ 1] = False
                meets = (batch.mix_offset[row] != 0) & own
                changed = not torch.equal(before[row, number ^ 1], after[row, number ^ 1])
                assert changed == bool(meets.any())
                reached.add(changed)
            assert others.any()
            assert torch.equal(before[others], after[others])
            # An image of which all tokens were swapped has nothing of its own.
            changed = not torch.equal(before[row, number], after[row, number])
            assert changed == bool(batch.label_weights[row, number] > 0)
    assert True in reached


@pytest.mark.parametrize("attention", ["reference", "segments"])
def test_an_image_s_gradient_is_of_its_own_tokens_and_of_those_they_meet(attention):
    setting = Mixed(attention, augment=MIXUP)
    batch, model = setting.batch(CASE), setting.model()
    pixels = batch.patches.double().requires_grad_()
    outputs = model(replace(batch, patches=pixels))[0, 3]
    (outputs * torch.arange(1, packed.NUM_CLASSES + 1)).sum().backward()
    ids = batch.segment_ids
    partner = (ids[0] == 3) & (batch.mix_offset[0] != 0)
    assert partner.any()
    assert not partner[ids[0] == 3].all()
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[0] = (ids[0] == 4) | partner
    assert torch.equal(pixels.grad.abs().sum(-1) > 0, wanted)
