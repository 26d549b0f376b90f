"""StoredPacks: packed rows by number, in a new seeded order every epoch."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import naive
import numpy as np
import pictures
import pyarrow as pa
import pytest
import strategies
import torch
from datasets import List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

import packpipe
from packpipe.loading.loader import PackedLoader
from packpipe.loading.stored import StoredPacks
from packpipe.philox import Key
from packpipe.planning.image_config import PackConfig
from packpipe.rows import files
from packpipe.rows.rows import Rows

SEQ_LEN = 32
PATCH_BYTES = 8 * 8 * 3
ROW_BYTES = PackConfig(seq_len=SEQ_LEN, patch_size=8).row_bytes
ROW_ORDER = 2  # the stream of random words that orders rows
TOKENS = ("patches", "segment_ids", "coords")
COLUMNS = (*TOKENS, "seq_lens", "grid_hw", "image_hw", "example_index")


def packed_in(folder, seed=0, images=None, **options):
    """Packed rows, two a record batch and five a file."""
    images = pictures.encoded_images() * 2 if images is None else images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BATCH_BYTES", 2 * ROW_BYTES)
        patch.setattr(files, "FILE_BYTES", 5 * ROW_BYTES)
        source = pictures.dataset_of(images)
        options = {"seq_len": SEQ_LEN, "patch_size": 8, "progress": False, **options}
        return packpipe.pack(source, output=folder, seed=seed, **options)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    found = packed_in(tmp_path_factory.mktemp("stored") / "out")
    assert len(found) > 10
    assert len(found.data.to_batches()) > 5
    assert len(found.cache_files) > 2
    return found


@pytest.fixture(scope="module")
def variants(packed, tmp_path_factory):
    """Everything that holds packed rows: how it is stored, selected and joined."""
    folder = tmp_path_factory.mktemp("variants")
    other = packed_in(folder / "other", seed=1)
    lazy = packed_in(folder / "lazy", materialize=False)
    arrow = packed.with_format("arrow")[:]
    joined = datasets.concatenate_datasets([packed, other])
    picked = [9, 0, 4, 4, 7]
    found = {
        "dataset": packed,
        "part": packed.select(range(3, 9)),
        "selection": packed.select(picked),
        "shuffle": packed.shuffle(seed=3),
        "selection of a shuffle": packed.shuffle(seed=3).select(range(2, 8)),
        "joined": joined,
        "joined selections": datasets.concatenate_datasets(
            [packed.select(picked), other.select([2, 1])]
        ),
        "torch format": packed.with_format("torch"),
        "saved again": saved_again(packed, folder / "again"),
        "table": arrow,
        "table of batches": pa.Table.from_batches(packed.data.to_batches()),
        "part of a table": arrow.slice(3, 7),
        "part of a table of batches": pa.Table.from_batches(packed.data.to_batches()).slice(3, 6),
        "computed": lazy,
        "computed selection": lazy.select(picked),
        "computed part": lazy.select(range(1, 6)),
    }
    return {name: (rows, plain_rows(rows)) for name, rows in found.items()}


VARIANTS = [
    "dataset",
    "part",
    "selection",
    "shuffle",
    "selection of a shuffle",
    "joined",
    "joined selections",
    "torch format",
    "saved again",
    "table",
    "table of batches",
    "part of a table",
    "part of a table of batches",
    "computed",
    "computed selection",
    "computed part",
]


def saved_again(packed, folder):
    packed.save_to_disk(folder)
    return datasets.load_from_disk(folder)


def plain_rows(rows) -> list[dict[str, Any]]:
    """The rows as `datasets`, or Arrow, hands them out itself."""
    if isinstance(rows, pa.Table):
        found = rows.to_pylist()
    else:
        if rows.format["type"] != "custom":
            rows = rows.with_format(None)
        found = [rows[number] for number in range(len(rows))]
    return [{name: flat(row[name], name) for name in (*COLUMNS, "labels")} for row in found]


def plain(rows: Rows) -> list[dict[str, Any]]:
    """Rows in the same way."""
    segments = rows
    found = []
    for row in range(len(rows)):
        a, b = segments.offsets[row : row + 2].tolist()
        own = {name: getattr(rows, name)[row] for name in TOKENS}
        own |= {name: getattr(segments, name)[a:b] for name in COLUMNS[3:]}
        own["labels"] = segments.labels.to_pylist()[a:b]
        found.append({name: flat(value, name) for name, value in own.items()})
    return found


def flat(values, name) -> Any:
    """Values as integers in a list, or for the many of the tokens their bytes."""
    numbers = np.asarray(values, np.int64).reshape(-1)
    return numbers.tobytes() if name in TOKENS else numbers.tolist()


def by_examples(row) -> list[int]:
    return row["example_index"]


def test_the_variants_are_all_tested(variants):
    assert list(variants) == VARIANTS
    assert all(len(wanted) > 4 for _, wanted in variants.values())
    assert max(len(row["seq_lens"]) for row in variants["dataset"][1]) > 1


@pytest.mark.parametrize("name", VARIANTS)
@given(key=strategies.keys(), data=st.data())
@settings(max_examples=6)
def test_rows_are_those_at_the_places_of_the_seeded_order(variants, name, key, data):
    dataset, wanted = variants[name]
    packs = StoredPacks(dataset)
    assert packs.num_packs(Key(*key)) == len(wanted)
    order = naive.seeded_order(*key, range(len(wanted)), ROW_ORDER)
    places = data.draw(st.lists(st.integers(0, len(wanted) - 1), min_size=1, max_size=6))
    rows = packs.rows(Key(*key), np.array(places))
    assert plain(rows) == [wanted[order[place]] for place in places]
    tokens = [rows.patches, rows.segment_ids, rows.coords]
    assert [array.dtype for array in tokens] == [np.uint8, np.int32, np.int16]
    assert all(array.flags.writeable and array.flags.c_contiguous for array in tokens)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_comes_once_in_an_epoch(variants, name):
    dataset, wanted = variants[name]
    packs = StoredPacks(dataset)
    orders = []
    for epoch in range(3):
        found = plain(packs.rows(Key(4, epoch), np.arange(len(wanted))))
        assert sorted(found, key=by_examples) == sorted(wanted, key=by_examples)
        orders.append([row["example_index"] for row in found])
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_without_shuffle_the_rows_come_as_they_lie(variants, name):
    dataset, wanted = variants[name]
    packs = StoredPacks(dataset, shuffle=False)
    for key in [(0, 0), (5, 3)]:
        assert plain(packs.rows(Key(*key), np.arange(len(wanted)))) == wanted


@pytest.mark.parametrize("name", VARIANTS)
def test_no_rows_asked_for(variants, name):
    dataset, _ = variants[name]
    rows = StoredPacks(dataset).rows(Key(0, 0), np.empty(0, np.int64))
    assert len(rows) == 0
    assert rows.patches.shape == (0, SEQ_LEN, PATCH_BYTES)
    assert rows.segment_ids.shape == (0, SEQ_LEN)
    assert rows.coords.shape == (0, SEQ_LEN, 2)
    assert rows.labels.to_pylist() == []


@pytest.mark.parametrize("name", VARIANTS)
def test_work_is_the_sum_of_squares_in_the_order_of_the_epoch(variants, name):
    dataset, wanted = variants[name]
    packs = StoredPacks(dataset)
    by_row = [sum(length * length for length in row["seq_lens"]) for row in wanted]
    for key in [(0, 0), (7, 2)]:
        order = naive.seeded_order(*key, range(len(wanted)), ROW_ORDER)
        found = packs.work(Key(*key))
        assert found.dtype == np.int64
        assert found.tolist() == [by_row[row] for row in order]
    assert StoredPacks(dataset, shuffle=False).work(Key(0, 0)).tolist() == by_row


@pytest.mark.parametrize("name", ["dataset", "joined", "table of batches", "computed"])
def test_max_segments_is_that_of_the_fullest_row(variants, name):
    dataset, wanted = variants[name]
    most = max(len(row["seq_lens"]) for row in wanted)
    assert StoredPacks(dataset).max_segments == most > 1


def test_a_selection_keeps_the_max_segments_of_its_rows(variants):
    dataset, wanted = variants["selection"]
    most = StoredPacks(dataset).max_segments
    assert most >= max(len(row["seq_lens"]) for row in wanted)


def test_no_rows_at_all(packed):
    for none in (packed.select([]), packed.with_format("arrow")[:].slice(0, 0)):
        packs = StoredPacks(none)
        assert packs.num_packs(Key(0, 0)) == 0
        assert packs.max_segments == 1
        assert packs.work(Key(0, 0)).tolist() == []
        assert len(packs.rows(Key(0, 0), np.empty(0, np.int64))) == 0
        assert packs.fingerprint(Key(0, 0)) != StoredPacks(packed).fingerprint(Key(0, 0))


def test_rows_without_segments_are_rows(tmp_path):
    broken = pictures.encoded_image(90, 90, 2, "JPEG")[:-900]
    packed = packed_in(tmp_path / "out", images=[broken], max_bad_fraction=1.0)
    packs = StoredPacks(packed)
    assert packs.num_packs(Key(0, 0)) == packs.max_segments == 1
    rows = packs.rows(Key(0, 0), np.array([0]))
    assert rows.offsets.tolist() == [0, 0]
    assert not rows.segment_ids.any()
    assert packs.work(Key(0, 0)).tolist() == [0]


def fingerprint(dataset, **options):
    return StoredPacks(dataset, **options).fingerprint(Key(0, 0))


def test_the_fingerprint_tells_other_rows_another_order_and_shuffle_apart(packed, tmp_path):
    last = len(packed) - 1
    found = [
        fingerprint(packed),
        fingerprint(packed, shuffle=False),
        fingerprint(packed.select(range(last))),
        fingerprint(packed.select([*range(1, last + 1), 0])),
        fingerprint(packed.shuffle(seed=1)),
        fingerprint(packed.shuffle(seed=2)),
        fingerprint(datasets.concatenate_datasets([packed, packed])),
        fingerprint(packed_in(tmp_path / "order", seed=1)),
        fingerprint(packed_in(tmp_path / "options", max_tokens=9)),
        fingerprint(packed_in(tmp_path / "images", images=pictures.encoded_images())),
    ]
    assert len(set(found)) == len(found)
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in found)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # Two images of equal token counts; which is high and which is wide decides the coordinates.
        ({"sizes": [(16, 32), (32, 16)]}, {"sizes": [(32, 16), (16, 32)]}),
        ({"seq_len": 32}, {"seq_len": 48}),
    ],
    ids=["grids", "seq_len"],
)
def test_the_fingerprint_tells_other_shapes_apart(tmp_path, one, other):
    found = []
    for name, options in (("one", one), ("other", other)):
        options = {"sizes": [(16, 32), (32, 16)], "seq_len": 32, **options}
        images = [pictures.encoded_image(*size) for size in options.pop("sizes")]
        source = pictures.dataset_of(images)
        folder = tmp_path / name
        packed = packpipe.pack(source, output=folder, max_segments=1, progress=False, **options)
        assert [row["seq_lens"] for row in packed] == [[2], [2]]
        found.append(fingerprint(packed))
    assert found[0] != found[1]


def test_the_fingerprint_is_the_same_every_epoch_and_in_a_copy(packed):
    packs = StoredPacks(packed)
    found = {packs.fingerprint(Key(*key)) for key in [(0, 0), (0, 1), (9, 0)]}
    found.add(pickle.loads(pickle.dumps(packs)).fingerprint(Key(0, 0)))  # noqa: S301
    found.add(fingerprint(packed))
    assert len(found) == 1


OTHER_PROCESS = """
import sys, datasets
from packpipe.loading.stored import StoredPacks
from packpipe.philox import Key
print(StoredPacks(datasets.load_from_disk(sys.argv[1])).fingerprint(Key(0, 0)))
"""


def test_the_fingerprint_does_not_depend_on_folder_time_or_process(packed, tmp_path):
    built_again = packed_in(tmp_path / "again")
    assert fingerprint(built_again) == fingerprint(packed)
    folder = Path(packed.cache_files[0]["filename"]).parent
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    found = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "copy")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == fingerprint(packed)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("dataset", "table"),
        ("dataset", "table of batches"),
        ("dataset", "saved again"),
        ("dataset", "computed"),
        ("dataset", "torch format"),
        ("part", "copied part"),
        ("selection", "copied selection"),
        ("shuffle", "copied shuffle"),
    ],
)
def test_the_fingerprint_does_not_depend_on_how_the_rows_are_stored(variants, one, other):
    copied = {
        f"copied {name}": (variants[name][0].flatten_indices(), variants[name][1])
        for name in ("part", "selection", "shuffle")
    }
    (first, wanted), (second, found) = ({**variants, **copied}[name] for name in (one, other))
    assert found == wanted
    assert fingerprint(first) == fingerprint(second)


def test_a_pickled_copy_gives_the_same_rows_and_carries_no_pixels(packed):
    packs = StoredPacks(packed)
    places = np.arange(len(packed))
    wanted = pictures.row_bytes(packs.rows(Key(1, 2), places))  # what is cached does not travel
    pickled = pickle.dumps(packs)
    assert len(pickled) < ROW_BYTES < len(packed) * ROW_BYTES
    copy = pickle.loads(pickled)  # noqa: S301
    assert pictures.row_bytes(copy.rows(Key(1, 2), places)) == wanted
    as_they_lie = pickle.loads(pickle.dumps(StoredPacks(packed, shuffle=False)))  # noqa: S301
    assert as_they_lie.order(Key(1, 2)).tolist() == places.tolist()
    assert packs.order(Key(1, 2)).tolist() != places.tolist()


def test_threads_may_read_several_epochs_at_once(packed):
    packs, places = StoredPacks(packed), np.arange(len(packed))
    keys = [(seed, epoch) for seed in range(3) for epoch in range(3)] * 4
    wanted = {key: StoredPacks(packed).order(Key(*key)).tolist() for key in keys}
    assert len({tuple(order) for order in wanted.values()}) == 9
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda key: packs.rows(Key(*key), places), keys))
            orders = list(threads.map(lambda key: packs.order(Key(*key)).tolist(), keys * 30))
    finally:
        sys.setswitchinterval(interval)
    assert orders == [wanted[key] for key in keys * 30]
    as_they_lie = packpipe.read_rows(packed)
    by_row = np.split(as_they_lie.example_index, as_they_lie.offsets[1:-1])
    for key, rows in zip(keys, found, strict=True):
        assert rows.example_index.tolist() == [
            example for row in wanted[key] for example in by_row[row].tolist()
        ]


NO_TOKENS = "column {!r} is {!r}, expected fixed_size_list<{}>; read rows that packpipe has written"
NO_DATASET = (
    "type(dataset) is {!r}, expected Dataset or pyarrow.Table; pass packed rows, one split of them"
)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda packed: [packed], TypeError, NO_DATASET.format("list")),
        (
            lambda packed: datasets.DatasetDict(train=packed),
            TypeError,
            NO_DATASET.format("DatasetDict"),
        ),
        (
            lambda packed: packed.to_iterable_dataset(),
            TypeError,
            NO_DATASET.format("IterableDataset"),
        ),
        (
            lambda packed: packed.remove_columns("coords"),
            ValueError,
            NO_TOKENS.format("coords", "missing", "int16"),
        ),
        (
            lambda _: pa.table({"patches": [1, 2]}),
            ValueError,
            NO_TOKENS.format("patches", "int64", "uint8"),
        ),
        (
            lambda _: pictures.dataset_of(pictures.encoded_images()),
            ValueError,
            NO_TOKENS.format("patches", "missing", "uint8"),
        ),
    ],
    ids=["list", "splits", "stream", "column", "table", "images"],
)
def test_what_holds_no_packed_rows_is_refused(packed, wrong, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        StoredPacks(wrong(packed))


@pytest.mark.parametrize("of_tokens", [False, True])
def test_columns_that_somebody_has_added_are_left_alone(packed, tmp_path, of_tokens):
    if of_tokens:
        lists = [[1] * n for n in (3, 5, 2, 8, 1)]
        source = datasets.Dataset.from_dict({"input_ids": lists, "label": list(range(5))})
        packed = packpipe.pack(source, 8, output=tmp_path / "a", progress=False)
    rows = len(packed)
    table = packed.data.table
    for name, column in {
        "weight": pa.array(range(rows)),
        "note": pa.array(["text"] * rows),
        "tags": pa.array([[row] for row in range(rows)]),
        "triple": pa.array([[1.0, 2.0, 3.0]] * rows, pa.list_(pa.float32(), 3)),
    }.items():
        table = table.append_column(name, column)
    found, wanted = packpipe.read_rows(table), packpipe.read_rows(packed)
    for columns, others in ((found.segments, wanted.segments), (found.tokens, wanted.tokens)):
        assert columns.keys() - others.keys() <= {"tags"}  # as many as segments, by chance
        assert all(np.array_equal(columns[name], others[name]) for name in others)
    loaded, plain_ones = (list(PackedLoader(one, 1)) for one in (table, packed))
    assert len(loaded) == len(plain_ones) == rows
    for one, other in zip(loaded, plain_ones, strict=True):
        assert torch.equal(one.example_index, other.example_index)


@pytest.mark.parametrize(
    "columns",
    [
        {"input_ids": [[1, 2, 3], [4, 5], [6]], "grid_hw": ["a", "b", None]},
        {"input_ids": [[1, 2, 3], [4, 5], [6]], "image_hw": [7, 8, 9]},
        {"patches": [[1, 2, 3], [4, 5], [6]], "coords": [[7, 8, 9], [1, 2], [3]]},
    ],
)
def test_columns_of_tokens_may_have_the_names_of_images(columns, tmp_path):
    source = datasets.Dataset.from_dict(columns)
    packed = packpipe.pack(source, 4, output=tmp_path / "a", progress=False)
    rows = packpipe.read_rows(packed)
    assert rows.of_tokens
    for name, values in columns.items():
        if isinstance(values[0], list):
            held = rows.tokens[name][rows.segment_ids > 0].tolist()
            assert held == [v for i in rows.example_index.tolist() for v in values[i]]
        else:
            expected = [values[i] for i in rows.example_index.tolist()]
            assert rows.segments[name].to_pylist() == expected
    loader = PackedLoader(packed, 1)
    assert isinstance(next(iter(loader)), packpipe.TokenBatch)
    loader.state_dict()
    found = packpipe.summarize(tmp_path / "a")
    assert (found.unit, found.image_hw) == ("sequence", None)
    assert packpipe.verify(tmp_path / "a", source) == []


def whole_rows(tmp_path) -> datasets.Dataset:
    """Return rows of one or two sequences each."""
    lists = [[1] * 8, [2] * 3, [3] * 5, [4] * 8, [5] * 2, [6] * 6]
    source = datasets.Dataset.from_dict({"input_ids": lists, "score": [1] * 6})
    return packpipe.pack(source, 8, output=tmp_path / "packed", progress=False)


def of_images(tmp_path, **options) -> datasets.Dataset:
    source = pictures.dataset_of(pictures.encoded_images())
    options = {"num_workers": 0, "progress": False, **options}
    return packpipe.pack(source, 16, output=tmp_path / "packed", **options)


ADDED = {
    "number": (lambda _: 1, None),
    "number or null": (lambda row: None if row else 1, None),
    "text": (lambda _: "a", None),
    "nothing": (lambda _: None, None),
    "lists": (lambda row: [1] * (row + 1), None),
    "a list or null": (lambda row: None if row else [1], None),
    "texts": (lambda row: ["a"] * (row + 1), None),
    "empty lists": (lambda _: [], None),
    "a struct": (lambda _: {"a": 1}, None),
    "as many as tokens": (lambda _: [1] * 8, None),
    "texts of tokens": (lambda _: ["a"] * 8, List(Value("string"), length=8)),
    "lists of tokens": (lambda _: [[1]] * 8, List(List(Value("int8")), length=8)),
    "times of tokens": (lambda _: [0] * 8, List(Value("timestamp[s]"), length=8)),
    "null or numbers of tokens": (
        lambda row: None if row else [1] * 8,
        List(Value("int8"), length=8),
    ),
    "numbers or null of tokens": (
        lambda row: [None if row else 1] * 8,
        List(Value("int8"), length=8),
    ),
    "large lists": (lambda _: [1], datasets.LargeList(Value("int8"))),
}


@pytest.mark.parametrize("kind", ["tokens", "images", "computed"])
@pytest.mark.parametrize(("value", "feature"), ADDED.values(), ids=ADDED)
def test_rows_with_a_column_added_by_map_are_loaded(tmp_path, kind, value, feature):
    packed = (
        whole_rows(tmp_path)
        if kind == "tokens"
        else of_images(tmp_path, materialize=kind == "images")
    )
    features = None if feature is None else datasets.Features({**packed.features, "x": feature})
    more = packed.map(lambda _, row: {"x": value(row)}, with_indices=True, features=features)
    assert "x" in more.column_names
    found, wanted = (list(PackedLoader(one, 1, rank=0, world_size=1)) for one in (more, packed))
    assert len(found) > 2
    for one, other in zip(found, wanted, strict=True):
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert more[0].keys() == packed[0].keys() | {"x"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("segment_ids", lambda values: [None] * len(values)),
        ("fragment", lambda values: values[:-1]),
        ("example_index", lambda values: [*values, 0]),
    ],
)
def test_a_column_of_packpipe_s_own_that_was_changed_is_named(tmp_path, name, change):
    def first_changed(row, number):
        return {name: row[name] if number else change(row[name])}

    rows = whole_rows(tmp_path).map(first_changed, with_indices=True)
    message = f"column '{name}' is 'incomplete', expected a number for every token, or for every"
    with pytest.raises(ValueError, match=message):
        next(iter(PackedLoader(rows, 1)))
    with pytest.raises(ValueError, match=message):
        packpipe.read_rows(rows)


def test_a_column_of_the_source_that_lost_values_is_logged(tmp_path, caplog):
    rows = whole_rows(tmp_path)
    lost = rows.map(
        lambda row, number: {"input_ids": row["input_ids"] if number else [None] * 8},
        with_indices=True,
    )
    assert "input_ids" not in next(iter(PackedLoader(lost, 1)))
    assert "batches do not show ['input_ids'], which some row has no value of" in caplog.text


def test_values_of_tokens_or_segments_added_by_map_reach_the_batch(tmp_path):
    packed = whole_rows(tmp_path)
    features = datasets.Features(
        {
            **packed.features,
            "of_tokens": List(Value("bool"), length=8),
            "of_all": List(Value("int8")),
        }
    )
    more = packed.map(
        lambda row: {"of_tokens": [True] * 8, "of_all": row["example_index"]}, features=features
    )
    for batch in PackedLoader(more, 1, rank=0, world_size=1):
        assert batch.tokens["of_tokens"].all()
        present = batch.present
        assert batch.segments["of_all"][present].tolist() == batch.example_index[present].tolist()


def test_lists_that_fit_some_rows_by_chance_are_in_no_batch(tmp_path):
    packed = whole_rows(tmp_path).map(lambda _: {"x": [1]})
    # A record batch a row: rows of one segment would have x, those of two not.
    table = pa.concat_tables([packed.data.table.slice(row, 1) for row in range(len(packed))])
    assert {len(lens) for lens in table["seq_lens"].to_pylist()} == {1, 2}
    for size in (1, 2):
        batches = list(PackedLoader(table, size, rank=0, world_size=1, tail="pad"))
        assert all(list(batch) == list(batches[0]) and "x" not in batch for batch in batches)


@pytest.mark.parametrize("labels", [lambda _: 1, lambda _: [1], lambda _: [1] * 99])
def test_labels_of_images_that_are_not_one_a_segment_are_refused(tmp_path, labels):
    packed = of_images(tmp_path).map(lambda row: {"labels": labels(row)})
    message = (
        "^column 'labels' is '.*', expected one value a segment; add lists as long as seq_lens"
    )
    with pytest.raises(ValueError, match=message):
        PackedLoader(packed, 1, rank=0, world_size=1)


def test_rows_to_be_computed_say_so_when_their_folder_is_opened(tmp_path):
    of_images(tmp_path, materialize=False)
    reopened = datasets.load_from_disk(str(tmp_path / "packed"))
    message = (
        "rows is 'packed with materialize=False', expected rows with patches; "
        "open them by the call of pack that wrote them, which computes their patches"
    )
    for read in (packpipe.read_rows, lambda rows: PackedLoader(rows, 1)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            read(reopened)
