"""Lists of numbers as labels: from the source into rows, batches, states and rejects."""

import math
import re

import datasets
import numpy as np
import pictures
import pyarrow as pa
import pytest
from datasets import Features, Image, List, Value

import packpipe
from packpipe import EpochPacks, PackedLoader, PackedStream
from packpipe.loading.batch import PackedBatch
from packpipe.rows.rejects import TooManyRejects

NAN = float("nan")
LABELS = [[0.0, 1.0, 0.5], [NAN, 1.0, None], None, [0.25, 0.5, 0.25], [1.0, 0.0, 0.0]]
WANTED = np.array([one or [NAN] * 3 for one in LABELS], np.float32)


def source_of(labels=LABELS, feature=None, name="labels"):
    encoded = pictures.encoded_images()[: len(labels)]
    images = [{"bytes": one, "path": None} for one in encoded]
    features = Features({"image": Image(), name: feature or List(Value("float64"))})
    return datasets.Dataset.from_dict({"image": images, name: labels}, features=features)


def labels_by_example(batches):
    return {
        int(example): values
        for batch in batches
        for example, values in zip(
            batch.example_index[batch.present].tolist(),
            batch.labels[batch.present].numpy(),
            strict=True,
        )
    }


def packed_in(folder, source, **options):
    options = {"num_workers": 0, "progress": False, **options}
    return packpipe.pack(source, 64, output=folder, **options)


def assert_are(found, wanted):
    assert sorted(found) == list(range(len(wanted)))
    for example, values in found.items():
        assert values.dtype == np.float32
        assert np.array_equal(values, wanted[example], equal_nan=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packed_in(tmp_path_factory.mktemp("vectors") / "out", source_of())


def test_they_are_stored_and_come_back_by_segment(packed, tmp_path):
    kind = packed.features.arrow_schema.field("labels").type
    assert kind == pa.list_(pa.list_(pa.float32(), 3))
    batch = next(iter(PackedLoader(packed, len(packed), shuffle=False, max_segments=8)))
    assert np.isnan(batch.labels[~batch.present].numpy()).all()
    assert (~batch.present).any()
    assert_are(labels_by_example([batch]), WANTED)
    assert packpipe.verify(packed.cache_files[0]["filename"].rsplit("/", 1)[0], source_of()) == []
    lazy = packed_in(tmp_path / "lazy", source_of(), materialize=False)
    assert_are(labels_by_example(PackedLoader(lazy, 2, tail="pad")), WANTED)


def test_the_source_is_compared_by_its_numbers(packed):
    folder = packed.cache_files[0]["filename"].rsplit("/", 1)[0]
    others = [*LABELS[:3], [0.25, 0.5, 0.75], LABELS[4]]
    problems = packpipe.verify(folder, source_of(others))
    what = "labels are not those of the source (example 3: [0.25, 0.5, 0.25], expected [0.25, 0.5,"
    assert [problem.what[: len(what)] for problem in problems] == [what]


@pytest.mark.parametrize("feature", [List(Value("float32"), length=3), List(Value("float64"))])
def test_packs_that_are_planned_anew_have_them(feature):
    source = source_of(feature=feature)
    packs = EpochPacks(source, 64)
    assert_are(labels_by_example(PackedLoader(packs, 2, tail="pad")), WANTED)
    stream = source.to_iterable_dataset()
    if feature.length < 0:
        message = "expected lists of one known length, in a stream; cast_column it to List(Value("
        with pytest.raises(ValueError, match=re.escape(message)):
            PackedStream(stream, 64)
        return
    batches = PackedLoader(PackedStream(stream, 64), 2, tail="pad")
    assert_are(labels_by_example(batches), WANTED)


def test_a_batch_without_any_list_needs_a_type_that_says_their_length():
    labels = [None, None, [1.0, 0.0], [0.0, 1.0]]

    def mapped(feature):
        source, packer = source_of(labels, feature), packpipe.Packer(64)
        options = {"batched": True, "batch_size": 2, "remove_columns": source.column_names}
        return source.map(packer, with_indices=True, **options)

    rows = mapped(List(Value("float32"), length=2))
    wanted = np.array([one or [NAN] * 2 for one in labels], np.float32)
    assert_are(labels_by_example(PackedLoader(rows, 1, tail="pad", max_segments=8)), wanted)
    message = (
        "^labels is 'empty', expected lists of numbers, or of a length that their type says; "
        r"cast_column them to List\(Value\('float32'\), length=K\), or pass label_column=None$"
    )
    with pytest.raises(ValueError, match=message):
        mapped(List(Value("float32")))


def test_a_state_of_other_numbers_is_refused():
    def loader_of(labels):
        return PackedLoader(EpochPacks(source_of(labels), 64), 1)

    state = loader_of(LABELS).state_dict()
    loader_of(LABELS).load_state_dict(state)
    others = [*LABELS[:4], [1.0, 0.0, 0.5]]
    with pytest.raises(ValueError, match=r"^state\['contents'\]\['labels'\] is "):
        loader_of(others).load_state_dict(state)


def test_lists_of_another_length_and_infinities_are_rejects(tmp_path):
    odd = [[1.0, 2.0, 3.0, 4.0], [1.0, float("inf"), 3.0]]
    packed = packed_in(tmp_path / "out", source_of(LABELS + odd), max_bad_fraction=0.5)
    assert [(one["example_index"], one["reason"]) for one in packpipe.rejects(packed)] == [
        (5, "bad label"),
        (6, "bad label"),
    ]
    assert [one["exception"] for one in packpipe.rejects(packed)] == [
        "label has 4 numbers, expected 3 as most have; repair it, or pass label_column=None",
        "label[1] is inf, expected a finite number, or NaN; repair it, or pass label_column=None",
    ]
    with pytest.raises(TooManyRejects, match=r"label\[1\] is inf, expected a finite number"):
        EpochPacks(source_of([*LABELS[:2], odd[1]]), 64)


def test_single_floats_are_numbers_of_their_own():
    source = source_of([0.5, 1.5, -2.0], Value("float64"), name="label")
    batches = list(PackedLoader(EpochPacks(source, 64), 1, tail="pad"))
    assert all(isinstance(batch, PackedBatch) for batch in batches)
    assert_are(labels_by_example(batches), np.array([[0.5], [1.5], [-2.0]], np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_single_float_may_be_missing_but_not_infinite(dtype, tmp_path):
    # What float32, the type of batches, does not hold is infinite, too.
    largest = -math.inf if dtype == "float32" else -1e300
    source = source_of([0.5, None, NAN, math.inf, largest], Value(dtype), name="label")
    packed = packed_in(tmp_path / "out", source, max_bad_fraction=0.5)
    packs = EpochPacks(source, 64, max_bad_fraction=0.5)
    stream = PackedStream(source.to_iterable_dataset(), 64, max_bad_fraction=0.5)
    for rows in (packed, packs, stream):
        batches = PackedLoader(rows, 1, tail="pad", max_segments=8)
        assert_are(labels_by_example(batches), np.array([[0.5], [NAN], [NAN]], np.float32))
    message = "label is {}, expected a finite number, or NaN; repair it, or pass label_column=None"
    found = [(one.example_index, one.exception) for one in packs.rejects]
    assert found == [(3, message.format("inf")), (4, message.format(largest))]
    assert [one["exception"] for one in packpipe.rejects(packed)] == [what for _, what in found]
    assert packpipe.verify(tmp_path / "out", source) == []
    with pytest.raises(TooManyRejects, match="label is inf, expected a finite number, or NaN"):
        list(PackedLoader(PackedStream(source.to_iterable_dataset(), 64), 1))


def test_lists_of_classes_are_no_vectors():
    source = source_of([[1, 2], [0]], List(datasets.ClassLabel(names=["a", "b", "c"])))
    message = r"^features\['labels'\] is List\(ClassLabel.*, expected a ClassLabel, a Value or a l"
    with pytest.raises(ValueError, match=message):
        EpochPacks(source, 64)
