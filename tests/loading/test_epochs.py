"""EpochPacks: source images, planned anew for every epoch."""

from __future__ import annotations

import logging
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import pairwise

import datasets
import naive
import numpy as np
import pictures
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from packpipe.loading import epochs
from packpipe.loading.epochs import EpochPacks
from packpipe.loading.streams import PackedStream
from packpipe.philox import Key
from packpipe.planning.distributions import Uniform
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import plan_epoch
from packpipe.planning.resolution import Side
from packpipe.rows.rejects import Reject, TooManyRejects
from packpipe.sources import sizes as sizes_module

KEPT_TOKENS = 8  # the stream of random words that chooses them
IMAGES = pictures.encoded_images()
SIZES = pictures.SIZES
LENIENT = {"max_bad_fraction": 0.5}


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    """Sizes of datasets in memory are kept in a cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def source():
    return pictures.dataset_of(IMAGES * 3)


def all_rows(packs, seed, epoch):
    return packs.rows(Key(seed, epoch), np.arange(packs.num_packs(Key(seed, epoch))))


def examples_of(rows):
    """The examples of each row."""
    return [part.tolist() for part in np.split(rows.example_index, rows.offsets[1:-1])]


def decoded(encoded, height, width):
    """Pixels by Pillow alone."""
    image = PillowImage.open(BytesIO(encoded)).convert("RGB")
    return np.asarray(image.resize((width, height), PillowImage.Resampling.BICUBIC))


@st.composite
def some_options(draw):
    return {
        "seq_len": draw(st.integers(8, 48)),
        "patch_size": draw(st.sampled_from([8, 16])),
        "resolution": draw(st.sampled_from(["native", "budget", Side(Uniform(16, 80))])),
        "drop_rate": draw(st.sampled_from([0.0, 0.4, Uniform(0.1, 0.8)])),
        "max_segments": draw(st.sampled_from([1, 3, 64])),
        "strategy": draw(st.sampled_from(["balanced", "ffd", "next_fit", "best_fit"])),
        "window": draw(st.integers(3, 40)),
        "reducing_gap": None,
    }


KEYS = st.tuples(st.integers(0, 3) | st.just(2**64 - 1), st.integers(0, 3) | st.just(2**63))


@given(options=some_options(), key=KEYS, picked=st.sets(st.integers(0, 26), min_size=2, max_size=9))
@settings(max_examples=12)
def test_an_epoch_holds_every_image_once_as_decided(source, options, key, picked):
    picked = sorted(picked, reverse=True)
    packs = EpochPacks(source.select(picked), **options)
    config = PackConfig(**options)
    rows = all_rows(packs, *key)
    segments = rows
    assert sorted(segments.example_index.tolist()) == list(range(len(picked)))
    assert max(np.diff(segments.offsets)) <= packs.max_segments == options["max_segments"]
    for row in range(len(rows)):
        place = 0
        for number in range(*segments.offsets[row : row + 2].tolist()):
            example = int(segments.example_index[number])
            origin = picked[example] % len(SIZES)
            grid, keep, _ = naive.decide(*SIZES[origin], config, *key, example)
            length = int(segments.seq_lens[number])
            tokens = slice(place, place + length)
            place += length
            assert tuple(segments.grid_hw[number].tolist()) == grid
            assert tuple(segments.image_hw[number].tolist()) == SIZES[origin]
            assert length == keep
            assert segments.labels[number].as_py() == picked[example] % 3
            chosen = naive.subset(*key, example, KEPT_TOKENS, grid[0] * grid[1], keep)
            assert rows.coords[row, tokens].tolist() == [
                list(divmod(token, grid[1])) for token in chosen
            ]
            patch = config.patch_size
            pixels = decoded(IMAGES[origin], grid[0] * patch, grid[1] * patch)
            assert (rows.patches[row, tokens] == naive.patchify(pixels, patch)[chosen]).all()
            number_in_row = number - int(segments.offsets[row]) + 1
            assert (rows.segment_ids[row, tokens] == number_in_row).all()
        assert place <= config.seq_len
        assert not rows.patches[row, place:].any()
        assert not rows.segment_ids[row, place:].any()


@given(options=some_options(), key=KEYS)
@settings(max_examples=10)
def test_the_plan_is_that_of_the_sizes(source, options, key):
    packs = EpochPacks(source, **options)
    wanted = plan_epoch(SIZES * 3, PackConfig(**options), seed=key[0], epoch=key[1])
    assert packs.num_packs(Key(*key)) == len(wanted) > 1
    assert packs.fingerprint(Key(*key)) == wanted.fingerprint
    assert [pack.tolist() for pack in packs.plan(*key)] == [pack.tolist() for pack in wanted]
    by_pack = [wanted.num_keep[wanted.packs[pack]].tolist() for pack in range(len(wanted))]
    work = packs.work(Key(*key))
    assert work.dtype == np.int64
    assert work.tolist() == [sum(length**2 for length in pack) for pack in by_pack]


def test_packs_are_rows_in_any_order_and_several_times(source):
    packs = EpochPacks(source, 32, drop_rate=0.3)
    whole = all_rows(packs, 2, 1)
    assert len(whole) > 4
    numbers = [3, 0, 3, len(whole) - 1]
    some = packs.rows(Key(2, 1), np.array(numbers))
    assert examples_of(some) == [examples_of(whole)[number] for number in numbers]
    for name in ("patches", "segment_ids", "coords"):
        assert (getattr(some, name) == getattr(whole, name)[numbers]).all()
    none = packs.rows(Key(2, 1), np.empty(0, np.int64))
    assert len(none) == 0
    assert none.patches.shape == (0, 32, 768)


def test_every_epoch_and_seed_is_another(source):
    packs = EpochPacks(source, 32, drop_rate=0.5)
    keys = [(0, 0), (0, 1), (1, 0), (0, 2)]
    assert len({packs.fingerprint(Key(*key)) for key in keys}) == 4
    rows = [all_rows(packs, *key) for key in keys]
    assert len({str(examples_of(one)) for one in rows}) == 4
    assert len({str(sorted(map(sorted, examples_of(one)))) for one in rows}) == 4, "neighbours"
    assert len({one.coords.tobytes() for one in rows}) == 4
    again = EpochPacks(source, 32, drop_rate=0.5)
    assert [again.fingerprint(Key(*key)) for key in keys] == [
        packs.fingerprint(Key(*key)) for key in keys
    ]


def test_a_plan_is_made_once_while_it_is_used(source, monkeypatch):
    made = []

    def counted(*arguments, **options):
        made.append((options["seed"], options["epoch"]))
        return plan_epoch(*arguments, **options)

    monkeypatch.setattr(epochs, "plan_epoch", counted)
    packs = EpochPacks(source, 32)
    assert made == []
    with ThreadPoolExecutor(8) as threads:
        plans = list(threads.map(lambda _: packs.plan(0, 0), range(16)))
    assert all(plan is plans[0] for plan in plans)
    packs.plan(0, 1)
    all_rows(packs, 0, 0)
    all_rows(packs, 0, 1)
    assert made == [(0, 0), (0, 1)]


def test_an_empty_dataset_has_no_packs(source):
    for none in (source.select([]), pictures.dataset_of([])):
        packs = EpochPacks(none, 32)
        assert packs.num_packs(Key(0, 0)) == 0
        assert packs.rejects == []
        assert packs.work(Key(0, 0)).tolist() == []
        assert len(all_rows(packs, 0, 0)) == 0


def test_bad_headers_and_labels_are_rejects_and_the_others_keep_their_numbers():
    images = list(IMAGES)
    images[2], images[4] = b"", b"<html>"
    packs = EpochPacks(pictures.dataset_of(images, [0, 1, 0, None, 2, 1, -1, 0, 1]), 32, **LENIENT)
    bad_label = "label is {}, expected 0..2; repair it, or pass label_column=None"
    assert packs.rejects == [
        Reject(2, "probe", "empty", "BadImage: the file holds no bytes"),
        Reject(3, "label", "bad label", bad_label.format(None)),
        Reject(4, "probe", "unreadable", "UnidentifiedImageError: no known image format"),
        Reject(6, "label", "bad label", bad_label.format(-1)),
    ]
    good = [0, 1, 5, 7, 8]
    rows = all_rows(packs, 0, 3)
    found = rows
    assert sorted(found.example_index.tolist()) == good
    by_example = dict(zip(found.example_index.tolist(), found.labels.to_pylist(), strict=True))
    assert by_example == {0: 0, 1: 1, 5: 1, 7: 0, 8: 1}
    index = np.array(good)
    sizes = [SIZES[example] for example in good]
    wanted = plan_epoch(sizes, PackConfig(seq_len=32), seed=0, epoch=3, index=index)
    assert examples_of(rows) == [pack.tolist() for pack in wanted]


def test_too_many_bad_images_are_refused():
    dataset = pictures.dataset_of([*IMAGES, b"", b""])
    message = (
        "rejected is 2 of 11 examples (18.18%), expected at most 1.00% (max_bad_fraction); repair "
        "the source or raise it. First: example 9 (empty: BadImage: the file holds no bytes); "
        "example 10 (empty: BadImage: the file holds no bytes)"
    )
    with pytest.raises(TooManyRejects, match=f"^{re.escape(message)}$"):
        EpochPacks(dataset, 32)
    message = (
        "rejected is 2 examples in a row up to example 10, expected fewer than 2 "
        "(max_consecutive_bad); repair the source or raise it. First: example 9 (empty: BadImage: "
        "the file holds no bytes); example 10 (empty: BadImage: the file holds no bytes)"
    )
    with pytest.raises(TooManyRejects, match=f"^{re.escape(message)}$"):
        EpochPacks(dataset, 32, max_bad_fraction=0.5, max_consecutive_bad=2)
    assert len(EpochPacks(dataset, 32, max_bad_fraction=0.5).rejects) == 2


def test_on_error_raise_allows_no_reject():
    message = (
        "example 1 is bad (empty: BadImage: the file holds no bytes), expected a usable image and "
        "label; repair it, or let bad examples be left out"
    )
    with pytest.raises(TooManyRejects, match=f"^{re.escape(message)}$"):
        EpochPacks(pictures.dataset_of([IMAGES[0], b"", b""]), 32, on_error="raise", **LENIENT)


@pytest.fixture
def truncated():
    """A dataset whose example 4 has a sound header and broken pixels."""
    images = list(IMAGES)
    images[4] = pictures.encoded_image(64, 64, 4, "JPEG")[:-900]
    return pictures.dataset_of(images)


def rows_of_an_epoch(dataset):
    return all_rows(EpochPacks(dataset, 32), 0, 0)


def rows_of_a_stream(dataset):
    packs = PackedStream(dataset.to_iterable_dataset(), 32)
    key = Key(0, 0)
    return packs.rows(key, list(packs.stream_packs(key, None, 0)))


@pytest.mark.parametrize("rows_of", [rows_of_an_epoch, rows_of_a_stream])
def test_images_with_a_broken_profile_are_kept_and_logged_the_first_as_a_warning(rows_of, caplog):
    images = list(IMAGES)
    for example in (2, 4):
        save = {"image_format": "PNG", "icc_profile": b"cut"}
        images[example] = pictures.encoded_image(*SIZES[example], example, **save)
    with caplog.at_level(logging.INFO, logger="packpipe"):
        rows = rows_of(pictures.dataset_of(images))
    assert sorted(rows.example_index.tolist()) == list(range(len(images)))
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    after = "kept: broken profile (others are logged as INFO)"
    assert {message for _, message in found} == {f"example {number} {after}" for number in (2, 4)}
    assert [level for level, _ in found] == ["WARNING", "INFO"]


def test_the_file_of_an_image_that_cannot_be_decoded_is_logged(tmp_path, caplog):
    files = [str(tmp_path / f"\x1b]0;{number}\x07.png") for number in range(3)]
    for file in files:
        PillowImage.fromarray(
            np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
        ).save(file)
    with open(files[1], "r+b") as file:
        file.truncate(1000)
    dataset = Dataset.from_dict({"image": files}).cast_column("image", Image())
    # As of a share that is held out, whose numbers are its own.
    packs = EpochPacks(dataset.select([1, 2]), 32, max_bad_fraction=0.5)
    with caplog.at_level(logging.WARNING, logger="packpipe"):
        all_rows(packs, 0, 0)
    (line,) = caplog.messages
    assert line.startswith("example 0 left out: OSError: ")
    assert line.endswith(rf" ({tmp_path}/\x1b]0;1\x07.png)")  # nothing that a terminal would obey


def test_an_image_that_cannot_be_decoded_leaves_padding_and_a_log_line(truncated, caplog):
    packs = EpochPacks(truncated, 32, max_bad_fraction=0.2)
    assert packs.rejects == []
    whole = examples_of(all_rows(EpochPacks(pictures.dataset_of(IMAGES), 32), 0, 0))
    assert any(4 in row and len(row) > 1 for row in whole)
    with caplog.at_level(logging.WARNING, logger="packpipe"):
        rows = all_rows(packs, 0, 0)
    assert examples_of(rows) == [[example for example in row if example != 4] for row in whole]
    (line,) = caplog.messages
    assert re.fullmatch(r"example 4 left out: OSError: .*truncated.*", line)
    for row, (a, b) in enumerate(pairwise(rows.offsets.tolist())):
        length = int(rows.seq_lens[a:b].sum())
        assert (rows.segment_ids[row] > 0).tolist() == [True] * length + [False] * (32 - length)
        assert not rows.patches[row, length:].any()
        assert not rows.coords[row, length:].any()


def test_on_error_raise_stops_at_an_image_that_cannot_be_decoded(truncated):
    packs = EpochPacks(truncated, 32, on_error="raise")
    message = (
        re.escape("example 4 is bad (undecodable: OSError: ")
        + ".*truncated.*"
        + re.escape(
            "), expected a usable image and label; repair it, or let bad examples be left out"
        )
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        all_rows(packs, 0, 0)


def test_an_image_whose_size_changed_is_an_error(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, image in zip(paths, IMAGES, strict=False):
        path.write_bytes(image)
    dataset = Dataset.from_dict({"image": list(map(str, paths))}).cast_column("image", Image())
    packs = EpochPacks(dataset, 32)
    assert sorted(all_rows(packs, 0, 0).example_index.tolist()) == [0, 1, 2]
    paths[1].write_bytes(pictures.encoded_image(17, 16))
    message = (
        "example 1: image_hw is (17, 16), expected (16, 16) as planned; "
        "plan again (stored rows: into another folder), the source has changed"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        all_rows(packs, 0, 1)
    again = all_rows(EpochPacks(dataset, 32), 0, 0)
    assert [17, 16] in again.image_hw.tolist()


@pytest.mark.parametrize(("column", "kind"), [("auto", "int64"), ("n", "int32"), (None, None)])
def test_labels_of_any_column_or_none(column, kind):
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=["cat", "dog", "owl"]),
            "n": Value("int32"),
        }
    )
    columns = {
        "image": [{"bytes": image, "path": None} for image in IMAGES],
        "label": [row % 3 for row in range(9)],
        "n": [10 * row for row in range(9)],
    }
    whole = Dataset.from_dict(columns, features=features)
    # In several chunks, as a dataset of several files has.
    dataset = datasets.concatenate_datasets([whole.select(range(4)), whole.select(range(4, 9))])
    segments = all_rows(EpochPacks(dataset, 32, label_column=column), 0, 0)
    if column is None:
        assert "labels" not in segments.segments
        return
    assert str(segments.labels.type) == kind
    name = "label" if column == "auto" else column
    assert len(segments.labels) == 9
    assert segments.labels.to_pylist() == [columns[name][i] for i in segments.example_index]


def test_sequences_are_refused_by_their_name():
    texts = Dataset.from_dict({"input_ids": [[1, 2], [3]], "label": [0, 1]})
    message = (
        "columns of tokens is ['input_ids'], expected images; packpipe.pack packs sequences, and "
        "PackedLoader takes their rows"
    )
    for make in (lambda: EpochPacks(texts, 32), lambda: PackedStream(texts.to_iterable_dataset())):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            make()


def test_the_image_column_is_the_one_asked_for(source):
    two = source.add_column("bare", [IMAGES[1]] * len(source))
    message = (
        "image columns is ['image', 'bare'], expected exactly one, for image_column='auto'; "
        "pass image_column (--image-column)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        EpochPacks(two, 32)
    rows = all_rows(EpochPacks(two, 32, image_column="bare"), 0, 0)
    assert set(map(tuple, rows.image_hw.tolist())) == {SIZES[1]}


def test_sizes_from_columns_are_not_probed(source, monkeypatch):
    def no_sizes(*_, **__):
        raise AssertionError("probed")

    heights, widths = zip(*(SIZES * 3), strict=True)
    sized = source.add_column("h", list(heights)).add_column("w", list(widths))
    probed = all_rows(EpochPacks(sized, 32), 1, 1)
    monkeypatch.setattr(sizes_module, "kept_sizes", no_sizes)
    packs = EpochPacks(sized, 32, size_columns=("h", "w"))
    assert len(probed) > 1
    assert pictures.row_bytes(all_rows(packs, 1, 1)) == pictures.row_bytes(probed)


def test_a_pickled_copy_gives_the_same_packs(source, tmp_path):
    source.save_to_disk(tmp_path / "data")
    for dataset in (source, datasets.load_from_disk(tmp_path / "data")):
        packs = EpochPacks(dataset, 32, drop_rate=0.3, on_error="raise")
        wanted = pictures.row_bytes(all_rows(packs, 0, 0))
        copy = pickle.loads(pickle.dumps(packs))  # noqa: S301
        assert copy.fingerprint(Key(0, 0)) == packs.fingerprint(Key(0, 0))
        assert copy.config == packs.config
        assert pictures.row_bytes(all_rows(copy, 0, 0)) == wanted
        assert copy.fingerprint(Key(4, 4)) == packs.fingerprint(Key(4, 4))


def test_what_is_planned_elsewhere_needs_no_plan(source, monkeypatch):
    packs = EpochPacks(source, 32, drop_rate=0.3)
    wanted = [pictures.row_bytes(all_rows(packs, 0, epoch)) for epoch in range(2)]
    assert wanted[0] != wanted[1]
    numbers = [np.arange(packs.num_packs(Key(0, epoch))) for epoch in range(2)]
    planned = [packs.planned(Key(0, epoch), numbers[epoch]) for epoch in range(2)]
    assert "patches" not in planned[0].tokens
    sent = pickle.dumps((packs, planned))
    monkeypatch.setattr(epochs, "plan_epoch", None)
    copy, planned = pickle.loads(sent)  # noqa: S301
    for epoch in (1, 0):
        assert pictures.row_bytes(copy.rows(Key(0, epoch), planned[epoch])) == wanted[epoch]


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
            "option is 'patch', expected one of seq_len, patch_size, crop, resolution, max_tokens, "
            "max_upscale, drop_rate, epochs, fit_last, fit_limit, max_segments, strategy, "
            "window, background, reducing_gap, downscale_filter, upscale_filter, max_pixels, "
            "profiles, damaged_scans, value_range, views, views_together, jpeg_edges, "
            "prefix_tokens, pixels; "
            "check its spelling"
        ),
    ),
    (
        {"on_error": "drop"},
        ValueError,
        "on_error is 'drop', expected one of 'quarantine', 'raise'; choose what a bad image does",
    ),
    (
        {"num_workers": 0},
        ValueError,
        "num_workers is 0, expected an integer in 1..1024; None is one thread a processor",
    ),
    (
        {"num_workers": True},
        TypeError,
        "num_workers is True, expected an integer in 1..1024; None is one thread a processor",
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
        {"image_column": "img"},
        ValueError,
        (
            "image_column is 'img', expected one of ['image', 'label', 'n']; "
            "pass image_column (--image-column)"
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
        (
            "label_column is 'y', expected one of ['image', 'label', 'n'], 'auto' or None; "
            "check its spelling"
        ),
    ),
    (
        {"label_column": "image"},
        ValueError,
        (
            "features['image'] is Image(mode=None, decode=True), expected a ClassLabel, a "
            "Value or a list of numbers; pass another label_column, or None"
        ),
    ),
    (
        {"size_columns": ("h", "w")},
        ValueError,
        (
            "size_columns is 'h', expected one of ['image', 'label', 'n']; pass the names of "
            "the columns of heights and widths, or None to read headers"
        ),
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG_OPTIONS)
def test_wrong_options_are_refused(source, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        EpochPacks(source, **{"seq_len": 32, **options})


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (lambda source: datasets.DatasetDict(train=source), "DatasetDict"),
        (lambda source: source.to_iterable_dataset(), "IterableDataset"),
        (lambda source: source[:]["image"], "list"),
    ],
)
def test_what_is_no_dataset_is_refused(source, wrong, name):
    remedy = "pass one split, such as dataset['train']"
    if name == "IterableDataset":
        remedy = "packpipe.PackedStream packs what comes as a stream"
    message = f"type(dataset) is {name!r}, expected Dataset; {remedy}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        EpochPacks(wrong(source), 32)


def test_too_many_images_that_cannot_be_decoded_stop_the_training(truncated):
    packs = EpochPacks(truncated, 32, max_bad_fraction=0.1)
    message = r"rejected is 1 of 9 examples \(11\.11%\), expected at most 10\.00% "
    with pytest.raises(TooManyRejects, match=message):
        all_rows(packs, 0, 0)
