"""`Packer` inside ``Dataset.map``, and on batches of others."""

import logging
import re
import subprocess
import sys
from itertools import chain

import naive
import numpy as np
import pictures
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, List
from datasets.fingerprint import Hasher

import packpipe
from packpipe.planning.image_config import PackConfig
from packpipe.rows import text


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
    index = rows.example_index
    assert sorted(index.tolist()) == list(range(len(source)))
    assert [tuple(hw) for hw in rows.image_hw] == [pictures.SIZES[i] for i in index]
    assert rows.labels.to_pylist() == [i % 3 for i in index.tolist()]


def test_a_sliced_source_loses_no_token(source):
    part = source.select(range(3, 8))
    rows = packpipe.read_rows(mapped(part, packpipe.Packer(seq_len=48), with_indices=True))
    sizes = np.array(pictures.SIZES)[3:8][rows.example_index]
    assert rows.image_hw.tolist() == sizes.tolist()
    wanted = packpipe.plan_epoch(pictures.SIZES[3:8], PackConfig(seq_len=48)).quality.num_tokens
    assert int((rows.segment_ids > 0).sum()) == wanted


def test_without_indices_the_source_row_is_unknown_not_wrong(source):
    rows = packpipe.read_rows(mapped(source, packpipe.Packer(seq_len=48)))
    assert set(rows.example_index.tolist()) == {-1}


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
    segments = rows
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
    assert len(rows.example_index) == len(source)


@pytest.mark.parametrize("name", ["weight_column", "mask_column", "target_stride"])
def test_options_of_pack_and_epoch_packs_alone_say_where_they_are_known(name, source):
    message = (
        f"^option is '{name}', expected left out here, where rows have neither weights nor "
        "targets; use packpipe.pack or EpochPacks$"
    )
    with pytest.raises(TypeError, match=message):
        packpipe.Packer(seq_len=48, **{name: "mask"})
    with pytest.raises(TypeError, match=message):
        packpipe.PackedStream(source.to_iterable_dataset(), 48, **{name: "mask"})


def test_bad_images_leave_the_draws_of_the_others_alone():
    images = [b"junk", *pictures.encoded_images()]
    packer = packpipe.Packer(seq_len=48, on_error="drop", **DRAWS)
    rows = packpipe.read_rows(mapped(pictures.dataset_of(images), packer, with_indices=True))
    index = rows.example_index.tolist()
    assert sorted(index) == list(range(1, 10))
    for row, grid in zip(index, rows.grid_hw.tolist(), strict=True):
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
    assert sorted(rows.example_index.tolist()) == list(range(1, 10))
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
    run = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    own = Hasher.hash(packpipe.Packer(seq_len=64, patch_size=8))
    assert run.stdout.strip() == own
    assert len(own) > 8


def test_another_configuration_has_another_fingerprint():
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


def test_a_map_without_batches_is_refused(source):
    message = (
        "type(batch) is 'LazyRow', expected a batch of Dataset.map, Arrow's table, or a dict of "
        "columns; use map(packer, batched=True)"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        source.map(packpipe.Packer(), remove_columns=source.column_names)


TOKENS = {
    "input_ids": [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10], [11] * 5],
    "attention_mask": [[1] * n for n in (3, 1, 4, 2, 5)],
    "name": ["a", "b", "c", "d", "e"],
}
BATCHES = {
    "table": lambda table: table,
    "record batch": lambda table: table.combine_chunks().to_batches()[0],
    "chunked table": lambda table: pa.concat_tables([table.slice(0, 2), table.slice(2)]),
    "lists": lambda table: table.to_pydict(),
    # What Ray Data hands to map_batches by default.
    "arrays": lambda table: {
        name: np.array([*map(np.asarray, column), None], object)[:-1]
        if isinstance(column[0], list)
        else np.array(column)
        for name, column in table.to_pydict().items()
    },
}


@pytest.mark.parametrize("form", BATCHES)
def test_token_batches_of_any_form_give_the_rows_of_map(form):
    dataset = Dataset.from_dict(TOKENS)
    wanted = mapped(dataset, packpipe.Packer(seq_len=8), with_indices=True)
    found = packpipe.Packer(seq_len=8)(BATCHES[form](dataset.data.table), list(range(5)))
    assert found.to_pydict() == wanted.to_dict()
    unknown = packpipe.Packer(seq_len=8)(BATCHES[form](dataset.data.table))
    assert {i for row in unknown.to_pydict()["example_index"] for i in row} == {-1}
    assert found.drop_columns("example_index").equals(unknown.drop_columns("example_index"))


@pytest.mark.parametrize("form", ["table", "record batch", "chunked table"])
@pytest.mark.parametrize("described", [True, False])
def test_image_tables_give_the_rows_of_map_with_or_without_what_datasets_knows(
    source, form, described
):
    wanted = mapped(source, packpipe.Packer(seq_len=48), with_indices=True)
    table = source.data.table.replace_schema_metadata(None) if not described else source.data.table
    numbers = np.arange(len(source))
    found = packpipe.Packer(seq_len=48)(BATCHES[form](table), numbers)
    assert pictures.row_bytes(packpipe.read_rows(found)) == pictures.row_bytes(
        packpipe.read_rows(wanted)
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_])
def test_batches_of_pixels_are_packed(dtype):
    pixels = np.random.default_rng(0).integers(0, 2, (5, 32, 48, 3)).astype(dtype)
    rows = packpipe.read_rows(packpipe.Packer(seq_len=12)({"image": pixels, "label": range(5)}))
    assert len(rows) == 3
    assert sorted(rows.labels.to_pylist()) == [0, 1, 2, 3, 4]
    place = dict(zip(rows.labels.to_pylist(), range(5), strict=True))[3]
    row = int(np.searchsorted(rows.offsets, place, "right")) - 1
    tokens = rows.segment_ids[row] == place - rows.offsets[row] + 1
    wanted = naive.patchify(pixels[3].astype(np.uint8) * (255 if dtype is np.bool_ else 1), 16)
    assert (rows.patches[row, tokens] == wanted).all()


def test_map_in_arrows_format_gives_the_same_rows(source):
    wanted = mapped(source, packpipe.Packer(seq_len=48), with_indices=True)
    found = mapped(source.with_format("arrow"), packpipe.Packer(seq_len=48), with_indices=True)
    assert pictures.row_bytes(packpipe.read_rows(found.with_format(None))) == pictures.row_bytes(
        packpipe.read_rows(wanted)
    )


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow", "pandas"])
def test_map_in_any_format_gives_the_same_rows_of_tokens(kind):
    dataset = Dataset.from_dict(TOKENS)
    wanted = mapped(dataset, packpipe.Packer(seq_len=8), with_indices=True)
    found = mapped(dataset.with_format(kind), packpipe.Packer(seq_len=8), with_indices=True)
    assert found.with_format(None).to_dict() == wanted.to_dict()


@pytest.mark.parametrize("layout", ["ragged", "fixed"])
def test_a_batch_beyond_32_bit_offsets_is_a_table_of_several_chunks(layout, monkeypatch):
    table = Dataset.from_dict(TOKENS).data.table
    packer = packpipe.Packer(seq_len=8, layout=layout)
    wanted, unknown = packer(table, list(range(5))), packer(table)
    assert wanted.column(0).num_chunks == unknown.column(0).num_chunks == 1
    monkeypatch.setattr(text, "MOST", 8 if layout == "ragged" else 3)
    found = packer(table, list(range(5)))
    assert found.column(0).num_chunks > 1
    assert found.equals(wanted)
    assert packer(table).equals(unknown)
    # An iterator gives each chunk as a batch, since no batch could hold them all.
    batches = list(packer(iter(table.to_batches())))
    assert len(batches) == found.column(0).num_chunks
    assert pa.Table.from_batches(batches).cast(unknown.schema).equals(unknown)
    message = (
        "batch is 'of 2 GiB or more', expected 2 GiB at most in a column, which map writes whole; "
        "lower map's batch_size, or use packpipe.pack"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mapped(Dataset.from_dict(TOKENS), packer)


def test_map_in_numpys_format_packs_the_pixels_that_datasets_has_decoded():
    plain = pictures.dataset_of([pictures.encoded_image(40, 30, seed) for seed in range(4)])
    wanted = packpipe.read_rows(mapped(plain, packpipe.Packer(seq_len=48), with_indices=True))
    found = mapped(plain.with_format("numpy"), packpipe.Packer(seq_len=48), with_indices=True)
    assert pictures.row_bytes(packpipe.read_rows(found.with_format(None))) == pictures.row_bytes(
        wanted
    )


def test_an_iterator_of_record_batches_gives_record_batches_one_after_the_other():
    # What Spark's mapInArrow asks of a function.
    table = Dataset.from_dict(TOKENS).data.table.combine_chunks()
    read = []

    def batches():
        for batch in table.to_batches(max_chunksize=2):
            read.append(batch.num_rows)
            yield batch

    found = packpipe.Packer(seq_len=8)(batches())
    assert read == []
    first = next(found)
    assert read == [2]
    rows = [first, *found]
    assert read == [2, 2, 1]
    assert all(isinstance(batch, pa.RecordBatch) for batch in rows)
    assert all(batch.schema == first.schema for batch in rows)
    held = pa.Table.from_batches(rows).to_pydict()
    assert sorted(chain(*held["name"])) == TOKENS["name"]
    assert sum(chain(*held["seq_lens"])) == 15


def test_an_iterator_gives_only_types_that_spark_has_and_they_are_cast_back(source):
    table = source.data.table
    packer = packpipe.Packer(seq_len=48)
    (rows,) = packer(iter(table.combine_chunks().to_batches()))
    assert str(rows.schema.field("patches").type) == "list<item: int16>"
    assert str(rows.schema.field("grid_hw").type) == "list<item: list<item: int16>>"
    wanted = packer(table)
    assert pa.Table.from_batches([rows]).cast(wanted.schema).equals(wanted)


def test_dicts_of_bytes_without_paths_are_encoded_images(source):
    # Ray Data's batches of NumPy arrays: objects, each a dict.
    table = source.data.table
    assert not any(image["path"] for image in table["image"].to_pylist())
    batch = {"image": np.array(table["image"].to_pylist(), object), "label": table["label"]}
    found = packpipe.Packer(seq_len=48)(batch)
    assert found.to_pydict() == packpipe.Packer(seq_len=48)(table).to_pydict()


def test_tensors_of_arrow_are_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3)).astype(np.uint8)
    chunks = [
        pa.FixedShapeTensorArray.from_numpy_ndarray(some) for some in (pixels[:2], pixels[2:])
    ]
    table = pa.table({"image": pa.chunked_array(chunks), "label": range(5)})
    wanted = packpipe.Packer(seq_len=12)({"image": pixels, "label": range(5)})
    assert packpipe.Packer(seq_len=12)(table).equals(wanted)
    kind = chunks[0].type
    nulls = pa.ExtensionArray.from_storage(kind, pa.array([None], kind.storage_type))
    table = pa.table({"image": pa.chunked_array([nulls, *chunks]), "label": [9, *range(5)]})
    packer = packpipe.Packer(seq_len=12, on_error="drop")
    wanted = packer({"image": [None, *pixels], "label": [9, *range(5)]})
    assert packer(table).equals(wanted)
    assert sum(map(len, wanted["labels"].to_pylist())) == 5
    with pytest.raises(
        ValueError, match=r"^example 0 of the batch .*; pass on_error='drop', or use"
    ):
        packpipe.Packer(seq_len=12)(table)


MIXED = {
    "dimensions": [np.zeros((16, 16), np.uint8), np.zeros((16, 16, 3), np.uint8)],
    "dtypes": [np.zeros((16, 16), np.uint8), np.zeros((16, 16), np.uint16)],
    "no image": [np.zeros((16, 16), np.uint8), np.uint8(3)],
    "nothing Arrow knows": [object(), object()],
}


@pytest.mark.parametrize("images", MIXED.values(), ids=MIXED)
def test_a_column_of_several_kinds_of_arrays_is_refused_not_guessed(images):
    with pytest.raises(
        ValueError, match=r"^batch\['image'\] is .*, expected arrays of one kind, or"
    ):
        packpipe.Packer(seq_len=4)({"image": images})


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"^batch is .*length.*, expected arrays of one kind, or"):
        packpipe.Packer(seq_len=4)({"input_ids": [[1], [2]], "label": [1]})


def test_a_missing_array_is_a_reject_and_an_empty_list_no_other_type():
    images = [np.full((16, 16, 3), 9, np.uint8), None, np.full((16, 16, 3), 7, np.uint8)]
    rows = packpipe.read_rows(packpipe.Packer(4, on_error="drop")({"image": images}, range(3)))
    assert sorted(rows.example_index.tolist()) == [0, 2]
    lists = [np.array([], np.float64), np.array([1, 2], np.int16), np.array([3], np.int16)]
    found = packpipe.Packer(4, on_error="drop")({"input_ids": lists})
    assert found.schema.field("input_ids").type.value_type == pa.int16()
    assert sorted(chain(*found.to_pydict()["seq_lens"])) == [1, 2]


def test_torchs_format_may_hold_numbers_beside_the_tokens():
    dataset = Dataset.from_dict({**TOKENS, "label": [3, 1, 4, 1, 5]})
    wanted = mapped(dataset, packpipe.Packer(seq_len=8), with_indices=True)
    found = mapped(dataset.with_format("torch"), packpipe.Packer(seq_len=8), with_indices=True)
    assert found.with_format(None).to_dict() == wanted.to_dict()


@pytest.mark.parametrize("batch", [[1, 2], "text", None])
def test_what_is_no_batch_is_refused(batch):
    message = f"type(batch) is {type(batch).__name__!r}, expected a batch of Dataset.map, Arrow's"
    with pytest.raises(TypeError, match=re.escape(message)):
        packpipe.Packer(seq_len=8)(batch)
