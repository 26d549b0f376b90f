"""Masks, weights and weights of classes from the command line, for training and `eval`."""

import json
import re

import datasets
import numpy as np
import pytest
import torch
from commands import run, told
from PIL import Image

import packpipe
from packpipe.cli.compared import Compared, class_weights_of
from packpipe.cli.open_source import open_source
from packpipe.training.checkpoints import checkpoints
from packpipe.training.evaluation import measure
from packpipe.training.log import read_log
from packpipe.training.loop import train
from packpipe.training.losses import LOSSES
from packpipe.training.train_config import TrainConfig

SMALL = ["--model", "Ti/16", "--seq-len", 64, "--sides", 32, 64, "--batch-size", 2]
QUICK = ["--num-workers", 0, "--log-every", 5, "--loss", "softmax", "--learning-rate", 1e-3]


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """A folder of light squares on dark ground, their masks, and a table of both with weights."""
    folder = tmp_path_factory.mktemp("squares")
    for name in ("photos", "masks"):
        (folder / name).mkdir()
    draw = np.random.default_rng(0)
    lines = ["photo, mask, matters"]
    for number in range(12):
        classes = np.zeros(draw.integers(48, 80, 2), np.uint8)
        top, left = draw.integers(0, 24, 2)
        classes[top : top + 24, left : left + 24] = 1
        pixels = np.stack([40 + 160 * classes] * 3, -1)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
        Image.fromarray(classes).save(folder / "masks" / f"{number}.png")
        lines.append(f"photos/{number}.png, masks/{number}.png, {number % 3}")
    text = "\n".join(line.replace(", ", ",") for line in lines)
    (folder / "table.csv").write_text(text)
    (folder / "names.txt").write_text("ground\nsquare\n")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small model that gives a vector an image, with a table that fits any grid."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(1)
    shape = {"dim": 32, "depth": 2, "heads": 2, "position": "resized", "max_side": 4}
    config = packpipe.NaViTConfig(num_classes=3, pooling="mean", norm_pooled=True, **shape)
    packing = packpipe.PackConfig(seq_len=64, resolution="budget", max_tokens=16)
    packpipe.save_pretrained(packpipe.NaViT(config), packing, folder, loss="softmax")
    return folder


@pytest.fixture(scope="module")
def trained(squares, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = [*QUICK, "--batch-size", 2, "--init", encoder, "--steps", 40, "--seed", 3]
    options += ["--mask-column", "mask", "--target-stride", 4, "--image-column", "photo"]
    options += ["--classes", squares / "names.txt", "--weight-column", "matters"]
    options += ["--class-weights", "1,2", "--val", 0.25, "--val-every", 20]
    said = told("train", squares / "table.csv", folder, *options, "--learning-rate", 5e-3)
    assert re.search(r"step 40 .* val IoU 0\.\d{3}\n", said)
    return folder


def test_a_segmentation_model_is_trained_and_measured_by_commands_alone(squares, trained):
    model, options = packpipe.load_model(trained)
    shape = model.config
    assert (shape.pooling, shape.target_stride, shape.num_classes) == ("none", 4, 2)
    assert (options.class_names, options.label_column) == (("ground", "square"), "mask")
    first, last = read_log(trained)[0], read_log(trained)[-1]
    assert last["loss"] < first["loss"]
    assert last["val_iou"] > 0.6  # a quarter or less of each image is square
    assert last["val_images"] == 3
    asked = ["--image-column", "photo", "--mask-column", "mask"]
    (found,) = json.loads(told("eval", trained, squares / "table.csv", *asked, "--json"))["budgets"]
    # The same figures as by the functions.
    numbers = range(12)
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    table = {
        name: [str(squares / where / f"{n}.png") for n in numbers]
        for name, where in (("image", "photos"), ("mask", "masks"))
    }
    dataset = datasets.Dataset.from_dict(table).cast(features)
    packs = packpipe.EpochPacks(
        dataset, **options.packing.to_options(), mask_column="mask", target_stride=4
    )
    loader = packpipe.PackedLoader(packs, 8, tail="pad")
    assert found == {"max_tokens": 16, **measure(model, loader, LOSSES["softmax"])._asdict()}
    assert f"IoU {found['iou']:.4f}" in told("eval", trained, squares / "table.csv", *asked)
    # Masks that lie in the table itself are the same.
    dataset.cast_column("mask", datasets.Image(decode=False)).to_parquet(squares / "t.parquet")
    again = json.loads(told("eval", trained, squares / "t.parquet", *asked[2:], "--json"))
    assert again["budgets"] == [found]


def test_weights_of_images_and_of_classes_are_those_of_the_function(squares, tmp_path):
    kinds = [number % 2 for number in range(12)]
    text = "photo,kind,matters\n" + "\n".join(
        f"photos/{n}.png,{'ab'[kind]},{n % 4}" for n, kind in enumerate(kinds)
    )
    (squares / "kinds.csv").write_text(text)
    options = [*SMALL, *QUICK, "--sides", 48, 48, "--label-column", "kind", "--steps", 1]
    options += ["--weight-column", "matters", "--class-weights", "3,0.5"]
    told("train", squares / "kinds.csv", tmp_path / "run", *options)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["a", "b"]),
            "matters": datasets.Value("float32"),
        }
    )
    images = [str(squares / "photos" / f"{n}.png") for n in range(12)]
    columns = {"image": images, "label": kinds, "matters": [n % 4 for n in range(12)]}
    side = packpipe.Side(packpipe.Constant(48))
    packs = packpipe.EpochPacks(
        datasets.Dataset.from_dict(columns).cast(features),
        64,
        resolution=side,
        weight_column="matters",
    )
    config = TrainConfig(steps=1, loss="softmax", learning_rate=1e-3, class_weights=[3, 0.5])
    torch.manual_seed(0)
    model = packpipe.NaViT(packpipe.NaViTConfig.preset("Ti/16", num_classes=2))
    (record,) = train(model, packpipe.PackedLoader(packs, 2), config)
    assert read_log(tmp_path / "run")[0]["loss"] == pytest.approx(record.loss, abs=1e-6)


def test_a_model_that_is_trained_on_masks_begins_with_one_of_images(
    squares, encoder, trained, tmp_path
):
    asked = [*QUICK, "--batch-size", 2, "--mask-column", "mask", "--classes", 2, "--steps", 2]
    asked += ["--image-column", "photo", "--target-stride", 8, "--freeze", 1]
    told("train", squares / "table.csv", tmp_path / "run", *asked, "--init", encoder)
    model, _ = packpipe.load_model(tmp_path / "run")
    assert (model.config.pooling, model.config.norm_pooled) == ("none", False)
    before, _ = packpipe.from_pretrained(encoder)
    assert torch.equal(model.embed.weight, before.embed.weight)
    # And with a run of one, which is refused where there are labels of images.
    told("train", squares / "table.csv", tmp_path / "next", *asked, "--init", trained)
    options = ["--init", trained, "--image-column", "photo", "--label-column", "matters"]
    result = run("train", squares / "table.csv", tmp_path / "no", *options)
    assert "pooling of --init is 'none', expected one that gives an output an im" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-stride", 4], "--target-stride is 4, expected left out without --mask-column"),
        (["--classes", 4], "--classes is '4', expected left out without --mask-column; pass the"),
        (["--mask-column", "mask"], "--classes is None, expected how many classes masks have"),
        (["--mask-column", "mask", "--classes", 1], "--classes is 1, expected an integer in 2..65"),
        (
            ["--mask-column", "mask", "--classes", "no.txt"],
            "--classes is 'no.txt', expected a whole number, or a file of text in UTF-8 (No",
        ),
        (
            ["--mask-column", "mask", "--classes", 2, "--pooling", "mean"],
            "--pooling is 'mean', expected left out beside --mask-column mask",
        ),
        (
            ["--mask-column", "mask", "--classes", 2, "--label-column", "matters"],
            "--label-column is 'matters', expected left out beside --mask-column mask",
        ),
        (
            ["--mask-column", "mask", "--classes", 2, "--target-stride", 5],
            "target_stride is 5, expected a divisor of 16 (patch_size)",
        ),
        (
            ["--mask-column", "mask", "--classes", 2, "--loss", "mse"],
            "loss is 'mse', expected 'softmax' or 'sigmoid' without pooling",
        ),
        (
            ["--mask-column", "matters", "--classes", 2],
            "column 'matters' is '0', expected files that are there; relative paths start at",
        ),
        (["--image-column", "auto"], "columns of paths is ['photo', 'mask'], expected exactly one"),
        (["--label-column", "matters", "--class-weights", "1;2"], "--class-weights is '1;2', exp"),
        (["--label-column", "mask", "--class-weights", "1"], "len(class_weights) is 1, expected 1"),
        (["--weight-column", "mask"], "a weight is 'masks/0.png', expected a number an image; pa"),
        (["--weight-column", "none"], "weight_column is 'none', expected one of ['photo', 'mask'"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(options, message, squares, tmp_path):
    given = ["--image-column", "photo", *options]
    result = run("train", squares / "table.csv", tmp_path / "out", *SMALL, *QUICK, *given)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()[-1:]
    assert message in line
    assert not checkpoints(tmp_path / "out")


def test_a_dry_run_refuses_what_the_run_would(squares, tmp_path):
    asked = ["--image-column", "photo", "--mask-column", "mask", "--classes", 2]
    options = [*asked, "--class-weights", "balanced", "--dry-run"]
    result = run("train", squares / "table.csv", tmp_path / "out", *SMALL, *QUICK, *options)
    assert result.exit_code == 2, result.output
    assert "class_weights is 'balanced', expected a list of numbers, unless" in result.stderr


def test_a_model_is_measured_by_what_it_answers(squares, encoder, trained):
    table = squares / "table.csv"
    result = run("eval", trained, table, "--image-column", "photo", "--label-column", "matters")
    assert result.exit_code == 2
    assert "mask_column is None, expected a column of class maps, since the mod" in result.stderr
    asked = ["--image-column", "photo", "--mask-column", "mask"]
    result = run("eval", encoder, table, *asked)
    assert "mask_column is 'mask', expected None, since the model answers for imag" in result.stderr
    result = run("predict", trained, squares / "photos")
    assert (
        "pooling of the model is 'none', expected one that gives an output an im" in result.stderr
    )


def test_masks_of_many_classes_say_so(squares):
    found = open_source(
        str(squares / "table.csv"), "train", image_column="photo", mask_column="mask"
    )
    assert Compared("mask", num_classes=255).telling(found).features["mask"].mode is None
    assert Compared("mask", num_classes=256).telling(found).features["mask"].mode == "I;16"


def test_weights_of_classes_are_a_word_or_numbers():
    assert class_weights_of(None) is None
    assert class_weights_of("balanced") == "balanced"
    assert class_weights_of("1,2.5,0") == [1, 2.5, 0]
