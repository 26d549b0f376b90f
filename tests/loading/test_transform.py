"""A function of pixels given to packs: new draws each epoch, the same whoever calls it."""

from __future__ import annotations

import json
import pickle
import re

import loading
import numpy as np
import pictures
import pytest

import packpipe
from packpipe import Crop, EpochPacks, PackedLoader, PackedStream
from packpipe.images.patches import unpatchify
from packpipe.philox import Key

IMAGES = [pictures.encoded_image(24 + 8 * (n % 5), 48 - 8 * (n % 3), n) for n in range(36)]


def noisy(pixels, rng):
    return pixels ^ rng.integers(0, 256, pixels.shape, np.uint8)


def negative(pixels, _):
    return 255 - pixels


def unlucky(pixels, _):
    raise ValueError(f"no pixels of mean {pixels.mean():.0f}")


@pytest.fixture(scope="module")
def source():
    return pictures.dataset_of(IMAGES)


@pytest.fixture(scope="module")
def packs(source):
    return EpochPacks(source, 16, patch_size=8, drop_rate=0.3, crop=Crop(), transform=noisy)


def steps_of(packs, world_size=1, state=None, **options):
    ranks = [
        PackedLoader(
            packs, 4 // world_size, rank=rank, world_size=world_size, tail="pad", **options
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        if state is not None:
            rank.load_state_dict(json.loads(state))
    return loading.steps_of(ranks)


def test_pixels_are_those_of_the_function_of_each_epoch(source):
    plain, drawn = (EpochPacks(source, 48, patch_size=8, transform=f) for f in (None, noisy))
    for key in (Key(5, 0), Key(5, 1)):
        numbers = np.arange(plain.num_packs(key))
        before, after = (packs.rows(key, numbers) for packs in (plain, drawn))
        assert len(before.seq_lens) == len(IMAGES)
        assert before.num_segments.max() > 1
        starts = before.first_places(48)
        tokens = [rows.patches.reshape(-1, 192) for rows in (before, after)]
        coords = before.coords.reshape(-1, 2)
        for number, example in enumerate(before.example_index.tolist()):
            some = slice(starts[number], starts[number] + before.seq_lens[number])
            grid = tuple(before.grid_hw[number].tolist())
            pixels, found = (unpatchify(one[some], coords[some], grid) for one in tokens)
            words = np.array([*key, 0, 64, example, 0], np.uint64)
            rng = np.random.Generator(np.random.Philox(key=words[:2], counter=words[2:]))
            assert (found == noisy(pixels, rng)).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads
def test_batches_are_the_same_at_any_step_world_size_and_worker(packs):
    whole = steps_of(packs)
    loader = PackedLoader(packs, 4, tail="pad")
    states = [json.dumps(loader.state_dict()) for _ in loader]
    assert 4 < len(whole) == len(states) == len(set(whole))
    for step, state in enumerate(states[:-1], 1):
        world_size = (1, 2, 4)[step % 3]
        assert steps_of(packs, world_size, state, num_workers=2 * (step % 2)) == whole[step:]
    assert steps_of(packs, num_workers=1, workers="processes") == whole
    # As a process gets them that is not forked.
    assert steps_of(pickle.loads(pickle.dumps(packs))) == whole  # noqa: S301


def test_a_stream_is_transformed_and_resumed(source):
    stream = source.to_iterable_dataset()

    def begin(transform=noisy):
        packs = PackedStream(stream, 24, patch_size=8, window=8, transform=transform)
        return PackedLoader(packs, 2, tail="pad")

    loader, whole, states = begin(), [], []
    for batch in loader:
        whole.append(loading.digest(batch))
        states.append(loader.state_dict())
    assert len(whole) > 4
    assert not set(whole) & set(map(loading.digest, begin(None)))
    again = begin()
    again.load_state_dict(json.loads(json.dumps(states[1])))
    assert list(map(loading.digest, again)) == whole[2:]
    with pytest.raises(ValueError, match=r"^state\['transform'\] is 'noisy', expected None; make"):
        begin(None).load_state_dict(states[1])


@pytest.mark.parametrize(("made", "loaded"), [(None, noisy), (noisy, None), (noisy, negative)])
def test_a_state_of_another_transform_is_refused_by_name(source, made, loaded):
    first, second = (
        PackedLoader(EpochPacks(source, 24, transform=one), 2) for one in (made, loaded)
    )
    state = first.state_dict()
    assert ("transform" in state) == (made is not None)
    own, other = (None if one is None else one.__name__ for one in (loaded, made))
    message = (
        f"state['transform'] is {other!r}, expected {own!r}; make the packs with the transform of "
        "the state"
    )
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        second.load_state_dict(state)
    first.load_state_dict(json.loads(json.dumps(state)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads
@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "workers": "processes"}])
def test_an_error_of_the_function_ends_the_loop_and_is_no_reject(source, workers):
    packs = EpochPacks(source, 24, transform=unlucky, max_bad_fraction=1.0)
    message = r"transform unlucky of example \d+ raised ValueError: no pixels of mean 12\d"
    with pytest.raises(RuntimeError, match=message) as caught:
        list(PackedLoader(packs, 2, **workers))
    if not workers:
        assert isinstance(caught.value.__cause__, ValueError)
    assert packs.rejects == []


def test_rows_that_are_stored_take_no_transform(source, tmp_path):
    message = (
        "option is 'transform', expected left out where rows are stored, which must be made again "
        "from their source; pass it to EpochPacks or PackedStream"
    )
    calls = [
        lambda: packpipe.pack(source, 24, output=tmp_path, transform=noisy, progress=False),
        lambda: packpipe.Packer(24, transform=noisy),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="^" + re.escape(message)):
            call()


def test_a_function_that_cannot_be_sent_is_refused_before_anything_is_read(source):
    message = r"^transform is '.*<lambda>', expected a function that can be sent to another process"
    with pytest.raises(TypeError, match=message):
        EpochPacks(source, 24, transform=lambda pixels, _: pixels)
    with pytest.raises(TypeError, match=message):
        PackedStream(source.to_iterable_dataset(), 24, transform=lambda pixels, _: pixels)


def drawn_number(pixels, rng):
    return np.full_like(pixels, rng.integers(0, 256, dtype=np.uint8))


def test_each_view_has_random_numbers_of_its_own(source):
    views = {}
    for number in (1, 2):
        options = {"patch_size": 8, "transform": drawn_number, "views": number}
        packs, key = EpochPacks(source, 48, **options), Key(5, 0)
        rows = packs.rows(key, np.arange(packs.num_packs(key)))
        levels = rows.patches.reshape(-1, 192)[rows.first_places(48), 0]
        places = np.broadcast_to(rows.views, len(levels)).tolist()
        views[number] = dict(
            zip(zip(rows.example_index.tolist(), places, strict=True), levels.tolist(), strict=True)
        )
    assert len(views[2]) == 2 * len(views[1]) == 72
    assert all(views[2][which] == level for which, level in views[1].items())
    assert sum(views[2][n, 0] != views[2][n, 1] for n in range(36)) > 30
