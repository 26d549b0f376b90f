"""`packpipe eval` and `packpipe predict`: what a run answers, and images that cannot be read."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import packpipe
from packpipe.cli.main import app
from packpipe.loading.epochs import EpochPacks
from packpipe.model.predict import predict_packs
from packpipe.training.evaluation import accuracy, calibration_error


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of two classes of images: dark and light ones, of several sizes."""
    folder = tmp_path_factory.mktemp("shapes")
    draw = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 210)):
        (folder / name).mkdir()
        for number in range(8):
            size = (int(draw.integers(20, 90)), int(draw.integers(20, 90)), 3)
            pixels = np.clip(draw.normal(level, 20, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = ["--model", "Ti/32", "--seq-len", 64, "--sides", 32, 128, "--batch-size", 1]
    options += ["--steps", 12, "--num-workers", 0, "--learning-rate", 1e-3, "--val", 0.25]
    told("train", shapes, folder, *options, "--val-every", 4)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def told(*arguments):
    """Return what a command that is fine has printed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_run_says_what_it_is(trained):
    model, options = packpipe.load_model(trained)
    assert options.class_names == ("dark", "light")
    assert options.label_column == "label"
    assert options.loss == "sigmoid"
    assert (options.packing.seq_len, options.packing.patch_size) == (64, 32)
    assert (options.packing.resolution, options.packing.max_tokens) == ("budget", 16)
    assert model.config.num_classes == 2


def test_eval_gives_the_figures_of_the_answers_at_each_budget(shapes, trained):
    found = json.loads(told("eval", trained, shapes, "--budgets", "4,16", "--json"))
    assert found["run"] == str(trained)
    assert [line["max_tokens"] for line in found["budgets"]] == [4, 16]
    model, _ = packpipe.load_model(trained)
    from packpipe.cli.open_source import open_source

    dataset = open_source(str(shapes), "train")
    for line in found["budgets"]:
        options = {"resolution": "budget", "max_tokens": line["max_tokens"]}
        packs = EpochPacks(dataset, 64, patch_size=32, num_workers=1, **options)
        answers = predict_packs(model, packs)
        assert line["num_images"] == len(answers.labels) == 16
        assert line["accuracy"] == pytest.approx(accuracy(answers))
        assert line["ece"] == pytest.approx(calibration_error(answers), abs=1e-6)
    assert found["budgets"][0]["loss"] != found["budgets"][1]["loss"]
    table = told("eval", trained, shapes)
    assert f"16 tokens  accuracy {found['budgets'][1]['accuracy']:.4f}  loss " in table
    assert "on 16 images of" in table


def test_eval_goes_by_the_names_of_classes(shapes, trained, tmp_path):
    shutil.copytree(shapes / "light", tmp_path / "half" / "light")
    shutil.copytree(shapes / "light", tmp_path / "half" / "twilight")
    result = run("eval", trained, tmp_path / "half")
    assert result.exit_code == 2
    assert "packpipe eval: a label is 'twilight', expected one of 'dark', 'light'" in result.stderr


def test_predict_names_the_classes_of_each_image(shapes, trained):
    files = [shapes / "light" / "3.png", shapes / "dark" / "0.png", shapes / "light" / "1.png"]
    found = json.loads(told("predict", trained, *files, "--json"))
    assert found["rejects"] == []
    assert [one["image"] for one in found["predictions"]] == list(map(str, files))
    model, options = packpipe.load_model(trained)
    shares = packpipe.predict(model, files, **options.packing.to_options()).double().sigmoid()
    for one, row in zip(found["predictions"], shares, strict=True):
        by_name = {each["name"]: each["probability"] for each in one["classes"]}
        wanted = dict(zip(("dark", "light"), row.tolist(), strict=True))
        assert by_name == pytest.approx(wanted, abs=1e-6)
        assert list(by_name) == sorted(wanted, key=wanted.get, reverse=True)
    said = told("predict", trained, shapes / "dark", "--top", 1)
    assert all(f"{number}.png" in said for number in range(8))
    assert said.count("dark ") + said.count("light ") == 8


def test_images_that_cannot_be_read_are_rejects_and_status_1(shapes, trained, tmp_path):
    whole = (shapes / "dark" / "1.png").read_bytes()
    (tmp_path / "no.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    files = [tmp_path / "no.png", shapes / "dark" / "2.png", tmp_path / "cut.png"]
    files += [tmp_path / "missing.png"]
    result = run("predict", trained, *files, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [one["image"] for one in found["predictions"]] == [str(files[1])]
    named = [one["image"] for one in found["rejects"]]
    assert named == [str(files[0]), str(files[2]), str(files[3])]
    assert all(one["reason"] and one["exception"] for one in found["rejects"])
    result = run("predict", trained, files[0])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"{files[0]}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "RUN", "SHAPES", "--budgets", "64;128"], "budgets is '64;128', expected whole n"),
        (["eval", "RUN", "SHAPES", "--budgets", "0"], "max_tokens is 0, expected an integer in 1"),
        (["eval", "SHAPES", "SHAPES"], "holds no checkpoint; train with this folder first"),
        (["predict", "SHAPES", "a.png"], "holds no checkpoint; train with this folder first"),
    ],
)
def test_a_wrong_call_is_said_in_a_line(arguments, message, shapes, trained):
    places = {"RUN": trained, "SHAPES": shapes}
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert f"packpipe {arguments[0]}: " in result.stderr
