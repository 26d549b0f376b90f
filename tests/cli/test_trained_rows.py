"""`packpipe train` and `eval` on packed rows: as from images, and a model for images afterwards."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import run, told
from datasets import Dataset
from PIL import Image

import packpipe
from packpipe.cli.embedded import EmbeddedRows
from packpipe.cli.labels import classes_of, divided, labelled, with_classes_of
from packpipe.cli.open_source import manifest_in, open_source
from packpipe.cli.trained_rows import TrainedRows
from packpipe.loading.stored import StoredPacks
from packpipe.model.predict import predict_packs
from packpipe.philox import Key
from packpipe.training.checkpoints import checkpoints
from packpipe.training.log import read_log

NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 24 images of several sizes, of three classes."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for number in range(24):
        path = folder / NAMES[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        size = (*draw.integers(8, 40, 2).tolist(), 3)
        Image.fromarray(draw.integers(0, 256, size).astype(np.uint8)).save(path)
    return folder


PACKING = ["--patch-size", 8, "--seq-len", 16, "--sides", 16, 24, "--num-workers", 0]


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "rows"
    told("pack", images, folder, *PACKING, "--profiles", "ignore")
    return folder


def test_rows_of_encoded_images_are_packed_and_train_as_rows_of_pixels_do(images, packed, tmp_path):
    told("pack", images, tmp_path / "rows", *PACKING, "--profiles", "ignore", "--store", "encoded")
    assert packpipe.manifest(datasets.load_from_disk(str(tmp_path / "rows")))["store"] == "encoded"
    pixels, encoded = (
        TrainedRows(open_source(str(folder), "train", rows=True), None, 8, 0, val=0.3)
        for folder in (packed, tmp_path / "rows")
    )
    assert (encoded.seq_len, encoded.evaluation) == (pixels.seq_len, pixels.evaluation)
    assert encoded.counts() == pixels.counts()
    for name in ("packs", "validation_packs"):
        numbers = np.arange(getattr(pixels, name).num_packs(Key(0, 0)))
        found, wanted = (getattr(rows, name).rows(Key(0, 0), numbers) for rows in (encoded, pixels))
        assert len(numbers) > 1
        assert np.array_equal(found.patches, wanted.patches), name
        assert found.labels.equals(wanted.labels), name
    told("show", tmp_path / "rows", 0, "--output", tmp_path / "encoded.png")
    told("show", packed, 0, "--output", tmp_path / "pixels.png")
    assert (tmp_path / "encoded.png").read_bytes() == (tmp_path / "pixels.png").read_bytes()
    told("stats", tmp_path / "rows", "--html", tmp_path / "page.html")
    assert b"data:image" in (tmp_path / "page.html").read_bytes()


QUICK = ["--model", "Ti/8", "--batch-size", 2, "--num-workers", 0, "--log-every", 2]
QUICK += ["--learning-rate", 1e-4, "--val", 0.3, "--val-every", 2]


@pytest.fixture(scope="module")
def trained(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    told("train", packed, folder, *QUICK, "--steps", 4)
    return folder


def test_rows_train_as_images_do_and_leave_a_model_for_images(images, packed, trained):
    assert [record["step"] for record in read_log(trained)] == [2, 4]
    assert all(record["val_loss"] > 0 for record in read_log(trained))
    model, options = packpipe.load_model(trained)
    assert options.class_names == NAMES
    assert options.label_column == "label"
    packing = options.packing
    # A square of the largest side is 3 x 3 patches; what was stated of pixels stays.
    assert (packing.resolution, packing.max_tokens, packing.seq_len) == ("budget", 9, 16)
    assert (packing.profiles, packing.patch_size) == ("ignore", model.config.patch_size)
    (found,) = json.loads(told("eval", trained, images, "--json"))["budgets"]
    assert (found["max_tokens"], found["num_images"]) == (9, 24)
    (found,) = json.loads(told("eval", trained, packed, "--json"))["budgets"]
    assert (found["max_tokens"], found["num_images"]) == (None, 24)
    assert "as packed  accuracy " in told("eval", trained, packed)
    said = told("predict", trained, images / "bee", "--top", 1)
    assert sum(said.count(f"{name} 0.") for name in NAMES) == 8


def test_rows_that_are_trained_on_again_go_on_to_the_same_figures(packed, trained, tmp_path):
    told("train", packed, tmp_path / "a", *QUICK, "--steps", 2)
    told("train", packed, tmp_path / "a", *QUICK, "--steps", 4)
    names = ("step", "loss", "val_loss", "val_accuracy", "val_ece")
    logs = [[[one[n] for n in names] for one in read_log(f)] for f in (trained, tmp_path / "a")]
    assert logs[0] == logs[1]
    assert checkpoints(tmp_path / "a")[-1].name == "step-00000004"
    result = run("train", packed, tmp_path / "a", *QUICK, "--steps", 6, "--val", 0.5)
    assert result.exit_code == 2
    assert "the validation images is '" in result.stderr


def test_whole_rows_are_held_out_the_same_ones_each_time(packed):
    rows = labelled(datasets.load_from_disk(str(packed)))
    trained, held_out = divided(rows, 0.3, 5)
    assert len(held_out) == round(0.3 * len(rows)) > 1
    assert len(trained) + len(held_out) == len(rows)
    examples = [np.concatenate(part["example_index"][:]) for part in (trained, held_out)]
    assert sorted(np.concatenate(examples)) == list(range(24))
    again = divided(rows, 0.3, 5)[1]
    assert again["example_index"][:] == held_out["example_index"][:]
    assert divided(rows, 0.3, 6)[1]["example_index"][:] != held_out["example_index"][:]


def test_views_of_an_image_are_not_on_both_sides(images, tmp_path):
    dataset = datasets.load_dataset("imagefolder", data_dir=str(images), split="train")
    options = {"patch_size": 8, "seq_len": 16, "resolution": "budget", "progress": False}
    apart = packpipe.pack(dataset, views=2, max_tokens=9, output=tmp_path / "apart", **options)
    with pytest.raises(ValueError, match=r"--val is '0.5, with example \d+ in several rows', exp"):
        divided(labelled(apart), 0.5, 0)
    one = apart.select([0])
    with pytest.raises(ValueError, match="packed rows is 1, expected 2 or more, to hold some out"):
        divided(one, 0.5, 0)
    together = {"views": 2, "max_tokens": 8, "views_together": True}
    found = packpipe.pack(dataset, **together, output=tmp_path / "beside", **options)
    assert len(divided(labelled(found), 0.5, 0)[1]) > 1


def packed_with(labels, folder):
    pixels = np.zeros((8, 8, 3), np.uint8)
    dataset = Dataset.from_dict({"image": [Image.fromarray(pixels)] * len(labels), "kind": labels})
    dataset = dataset.cast_column("image", datasets.Image())
    return packpipe.pack(
        dataset, 2, patch_size=8, label_column="kind", output=folder, progress=False
    )


@pytest.mark.parametrize("labels", [["b", "a", "10", "b", "c"], [7, -3, 10, 7, 200]])
def test_labels_without_names_are_the_classes_that_images_with_them_have(labels, tmp_path):
    rows = labelled(packed_with(labels, tmp_path / "a"))
    plain = Dataset.from_dict({"label": labels}).class_encode_column("label")
    assert classes_of(rows).names == plain.features["label"].names
    by_example = dict(
        zip(
            np.concatenate(rows["example_index"][:]), np.concatenate(rows["labels"][:]), strict=True
        )
    )
    assert [by_example[number] for number in range(5)] == plain["label"][:]
    # With a digest of all bytes still, and with the labels that batches show.
    assert {"labels", "files"} <= StoredPacks(rows).contents().keys()
    batch = next(iter(packpipe.PackedLoader(rows, 2, shuffle=False)))
    assert batch.labels[batch.present].tolist() == np.concatenate(rows["labels"][:2]).tolist()


def test_rows_are_renumbered_by_the_names_of_their_classes(packed):
    rows = labelled(datasets.load_from_disk(str(packed)))
    trained = datasets.ClassLabel(names=["cat", "dog", "bee", "ant"])
    found = with_classes_of(rows, trained)
    assert classes_of(found).names == trained.names
    numbers = {0: 3, 1: 2, 2: 0}
    wanted = [[numbers[label] for label in row] for row in rows["labels"][:]]
    assert found["labels"][:] == wanted
    with pytest.raises(ValueError, match="a label is 'ant', expected one of 'cat', 'bee'; train"):
        with_classes_of(rows, datasets.ClassLabel(names=["cat", "bee"]))


def described(*arguments):
    return json.loads(told("train", *arguments, "--dry-run", "--json"))


def test_rows_and_images_validate_each_other(images, packed, tmp_path):
    few = shutil.copytree(images / "bee", tmp_path / "few" / "bee").parent
    shutil.copytree(images / "cat", few / "cat")
    options = ["--model", "Ti/8", "--batch-size", 2, "--num-workers", 0]
    found = described(packed, tmp_path / "a", *options, "--val", few, "--val-tokens", 4)
    assert (found["images"], found["validation images"], found["classes"]) == (24, 16, 3)
    assert found["rows an epoch"] == len(datasets.load_from_disk(str(packed)))
    more = ["--sides", 16, 24, "--batch-size", 1]
    found = described(images, tmp_path / "a", *options, "--val", packed, *more)
    assert (found["images"], found["validation images"]) == (24, 24)
    said = told("train", packed, tmp_path / "b", *options, "--val", few, "--steps", 1)
    assert "val accuracy" in said


def test_what_save_to_disk_wrote_is_asked_as_its_rows_show(images, packed, tmp_path):
    dataset = datasets.load_dataset("imagefolder", data_dir=str(images), split="train")
    options = {"patch_size": 8, "prefix_tokens": 2, "output": tmp_path / "a", "progress": False}
    native = packpipe.pack(dataset, 64, **options)
    native.save_to_disk(tmp_path / "native")
    datasets.load_from_disk(str(packed)).save_to_disk(tmp_path / "drawn")
    assert manifest_in(tmp_path / "native") is None
    found = [
        TrainedRows(datasets.load_from_disk(str(tmp_path / name)), None, 8, 0)
        for name in ("native", "drawn")
    ]
    assert found[0].evaluation.resolution == "native"
    assert [rows.evaluation.prefix_tokens for rows in found] == [2, 0]
    most = max(np.prod(grid) for row in found[1].dataset["grid_hw"][:] for grid in row)
    assert (found[1].evaluation.resolution, found[1].evaluation.max_tokens) == ("budget", most)
    assert found[1].labelled.classes.names == list(NAMES)
    assert found[1].packs.num_packs(Key(0, 0)) == len(found[1].dataset)


@pytest.fixture(scope="module")
def others(packed, tmp_path_factory):
    """Folders that are no complete rows of labelled images."""
    folder = tmp_path_factory.mktemp("others")
    tokens = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    packpipe.pack(tokens, 4, output=folder / "tokens", progress=False)
    plain = Dataset.from_dict({"image": [Image.new("RGB", (8, 8))]}).cast_column(
        "image", datasets.Image()
    )
    packpipe.pack(plain, 4, patch_size=8, output=folder / "plain", progress=False)
    lazy = {"materialize": False, "output": folder / "lazy", "progress": False}
    packpipe.pack(plain, 4, patch_size=8, **lazy)
    shutil.copytree(packed, folder / "half")
    manifest = folder / "half" / "manifest.json"
    known = json.loads(manifest.read_text()) | {"complete": False}
    manifest.write_text(json.dumps(known))
    for part in ("images", "texts"):
        shutil.copytree(packed, folder / "pairs" / part)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{p}", "--sides", 32, 64], "--sides is (32, 64), expected left out, since the rows in"),
        (["{p}", "--seq-len", 16], "--seq-len is 16, expected left out, since the rows in"),
        (["{p}", "--layout", "square"], "--layout is 'square', expected left out"),
        (["{p}", "--crop-area", 0.5, 1], "--crop-area is (0.5, 1.0), expected left out"),
        (["{p}", "--drop-rate", 0.5], "--drop-rate is 0.5, expected left out"),
        (["{p}", "--profiles", "ignore"], "--profiles is 'ignore', expected left out"),
        (["{p}", "--label-column", "x"], "--label-column is 'x', expected left out"),
        (["{p}", "--max-bad-fraction", 0.5], "--max-bad-fraction is 0.5, expected left out"),
        (
            ["{p}", "--val", 0.3, "--val-tokens", 4],
            "--val-tokens is 4, expected left out, since the rows in",
        ),
        (["{p}", "--model", "Ti/16"], "patch size of the rows is 8, expected 16 (of the model); t"),
        (["{o}/tokens"], "rows is 'of token sequences', expected rows of images; pass what"),
        (["{o}/plain"], "expected labels among them; pack a source with a label column"),
        (["{o}/lazy"], "rows is 'packed with materialize=False', expected rows with patches"),
        (["{o}/half"], "half', expected a complete build; call pack again, and it continues"),
        (["{o}/pairs"], "pairs, of pairs', expected rows of images alone; pass "),
    ],
)
def test_what_rows_cannot_be_asked_for_is_said(arguments, message, packed, others, tmp_path):
    places = {"p": packed, "o": others}
    source, *options = (str(argument).format(**places) for argument in arguments)
    model = [] if "--model" in options else ["--model", "Ti/8"]
    result = run("train", source, tmp_path / "a", *model, *options)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert message in result.stderr
    assert not (tmp_path / "a").exists()


def test_embed_writes_the_features_of_the_images_in_rows_as_they_were_packed(
    packed, trained, tmp_path
):
    """In parts of whole rows, each in the order of its examples."""
    out, rows = tmp_path / "v.parquet", datasets.load_from_disk(str(packed))
    result = run("embed", trained, packed, out, "--columns", "label")
    assert "columns is 'label', expected one of ['labels'], and none of" in result.stderr
    found = json.loads(told("embed", trained, packed, out, "--part-size", 9, "--json"))
    assert found == {"output": str(out), "images": 24, "rejects": 0}
    table = pq.read_table(out)
    assert table.column_names == ["example_index", "labels", "embedding", "num_tokens"]
    order, step = [], 9 * len(rows) // 24
    for first in range(0, len(rows), step):
        order += sorted(np.concatenate(rows["example_index"][first : first + step]).tolist())
    assert table["example_index"].to_pylist() == order
    assert sorted(order) == list(range(24)) != order
    model, _ = packpipe.load_model(trained)
    head, model.head = model.head.weight, None
    model.config = replace(model.config, num_classes=None)
    answers = predict_packs(model, StoredPacks(rows))
    assert table["labels"].to_pylist() == answers.labels[order].tolist()
    assert table["num_tokens"].to_pylist() == answers.seq_lens[order].tolist()
    vectors = torch.tensor(table["embedding"].to_pylist())
    assert (vectors - answers.outputs[order]).abs().max() < 1e-5
    assert vectors.shape == (24, head.shape[1])


def test_embed_of_rows_that_lack_tokens_or_have_other_patches_is_refused(
    images, packed, trained, tmp_path
):
    told("embed", trained, packed, tmp_path / "maps.parquet", "--tokens")
    maps = pq.read_table(tmp_path / "maps.parquet")
    assert list(map(len, maps["tokens"].to_pylist())) == maps["num_tokens"].to_pylist()
    told("pack", images, tmp_path / "rows", *PACKING, "--drop-rate", 0.5)
    result = run("embed", trained, tmp_path / "rows", tmp_path / "a.parquet", "--tokens")
    assert "in the rows is 4, expected all 9 of its grid; pass images, or" in result.stderr
    told("pack", images, tmp_path / "large", "--seq-len", 16, "--num-workers", 0)
    result = run("embed", trained, tmp_path / "large", tmp_path / "a.parquet")
    assert "patch size of the rows is 16, expected 8 (of the model); take a" in result.stderr


def test_what_embed_knows_of_rows_tells_others_apart_and_rows_know_their_images(images):
    source = datasets.load_dataset("imagefolder", data_dir=str(images), split="train[:4]")
    packer = packpipe.Packer(64, patch_size=8, label_column="label")

    def rows(labels, fingerprint="same", *, with_indices=True):
        found = source.remove_columns("label").add_column("label", labels)
        found = found.map(
            packer, batched=True, with_indices=with_indices, remove_columns=["image", "label"]
        )
        found._fingerprint = fingerprint
        return EmbeddedRows(found, packer.config).fingerprint

    texts = [*"abcd"]
    known = rows(texts)
    assert known == rows(texts)
    assert len({known, rows([*"abdc"]), rows(texts, "another")}) == 3
    with pytest.raises(
        ValueError, match=r"example_index of the rows is -1, expected the number of"
    ):
        rows(texts, with_indices=False)


@pytest.mark.parametrize(("command", "more"), [("pack", ["o"]), ("plan", []), ("bench", [])])
def test_rows_are_no_source_of_other_commands(command, more, packed, trained, tmp_path):
    result = run(command, packed, *(tmp_path / name for name in more))
    assert result.exit_code == 2
    assert "packed rows', expected images or sequences, not packed yet" in result.stderr
    result = run("eval", trained, packed, "--budgets", "4")
    assert "budgets is [4], expected left out for packed rows; measure on" in result.stderr


def test_rows_are_not_packed_again(packed):
    with pytest.raises(ValueError, match="dataset is 'packed rows', expected images or sequences"):
        packpipe.pack(datasets.load_from_disk(str(packed)), 16)


def test_a_manifest_of_somebody_else_is_none(tmp_path):
    for text in ("{", "[]", '{"complete": true}'):
        (tmp_path / "manifest.json").write_text(text)
        assert manifest_in(Path(tmp_path)) is None
