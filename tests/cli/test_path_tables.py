"""Tables of paths and labels as sources: CSV, TSV, JSON lines and Parquet."""

import csv
import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import packpipe
from packpipe.cli.labels import chosen, divided, labelled, num_outputs, with_one_image
from packpipe.cli.main import app
from packpipe.cli.open_source import open_source
from packpipe.cli.path_tables import read_text_table
from packpipe.loading.epochs import EpochPacks

ROWS = [("a/1.png", "ox"), ("a/2.PNG", "007"), ("b/3.png", "NA"), ("b/4.png", "ox")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of four images, in folders that say nothing of their classes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (path, _) in enumerate(ROWS, 1):
        (folder / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8 * number, 16), (number, 0, 0)).save(folder / path)
    return folder


def written(folder, name, rows, header=("path", "label")):
    """A table of rows beside the images."""
    path = folder / name
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(header, row, strict=True))) for row in rows]
        path.write_text("\n".join(lines))
    elif path.suffix == ".parquet":
        columns = [list(column) for column in zip(*rows, strict=True)]
        pq.write_table(pa.table(columns, list(header)), path)
    else:
        between = "\t" if path.suffix == ".tsv" else ","
        lines = [between.join("" if one is None else one for one in row) for row in (header, *rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def opened(path, **columns):
    return open_source(path, "train", **columns)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_of_paths_is_a_dataset_of_its_images(suffix, photos, tmp_path, monkeypatch):
    found = opened(written(photos, f"t.{suffix}", ROWS))
    monkeypatch.chdir(tmp_path)  # relative paths begin at the table's folder
    assert found.column_names == ["path", "image", "label"]
    assert found.features["image"] == ImageFeature()
    classes = found.features["label"]
    assert [classes.names[number] for number in found["label"]] == ["ox", "007", "NA", "ox"]
    assert found["path"][:] == [path for path, _ in ROWS]
    assert [image.size for image in found["image"]] == [(8, 16), (16, 16), (24, 16), (32, 16)]
    packs = EpochPacks(found, 16, patch_size=8, num_workers=1)
    assert packs.labels.to_pylist() == found["label"][:]
    if suffix in ("csv", "tsv"):  # `datasets` knows the others by when they were written, too
        written(photos, f"t.{suffix}", ROWS)
    assert opened(str(photos / f"t.{suffix}"))._fingerprint == found._fingerprint


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8)


@given(st.lists(st.tuples(texts, texts), max_size=5))
def test_values_are_texts_as_they_are_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("path", "label"), *rows])
    found = read_text_table(str(path))
    columns = [[row[number] or None for row in rows] for number in (0, 1)]
    assert [found["path"][:], found["label"][:]] == columns


def test_another_table_has_another_fingerprint(photos):
    prints = {
        opened(written(photos, name, rows), **more)._fingerprint
        for name, rows, more in (
            ("t.csv", ROWS, {}),
            ("t.csv", ROWS[:3], {}),
            ("t.csv", [(path, "x") for path, _ in ROWS], {}),
            ("t.csv", ROWS, {"label_column": "none"}),
        )
    }
    assert len(prints) == 4


def test_columns_are_named_where_they_cannot_be_found(photos):
    header = ("image", "mask", "kind", "page")
    rows = [(path, path, label, "7") for path, label in ROWS]
    path = written(photos, "t.csv", rows, header)
    with pytest.raises(ValueError, match=r"columns of paths is \['image', 'mask'\], expected exac"):
        opened(path)
    found = opened(path, image_column="image", label_column="kind")
    # In the place of its paths, since that is its name.
    assert found.column_names == ["mask", "page", "image", "kind"]
    assert labelled(found).features["kind"].names == ["007", "NA", "ox"]
    found = opened(path, image_column="mask", label_column="kind")
    assert found.features["mask"] == ImageFeature()
    for wrong in ({"label_column": "typo"}, {"image_column": "typo"}):
        with pytest.raises(ValueError, match="column is 'typo', expected one of"):
            chosen(opened(path, **{"image_column": "mask", **wrong}), **wrong)
    rows = [(path, label, "7") for path, label in ROWS]
    path = written(photos, "t.csv", rows, ("file", "kind", "page"))
    message = "'kind', 'page', 'image'], expected a label column among them; pass --label-column"
    with pytest.raises(ValueError, match=re.escape(message)):
        labelled(opened(path))


def test_what_is_not_there_is_a_reject_and_all_of_it_an_error(photos):
    gone = [("a/gone.png", "ox"), (None, "ox"), ("b/3.png", None)]
    path = written(photos, "t.csv", [*ROWS, *gone])
    packs = EpochPacks(
        opened(path), 16, patch_size=8, num_workers=1, max_bad_fraction=0.5, max_consecutive_bad=9
    )
    assert [reject.example_index for reject in packs.rejects] == [4, 5, 6]
    assert [reject.reason for reject in packs.rejects[:2]] == ["missing", "missing"]
    there = re.escape(f"expected files that are there; relative paths start at {photos}; pass")
    with pytest.raises(ValueError, match=f"column 'path' is 'a/gone.png', {there}"):
        opened(written(photos, "t.csv", gone[:2]))


def test_an_image_root_confines_the_paths_of_a_table(photos, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    outside = os.path.relpath(tmp_path / "out.png", photos)
    path = written(photos, "t.csv", [*ROWS, (outside, "ox")])
    options = ["--patch-size", 8, "--seq-len", 16, "--num-workers", 0, "--max-bad-fraction", 0.5]
    for root, reasons in ((photos, {"outside image_root": 1}), (None, {})):
        more = [] if root is None else ["--image-root", root]
        out = tmp_path / str(root is None)
        arguments = ["pack", path, out, *options, *more, "--image-column", "path"]
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        assert packpipe.summarize(out).manifest["counts"]["rejected_by_reason"] == reasons


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a/1.png,ox\nb/3.png,ox\n", "columns is ['a/1.png', 'ox'], expected different names of"),
        (b"path,path\na/1.png,ox\n", "columns is ['path', 'path'], expected different names of"),
        (b"path,label\na/1.png,\xff\n", "expected a table of UTF-8 text with names of columns"),
        (b"path,label\na/1.png,ox,1\n", "expected a table of UTF-8 text with names of columns"),
        (
            b"path;label\na/1.png;ox\n",
            "between them in t.csv; write the table anew with commas",
        ),
        (
            b"path;label\na/1.png;a, b\n",
            "columns is 'path;label', expected names with commas between them in t.csv; ",
        ),
        (b"path\tlabel\na/1.png\tox\n", "between them in t.csv; name the file .tsv"),
        (
            rb"path,label" + b"\n" + rb"a\1.png,ox" + b"\n",
            "write / for the backslashes of Windows, or pass --image-column",
        ),
        (b"", "expected a table of UTF-8 text with names of columns"),
    ],
)
def test_a_table_that_is_none_is_said(content, message, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        opened(str(tmp_path / "t.csv"))


def test_a_byte_order_mark_is_no_part_of_a_name(photos):
    path = photos / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfpath,label\r\na/1.png,ox\r\n")
    assert opened(str(path)).column_names == ["path", "image", "label"]


def test_tables_of_images_or_tokens_stay_what_they_are(photos):
    rows = [{"file": path, "input_ids": [1, 2]} for path, _ in ROWS]
    (photos / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "image" not in opened(str(photos / "t.jsonl")).column_names
    assert opened(str(photos / "t.jsonl"), image_column="file").features["image"] == ImageFeature()


def test_of_several_columns_the_one_that_is_asked_for_is_taken(photos):
    path = written(photos, "t.csv", ROWS)
    images = opened(path).rename_column("path", "name")
    stored = images.with_format("arrow")[:]["image"].to_pylist()
    two = images.add_column("thumb", stored, feature=ImageFeature())
    two = two.add_column("kind", [1, 0, 1, 0], feature=ClassLabel(names=["x", "y"]))
    found = chosen(two, "thumb", "kind")
    assert found.column_names == ["thumb", "kind"]
    assert labelled(found)["kind"][:] == [1, 0, 1, 0]
    assert labelled(chosen(two, "thumb", "name")).features["label"].num_classes == 4
    assert with_one_image(two, "thumb").column_names == ["name", "label", "thumb", "kind"]
    assert with_one_image(two, "auto") is two
    with pytest.raises(ValueError, match="image_column is 'no', expected one of"):
        with_one_image(two, "no")
    with pytest.raises(ValueError, match=r"pass image_column \(--image-column\)"):
        labelled(two)
    both = two.remove_columns(["thumb"]).rename_column("kind", "labels")
    with pytest.raises(ValueError, match=r"pass label_column \(--label-column\)"):
        labelled(both)


@pytest.mark.parametrize("name", ["label", "kind"])
@pytest.mark.parametrize(
    ("labels", "outputs"),
    [
        ([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], 2),
        ([0.5, -1.0, 2.0, 0.25], 1),
        ([3, 7, 7, 40], 1),
    ],
)
def test_labels_that_are_no_texts_stay_what_they_are(name, labels, outputs, photos):
    rows = [(path, label) for (path, _), label in zip(ROWS, labels, strict=True)]
    path = written(photos, "t.jsonl", rows, ("path", name))
    asked = {"image_column": "path", "label_column": name}
    columns = [asked] if name == "kind" and outputs == 2 else [{}, asked]
    for some in columns:
        found = labelled(chosen(opened(path, **some, texts=True), **some), "mse")
        assert found["label"][:] == labels
        assert num_outputs(found) == outputs


def test_classes_of_a_table_keep_their_names(photos):
    features = Features({"path": Value("string"), "label": ClassLabel(names=["yak", "ox"])})
    columns = {"path": [path for path, _ in ROWS], "label": [1, 0, 1, 1]}
    Dataset.from_dict(columns, features=features).to_parquet(photos / "t.parquet")
    found = labelled(opened(str(photos / "t.parquet")))
    assert found.features["label"].names == ["yak", "ox"]
    assert found["label"][:] == [1, 0, 1, 1]


def test_texts_are_parsed_as_numbers_for_a_regression_alone(photos):
    written_as = ["007", "1.5", " -2e1", None]
    rows = [(path, text) for (path, _), text in zip(ROWS, written_as, strict=True)]
    path = written(photos, "t.csv", rows, ("path", "size"))
    for columns in ({}, {"label_column": "size"}):
        found = chosen(opened(path, **columns, texts=True), **columns)
        assert labelled(found, "l1")["label"][:] == [7, 1.5, -20, None]
        assert labelled(found).features["label"].names == ["-2e1", "007", "1.5"]
    assert opened(path).features["size"].names == ["-2e1", "007", "1.5"]
    with pytest.raises(ValueError, match="a label is 'ox', expected a number for --loss mse; "):
        labelled(opened(written(photos, "t.csv", ROWS), texts=True), "mse")


def test_blanks_after_commas_belong_to_no_name(photos):
    rows = [(path, f" {label} ") for path, label in ROWS] + [("a/1.png", " ")]
    found = opened(written(photos, "t.csv", rows, ("path", " label")))
    assert found.features["label"].names == ["007", "NA", "ox"]
    assert found["label"][:] == [2, 0, 1, 2, None]


def test_a_file_that_is_listed_twice_is_trained_on_or_held_out(tmp_path):
    once = [(f"a/{n}.png", "ox") for n in range(12)]
    for path, _ in once:
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    twice = [*once, *((f"./{path}", "cow") for path, _ in once[::3]), *once[1::3]]

    def parts(rows):
        table = labelled(chosen(opened(written(tmp_path, "t.csv", rows))))
        sides = divided(table, 0.3, 1)
        assert sum(map(len, sides)) == len(rows)
        return [
            {
                os.path.normpath(one["path"])
                for one in side.with_format("arrow")[:]["image"].to_pylist()
            }
            for side in sides
        ]

    trained, held = parts(twice)
    assert not trained & held
    assert (trained, held) == tuple(parts(once))
    assert len(held) == 4
