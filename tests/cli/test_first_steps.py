"""What a newcomer meets on the way to a model: each wrong source is said in a sentence."""

import json
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from packpipe.cli.main import app

QUICK = ["--model", "Ti/32", "--seq-len", 16, "--sides", 32, 64, "--batch-size", 1]
QUICK += ["--num-workers", 0]


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def images(folder, *paths):
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32 + number, 40)).save(folder / path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders and tables, each with something amiss; ok is fine."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "empty" / "class").mkdir(parents=True)
    images(folder, *(f"ok/{name}/{number}.png" for name in "ab" for number in range(2)))
    images(folder, *(f"other/{name}/{number}.png" for name in "cd" for number in range(2)))
    images(folder, "one/cat/1.png", "one/cat/2.png", "two/a/1.png", "two/b/2.png")
    for path in ("broken/a/1.png", "broken/b/2.png", "texts/a.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("no image")
    tables = {
        "gone": "path,label\ngone/1.png,a\n",
        "unlabelled": "path\nok/a/0.png\nok/b/0.png\n",
        "alike": "path,label\nok/a/0.png,a\nok/b/0.png,a\n",
        "names": "name,label\nx,a\n",
        "bare": "path,label\n",
    }
    for name, text in tables.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = run("train", sources / "ok", folder, *QUICK, "--steps", 1)
    assert result.exit_code == 0, result.output
    return folder


ONE_FOLDER = "put the images of each class into a folder of its own"


@pytest.mark.parametrize(
    ("source", "status", "message"),
    [
        ("empty", 2, "without any file', expected a folder of images, a table or an archive; put"),
        (
            "ok/a/0.png",
            2,
            "0.png, an image', expected a folder of images, a table or an archive; pa",
        ),
        (
            "one",
            2,
            f"expected a label column among them; pass --label-column, or {ONE_FOLDER}",
        ),
        ("alike.csv", 2, "classes is ['a'], expected two or more; add images of another class, or"),
        ("broken", 1, "rejected is 2 of 2 examples (100.00%), expected at most 1.00% (max_bad_fr"),
        ("texts", 2, "columns of text is ['text'], expected images"),
        ("gone.csv", 2, "column 'path' is 'gone/1.png', expected files that are there; relative"),
        (
            "unlabelled.csv",
            2,
            "columns is ['path', 'image'], expected a label column among them; pass",
        ),
        ("names.csv", 2, "columns is ['name', 'label'], expected paths of images among them; pass"),
        ("bare.csv", 2, "columns is ['path', 'label'], expected paths of images among them; pass"),
    ],
)
def test_training_says_what_is_amiss_with_a_source(source, status, message, sources, tmp_path):
    result = run("train", sources / source, tmp_path / "run", *QUICK, "--steps", 1)
    assert result.exit_code == status, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("packpipe train: ")
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("val", [[], ["--val", 0.5]])
def test_images_that_are_left_out_are_named(val, sources, tmp_path):
    folder = shutil.copytree(sources / "ok", tmp_path / "images")
    (folder / "b" / "9.png").write_text("no image")
    options = [*QUICK, *val, "--dry-run", "--max-bad-fraction", 0.5]
    result = run("train", folder, tmp_path / "run", *options)
    assert result.exit_code == 0, result.output
    said = f"rejected {folder / 'b' / '9.png'}: UnidentifiedImageError: no known image format\n"
    assert result.stderr == said
    # None of those is counted as an image, and of many some are named.
    for number in range(6):
        (folder / "b" / f"9{number}.png").write_text("no image")
    result = run("train", folder, tmp_path / "run", *options, "--json", "--max-bad-fraction", 0.9)
    found = json.loads(result.stdout)
    good = sum(len(list(each.iterdir())) for each in (sources / "ok").iterdir())
    assert found["images"] + found.get("validation images", 0) == good
    assert found["rejected images"] == 7
    assert len(result.stderr.splitlines()) == 6
    assert result.stderr.endswith("and 2 more are rejected\n")


def test_two_images_train_and_cannot_be_divided(sources, tmp_path):
    options = [*QUICK, "--dry-run"]
    assert run("train", sources / "two", tmp_path / "run", *options).exit_code == 0
    result = run("train", sources / "two", tmp_path / "run", *options, "--val", 0.5)
    assert result.exit_code == 2
    assert "labels is '2 lone ones', expected two or more examples of a class" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "{s}/other", "{run}", *QUICK, "--steps", 2],
            "class_names is ('c', 'd'), expect",
        ),
        (["eval", "{run}", "{s}/empty"], "without any file', expected a folder of images"),
        (["eval", "{run}", "{s}/other"], "a label is 'c', expected one of 'a', 'b'; train on"),
        (["eval", "{run}", "{s}/unlabelled.csv"], "expected a label column among them; pass --lab"),
        (["eval", "{s}/ok", "{s}/ok"], "holds no checkpoint; train with this folder first"),
        (["predict", "{run}", "{s}/empty"], "without any image', expected images; pass files"),
        (["predict", "{s}/ok", "{s}/ok"], "holds no checkpoint; train with this folder first"),
        (["embed", "{run}", "{s}/empty", "v.parquet"], "without any file', expected a folder of"),
    ],
)
def test_asking_says_what_is_amiss(arguments, message, sources, trained):
    places = {"s": sources, "run": trained}
    result = run(*(str(argument).format(**places) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_more_images_of_the_same_classes_are_not_gone_on_with(sources, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    more = shutil.copytree(sources / "ok", tmp_path / "more")
    images(more, "a/9.png")
    result = run("train", more, folder, *QUICK, "--steps", 2)
    assert result.exit_code == 2
    assert "expected" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_bench_takes_images_without_labels(sources, monkeypatch):
    monkeypatch.setattr("packpipe.cli.bench.matrix_rate", lambda *_: 1e18)
    options = ["--model", "Ti/32", "--seq-len", 16, "--sides", 32, 64, "--num-workers", 0]
    result = run("bench", sources / "one", *options, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("An epoch of these 2 images takes ")
