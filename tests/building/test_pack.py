"""`pack`: the whole way from a Dataset of images to packed rows."""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import naive_profiles
import numpy as np
import pictures
import pyarrow as pa
import pytest
import xxhash
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PillowImage
from PIL import features
from strategies import encode

import packpipe
from packpipe.building.shards import Shards, alone_in
from packpipe.images import modes
from packpipe.images.decode import decode
from packpipe.images.patches import unpatchify
from packpipe.images.rules import pixel_rules
from packpipe.philox import Key
from packpipe.planning.image_config import PackConfig
from packpipe.rows import files, text
from packpipe.rows.rejects import TooManyRejects

SMALL = {"seq_len": 32, "progress": False, "num_workers": 0}


@pytest.fixture(scope="module")
def source():
    return pictures.dataset_of(pictures.encoded_images())


def packed_in(folder, dataset, **options):
    return packpipe.pack(dataset, output=folder, **{**SMALL, **options})


def test_every_image_is_in_exactly_one_row_with_its_own_pixels_and_label(source, tmp_path):
    packed = packed_in(tmp_path / "out", source)
    rows = packpipe.read_rows(packed)
    segments = rows
    assert sorted(segments.example_index.tolist()) == list(range(len(source)))
    assert np.diff(segments.offsets).max() > 1
    config = PackConfig(seq_len=32)
    stored = source.with_format("arrow")[:]["image"]
    for row in range(len(rows)):
        place = 0
        for segment in range(segments.offsets[row], segments.offsets[row + 1]):
            example = int(segments.example_index[segment])
            height, width = segments.grid_hw[segment].tolist()
            tokens = slice(place, place + int(segments.seq_lens[segment]))
            place = tokens.stop
            wanted = decode(
                stored[example]["bytes"].as_py(),
                image_hw=pictures.SIZES[example],
                target_hw=(height * 16, width * 16),
                rules=pixel_rules(config),
            ).pixels
            coords = rows.coords[row, tokens]
            found = unpatchify(rows.patches[row, tokens], coords, (height, width))
            assert np.array_equal(found, wanted)
            assert tuple(segments.image_hw[segment]) == pictures.SIZES[example]
            assert segments.labels[segment].as_py() == example % 3
        assert not rows.patches[row, place:].any()


@pytest.mark.parametrize("materialize", [True, False])
def test_labels_of_more_than_2_gib_of_text_are_packed(source, tmp_path, monkeypatch, materialize):
    texts = [f"a caption, number {n}" for n in range(len(source))]
    captions = source.select_columns(["image"]).add_column("label", texts)
    halves = [captions.select(range(4)), captions.select(range(4, len(source)))]
    captions = datasets.concatenate_datasets(halves)
    wanted = packpipe.read_rows(packed_in(tmp_path / "wanted", captions, label_column="label"))
    assert np.diff(wanted.offsets).max() > 1
    monkeypatch.setattr(text, "MOST", 100)  # more than the captions of a row, fewer than of all
    options = {"materialize": materialize, "label_column": "label"}
    packed = packed_in(tmp_path / "out", captions, **options)
    assert packed.features["labels"] == List(Value("string"))
    rows = packpipe.read_rows(packed)
    assert rows.labels.to_pylist() == wanted.labels.to_pylist()
    assert rows.labels.to_pylist() == [texts[n] for n in rows.example_index]
    assert packpipe.verify(tmp_path / "out", captions) == []


def test_the_rows_follow_the_public_plan(source, tmp_path):
    packed = packed_in(tmp_path / "out", source, seed=5, epoch=2)
    plan = packpipe.plan_epoch(pictures.SIZES, PackConfig(seq_len=32), seed=5, epoch=2)
    assert [row.tolist() for row in plan] == [row["example_index"] for row in packed]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(source, tmp_path, num_workers):
    packed_in(tmp_path / "one", source)
    packed_in(tmp_path / "more", source, num_workers=num_workers)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "data-00000.arrow" in names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "more" / name).read_bytes()


def test_rows_computed_when_read_are_the_rows_stored(source, tmp_path):
    stored = packed_in(tmp_path / "stored", source)
    lazy = packed_in(tmp_path / "lazy", source, materialize=False)
    assert pictures.row_bytes(packpipe.read_rows(stored)) == pictures.row_bytes(
        packpipe.read_rows(lazy)
    )
    for row in range(len(stored)):
        for name, value in lazy[row].items():
            assert np.array_equal(np.asarray(value), np.asarray(stored[row][name])), name
    assert lazy[0]["patches"].dtype == np.uint8
    assert len(list((tmp_path / "lazy").glob("*.arrow"))) == 2
    # Profiles are read with the pixels.
    counts = {"broken_profile": 0, **packpipe.manifest(lazy)["counts"]}
    assert counts == packpipe.manifest(stored)["counts"]


def test_small_files_and_batches_change_nothing_but_the_files(source, tmp_path, monkeypatch):
    whole = packed_in(tmp_path / "whole", source)
    row_bytes = PackConfig(seq_len=32).row_bytes
    monkeypatch.setattr(files, "BATCH_BYTES", row_bytes)
    monkeypatch.setattr(files, "FILE_BYTES", 2 * row_bytes)
    cut = packed_in(tmp_path / "cut", source, num_workers=2)
    assert len(whole) > 2
    assert len(list((tmp_path / "cut").glob("data-*"))) == -(-len(whole) // 2)
    assert pictures.row_bytes(packpipe.read_rows(cut)) == pictures.row_bytes(
        packpipe.read_rows(whole)
    )


def test_selections_and_shuffles_of_packed_rows_read_as_they_stand(source, tmp_path):
    packed = packed_in(tmp_path / "out", source)
    picked = packed.select([2, 0]).flatten_indices()
    wanted = pictures.row_bytes(packpipe.read_rows(packed, [2, 0]))
    assert pictures.row_bytes(packpipe.read_rows(packed.select([2, 0]))) == wanted
    assert pictures.row_bytes(packpipe.read_rows(picked)) == wanted


def test_a_selected_source_is_read_through_its_indices(source, tmp_path):
    picked = source.select([8, 3, 5])
    rows = packpipe.read_rows(packed_in(tmp_path / "out", picked))
    by_example = dict(zip(rows.example_index.tolist(), rows.image_hw.tolist(), strict=True))
    assert by_example == {0: [70, 70], 1: [8, 120], 2: [1, 7]}


def test_the_columns_have_the_types_the_design_states(source, tmp_path):
    packed = packed_in(tmp_path / "out", source)
    assert packed.features == Features(
        {
            "patches": List(Value("uint8"), length=32 * 768),
            "segment_ids": List(Value("int32"), length=32),
            "coords": List(Value("int16"), length=64),
            "seq_lens": List(Value("int32")),
            "grid_hw": List(List(Value("int16"), length=2)),
            "image_hw": List(List(Value("int32"), length=2)),
            "labels": List(ClassLabel(names=["cat", "dog", "owl"])),
            "example_index": List(Value("int64")),
        }
    )


@pytest.mark.parametrize(
    ("label_column", "feature"),
    [(None, None), ("n", Value("int32")), ("auto", ClassLabel(names=["cat", "dog", "owl"]))],
)
def test_any_label_column_or_none(source, tmp_path, label_column, feature):
    packed = packed_in(tmp_path / "out", source, label_column=label_column)
    assert packed.features.get("labels") == (None if feature is None else List(feature))


def test_string_labels_that_are_named_travel_as_strings(tmp_path):
    images = pictures.encoded_images()[:2]
    source = Dataset.from_dict(
        {"image": [{"bytes": b, "path": None} for b in images], "label": ["a", "b"]},
        features=Features({"image": Image(), "label": Value("string")}),
    )
    packed = packed_in(tmp_path / "out", source, label_column="label")
    lazy = packed_in(tmp_path / "lazy", source, label_column="label", materialize=False)
    found = {
        i: name
        for row in packed
        for i, name in zip(row["example_index"], row["labels"], strict=True)
    }
    assert found == {0: "a", 1: "b"}
    assert [row["labels"] for row in lazy] == [row["labels"] for row in packed]


@pytest.mark.parametrize(("kind", "values"), [("string", ["a", "b"]), ("bool", [True, False])])
@pytest.mark.parametrize("name", ["label", "labels"])
def test_labels_that_no_batch_can_hold_are_refused_before_anything_is_read(kind, values, name):
    images = [{"bytes": b"no image", "path": None}] * 2
    features = Features({"image": Image(), name: Value(kind)})
    source = Dataset.from_dict({"image": images, name: values}, features=features)
    expected = "integers, a ClassLabel, floats or lists of numbers; "
    what = f"features['{name}'] is Value('{kind}'), expected {expected}"
    remedy = f"class_encode_column it, or pass label_column=None, or '{name}' to store it for"
    with pytest.raises(ValueError, match=f"^{re.escape(what + remedy)} read_rows alone$"):
        packpipe.pack(source)
    with pytest.raises(ValueError, match=re.escape(what + remedy)):
        packpipe.Packer()(source.data.table)
    for column in ("auto", name):
        for call, rows in (
            (packpipe.EpochPacks, source),
            (packpipe.PackedStream, source.to_iterable_dataset()),
        ):
            with pytest.raises(ValueError, match=re.escape(what) + ".*label_column=None$"):
                call(rows, label_column=column)


def test_images_by_path_and_bare_bytes_give_the_rows_of_images_by_bytes(source, tmp_path):
    paths = []
    for number, image in enumerate(pictures.encoded_images()):
        paths.append(str(tmp_path / f"{number}.png"))
        (tmp_path / f"{number}.png").write_bytes(image)
    by_path = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    bare = Dataset.from_dict(
        {"image": pictures.encoded_images()}, features=Features({"image": Value("binary")})
    )
    wanted, *others = (
        pictures.row_bytes(
            packpipe.read_rows(packed_in(tmp_path / name, dataset, label_column=None))
        )
        for name, dataset in [("a", source), ("b", by_path), ("c", bare)]
    )
    assert all(found == wanted for found in others)


def test_load_from_disk_opens_the_folder(source, tmp_path):
    packed = packed_in(tmp_path / "out", source)
    opened = datasets.load_from_disk(str(tmp_path / "out"))
    assert opened.features == packed.features
    assert opened[:] == packed[:]
    assert {file["filename"] for file in packed.cache_files} == {
        str(tmp_path / "out" / "data-00000.arrow")
    }


def test_the_manifest_records_what_the_bytes_depend_on_and_their_checksums(source, tmp_path):
    packed = packed_in(tmp_path / "out", source, patch_size=8, max_tokens=30, seed=3)
    found = packpipe.manifest(packed)
    assert found["schema_version"] == 1
    assert found["packpipe"] == packpipe.__version__
    assert found["config"]["patch_size"] == 8
    assert found["config"]["max_tokens"] == 30
    assert (found["seed"], found["epoch"]) == (3, 0)
    rows = packpipe.read_rows(packed)
    tokens = int(rows.seq_lens.sum())
    assert found["counts"] == {
        "read": 9,
        "packed": 9,
        "rejected": 0,
        "rejected_by_reason": {},
        "shrunk": 5,
        "broken_exif": 0,
        "broken_profile": 0,
        "packs": len(packed),
        "bound": found["counts"]["bound"],
        "tokens": tokens,
    }
    assert found["counts"]["bound"] <= len(packed)
    assert found["fill"] == tokens / (len(packed) * 32)
    for name, record in found["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert xxhash.xxh3_128(content).hexdigest() == record["xxh3_128"]
        assert len(content) == record["bytes"]


def test_bad_examples_land_in_the_rejects_and_nobody_else_moves(tmp_path, caplog):
    images = pictures.encoded_images() * 12
    truncated = pictures.encoded_image(90, 33, 2, "JPEG")[:-900]
    whole = packed_in(tmp_path / "whole", pictures.dataset_of(images))
    images[2] = truncated  # size as planned; fails when decoded
    images[7] = b""
    labels = [row % 3 for row in range(len(images))]
    labels[11] = None
    source = pictures.dataset_of(images, labels)
    with caplog.at_level(logging.WARNING, logger="packpipe"):
        packed = packed_in(tmp_path / "out", source, max_bad_fraction=0.05)
    assert "3 of 108 examples rejected; packpipe.rejects(packed) says which and why" in caplog.text
    found = packpipe.rejects(packed).to_list()
    assert [(r["example_index"], r["stage"], r["reason"]) for r in found] == [
        (2, "decode", "undecodable"),
        (7, "probe", "empty"),
        (11, "label", "bad label"),
    ]
    assert found[0]["exception"].startswith("OSError: ")
    assert found[2]["exception"] == (
        "label is None, expected 0..2; repair it, or pass label_column=None"
    )
    counts = packpipe.manifest(packed)["counts"]
    assert (counts["read"], counts["packed"], counts["rejected"]) == (108, 105, 3)
    assert counts["rejected_by_reason"] == {"bad label": 1, "empty": 1, "undecodable": 1}
    rows = packpipe.read_rows(packed)
    kept = rows.example_index.tolist()
    assert sorted([*kept, 2, 7, 11]) == list(range(108))
    assert counts["tokens"] == int(rows.seq_lens.sum()) == int((rows.segment_ids > 0).sum())
    assert len(packpipe.rejects(whole)) == 0


def test_a_failed_image_leaves_its_row_to_the_others(tmp_path):
    images = pictures.encoded_images()
    images[0] = pictures.encoded_image(40, 60, 0, "JPEG")
    whole = packed_in(tmp_path / "whole", pictures.dataset_of(images))
    images[0] = images[0][:-900]
    packed = packed_in(tmp_path / "out", pictures.dataset_of(images), max_bad_fraction=0.5)
    lazy = packed_in(
        tmp_path / "lazy", pictures.dataset_of(images), max_bad_fraction=0.5, materialize=False
    )
    without = [[i for i in row["example_index"] if i != 0] for row in whole]
    assert any(len(row) > 1 for row in without)
    assert [row["example_index"] for row in packed] == without
    assert pictures.row_bytes(packpipe.read_rows(lazy)) == pictures.row_bytes(
        packpipe.read_rows(packed)
    )


def test_a_build_with_too_many_bad_images_stops_and_leaves_nothing(tmp_path):
    images = [*pictures.encoded_images(), b"<html>not found</html>"]
    message = (
        "rejected is 1 of 10 examples (10.00%), expected at most 1.00% (max_bad_fraction); repair "
        "the source or raise it. First: example 9 (unreadable: "
    )
    with pytest.raises(TooManyRejects, match=re.escape(message)) as caught:
        packed_in(tmp_path / "out", pictures.dataset_of(images))
    assert [reject.example_index for reject in caught.value.rejects] == [9]
    assert list(tmp_path.iterdir()) == []


def test_on_error_raise_stops_at_the_first_bad_image(tmp_path):
    images = pictures.encoded_images() * 30
    images[100] = b"nothing"
    with pytest.raises(TooManyRejects, match=re.escape("example 100 is bad (unreadable: ")):
        packed_in(tmp_path / "out", pictures.dataset_of(images), on_error="raise")


def test_called_again_it_opens_what_it_wrote(source, tmp_path):
    packed_in(tmp_path / "out", source)
    written = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    again = packed_in(tmp_path / "out", source)
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == written
    assert len(again) > 0


def test_without_output_the_datasets_cache_holds_the_rows(source, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    packed = packpipe.pack(source, **SMALL)
    again = packpipe.pack(source, **SMALL)
    other = packpipe.pack(source, **SMALL, seed=1)
    assert packed.cache_files == again.cache_files
    assert packed.cache_files != other.cache_files
    kept = list((tmp_path / "packpipe").iterdir())
    assert sum(path.is_dir() for path in kept) == 2
    assert [path.suffix for path in kept if path.is_file()] == [".arrow"]  # the sizes, once


def test_another_build_in_the_folder_is_refused(source, tmp_path):
    packed_in(tmp_path / "out", source)
    message = (
        f"output is {str(tmp_path / 'out')!r}, expected rows made with the same patch_size, seed;"
    )
    with pytest.raises(FileExistsError, match=re.escape(message)):
        packed_in(tmp_path / "out", source, patch_size=8, seed=9)


def test_a_folder_of_something_else_is_refused(source, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    message = f"output is {str(tmp_path)!r}, expected an absent or empty folder; choose another"
    with pytest.raises(FileExistsError, match=re.escape(message)):
        packed_in(tmp_path, source)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_dataset_gives_no_rows(source, tmp_path):
    packed = packed_in(tmp_path / "out", source.select([]))
    assert len(packed) == 0
    assert "patches" in packed.features
    assert packpipe.manifest(packed)["counts"]["packs"] == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seq_len": 0}, ValueError, "seq_len is 0, expected an integer in 1..32767; "),
        ({"patch": 8}, TypeError, "option is 'patch', expected one of seq_len, patch_size, "),
        ({"num_workers": -1}, ValueError, "num_workers is -1, expected an integer in 0..1024; "),
        ({"image_seconds": 0}, ValueError, "image_seconds is 0, expected a number above 0; "),
        ({"image_root": 1}, TypeError, "image_root is 1, expected a folder; "),
        ({"image_root": "no/such"}, ValueError, "image_root is 'no/such', expected a folder; "),
        ({"on_error": "skip"}, ValueError, "on_error is 'skip', expected one of 'quarantine', "),
        ({"image_column": "img"}, ValueError, "image_column is 'img', expected one of ['image', "),
        (
            {"image_column": "n"},
            ValueError,
            "features['n'] is Value('int32'), expected Image(), Value('binary') or arrays",
        ),
        ({"label_column": "y"}, ValueError, "label_column is 'y', expected one of ['image', 'lab"),
        ({"max_bad_fraction": 2}, ValueError, "max_bad_fraction is 2, expected 0..1; it is a sh"),
        ({"max_consecutive_bad": 0}, ValueError, "max_consecutive_bad is 0, expected an integer"),
        ({"materialize": "no"}, TypeError, "materialize is 'no', expected True or False; pass a b"),
        ({"on_error": "raise", "max_bad_fraction": "x"}, TypeError, "max_bad_fraction is 'x', ex"),
        ({"seed": -1}, ValueError, "seed is -1, expected an integer in 0..18446744073709551615; "),
    ],
)
def test_wrong_arguments_are_refused_at_the_front_door(source, tmp_path, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        packed_in(tmp_path / "out", source, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_dataset_is_refused(source):
    message = (
        "type(dataset) is 'DatasetDict', expected Dataset; pass one split, such as dataset['train']"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        packpipe.pack(datasets.DatasetDict(train=source))


def test_a_dataset_without_images_is_refused():
    message = (
        "image columns is [], expected exactly one, for image_column='auto'; "
        "pass image_column (--image-column)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        packpipe.pack(Dataset.from_dict({"x": [1]}))


def test_a_dataset_pack_did_not_make_has_no_manifest():
    message = "folders of packed is [], expected one folder that packpipe.pack wrote; ask each"
    with pytest.raises(ValueError, match=re.escape(message)):
        packpipe.manifest(Dataset.from_dict({"x": [1]}))


def test_rows_of_the_lazy_dataset_can_be_computed_in_another_process(source, tmp_path):
    import pickle

    lazy = packed_in(tmp_path / "lazy", source, materialize=False)
    copy = pickle.loads(pickle.dumps(lazy))  # noqa: S301  what a DataLoader worker does
    assert pictures.row_bytes(packpipe.read_rows(copy)) == pictures.row_bytes(
        packpipe.read_rows(lazy)
    )


def test_read_rows_takes_an_arrow_table_too(source, tmp_path):
    packed = packed_in(tmp_path / "out", source)
    arrow = packed.with_format("arrow")[:]
    assert isinstance(arrow, pa.Table)
    assert pictures.row_bytes(packpipe.read_rows(arrow)) == pictures.row_bytes(
        packpipe.read_rows(packed)
    )


def test_rows_already_written_are_held_to_the_policy_of_every_call(tmp_path):
    images = [*pictures.encoded_images(), b"junk"]
    source = pictures.dataset_of(images)
    packed_in(tmp_path / "out", source, max_bad_fraction=1.0)
    with pytest.raises(TooManyRejects, match=re.escape("rejected is 1 of 10 examples")):
        packed_in(tmp_path / "out", source)
    with pytest.raises(TooManyRejects, match=re.escape("example 9 is bad (unreadable: ")):
        packed_in(tmp_path / "out", source, on_error="raise")
    assert len(packpipe.rejects(packed_in(tmp_path / "out", source, max_bad_fraction=0.1))) == 1


def test_progress_says_images_rows_rejects_and_the_size_to_come(tmp_path, capsys):
    datasets.enable_progress_bars()
    images = pictures.encoded_images()
    images[4] = pictures.encoded_image(64, 64, 4, "JPEG")[:-900]
    source = pictures.dataset_of(images)
    options = {**SMALL, "max_bad_fraction": 1.0, "output": tmp_path / "out", "progress": True}
    packed = packpipe.pack(source, **options)
    said = capsys.readouterr().err
    assert re.search(rf"Packing 9 images in {len(packed)} rows, [\d.]+ kB: +0%", said)
    assert re.search(rf"100%.*\b9/9 .*images/s, rejects=1, rows={len(packed)}\]", said)
    packpipe.pack(source, **options)
    assert "Packing" not in capsys.readouterr().err
    packpipe.pack(source, **{**options, "output": tmp_path / "silent", "progress": False})
    assert "Packing" not in capsys.readouterr().err


def test_rejects_are_the_same_bytes_in_every_run(tmp_path):
    source = pictures.dataset_of([*pictures.encoded_images(), b"junk"])
    for name in ("a", "b"):
        packed_in(tmp_path / name, source, max_bad_fraction=1.0)
    first, second = ((tmp_path / name / "rejects.arrow").read_bytes() for name in ("a", "b"))
    assert first == second


def test_rows_computed_when_read_obey_on_error(tmp_path, caplog):
    images = pictures.encoded_images()
    images[4] = pictures.encoded_image(64, 64, 4, "JPEG")[:-900]
    source = pictures.dataset_of(images)
    strict = packed_in(tmp_path / "a", source, materialize=False, on_error="raise")
    with pytest.raises(ValueError, match=re.escape("example 4 is bad (undecodable: OSError: ")):
        packpipe.read_rows(strict)
    lenient = packed_in(tmp_path / "b", source, materialize=False)
    with caplog.at_level(logging.WARNING, logger="packpipe"):
        rows = packpipe.read_rows(lenient)
    assert sorted(rows.example_index.tolist()) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert "example 4 left out: OSError: " in caplog.text


def test_stored_columns_of_lazy_rows_can_be_selected(source, tmp_path):
    lazy = packed_in(tmp_path / "lazy", source, materialize=False)
    picked = lazy.select_columns(["seq_lens"])
    assert [row["seq_lens"] for row in picked] == [list(row["seq_lens"]) for row in lazy]


def test_changed_files_behind_the_same_paths_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "image.png"
    path.write_bytes(pictures.encoded_image(40, 60))
    source = Dataset.from_dict({"image": [str(path)]}).cast_column("image", Image())
    lazy = packpipe.pack(source, **SMALL, materialize=False)
    before = packpipe.pack(source, **SMALL)
    path.write_bytes(pictures.encoded_image(64, 96))
    after = packpipe.pack(source, **SMALL)
    assert [before[0]["image_hw"], after[0]["image_hw"]] == [[[40, 60]], [[64, 96]]]
    message = (
        "example 0: image_hw is (64, 96), expected (40, 60) as planned; "
        "plan again (stored rows: into another folder), the source has changed"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        packpipe.read_rows(lazy)


def test_a_fault_of_the_machine_is_no_reject(source, tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr("packpipe.images.decode.plain", out_of_memory)
    monkeypatch.setattr("packpipe.images.bad_images._has_memory", lambda: False)
    with pytest.raises(MemoryError):
        packed_in(tmp_path / "out", source, max_bad_fraction=1.0)
    assert list(tmp_path.iterdir()) == []


def test_an_image_too_large_for_the_memory_does_not_stop_a_build(source, tmp_path, monkeypatch):
    def one_is_large(image, *options):
        if image.size == (60, 40):
            raise MemoryError
        return modes.plain(image, *options)

    monkeypatch.setattr("packpipe.images.decode.plain", one_is_large)
    packed_in(tmp_path / "out", source, max_bad_fraction=1.0)
    found = packpipe.summarize(tmp_path / "out")
    assert {reject.reason for reject in found.rejects} == {"too much memory"}
    assert 0 < len(found.rejects) < len(source)
    monkeypatch.undo()
    assert packpipe.verify(tmp_path / "out", source) == []


def test_a_second_build_in_the_folder_of_a_first_is_refused(source, tmp_path):
    with alone_in(tmp_path / "out", wait=False):
        message = "(being written by another process)', expected a folder of its own; wait for it"
        with pytest.raises(FileExistsError, match=re.escape(message)):
            packed_in(tmp_path / "out", source)
    assert len(packed_in(tmp_path / "out", source)) > 0


def test_builds_of_the_same_rows_in_the_cache_wait_for_one_another(source, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as threads:
        runs = [threads.submit(packpipe.pack, source, **SMALL) for _ in range(4)]
        found = [pictures.row_bytes(packpipe.read_rows(run.result())) for run in runs]
    assert all(rows == found[0] for rows in found)
    (folder,) = (path for path in (tmp_path / "cache" / "packpipe").iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} == {
        *("data-00000.arrow", "rejects.arrow", "manifest.json"),
        *("dataset_info.json", "state.json"),
    }


def test_joined_datasets_have_no_single_manifest(source, tmp_path):
    parts = [packed_in(tmp_path / str(seed), source, seed=seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"expected one folder that packpipe.pack wrote; ask each"):
        packpipe.manifest(datasets.concatenate_datasets(parts))


def test_other_rows_have_another_fingerprint_on_disk(source, tmp_path):
    for seed in (0, 1):
        packed_in(tmp_path / str(seed), source, seed=seed)
    opened = [datasets.load_from_disk(str(tmp_path / str(seed))) for seed in (0, 1)]
    assert opened[0]._fingerprint != opened[1]._fingerprint


def test_unlabelled_splits_are_told_what_to_do(tmp_path):
    source = pictures.dataset_of(pictures.encoded_images(), [-1] * 9)
    message = "label is -1, expected 0..2; repair it, or pass label_column=None"
    with pytest.raises(TooManyRejects, match=re.escape(message)):
        packed_in(tmp_path / "out", source)


def test_a_label_that_is_no_number_or_list_of_them_is_refused(tmp_path):
    features = Features({"image": Image(), "label": List(Value("string"))})
    rows = {"image": [{"bytes": pictures.encoded_image(9, 9), "path": None}], "label": [["a"]]}
    message = "features['label'] is List(Value('string')), expected a ClassLabel, a Value or a list"
    with pytest.raises(ValueError, match=re.escape(message)):
        packed_in(tmp_path / "out", Dataset.from_dict(rows, features=features))


def test_the_info_of_datasets_is_what_datasets_would_write(source, tmp_path):
    packed = packed_in(tmp_path / "out", source)
    datasets.DatasetInfo(features=packed.features).write_to_directory(str(tmp_path))
    info = (tmp_path / "out" / "dataset_info.json").read_bytes()
    assert info == (tmp_path / "dataset_info.json").read_bytes()


@pytest.mark.parametrize(("made", "asked"), [(60, 5), (5, 60), (5, 6)])
def test_rows_made_with_another_limit_on_seconds_are_other_rows(source, tmp_path, made, asked):
    before = packed_in(tmp_path / "out", source, image_seconds=made)
    assert packpipe.manifest(before).get("image_seconds", 60) == made
    assert len(packed_in(tmp_path / "out", source, image_seconds=float(made))) == len(before)
    message = "expected rows made with the same image_seconds; choose another output, or remove it"
    with pytest.raises(FileExistsError, match=re.escape(message)):
        packed_in(tmp_path / "out", source, image_seconds=asked)


def test_rows_whose_images_are_read_later_have_no_limit_on_seconds(source, tmp_path):
    for seconds in (60, 5):
        packed = packed_in(tmp_path / "out", source, image_seconds=seconds, materialize=False)
        assert "image_seconds" not in packpipe.manifest(packed)


def test_rows_packed_beside_texts_are_not_those_packed_alone(tmp_path):
    images = pictures.dataset_of(pictures.encoded_images())
    pairs = images.add_column("input_ids", [[1, 2]] * len(images))
    options = {"num_workers": 0, "progress": False}
    packpipe.pack_pairs(pairs, 64, 32, output=tmp_path, **options)
    message = "expected rows made with the same beside; choose another output, or remove it"
    with pytest.raises(FileExistsError, match=re.escape(message)):
        packpipe.pack(pairs, 64, output=tmp_path / "images", image_column="image", **options)


@pytest.mark.parametrize("output", ["s3://bucket/rows", Path("s3://bucket/rows"), "file:///rows"])
def test_a_folder_behind_a_scheme_is_refused_and_no_folder_of_that_name(
    source, tmp_path, monkeypatch, output
):
    monkeypatch.chdir(tmp_path)
    message = f"output is '{output}', expected a path without a scheme; write to a local folder"
    with pytest.raises(ValueError, match=re.escape(message)):
        packed_in(output, source)
    assert list(tmp_path.iterdir()) == []


WIDE = naive_profiles.rgb_profile(naive_profiles.ADOBE, 2.19921875)


def profiled(profiles):
    """A dataset of images of one size, 32x48, each with its profile; and their stored pixels."""
    pixels = [
        np.random.default_rng(number).integers(0, 256, (32, 48, 3), np.uint8)
        for number in range(len(profiles))
    ]
    images = [
        encode(PillowImage.fromarray(one), "PNG", icc_profile=profile)
        for one, profile in zip(pixels, profiles, strict=True)
    ]
    return pictures.dataset_of(images).select_columns(["image", "label"]), pixels


def by_example(rows):
    """Pixels of each image, of rows without dropped tokens."""
    found, ends = {}, np.cumsum(rows.seq_lens)
    for row in range(len(rows)):
        segments = range(rows.offsets[row], rows.offsets[row + 1])
        before = ends[segments[0]] - rows.seq_lens[segments[0]]
        for segment in segments:
            tokens = slice(ends[segment] - rows.seq_lens[segment] - before, ends[segment] - before)
            grid_hw = tuple(rows.grid_hw[segment].tolist())
            patches, coords = rows.patches[row, tokens], rows.coords[row, tokens]
            found[int(rows.example_index[segment])] = unpatchify(patches, coords, grid_hw)
    return found


def in_worker_processes(dataset, folder):
    return packpipe.read_rows(
        packpipe.pack(dataset, output=folder, num_workers=2, progress=False, seq_len=16)
    )


def in_this_process(dataset, folder):
    return packpipe.read_rows(packed_in(folder, dataset))


def when_read(dataset, folder):
    return packpipe.read_rows(packed_in(folder, dataset, materialize=False))


def by_packer(dataset, _):
    packer = packpipe.Packer(seq_len=16)
    return packpipe.read_rows(
        dataset.map(packer, batched=True, with_indices=True, remove_columns=dataset.column_names)
    )


def every_epoch(dataset, _):
    packs = packpipe.EpochPacks(dataset, 16, num_workers=1)
    return packs.rows(Key(0, 0), np.arange(packs.num_packs(Key(0, 0))))


def of_a_stream(dataset, _):
    stream = packpipe.PackedStream(dataset.to_iterable_dataset(), 16)
    return stream.rows(Key(0, 0), list(stream.stream_packs(Key(0, 0), None, 0)))


@pytest.mark.parametrize(
    "decoded",
    [in_worker_processes, in_this_process, when_read, by_packer, every_epoch, of_a_stream],
)
def test_colours_become_srgb_wherever_pixels_are_decoded(tmp_path, decoded):
    dataset, pixels = profiled([WIDE, None, WIDE])
    found = by_example(decoded(dataset, tmp_path / "out"))
    assert sorted(found) == [0, 1, 2]
    assert np.array_equal(found[1], pixels[1])
    for number in (0, 2):
        wanted = naive_profiles.srgb_of(pixels[number], naive_profiles.ADOBE, 2.19921875)
        assert np.abs(found[number] - wanted).max() <= 1.01


@pytest.mark.parametrize("num_workers", [0, 2])
def test_profiles_that_cannot_be_used_are_counted_also_after_a_stop(
    tmp_path, monkeypatch, num_workers
):
    # Rows of two images each, and files of one row.
    dataset, _ = profiled([b"no", WIDE, None, b"profile", b"at all", None])
    options = {"num_workers": num_workers, "seq_len": 12, "progress": False}
    monkeypatch.setattr(files, "FILE_BYTES", 1)
    packed = packpipe.pack(dataset, output=tmp_path / "whole", **options)
    assert len(packpipe.manifest(packed)["files"]) == 3 + 1
    assert packpipe.manifest(packed)["counts"]["broken_profile"] == 3
    assert packpipe.verify(tmp_path / "whole", dataset, sample=None) == []
    commit = Shards.commit

    def stopping(shards, number, *others):
        commit(shards, number, *others)
        if number == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Shards, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            packpipe.pack(dataset, output=tmp_path / "stopped", **options)
    found = [problem.what for problem in packpipe.verify(tmp_path / "stopped")]
    assert "says that the build is not complete; call pack again, and it continues" in found
    packpipe.pack(dataset, output=tmp_path / "stopped", **options)
    for folder in ("whole", "stopped"):
        assert packpipe.verify(tmp_path / folder, dataset) == []
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("whole", "stopped")]
    assert manifests[0] == manifests[1]


def test_rows_that_ignore_profiles_are_those_from_before_there_was_the_option(tmp_path):
    dataset, pixels = profiled([WIDE, b"no"])
    packed = packed_in(tmp_path / "out", dataset, profiles="ignore")
    found = packpipe.manifest(packed)
    assert "profiles" not in found["config"]
    assert "broken_profile" not in found["counts"]
    assert "littlecms2" not in found["codecs"]
    images = by_example(packpipe.read_rows(packed))
    assert all(np.array_equal(images[number], pixels[number]) for number in (0, 1))
    assert packpipe.verify(tmp_path / "out", dataset, sample=None) == []
    with pytest.raises(FileExistsError, match="expected rows made with the same profiles;"):
        packed_in(tmp_path / "out", dataset)
    converted = packed_in(tmp_path / "converted", dataset)
    assert packpipe.manifest(converted)["config"]["profiles"] == "srgb"
    assert packpipe.manifest(converted)["codecs"]["littlecms2"] == features.version("littlecms2")
    assert packpipe.verify(tmp_path / "converted", dataset, sample=None) == []


def test_a_codec_that_came_since_makes_no_other_rows_and_another_version_does(tmp_path):
    dataset, _ = profiled([None])
    packed = packed_in(tmp_path / "out", dataset)
    manifest = tmp_path / "out" / "manifest.json"
    found = json.loads(manifest.read_text())
    codecs = {**found["codecs"], "codec of old": "1"}
    name, version = next(iter(found["codecs"].items()))
    manifest.write_text(json.dumps({**found, "codecs": codecs}))
    assert packed_in(tmp_path / "out", dataset)[:] == packed[:]
    manifest.write_text(json.dumps({**found, "codecs": {**codecs, name: f"{version}.1"}}))
    with pytest.raises(FileExistsError, match="expected rows made with the same codecs;"):
        packed_in(tmp_path / "out", dataset)


def test_an_image_of_high_dynamic_range_is_a_reject(tmp_path):
    high = naive_profiles.rgb_profile(naive_profiles.P3, 2.2, cicp=b"cicp\0\0\0\0\x09\x10\0\1")
    dataset, pixels = profiled([None, high])
    packed = packed_in(tmp_path / "out", dataset, max_bad_fraction=0.5)
    (reject,) = packpipe.rejects(packed)
    assert (reject["example_index"], reject["stage"]) == (1, "decode")
    assert reject["reason"] == "high dynamic range"
    assert reject["exception"].startswith("HighDynamicRange: the transfer is PQ, expected")
    assert packpipe.verify(tmp_path / "out", dataset) == []
    kept = packed_in(tmp_path / "kept", dataset, profiles="ignore")
    assert np.array_equal(by_example(packpipe.read_rows(kept))[1], pixels[1])
