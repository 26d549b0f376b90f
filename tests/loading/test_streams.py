"""PackedStream: packs of a dataset that is read from front to back, through a PackedLoader."""

from __future__ import annotations

import json
import math
import re
from io import BytesIO
from typing import Any

import datasets
import naive
import naive_streams
import numpy as np
import pictures
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from packpipe.images import fill
from packpipe.images.decode import decode
from packpipe.loading.batch import PackedBatch
from packpipe.loading.loader import PackedLoader
from packpipe.loading.streams import PackedStream
from packpipe.philox import Key
from packpipe.planning.distributions import Uniform
from packpipe.planning.dropping import OverTraining
from packpipe.planning.image_config import PackConfig
from packpipe.planning.resolution import Side
from packpipe.rows.rejects import TooManyRejects

KEPT_TOKENS = 8  # the stream of random words that chooses them
SIZES = [(3 + 7 * number % 50, 5 + 11 * number % 60) for number in range(43)]
IMAGES = [pictures.encoded_image(*size, seed) for seed, size in enumerate(SIZES)]
FEATURES = Features({"image": Image(), "n": Value("int32")})
SMALL = {"seq_len": 20, "patch_size": 8, "label_column": "n", "drop_rate": 0.3}
SMALL |= {"window": 12, "open_packs": 3, "max_segments": 5}


def stored(images=IMAGES) -> Dataset:
    """Images, each with its number."""
    columns = {
        "image": [{"bytes": image, "path": None} for image in images],
        "n": list(range(len(images))),
    }
    return Dataset.from_dict(columns, features=FEATURES)


def generated(shards):
    for number in shards:
        yield {"image": {"bytes": IMAGES[number], "path": None}, "n": number}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Functions that open a dataset anew, by name."""
    folder = tmp_path_factory.mktemp("streams")
    names = []
    for number, some in enumerate((range(20), range(20, 43))):
        names.append(str(folder / f"{number}.parquet"))
        stored().select(some).to_parquet(names[-1], batch_size=7)
    paths = []
    for number, image in enumerate(IMAGES):
        paths.append(str(folder / f"{number}.png"))
        (folder / f"{number}.png").write_bytes(image)
    by_path = {"image": paths, "n": list(range(len(paths)))}
    by_path = Dataset.from_dict(by_path).cast(FEATURES)
    bare = Dataset.from_dict(
        {"image": IMAGES, "n": list(range(len(IMAGES)))},
        features=Features({"image": Value("binary"), "n": Value("int32")}),
    )

    def of_parquet():
        return datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)

    def of_dataset():
        return stored().to_iterable_dataset(num_shards=2)

    def of_generator():
        shards = {"shards": list(range(43))}
        return IterableDataset.from_generator(generated, features=FEATURES, gen_kwargs=shards)

    def joined():
        parts = [stored().select(range(20)), stored().select(range(20, 43))]
        return datasets.concatenate_datasets([part.to_iterable_dataset() for part in parts])

    def interleaved():
        parts = [stored().select(range(20)), stored().select(range(20, 43))]
        streams = [part.to_iterable_dataset() for part in parts]
        return datasets.interleave_datasets(
            streams, stopping_strategy="all_exhausted_without_replacement"
        )

    def undecoded():  # what maps and filters hand on is decoded otherwise
        return of_dataset().cast_column("image", Image(decode=False))

    def mapped():
        dataset = undecoded()
        return dataset.map(lambda row: {"n": row["n"]}, features=dataset.features)

    return {
        "parquet": of_parquet,
        "dataset": of_dataset,
        "generator": of_generator,
        "joined": joined,
        "interleaved": interleaved,
        "mapped": mapped,
        "filtered": lambda: undecoded().filter(lambda row: row["n"] % 5 != 2),
        "skipped": lambda: of_dataset().skip(3).take(35),
        "paths": lambda: by_path.to_iterable_dataset(num_shards=3),
        "bare bytes": lambda: bare.to_iterable_dataset(num_shards=3),
        "torch format": lambda: of_dataset().with_format("torch"),
    }


KINDS = ["parquet", "dataset", "generator", "joined", "interleaved", "mapped", "filtered"]
KINDS += ["skipped", "paths", "bare bytes", "torch format"]


def numbers_of(dataset, epoch) -> list[int]:
    """Which image is which in the stream, as `datasets` hands them out itself."""
    dataset = dataset.with_format(None).select_columns(["n"])
    dataset.set_epoch(epoch)
    return [row["n"] for row in dataset]


def loader_of(dataset, batch_size, options=SMALL, **more) -> PackedLoader:
    return PackedLoader(PackedStream(dataset, **options), batch_size, **more)


def naive_packs(numbers, options, seed, epoch) -> list[list[int]]:
    """The examples of each pack, by their numbers in the stream: window by window."""
    config = config_of(options)
    packs = []
    for first in range(0, len(numbers), config.window):
        window = range(first, min(first + config.window, len(numbers)))
        keeps = [naive.decide(*SIZES[numbers[i]], config, seed, epoch, i)[1] for i in window]
        closed, left = naive_streams.online(
            keeps,
            config.seq_len,
            strategy=config.strategy,
            open_packs=options["open_packs"],
            max_segments=config.max_segments,
        )
        packs += [[window[place] for place in pack] for pack in [*closed, *left]]
    return packs


def config_of(options) -> PackConfig:
    others = ("label_column", "open_packs")
    named = {name: value for name, value in options.items() if name not in others}
    return PackConfig(**{"strategy": "best_fit", **named})


def examples_of(batches) -> list[list[int]]:
    """The examples of each row of some batches."""
    return [
        [example for example in row if example >= 0]
        for batch in batches
        for row in batch.example_index.tolist()
    ]


def flat(rows: list[list[int]]) -> list[int]:
    return [example for row in rows for example in row]


def batch_bytes(batch: PackedBatch) -> list[Any]:
    return [
        (name, value.dtype, tuple(value.shape), value.numpy().tobytes())
        for name, value in vars(batch).items()
        if value is not None
    ]


def laid_together(parts: list[PackedBatch]) -> PackedBatch:
    """The batches of all ranks as one."""
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return PackedBatch(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    )


def global_batches(opened, world_size, size=4, state=None, passes=1, **options) -> list[list[Any]]:
    """The bytes of each global batch of some epochs, every rank with a dataset of its own."""
    ranks = []
    for rank in range(world_size):
        more = {"rank": rank, "world_size": world_size, "tail": "pad", **options}
        loader = loader_of(opened(), size // world_size, **more)
        if state is not None:
            loader.load_state_dict(state)
        ranks.append([batch for _ in range(passes) for batch in loader])
    return [batch_bytes(laid_together(parts)) for parts in zip(*ranks, strict=True)]


@st.composite
def some_options(draw):
    return {
        "seq_len": draw(st.integers(8, 60)),
        "patch_size": draw(st.sampled_from([4, 8])),
        "drop_rate": draw(st.sampled_from([0.0, 0.4, Uniform(0.1, 0.8)])),
        "max_segments": draw(st.sampled_from([1, 2, 4, 64])),
        "strategy": draw(st.sampled_from(["best_fit", "first_fit"])),
        "window": draw(st.integers(1, 50)),
        "open_packs": draw(st.integers(1, 6)),
        "label_column": "n",
    }


@given(
    kind=st.sampled_from(KINDS),
    options=some_options(),
    seed=st.integers(0, 3) | st.just(2**64 - 1),
    epoch=st.integers(0, 2),
    batch_size=st.integers(1, 5),
    num_workers=st.sampled_from([0, 2]),
)
def test_the_packs_are_those_of_the_online_packer_window_by_window(
    sources, kind, options, seed, epoch, batch_size, num_workers
):
    dataset = sources[kind]()
    numbers = numbers_of(dataset, epoch)
    wanted = naive_packs(numbers, options, seed, epoch)
    workers = {"num_workers": num_workers, "prefetch": 1}
    loader = loader_of(dataset, batch_size, options, seed=seed, tail="pad", **workers)
    loader.set_epoch(epoch)
    batches = list(loader)
    found = examples_of(batches)
    assert [row for row in found if row] == wanted
    assert len(batches) == -(-len(wanted) // batch_size)
    assert sorted(flat(found)) == list(range(len(numbers)))
    assert len(numbers) >= 34

    config = config_of(options)
    for batch in batches:
        assert batch.seq_lens.shape == (batch_size, config.max_segments)
        assert batch.seq_lens.sum(axis=1).max() <= config.seq_len
        present = batch.present
        for example, label, length, grid in zip(
            batch.example_index[present].tolist(),
            batch.labels[present].tolist(),
            batch.seq_lens[present].tolist(),
            batch.grid_hw[present].tolist(),
            strict=True,
        ):
            assert label == numbers[example]
            decided, keep, _ = naive.decide(*SIZES[label], config, seed, epoch, example)
            assert (tuple(grid), length) == (decided, keep)


@pytest.mark.parametrize("kind", KINDS)
def test_every_segment_is_its_image_with_the_tokens_decided(sources, kind):
    options = {**SMALL, "max_segments": 64}
    dataset = sources[kind]()
    numbers = numbers_of(dataset, 0)
    loader = loader_of(dataset, 3, options, seed=5, tail="pad")
    seen = []
    for batch in loader:
        for row in range(3):
            place = 0
            for segment in range(int(batch.present[row].sum())):
                example = int(batch.example_index[row, segment])
                height, width = batch.grid_hw[row, segment].tolist()
                length = int(batch.seq_lens[row, segment])
                tokens = slice(place, place + length)
                place += length
                chosen = naive.subset(5, 0, example, KEPT_TOKENS, height * width, length)
                coords = [list(divmod(token, width)) for token in chosen]
                assert batch.coords[row, tokens].tolist() == coords
                assert (batch.segment_ids[row, tokens] == segment + 1).all()
                image = PillowImage.open(BytesIO(IMAGES[numbers[example]])).convert("RGB")
                pixels = image.resize((width * 8, height * 8), PillowImage.Resampling.BICUBIC)
                wanted = naive.patchify(np.asarray(pixels), 8)[chosen]
                assert (batch.patches[row, tokens].numpy() == wanted).all()
                seen.append(example)
            assert not batch.patches[row, place:].any()
            assert not batch.segment_ids[row, place:].any()
    assert sorted(seen) == list(range(len(numbers)))
    assert max(map(len, examples_of(list(loader)))) > 1


def test_every_epoch_and_seed_is_another():
    options = {**SMALL, "drop_rate": Uniform(0.1, 0.8)}

    def opened():
        return stored().to_iterable_dataset(num_shards=9)

    loader = loader_of(opened(), 4, options, tail="pad")
    epochs = [list(loader) for _ in range(3)]
    assert loader.epoch == 2
    epochs.append(list(loader_of(opened(), 4, options, tail="pad", seed=1)))
    packs = [examples_of(batches) for batches in epochs]
    for found in packs:
        assert sorted(flat(found)) == list(range(43))
        assert max(map(len, found)) > 1
    assert len(set(map(str, packs))) == 4
    coords = [b"".join(batch.coords.numpy().tobytes() for batch in batches) for batches in epochs]
    assert len(set(coords)) == 4
    # `datasets` gives the shards of each epoch but the first in an order of its own.
    fill = [numbers_of(opened(), epoch) for epoch in range(3)]
    assert fill[0] != fill[1] != fill[2]
    for epoch, order in enumerate(fill):
        for batch in epochs[epoch]:
            examples = batch.example_index[batch.present].tolist()
            assert batch.labels[batch.present].tolist() == [order[i] for i in examples]


UNINTERRUPTED: dict[str, list[tuple[int, list[Any]]]] = {}


def uninterrupted(kind, opened) -> list[tuple[int, list[Any]]]:
    """(epoch, bytes) of the batches of three epochs, one rank after them all."""
    if kind not in UNINTERRUPTED:
        loader = loader_of(opened(), 4, tail="pad")
        found = [(loader.epoch, batch_bytes(batch)) for _ in range(3) for batch in loader]
        assert len(found) > 12
        UNINTERRUPTED[kind] = found
    return UNINTERRUPTED[kind]


@given(
    kind=st.sampled_from(KINDS),
    stop=st.integers(0, 9),
    epoch=st.integers(0, 1),
    worlds=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    workers=st.tuples(st.sampled_from([0, 2]), st.sampled_from([0, 1, 3])),
)
@settings(max_examples=settings.default.max_examples // 2)
def test_a_stream_goes_on_where_it_stopped(sources, kind, stop, epoch, worlds, workers):
    opened = sources[kind]
    whole = uninterrupted(kind, opened)
    first = sum(batch_epoch == 0 for batch_epoch, _ in whole)
    stop = min(stop, sum(batch_epoch == epoch for batch_epoch, _ in whole) - 1)

    states = []
    for rank in range(worlds[0]):
        place = {"rank": rank, "world_size": worlds[0], "tail": "pad"}
        loader = loader_of(opened(), 4 // worlds[0], num_workers=workers[0], **place)
        for _ in range(epoch):
            assert len(list(loader)) == first
        for number, _ in enumerate(loader if stop else [], start=1):
            if number == stop:
                break
        states.append(json.dumps(loader.state_dict(), sort_keys=True))
    assert len(set(states)) == 1, "every rank has the same state"
    state = json.loads(states[0])
    found = global_batches(opened, worlds[1], state=state, passes=3 - epoch, num_workers=workers[1])
    assert found == [batch for _, batch in whole[epoch * first + stop :]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_tails(world_size):
    def opened():
        return stored(IMAGES[:40]).to_iterable_dataset(num_shards=2)

    packs = naive_packs(numbers_of(opened(), 0), SMALL, 0, 0)
    rest = len(packs) % 4
    assert rest
    batch_size = 4 // world_size
    places = [
        {"rank": rank, "world_size": world_size, "num_workers": rank} for rank in range(world_size)
    ]
    by_rank = [list(loader_of(opened(), batch_size, **place)) for place in places]
    steps = [examples_of(parts) for parts in zip(*by_rank, strict=True)]
    assert steps == [packs[first : first + 4] for first in range(0, len(packs) - rest, 4)]

    by_rank = [list(loader_of(opened(), batch_size, tail="pad", **place)) for place in places]
    steps = [examples_of(parts) for parts in zip(*by_rank, strict=True)]
    assert [pack for step in steps for pack in step if pack] == packs
    assert all(len(step) == 4 for step in steps)
    for ranks in (1, 2, 4):
        held = np.array([bool(pack) for pack in steps[-1]]).reshape(ranks, -1).sum(axis=1)
        assert held.sum() == rest
        assert held.max() - held.min() <= 1

    message = (
        f"num_packs is {rest}, expected a multiple of 4 (batch_size times world_size); "
        "choose another batch size, or tail='drop' or 'pad'"
    )
    for place in places:
        loader = loader_of(opened(), batch_size, tail="error", **{**place, "num_workers": 0})
        found = []
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            found.extend(loader)
        assert len(found) == len(packs) // 4


def test_packs_that_fill_the_last_step_pass_every_tail(sources):
    packs = naive_packs(numbers_of(sources["dataset"](), 0), SMALL, 0, 0)
    whole = loader_of(sources["dataset"](), len(packs), tail="error")
    for tail in ("error", "drop", "pad"):
        (batch,) = loader_of(sources["dataset"](), len(packs), tail=tail)
        assert examples_of([batch]) == packs
    assert len(list(whole)) == 1


def test_a_state_of_a_stream_belongs_to_its_newest_loop(sources):
    loader = loader_of(sources["dataset"](), 2)
    older = iter(loader)
    next(older)
    next(older)
    newer = iter(loader)
    next(newer)
    state = json.loads(json.dumps(loader.state_dict()))
    with pytest.raises(RuntimeError, match=r"^loop over the loader is 'one that another loop, "):
        next(older)
    assert json.loads(json.dumps(loader.state_dict())) == state
    resumed = loader_of(sources["dataset"](), 2)
    resumed.load_state_dict(state)
    assert examples_of(resumed) == examples_of(newer)


def test_a_stream_too_short_for_one_step_is_refused_not_dropped(sources):
    num_packs = len(naive_packs(numbers_of(sources["dataset"](), 0), SMALL, 0, 0))
    message = (
        f"num_packs is {num_packs}, expected 64 (batch_size times world_size) or more; choose a "
        "smaller batch, or tail='pad'"
    )
    for place in ({}, {"rank": 1, "world_size": 2}):
        loader = loader_of(sources["dataset"](), 64 // place.get("world_size", 1), **place)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            list(loader)


def after(loader, num_batches) -> dict[str, Any]:
    """The state of a loader once it has handed out so many batches, as JSON keeps it."""
    for number, _ in enumerate(loader, start=1):
        if number == num_batches:
            break
    else:
        raise AssertionError("too few batches")
    return json.loads(json.dumps(loader.state_dict()))


def rest_of(opened, state, **options) -> list[list[Any]]:
    """The bytes of the batches that a new loader gives after a state, to the epoch's end."""
    loader = loader_of(opened(), 4, tail="pad", **options)
    loader.load_state_dict(state)
    return [batch_bytes(batch) for batch in loader]


def by_epoch(sources, kind, epoch) -> list[list[Any]]:
    whole = uninterrupted(kind, sources[kind])
    return [batch for batch_epoch, batch in whole if batch_epoch == epoch]


def test_a_state_is_the_beginning_of_the_window_that_comes_next(sources):
    numbers = numbers_of(sources["dataset"](), 0)
    window = SMALL["window"]
    packs_until = [
        len(naive_packs(numbers[:end], SMALL, 0, 0)) for end in range(0, len(numbers) + 1, window)
    ]
    loader = loader_of(sources["dataset"](), 4, tail="pad")
    seen = set()
    for number, _ in enumerate(loader, start=1):
        state = loader.state_dict()
        assert (state["epoch"], state["packs"], state["unit"]) == (0, 4 * number, "packs")
        # Where a window ends with the batch, its own beginning will do.
        begun = {
            max(i for i, packs in enumerate(packs_until) if packs < 4 * number),
            max(i for i, packs in enumerate(packs_until) if packs <= 4 * number),
        }
        stream = state["stream"]
        place = stream["num_packs"], stream["num_examples"]
        assert place in [(packs_until[i], i * window) for i in begun]
        seen.add(place)
    assert len(seen) > 2


def test_what_was_taken_is_not_decoded_again(sources, monkeypatch):
    decoded = []

    def counted(encoded, **options):
        decoded.append(encoded)
        return decode(encoded, **options)

    whole = naive_packs(numbers_of(sources["dataset"](), 0), SMALL, 0, 0)
    state = after(loader_of(sources["dataset"](), 4, tail="pad"), 3)
    undecoded = state["packs"] - state["stream"]["num_packs"]
    assert undecoded > 0
    wanted = by_epoch(sources, "dataset", 0)[3:]
    monkeypatch.setattr(fill, "decode", counted)
    assert rest_of(sources["dataset"], state) == wanted != []
    assert len(decoded) == sum(map(len, whole[12:]))


def test_states_follow_each_other(sources):
    loader = loader_of(sources["generator"](), 4, tail="pad")
    for _ in range(5):
        state = after(loader, 1)
        loader = loader_of(sources["generator"](), 4, tail="pad")
        loader.load_state_dict(state)
        assert loader.state_dict()["packs"] == state["packs"]
    assert state["packs"] == 20
    assert rest_of(sources["generator"], state) == by_epoch(sources, "generator", 0)[5:]


def test_a_state_saved_again_before_the_first_batch_is_the_same(sources):
    state = after(loader_of(sources["dataset"](), 4, tail="pad"), 4)
    loader = loader_of(sources["dataset"](), 4, tail="pad")
    loader.load_state_dict(state)
    assert json.loads(json.dumps(loader.state_dict())) == state
    assert rest_of(sources["dataset"], loader.state_dict()) == by_epoch(sources, "dataset", 0)[4:]


def test_a_finished_epoch_goes_on_with_the_next(sources):
    loader = loader_of(sources["dataset"](), 4, tail="pad")
    list(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["finished"] is True
    assert rest_of(sources["dataset"], state) == by_epoch(sources, "dataset", 1) != []


def test_the_state_of_an_epoch_that_was_set_is_its_beginning(sources):
    loader = loader_of(sources["dataset"](), 4, tail="pad")
    after(loader, 4)
    loader.set_epoch(1)
    state = json.loads(json.dumps(loader.state_dict()))
    assert (state["epoch"], state["packs"]) == (1, 0)
    assert rest_of(sources["dataset"], state) == by_epoch(sources, "dataset", 1) != []


def test_a_loader_under_way_may_load_an_earlier_state(sources):
    loader = loader_of(sources["dataset"](), 4, tail="pad")
    early = after(loader, 1)
    after(loader, 5)
    loader.load_state_dict(early)
    again = json.loads(json.dumps(loader.state_dict()))
    wanted = by_epoch(sources, "dataset", 0)[1:]
    assert [batch_bytes(batch) for batch in loader] == wanted
    assert rest_of(sources["dataset"], again) == wanted


def test_a_pass_that_was_left_starts_over(sources):
    loader = loader_of(sources["dataset"](), 4, tail="pad")
    after(loader, 3)
    assert [batch_bytes(batch) for batch in loader] == by_epoch(sources, "dataset", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_one_dataset_leave_each_other_alone(sources, kind):
    dataset = sources[kind]()
    ranks = [
        loader_of(dataset, 2, rank=rank, world_size=2, tail="pad", num_workers=rank)
        for rank in range(2)
    ]
    found, states = [], []
    for parts in zip(*ranks, strict=True):
        found.append(batch_bytes(laid_together(list(parts))))
        states.append([json.loads(json.dumps(loader.state_dict())) for loader in ranks])
    wanted = by_epoch(sources, kind, 0)
    assert found == wanted
    for number, pair in enumerate(states, start=1):
        for state in pair:
            assert rest_of(sources[kind], state) == wanted[number:]


def test_loaders_of_one_stream_leave_each_other_alone(sources):
    packs = PackedStream(sources["dataset"](), **SMALL)
    one = PackedLoader(packs, 4, tail="pad")
    state = after(one, 1)
    other = PackedLoader(packs, 4, tail="pad")
    after(other, 5)
    wanted = by_epoch(sources, "dataset", 0)[1:]
    assert rest_of(sources["dataset"], one.state_dict()) == wanted
    assert rest_of(sources["dataset"], state) == wanted


def shuffled(dataset):
    return dataset.shuffle(seed=1, buffer_size=5)


@pytest.mark.parametrize(
    "shuffle",
    [
        shuffled,
        lambda dataset: shuffled(dataset).take(40),
        lambda dataset: shuffled(dataset).select_columns(["image", "n"]),
        lambda dataset: shuffled(dataset).filter(lambda row: row["n"] >= 0),
        lambda dataset: datasets.concatenate_datasets([dataset, shuffled(dataset)]),
        lambda dataset: datasets.interleave_datasets([shuffled(dataset), dataset]),
    ],
    ids=["plain", "taken", "selected", "filtered", "joined", "interleaved"],
)
def test_a_dataset_shuffled_in_a_buffer_cannot_go_on(shuffle):
    def opened():
        dataset = stored().to_iterable_dataset(num_shards=2)
        return shuffle(dataset.cast_column("image", Image(decode=False)))

    loader = loader_of(opened(), 4)
    state = after(loader, 2)
    message = (
        "dataset is 'shuffled in a buffer', expected a dataset that continues exactly; "
        "datasets refills a shuffle buffer; shuffle the rows before they are read"
    )
    other = loader_of(opened(), 4)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        other.load_state_dict(state)
    assert other.state_dict()["packs"] == 0


def test_a_state_of_another_stream_is_refused(sources):
    state = after(loader_of(sources["dataset"](), 4), 2)
    for options in ({"open_packs": 4}, {"window": 13}, {"seq_len": 21}, {"strategy": "first_fit"}):
        packs = PackedStream(sources["dataset"](), **{**SMALL, **options})
        loader = PackedLoader(packs, 4)
        expected = packs.fingerprint(Key(0, 0))
        message = (
            f"state['fingerprint'] is {state['fingerprint']!r}, expected {expected!r}; the packs "
            "are others: use the data, options and seed of the state"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            loader.load_state_dict(state)


LENIENT = {"max_bad_fraction": 0.5}
ONE_WINDOW = {**SMALL, "window": 100}


def bad_images() -> list[bytes]:
    """Images of which 3 and 20 have bad headers, and 30 a sound one but broken pixels."""
    images = list(IMAGES)
    images[3], images[20] = b"", b"<html>"
    images[30] = pictures.encoded_image(*SIZES[30], 4, "JPEG", quality=95)[:-500]
    return images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_left_out_and_logged(caplog, num_workers):
    dataset = stored(bad_images()).to_iterable_dataset()
    options = {**ONE_WINDOW, **LENIENT, "drop_rate": 0.0}
    whole = [
        pack
        for batch in loader_of(dataset, 4, options, tail="pad", num_workers=num_workers)
        for pack in examples_of([batch])
    ]
    assert sorted(flat(whole)) == [i for i in range(43) if i not in (3, 20, 30)]
    messages = {record.getMessage() for record in caplog.records if record.name.startswith("pack")}
    truncated = {message for message in messages if message.startswith("example 30 ")}
    assert messages - truncated == {
        "example 3 left out: BadImage: the file holds no bytes",
        "example 20 left out: UnidentifiedImageError: no known image format",
    }
    (message,) = truncated
    assert re.fullmatch("example 30 left out: OSError: .*truncated.*", message)
    # The others stand where they would if the pixels were sound, those with bad headers absent.
    sound = bad_images()
    sound[30] = IMAGES[30]
    loader = loader_of(stored(sound).to_iterable_dataset(), 4, options, tail="pad")
    wanted = examples_of(list(loader))
    assert whole == [[i for i in pack if i != 30] for pack in wanted]
    assert any(30 in pack for pack in wanted)


def test_bad_examples_keep_their_numbers_across_windows_and_a_resume():
    options = {**SMALL, **LENIENT}

    def opened():
        return stored(bad_images()).to_iterable_dataset(num_shards=2)

    loader = loader_of(opened(), 2, options, tail="pad")
    found, states = [], []
    for batch in loader:
        found.append(batch_bytes(batch))
        states.append(loader.state_dict())
        for example, label in zip(
            batch.example_index[batch.present].tolist(),
            batch.labels[batch.present].tolist(),
            strict=True,
        ):
            assert example == label
    assert len(found) > 8
    for number in (1, 5, len(found) - 1):
        again = loader_of(opened(), 2, options, tail="pad")
        again.load_state_dict(states[number - 1])
        assert [batch_bytes(batch) for batch in again] == found[number:] != []


def test_null_labels_are_left_out(caplog):
    rows = stored().select(range(20)).to_dict()
    rows["n"][7] = None
    dataset = Dataset.from_dict(rows, features=FEATURES).to_iterable_dataset()
    loader = loader_of(dataset, 4, {**ONE_WINDOW, **LENIENT}, tail="pad")
    assert sorted(flat(examples_of(list(loader)))) == [i for i in range(20) if i != 7]
    assert caplog.messages == ["example 7 left out: BadImage: the label is null"]


def test_labels_that_are_no_class_are_left_out():
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    columns = {
        "image": [{"bytes": image, "path": None} for image in IMAGES[:10]],
        "label": [0, 1, 1, 0, -1, 1, 0, 0, 1, 1],
    }
    dataset = Dataset.from_dict(columns, features=features).to_iterable_dataset()
    options = {**ONE_WINDOW, **LENIENT, "label_column": "auto"}
    batches = list(loader_of(dataset, 4, options, tail="pad"))
    found = [batch.labels[batch.present].tolist() for batch in batches]
    assert set(flat(found)) == {0, 1}
    assert sorted(flat(examples_of(batches))) == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_too_many_bad_images_stop_the_stream():
    dataset = stored(bad_images()).to_iterable_dataset()
    message = (
        "rejected is 2 of 43 examples (4.65%), expected at most 1.00% (max_bad_fraction); repair "
        "the source or raise it. Last: example 3 (empty: BadImage: the file holds no bytes); "
        "example 20 (unreadable: UnidentifiedImageError: no known image format)"
    )
    with pytest.raises(TooManyRejects, match=f"^{re.escape(message)}$"):
        list(loader_of(dataset, 4, ONE_WINDOW))

    images = list(IMAGES)
    images[20] = images[21] = images[22] = b""
    dataset = stored(images).to_iterable_dataset()
    assert list(loader_of(dataset, 4, {**ONE_WINDOW, **LENIENT, "max_consecutive_bad": 4}))
    message = (
        "rejected is 3 examples in a row up to example 22, expected fewer than 3 "
        "(max_consecutive_bad); repair the source or raise it. Last: "
        + "; ".join(f"example {i} (empty: BadImage: the file holds no bytes)" for i in (20, 21, 22))
    )
    with pytest.raises(TooManyRejects, match=f"^{re.escape(message)}$"):
        list(loader_of(dataset, 4, {**ONE_WINDOW, **LENIENT, "max_consecutive_bad": 3}))


TINY = pictures.encoded_image(8, 8)
CUT = pictures.encoded_image(8, 8, 0, "JPEG", quality=95)[:-60]


@pytest.mark.parametrize("window", [8, 1000])
@pytest.mark.parametrize("bad", [b"", CUT], ids=["header", "pixels"])
def test_a_share_below_the_limit_never_stops_a_stream_whatever_the_window(bad, window):
    images = [bad if number % 20 == 7 else TINY for number in range(700)]
    options = {**SMALL, "window": window, "max_bad_fraction": 0.1}
    loader = loader_of(stored(images).to_iterable_dataset(), 16, options, tail="pad")
    good = [number for number in range(700) if number % 20 != 7]
    for _ in range(2):
        assert sorted(flat(examples_of(list(loader)))) == good


@pytest.mark.parametrize("window", [16, 2000])
def test_a_stream_of_mostly_bad_images_is_not_read_to_its_end(window):
    images = [b"" if number % 2 else TINY for number in range(2000)]
    loader = loader_of(stored(images).to_iterable_dataset(), 4, {**SMALL, "window": window})
    with pytest.raises(TooManyRejects, match=r"^rejected is 31 of 62 examples \(50\.00%\), "):
        list(loader)


def until_it_stops(opened, options, state=None, most=None):
    """Batches to the end or an error, its sentence without examples, and the states after each."""
    loader = loader_of(opened(), 2, options, tail="pad")
    if state is not None:
        loader.load_state_dict(state)
    found, states = [], [json.loads(json.dumps(loader.state_dict()))]
    try:
        for batch in loader:
            found.append(batch_bytes(batch))
            states.append(json.loads(json.dumps(loader.state_dict())))
            if len(found) == most:
                break
    except TooManyRejects as error:
        return found, str(error).split(" Last: ")[0].rstrip("."), states
    return found, None, states


@given(
    outcomes=st.lists(st.sampled_from("ggggb"), min_size=20, max_size=60),
    window=st.integers(1, 20),
    limit=st.sampled_from([0.1, 0.25, 1.0]),
    in_a_row=st.integers(2, 5),
    at_first=st.integers(0, 6),
    data=st.data(),
)
def test_a_stream_that_is_resumed_stops_where_it_would_have_stopped(
    outcomes, window, limit, in_a_row, at_first, data
):
    images = [TINY if outcome == "g" else b"" for outcome in outcomes]

    def opened():
        return stored(images).to_iterable_dataset()

    options = {**SMALL, "window": window, "max_bad_fraction": limit}
    options["max_consecutive_bad"] = in_a_row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("packpipe.rows.rejects._AT_FIRST", at_first)
        found, why, states = until_it_stops(opened, options)
        stop = data.draw(st.integers(0, len(found)))
        again, same, _ = until_it_stops(opened, options, states[stop])
        if not states[stop]["finished"]:
            assert (again, same) == (found[stop:], why)
    bad = "".join(outcomes)
    if "b" * in_a_row in bad:
        assert why is not None, "also where a window ends within them"


def test_a_state_that_does_not_count_bad_examples_counts_none():
    images = [*[b""] * 3, *[TINY] * 30, *[b""] * 2]

    def opened():
        return stored(images).to_iterable_dataset()

    options = {**SMALL, "window": 5, "max_bad_fraction": 0.1}
    _, why, states = until_it_stops(opened, options)
    assert why.startswith("rejected is 5 of 35 examples")
    state = states[-1]
    assert state["stream"].pop("num_bad") == 3
    assert state["stream"].pop("bad_in_a_row") == 0
    _, why, _ = until_it_stops(opened, options, state)
    assert why is None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_bad", -1, "an integer in 0..12"),
        ("num_bad", 13, "an integer in 0..12"),
        ("num_bad", "2", "an integer in 0..12"),
        ("bad_in_a_row", 3, "an integer in 0..2"),
        ("bad_in_a_row", None, "an integer in 0..2"),
    ],
)
def test_counts_of_bad_examples_that_cannot_be_are_refused(name, value, expected):
    def opened():
        return stored(bad_images()).to_iterable_dataset()

    loader = loader_of(opened(), 2, {**SMALL, **LENIENT}, tail="pad")
    state = after(loader, 3)
    assert state["stream"]["num_examples"] == 12
    state["stream"] |= {"num_bad": 2, "bad_in_a_row": 0, name: value}
    message = f"state['stream']['{name}'] is {value!r}, expected {expected}; "
    message += "pass what state_dict returned"
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        loader_of(opened(), 2, {**SMALL, **LENIENT}, tail="pad").load_state_dict(state)


BAD = (
    "example {} is bad ({}), expected a usable image and label; repair it, or let bad examples be "
    "left out"
)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_on_error_raise_stops_at_the_first_bad_example(num_workers):
    options = {**ONE_WINDOW, "on_error": "raise", "drop_rate": 0.0}
    dataset = stored(bad_images()).to_iterable_dataset()
    message = BAD.format(3, "empty: BadImage: the file holds no bytes")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        list(loader_of(dataset, 4, options, num_workers=num_workers))

    images = list(IMAGES)
    images[30] = bad_images()[30]
    start, end = BAD.split("({})")
    message = re.escape(start.format(30)) + r"\(undecodable: OSError: .*truncated.*\)"
    with pytest.raises(ValueError, match=f"^{message}{re.escape(end)}$"):
        list(loader_of(stored(images).to_iterable_dataset(), 4, options, num_workers=num_workers))


def unfeatured(images=IMAGES) -> IterableDataset:
    def rows():
        for number, image in enumerate(images):
            yield {"image": image, "n": number}

    dataset = IterableDataset.from_generator(rows)
    assert dataset.features is None
    return dataset


def test_a_dataset_without_features_needs_the_names_of_its_columns():
    message = (
        "dataset.features is None, expected known, for 'auto'; pass image_column and label_column"
    )
    for columns in ({}, {"image_column": "image"}, {"label_column": "n"}, {"label_column": None}):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            PackedStream(unfeatured(), 20, **columns)
    for label_column in ("n", None):
        options = {**SMALL, "image_column": "image", "label_column": label_column}
        (batch, *others) = loader_of(unfeatured(), 4, options)
        assert len(others) > 4
        examples = batch.example_index[batch.present].tolist()
        if label_column is None:
            assert batch.labels is None
        else:
            assert batch.labels[batch.present].tolist() == examples != []


def test_a_rank_without_packs_pads_whatever_the_features():
    options = {**SMALL, "image_column": "image"}
    place = {"world_size": 2, "tail": "pad"}
    for opened in (unfeatured, lambda images: stored(images).to_iterable_dataset()):
        for rank in range(2):
            loader = loader_of(opened(IMAGES[:1]), 2, options, rank=rank, **place)
            (batch,) = loader
            assert batch.labels.dtype == torch.int64
            assert flat(examples_of([batch])) == ([] if rank else [0])


def test_a_column_that_is_not_there_is_named():
    options = {"seq_len": 20, "image_column": "img", "label_column": None}
    message = "image_column is 'img', expected one of ['image', 'n']; pass image_column"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        list(loader_of(unfeatured(), 4, options))
    with pytest.raises(ValueError, match=f"^{re.escape(message)} \\(--image-column\\)$"):
        list(loader_of(stored().to_iterable_dataset(), 4, options))


def test_images_that_were_decoded_give_the_rows_of_their_files():
    """What maps and filters hand on, `datasets` decodes, unless the column is cast before."""
    encoded, decoded = (stored().to_iterable_dataset() for _ in range(2))
    decoded = decoded.filter(lambda row: row["n"] >= 0)
    assert not isinstance(next(iter(decoded))["image"], dict)
    batches = [list(loader_of(dataset, 4)) for dataset in (encoded, decoded)]
    assert len(batches[0]) > 1
    for one, other in zip(*batches, strict=True):
        assert bool((one.patches == other.patches).all())
        assert bool((one.example_index == other.example_index).all())


def test_a_stream_has_no_length(sources):
    message = "a PackedStream has no length; iterate until it ends"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        len(loader_of(sources["dataset"](), 4))


@pytest.mark.parametrize("options", [{"balance": True}, {"num_workers": 1, "workers": "processes"}])
def test_balance_and_processes_are_refused(sources, options):
    message = (
        "packs is 'a stream', expected no balance and no processes; all of it has to be known for "
        "that; use threads, or EpochPacks"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loader_of(sources["dataset"](), 4, **options)


def test_an_empty_stream_gives_no_batches():
    for tail in ("drop", "pad", "error"):
        dataset = stored().to_iterable_dataset().cast_column("image", Image(decode=False))
        loader = loader_of(dataset.filter(lambda _: False), 4, tail=tail)
        assert list(loader) == []
        assert loader.epoch == 0


WRONG_OPTIONS = [
    (
        {"seq_len": 0},
        ValueError,
        (
            "seq_len is 0, expected an integer in 1..32767; coordinates are int16, so choose "
            "a shorter row"
        ),
    ),
    (
        {"patch": 8},
        TypeError,
        (
            "option is 'patch', expected one of seq_len, patch_size, crop, resolution, "
            "max_tokens, max_upscale, drop_rate, epochs, fit_last, fit_limit, max_segments, "
            "strategy, window, background, reducing_gap, downscale_filter, upscale_filter, "
            "max_pixels, profiles, damaged_scans, value_range, views, views_together, "
            "jpeg_edges, prefix_tokens, pixels; check its spelling"
        ),
    ),
    (
        {"strategy": "ffd"},
        ValueError,
        ("strategy is 'ffd', expected one of 'best_fit', 'first_fit'; choose a packing rule"),
    ),
    (
        {"fit_last": "drop_rate"},
        ValueError,
        ("fit_last is 'drop_rate', expected None; the open packs of a stream are nearly full"),
    ),
    (
        {"open_packs": 0},
        ValueError,
        (
            "open_packs is 0, expected an integer in 1..65536; 64 is usual; for more, use "
            "pack_lengths"
        ),
    ),
    (
        {"open_packs": "4"},
        TypeError,
        (
            "open_packs is '4', expected an integer in 1..65536; 64 is usual; for more, use "
            "pack_lengths"
        ),
    ),
    (
        {"window": 0},
        ValueError,
        (
            "window is 0, expected an integer in 1..4611686018427387904; 1024 or more keeps "
            "padding low"
        ),
    ),
    (
        {"on_error": "skip"},
        ValueError,
        ("on_error is 'skip', expected one of 'quarantine', 'raise'; choose what a bad image does"),
    ),
    (
        {"max_bad_fraction": 2},
        ValueError,
        "max_bad_fraction is 2, expected 0..1; it is a share",
    ),
    (
        {"max_bad_fraction": "x", "on_error": "raise"},
        TypeError,
        "max_bad_fraction is 'x', expected 0..1; it is a share",
    ),
    (
        {"max_consecutive_bad": 0},
        ValueError,
        (
            "max_consecutive_bad is 0, expected an integer in 1..9223372036854775808; 1 stops"
            " at the first bad example"
        ),
    ),
    (
        {"image_column": "n"},
        ValueError,
        (
            "features['n'] is Value('int32'), expected Image(), Value('binary') or arrays of bool, "
            "uint8 or uint16; cast_column it"
        ),
    ),
    (
        {"label_column": "y"},
        ValueError,
        ("label_column is 'y', expected one of ['image', 'n'], 'auto' or None; check its spelling"),
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG_OPTIONS)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        PackedStream(stored().to_iterable_dataset(), **options)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (stored, "Dataset"),
        (lambda: datasets.IterableDatasetDict(train=unfeatured()), "IterableDatasetDict"),
        (lambda: iter([]), "list_iterator"),
    ],
)
def test_what_is_no_stream_is_refused(wrong, name):
    message = (
        f"type(dataset) is {name!r}, expected IterableDataset; pass a Dataset to EpochPacks instead"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        PackedStream(wrong())


def test_progress_is_the_place_in_the_stream(sources):
    options = {
        **SMALL,
        "drop_rate": OverTraining(0.1, 0.8, 0.5, 0.1),
        "epochs": 2,
        "resolution": Side(40),
    }
    stream = PackedStream(sources["dataset"](), **options, num_examples=43)
    kept = {}
    loader = PackedLoader(stream, 1)
    for epoch in range(2):
        for batch in loader:
            index, lens = batch.by_example(batch.seq_lens)
            _, grids = batch.by_example(batch.grid_hw)
            for i, keep, grid in zip(index.tolist(), lens, grids, strict=True):
                kept[epoch, i] = int(keep), int(grid.prod())
    assert sorted(kept) == [(epoch, i) for epoch in range(2) for i in range(43)]
    for (epoch, i), (keep, tokens) in kept.items():
        progress = (epoch + i / 43) / 2
        rate = 0.1 + 0.7 / (1 + math.exp(-(progress - 0.5) / 0.1))
        assert keep == max(1, round(tokens * (1 - rate)))


def test_progress_needs_to_know_how_long_an_epoch_is(sources):
    options = {**SMALL, "drop_rate": OverTraining(0.1, 0.8, 0.5, 0.1), "epochs": 2}
    message = (
        "num_examples is None, expected a number, for OverTraining; "
        "pass about as many as an epoch has"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PackedStream(sources["dataset"](), **options)


def test_a_dataset_that_is_split_by_node_is_refused(sources):
    half = split_dataset_by_node(sources["dataset"](), rank=0, world_size=2)
    message = (
        "dataset is 'split by node', expected the whole dataset; "
        "each rank takes its own packs of all examples"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PackedStream(half, **SMALL)
