"""`Packer` inside ``Dataset.map``."""

import logging
import re
import subprocess
import sys

import naive
import numpy as np
import pictures
import pytest
from datasets import ClassLabel, List

import packpipe
from packpipe.planning.image_config import PackConfig


@pytest.fixture(scope="module")
def source():
    return pictures.dataset_of(pictures.encoded_images())


def mapped(source, packer, **options):
    return source.map(
        packer,
        batched=True,
        remove_columns=source.column_names,
        load_from_cache_file=False,
        **options,
    )


def test_one_batch_gives_the_rows_pack_gives(source, tmp_path):
    packed = packpipe.pack(source, 48, output=tmp_path / "out", progress=False)
    through_map = mapped(source, packpipe.Packer(seq_len=48), with_indices=True)
    assert through_map.features == packed.features
    assert through_map.features["labels"] == List(ClassLabel(names=["cat", "dog", "owl"]))
    assert pictures.row_bytes(packpipe.read_rows(through_map)) == pictures.row_bytes(
        packpipe.read_rows(packed)
    )


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_every_image_is_in_exactly_one_row_whatever_the_batches(source, batch_size, num_proc):
    packer = packpipe.Packer(seq_len=48)
    rows = packpipe.read_rows(
        mapped(source, packer, with_indices=True, batch_size=batch_size, num_proc=num_proc)
    )
    index = rows.segments.example_index
    assert sorted(index.tolist()) == list(range(len(source)))
    assert [tuple(hw) for hw in rows.segments.image_hw] == [pictures.SIZES[i] for i in index]
    assert rows.segments.labels.to_pylist() == [i % 3 for i in index.tolist()]


def test_a_sliced_source_loses_no_token(source):
    part = source.select(range(3, 8))
    rows = packpipe.read_rows(mapped(part, packpipe.Packer(seq_len=48), with_indices=True))
    sizes = np.array(pictures.SIZES)[3:8][rows.segments.example_index]
    assert rows.segments.image_hw.tolist() == sizes.tolist()
    wanted = packpipe.plan_epoch(pictures.SIZES[3:8], PackConfig(seq_len=48)).num_tokens
    assert int((rows.segment_ids > 0).sum()) == wanted


def test_without_indices_the_source_row_is_unknown_not_wrong(source):
    rows = packpipe.read_rows(mapped(source, packpipe.Packer(seq_len=48)))
    assert set(rows.segments.example_index.tolist()) == {-1}


DRAWS = {
    "resolution": packpipe.Side(packpipe.Uniform(20, 90)),
    "drop_rate": packpipe.Uniform(0.1, 0.6),
    "seed": 5,
    "epoch": 2,
}


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_images_draw_by_their_source_row_whatever_the_batch(batch_size):
    # All of one size, so that only their draws tell them apart.
    same = pictures.dataset_of([pictures.encoded_image(64, 48, seed) for seed in range(7)])
    packer = packpipe.Packer(seq_len=48, **DRAWS)
    rows = packpipe.read_rows(mapped(same, packer, with_indices=True, batch_size=batch_size))
    segments = rows.segments
    decided = [naive.decide(64, 48, packer.config, 5, 2, row) for row in range(7)]
    assert len(set(decided)) > 4
    found = {
        row: (tuple(grid), keep)
        for row, grid, keep in zip(
            segments.example_index.tolist(),
            segments.grid_hw.tolist(),
            segments.seq_lens.tolist(),
            strict=True,
        )
    }
    assert found == {row: decided[row][:2] for row in range(7)}
    places = [row for row in range(len(rows)) for _ in np.unique(rows.segment_ids[row])[1:]]
    numbers = [n for row in range(len(rows)) for n in np.unique(rows.segment_ids[row])[1:]]
    for place, number, row in zip(places, numbers, segments.example_index.tolist(), strict=True):
        (height, width), keep, _ = decided[row]
        tokens = naive.subset(5, 2, row, 8, height * width, keep)
        coords = rows.coords[place][rows.segment_ids[place] == number]
        assert coords.tolist() == [list(divmod(token, width)) for token in tokens]


NEEDS_ROWS = (
    "with_indices is False, expected True for options that draw, since every image draws by its "
    "row; use map(packer, batched=True, with_indices=True)"
)


@pytest.mark.parametrize(
    "options",
    [
        {"drop_rate": 0.5},
        {"drop_rate": packpipe.Uniform(0, 0.5)},
        {"resolution": packpipe.Side(packpipe.Uniform(64, 256))},
        {"resolution": packpipe.Budget([64, 256])},
    ],
    ids=str,
)
def test_options_that_draw_are_refused_without_indices(source, options):
    with pytest.raises(ValueError, match=f"^{re.escape(NEEDS_ROWS)}$"):
        mapped(source, packpipe.Packer(seq_len=48, **options))


@pytest.mark.parametrize(
    "options", [{"resolution": "budget"}, {"fit_last": "resolution"}, {"max_upscale": 0.5}], ids=str
)
def test_options_that_do_not_draw_need_no_indices(source, options):
    rows = packpipe.read_rows(mapped(source, packpipe.Packer(seq_len=48, **options)))
    assert len(rows.segments.example_index) == len(source)


def test_bad_images_leave_the_draws_of_the_others_alone():
    images = [b"junk", *pictures.encoded_images()]
    packer = packpipe.Packer(seq_len=48, on_error="drop", **DRAWS)
    rows = packpipe.read_rows(mapped(pictures.dataset_of(images), packer, with_indices=True))
    index = rows.segments.example_index.tolist()
    assert sorted(index) == list(range(1, 10))
    for row, grid in zip(index, rows.segments.grid_hw.tolist(), strict=True):
        wanted, _, _ = naive.decide(*pictures.SIZES[row - 1], packer.config, 5, 2, row)
        assert tuple(grid) == wanted


def test_a_bad_image_stops_the_map_and_is_named():
    images = [*pictures.encoded_images(), b"junk"]
    message = "example 9 is bad (unreadable: UnidentifiedImageError: "
    remedy = "pass on_error='drop', or use packpipe.pack, which keeps a rejects table"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        mapped(pictures.dataset_of(images), packpipe.Packer(seq_len=48), with_indices=True)
    assert str(caught.value).endswith(remedy)


def test_dropped_images_are_logged(caplog):
    images = [b"junk", *pictures.encoded_images(), pictures.encoded_image(33, 33, 1, "JPEG")[:-400]]
    packer = packpipe.Packer(seq_len=48, on_error="drop")
    with caplog.at_level(logging.WARNING, logger="packpipe"):
        rows = packpipe.read_rows(mapped(pictures.dataset_of(images), packer, with_indices=True))
    assert sorted(rows.segments.example_index.tolist()) == list(range(1, 10))
    assert "example 0 is bad (unreadable: " in caplog.text
    assert "example 10 is bad (undecodable: " in caplog.text


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_every_process():
    command = (
        "import packpipe; from datasets.fingerprint import Hasher;"
        "packer = packpipe.Packer(seq_len=64, patch_size=8); packer.config;"
        "packpipe.plan_epoch([[8, 8]], packer.config);"  # a used kernel must not matter
        "print(Hasher.hash(packer))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(seen) == 1
    assert len(seen.pop()) > 8


def test_another_configuration_has_another_fingerprint():
    from datasets.fingerprint import Hasher

    hashes = {Hasher.hash(packpipe.Packer(seq_len=n, seed=s)) for n in (32, 64) for s in (0, 1)}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len is 0, expected an integer in 1..32767; "),
        ({"on_error": "quarantine"}, "on_error is 'quarantine', expected one of 'raise', 'drop'; "),
        ({"epoch": 2**64}, "epoch is 18446744073709551616, expected an integer in 0..184467440737"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        packpipe.Packer(**options)


def test_a_formatted_dataset_is_refused_with_its_remedy():
    message = (
        "type(batch) is 'dict', expected LazyBatch, as Dataset.map passes it; "
        "use map(packer, batched=True) on dataset.with_format(None)"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        packpipe.Packer()({"image": []})


def test_a_map_without_batches_is_refused(source):
    message = (
        "type(batch) is 'LazyRow', expected LazyBatch, as Dataset.map passes it; use map(packer, "
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        source.map(packpipe.Packer(), remove_columns=source.column_names)
