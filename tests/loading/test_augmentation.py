"""Augmented batches: the same whatever workers and ranks, resumed to the byte, refused by name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import datasets
import loading
import numpy as np
import pictures
import pytest
import torch
from laws import EVERYTHING

import packpipe
from packpipe import Augment, PackedLoader, PackedStream, read_rows
from packpipe.augmenting.colours import coloured
from packpipe.augmenting.rows import augmented
from packpipe.philox import Key
from packpipe.rows.pairs import PairRows
from packpipe.rows.rows import NO_LABEL

KINDS = ["stored", "computed", "planned"]
MIXING = replace(EVERYTHING, mixup=0.8, cutmix=1, mix_prob=0.9)


@pytest.fixture(scope="module")
def packs(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("packs")
    return {kind: loading.packs_of(kind, folder) for kind in KINDS}


def loaders(packs: Any, world_size: int = 1, **options: Any) -> list[PackedLoader]:
    options = {"tail": "pad", "augment": MIXING, **options}
    return [
        PackedLoader(packs, 8 // world_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def steps_of(ranks: list[PackedLoader], epochs: int = 1) -> list[str]:
    return [digest for _ in range(epochs) for digest in loading.steps_of(ranks)]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_resume_at_every_step_at_any_world_size_and_worker_count(packs, kind):
    whole = steps_of(loaders(packs[kind]), 2)
    (loader,) = loaders(packs[kind])
    states = [json.dumps(loader.state_dict())]
    for _ in loader:
        states.append(json.dumps(loader.state_dict()))
    steps = len(states) - 1
    assert 6 < steps < len(whole) == len(set(whole))
    settings = [(1, 2), (2, 0), (4, 1)]
    for step, state in enumerate(states):
        world_size, num_workers = settings[step % 3]
        ranks = loaders(packs[kind], world_size, num_workers=num_workers)
        for rank in ranks:
            rank.load_state_dict(json.loads(state))
        # After the last step of an epoch comes the next one.
        assert steps_of(ranks) == (whole[step:steps] if step < steps else whole[steps:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_a_pack_in_the_last_step_has_an_empty_batch(packs, kind):
    batches = []
    # One more than all packs are taken in two steps, so the last rank has none in the second.
    half = -(-len(list(PackedLoader(packs[kind], 1))) // 2)
    for rank in range(half):
        loader = PackedLoader(packs[kind], 1, rank=rank, world_size=half + 1, tail="pad")
        plain = [int(batch.seq_lens.sum()) for batch in loader]
        options = {"rank": rank, "world_size": half + 1, "tail": "pad", "augment": MIXING}
        batches += [int(b.seq_lens.sum()) for b in PackedLoader(packs[kind], 1, **options)]
        assert batches[-len(plain) :] == plain
    (*_, last) = PackedLoader(
        packs[kind], 1, rank=half, world_size=half + 1, tail="pad", augment=EVERYTHING
    )
    assert last.seq_lens.sum() == 0
    assert last.patches.shape[0] == 1


@pytest.mark.parametrize("kind", ["stored", "planned"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads
def test_processes_draw_the_same(packs, kind):
    whole = steps_of(loaders(packs[kind]), 2)
    processes = {"num_workers": 2, "workers": "processes"}
    assert steps_of(loaders(packs[kind], **processes), 2) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_each_epoch_draws_anew_for_each_example_whatever_its_row(packs, kind):
    options = {"seed": 3, "tail": "pad"}
    plain = PackedLoader(packs[kind], 8, **options)
    augment = Augment(vertical_flip=0.5, turns=True)
    drawn = PackedLoader(packs[kind], 8, augment=augment, **options)
    ways = []
    for epoch in range(2):
        seen = {}
        for before, after in zip(plain, drawn, strict=True):
            for row, number in before.present.nonzero().tolist():
                example = int(before.example_index[row, number])
                turned = before.grid_hw[row, number].tolist() != after.grid_hw[row, number].tolist()
                found = augment.draws(3, epoch, example)
                assert not turned or found["turns"] % 2
                seen[example] = found
                own = before.segment_ids[row] == number + 1
                moved = not torch.equal(before.patches[row, own], after.patches[row, own])
                assert moved == (found not in SAME)
        assert len(seen) == 270
        ways.append(seen)
    assert ways[0] != ways[1]


NOTHING = Augment(flip=0).draws(0, 0, 0)
# Mirrored both ways and turned by half, a picture is as it was.
SAME = [NOTHING, NOTHING | {"flip": True, "vertical_flip": True, "turns": 2}]


def test_stored_rows_stay_as_they_are(packs):
    before = {name: values.copy() for name, values in read_rows(packs["stored"]).tokens.items()}
    for shuffle in (True, False):
        (loader,) = loaders(packs["stored"], shuffle=shuffle)
        assert len(list(loader)) > 3
    after = read_rows(packs["stored"]).tokens
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["stored", "planned"])
def test_numpy_batches_hold_the_same_columns(packs, kind):
    (tensors,), (arrays,) = loaders(packs[kind]), loaders(packs[kind], as_numpy=True)
    for batch, columns in zip(tensors, arrays, strict=True):
        assert list(batch) == list(columns)
        for name in columns:
            assert np.array_equal(batch[name].numpy(), columns[name])
    assert columns["colours"].shape[1:] == (tensors.packs.max_segments, 3, 4)
    assert np.abs(coloured(columns).astype(int) - batch.coloured().patches.numpy()).max() <= 1


def test_a_state_without_augmentation_is_what_it_was(packs):
    plain = PackedLoader(packs["stored"], 8)
    assert "augment" not in plain.state_dict()
    (augmented,) = loaders(packs["stored"], tail="drop")
    state = augmented.state_dict()
    assert state.pop("augment") == MIXING.to_dict()
    assert state == plain.state_dict()


def test_a_state_from_before_there_was_mixing_is_what_it_was(packs):
    (loader,) = loaders(packs["stored"], augment=EVERYTHING)
    assert not {"mixup", "cutmix", "mix_prob"} & loader.state_dict()["augment"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_mixed_anew_every_epoch_with_labels_of_their_own(packs, kind):
    (loader,) = loaders(packs[kind], augment=Augment(mixup=1, cutmix=1))
    weights = []
    for _ in range(2):
        labels, seen = {}, []
        for batch in loader:
            rows, numbers = (batch.partner_labels != NO_LABEL).nonzero().T
            assert torch.equal(batch.partner_labels[rows, numbers], batch.labels[rows, numbers ^ 1])
            found = batch.label_weights[rows, numbers].tolist()
            index = batch.example_index[rows, numbers].tolist()
            labels |= dict(zip(index, found, strict=True))
            seen.append(batch.mix_offset.any())
        assert all(seen)
        assert len(labels) > 90
        assert all(0 <= share < 1 for share in labels.values())
        weights.append(labels)
    both = weights[0].keys() & weights[1].keys()
    assert any(weights[0][one] != weights[1][one] for one in both)


@pytest.mark.parametrize(
    ("made", "loaded"), [(None, Augment()), (Augment(), None), (Augment(), Augment(flip=0.25))]
)
def test_a_state_of_another_augmentation_is_refused_by_name(packs, made, loaded):
    state = PackedLoader(packs["stored"], 8, augment=made).state_dict()
    loader = PackedLoader(packs["stored"], 8, augment=loaded)
    own, other = (None if one is None else one.to_dict() for one in (loaded, made))
    message = f"state['augment'] is {other!r}, expected {own!r}; make the loader with the options"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        loader.load_state_dict(state)
    PackedLoader(packs["stored"], 8, augment=made).load_state_dict(json.loads(json.dumps(state)))


def test_a_stream_is_augmented_and_resumed():
    images = [pictures.encoded_image(40, 64, number) for number in range(24)]
    stream = pictures.dataset_of(images).to_iterable_dataset()

    def begin(augment=EVERYTHING):
        packs = PackedStream(stream, 16, patch_size=16, window=8)
        return PackedLoader(packs, 2, tail="pad", augment=augment)

    whole, states = [], []
    loader = begin()
    for batch in loader:
        whole.append(loading.digest(batch))
        states.append(loader.state_dict())
    assert len(whole) > 3
    assert not set(whole) & set(map(loading.digest, begin(None)))
    again = begin()
    again.load_state_dict(states[1])
    assert list(map(loading.digest, again)) == whole[2:]


def test_of_pairs_the_images_are_augmented_and_never_mixed(tmp_path):
    images = [pictures.encoded_image(40, 64, number) for number in range(8)]
    dataset = pictures.dataset_of(images).select_columns(["image"])
    dataset = dataset.add_column("input_ids", [[number] * 3 for number in range(8)])
    pairs = packpipe.pack_pairs(
        dataset, 16, text_seq_len=16, max_text=8, output=tmp_path, num_workers=0, progress=False
    )
    plain, drawn = (PackedLoader(pairs, 1, augment=one) for one in (None, EVERYTHING))
    changed = 0
    for before, after in zip(plain, drawn, strict=True):
        assert loading.digest(before.texts) == loading.digest(after.texts)
        assert torch.equal(before.images.example_index, after.images.example_index)
        assert after.images.colours is not None
        changed += not torch.equal(before.images.patches, after.images.patches)
    assert changed == len(plain) > 0
    message = "cutmix is 1.0, expected 0 with pairs of images and texts; leave mixup and cutmix out"
    with pytest.raises(ValueError, match=f"^{message}$"):
        PackedLoader(pairs, 1, augment=Augment(cutmix=1))
    with pytest.raises(ValueError, match=f"^{message}$"):
        augmented(PairRows(*map(read_rows, pairs)), Augment(cutmix=1), Key(0, 0))


def test_rows_of_one_image_are_never_mixed():
    images = pictures.dataset_of([pictures.encoded_image(40, 64, number) for number in range(3)])
    packed = packpipe.pack(images, 16, max_segments=1, progress=False)
    PackedLoader(packed, 1, augment=Augment())
    message = (
        "packs.max_segments is 1, expected 2 or more, for mixup and cutmix; put several into a row"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        PackedLoader(packed, 1, augment=Augment(mixup=1))


def test_what_cannot_be_augmented_is_refused(packs):
    texts = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]})
    packed = packpipe.pack(texts, 4, progress=False)
    message = (
        r"^packs is 'rows of tokens', expected rows of images, for augment; leave augment out$"
    )
    with pytest.raises(ValueError, match=message):
        PackedLoader(packed, 1, augment=Augment())
    message = (
        r"^augment is 'three', expected an Augment, or None; such as Augment.preset\('three'\)$"
    )
    with pytest.raises(TypeError, match=message):
        PackedLoader(packs["stored"], 1, augment="three")


def test_rows_that_do_not_say_which_example_is_which_are_refused():
    images = pictures.dataset_of([pictures.encoded_image(40, 64, number) for number in range(3)])
    rows = images.map(packpipe.Packer(16), batched=True, remove_columns=images.column_names)
    loader = PackedLoader(rows, 1, augment=Augment())
    message = (
        "example_index is -1, expected rows that say which example is which, for augment; pack"
    )
    with pytest.raises(ValueError, match="^" + message):
        next(iter(loader))
