"""`packpipe train`: every layout trains, stopped it goes on, what is wrong is said in a line."""

import io
import json
import logging
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import commanding
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, enable_progress_bars
from datasets import Image as DatasetImage
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm
from two_ranks import launch_two_ranks
from typer.testing import CliRunner

from packpipe.building.shards import alone_in
from packpipe.cli import training_run
from packpipe.cli.labels import with_classes_of
from packpipe.cli.layouts import Layout
from packpipe.cli.main import app
from packpipe.cli.open_source import open_source
from packpipe.cli.training_run import bar_of, trim_of
from packpipe.cli.validation_source import validation_of
from packpipe.planning.crops import Crop
from packpipe.samples import images_folder
from packpipe.training.checkpoints import checkpoints, model_of
from packpipe.training.loop import TrainConfig, read_log


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder of some bundled images of two labels, by folder name."""
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(sorted(p for p in images_folder().iterdir() if p.is_dir())[:2]):
        (folder / name.name).mkdir()
        for path in sorted(name.iterdir())[: 9 + number]:
            shutil.copy(path, folder / name.name / path.name)
    return folder


@given(st.integers(1, 2**15))
def test_bucketed_rows_have_eight_lengths_at_most(seq_len):
    trim = trim_of(seq_len)
    assert trim % 64 == 0
    assert -(-seq_len // trim) <= torch._dynamo.config.recompile_limit
    # No more is cut off than that asks for.
    assert trim == 64 or -(-seq_len // (trim - 64)) > 8
    assert -(-seq_len // trim_of(seq_len, validates=True)) <= 7  # one graph is of validation


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


SMALL = ["--model", "Ti/32", "--seq-len", "64", "--sides", "32", "128", "--batch-size", "2"]
QUICK = ["--steps", "4", "--log-every", "2", "--num-workers", "0"]


@pytest.mark.parametrize(("layout", "shape"), [("packed", "image"), ("square", "square")])
def test_images_are_cropped_in_training_and_stay_undistorted(layout, shape, few):
    found = Layout(layout, 64, (32, 128), 0.0, crop=Crop(0.5))
    packs = found.packs(open_source(str(few), "train"), 32, 0)
    assert packs.config.crop == Crop(0.5, shape=shape)
    said = run(few, few / "out", *SMALL, "--layout", layout, "--crop-area", 0.5, 0.5, "--dry-run")
    assert said.exit_code == 0, said.output
    assert f"{packs.plan(0, 0).quality.num_tokens:,}" in said.stdout


def test_sides_in_the_wrong_order_are_refused(few):
    with pytest.raises(ValueError, match=r"--sides is \(256, 64\), expected the smaller"):
        Layout("packed", 64, (256, 64), 0.0).packs(open_source(str(few), "train"), 32, 0)


@pytest.mark.parametrize("layout", ["packed", "padded", "bucketed", "square"])
def test_every_layout_trains(layout, few, tmp_path):
    result = run(few, tmp_path / "out", *SMALL, *QUICK, "--layout", layout)
    assert result.exit_code == 0, result.output
    assert "step 2  loss " in result.stdout
    assert "step 4  loss " in result.stdout
    log = read_log(tmp_path / "out")
    assert [record["step"] for record in log] == [2, 4]
    fills = {"packed": 0.7, "padded": 0.1, "bucketed": 0.1, "square": 1.0}
    assert log[-1]["fill"] >= fills[layout]
    assert (tmp_path / "out" / "training.png").read_bytes()[:4] == b"\x89PNG"
    model = model_of(tmp_path / "out")
    assert (model.config.dim, model.config.num_classes) == (192, 2)
    assert (model.config.attention == "reference") == (layout in ("padded", "bucketed"))


@pytest.mark.slow
def test_two_ranks_train_and_end(few, tmp_path):
    options = [*SMALL[:-1], 1, "--num-workers", 1, "--steps", 3, "--log-every", 1]
    launch_two_ranks(commanding.__file__, "train", few, tmp_path / "out", *options)
    assert [record["step"] for record in read_log(tmp_path / "out")] == [1, 2, 3]
    assert checkpoints(tmp_path / "out")[-1].name == "step-00000003"


def test_stopped_it_goes_on_with_all_that_is_switched_on(few, tmp_path, monkeypatch):
    tracked = []

    @contextmanager
    def tracking(folder, project="a board", **options):
        assert folder.is_relative_to(tmp_path / "out")
        assert options.get("config", {}).get("accumulate", 2) == 2
        yield lambda record: tracked.append((project, record.step))

    monkeypatch.setattr(training_run, "to_tensorboard", tracking)
    monkeypatch.setattr(training_run, "to_wandb", tracking)
    options = [*SMALL, "--num-workers", "0", "--log-every", "1", "--save-every", "1"]
    options += ["--learning-rate", "1e-4", "--accumulate", "2", "--ema", "0.9", "--clip", "0"]
    options += ["--layer-decay", "0.9", "--drop-path", "0.2", "--tensorboard", "--wandb", "photos"]
    assert run(few, tmp_path / "out", *options, "--steps", "3").exit_code == 0
    result = run(few, tmp_path / "out", *options, "--steps", "5", "--drop-rate", "0")
    assert result.exit_code == 0, result.output
    assert "step 3 " not in result.stdout
    assert "step 5 " in result.stdout
    assert [record["step"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4, 5]
    assert checkpoints(tmp_path / "out")[-1].name == "step-00000005"
    assert tracked == [(to, step) for step in range(1, 6) for to in ("a board", "photos")]
    state = json.loads((checkpoints(tmp_path / "out")[-1] / "state.json").read_text())
    assert state["version"] == 3  # with averaged weights
    assert state["loader"]["epoch"] > 0  # ten batches


VALIDATED = [*SMALL, *QUICK, "--learning-rate", "1e-4", "--val", "0.3", "--val-every", "2"]


@pytest.fixture(scope="module")
def validated(few, tmp_path_factory):
    """The folder of a training with images held out."""
    folder = tmp_path_factory.mktemp("validated")
    result = run(few, folder, *VALIDATED)
    assert result.exit_code == 0, result.output
    line = r"step 4  .*waited .*  val loss \d\.\d{4}  val accuracy \d\.\d{3}  val ECE \d\.\d{3}\n"
    assert re.search(line, result.stdout)
    assert re.search(r"step 4  .*/s  padding \d+\.\d%  waited", result.stdout)
    return folder


def test_images_are_held_out_and_measured(few, validated, tmp_path):
    log = read_log(validated)
    assert all(0 <= record["val_accuracy"] <= 1 for record in log)
    assert all(record["val_loss"] > 0 for record in log)
    described = json.loads(run(few, tmp_path / "no", *VALIDATED, "--dry-run", "--json").stdout)
    assert (described["images"], described["validation images"]) == (13, 6)  # 3 of 9, 3 of 10
    # Those of each class alone make the same packs: the same split, the same figures.
    again = run(few, tmp_path / "again", *VALIDATED, "--json")
    lines = [json.loads(line) for line in again.stdout.splitlines()]
    assert [line["val_loss"] for line in lines] == [record["val_loss"] for record in log]


def test_one_training_at_a_time_writes_into_a_folder(few, validated):
    before = {path.name: path.stat().st_mtime_ns for path in validated.iterdir()}
    with alone_in(validated, wait=False):
        result = run(few, validated, *VALIDATED, "--steps", "6")
    assert result.exit_code == 2
    message = f"output is '{validated} (being written by another process)', expected a folder of"
    assert message in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in validated.iterdir()} == before


def test_it_goes_on_with_the_same_images_held_out_and_with_no_others(few, validated, tmp_path):
    folder = shutil.copytree(validated, tmp_path / "copy")
    result = run(few, folder, *VALIDATED, "--steps", "6")
    assert result.exit_code == 0, result.output
    assert [record["step"] for record in read_log(folder)] == [2, 4, 6]
    assert "reached before" not in result.stdout
    said = run(few, folder, *VALIDATED, "--steps", "6").stdout
    assert said.startswith("step 6 was reached before; a larger --steps trains on\ncheckpoints")
    result = run(few, folder, *VALIDATED, "--steps", "8", "--val", "0.2")
    assert result.exit_code == 2
    assert "fingerprint of the validation images is '" in result.stderr


def test_another_source_is_measured_by_the_names_of_its_classes(few, tmp_path):
    names = sorted(path.name for path in few.iterdir())
    shutil.copytree(few / names[1], tmp_path / "one" / names[1])
    shutil.copytree(few / names[1], tmp_path / "one" / "zebra")
    result = run(few, tmp_path / "out", *VALIDATED, "--val", tmp_path / "one", "--dry-run")
    assert result.exit_code == 2
    message = f"a label is 'zebra', expected one of '{names[0]}', '{names[1]}'; train on"
    assert message in result.stderr
    trained, others = (ClassLabel(names=names) for names in (["b", "c", "a"], ["a", "b"]))
    features = Features({"label": others, "page": Value("int64")})
    own = Dataset.from_dict({"label": [0, 1, None, 0], "page": [1, 2, 3, 4]}, features)
    assert with_classes_of(own, trained)["label"] == [2, 0, None, 2]
    assert with_classes_of(own, others) is own


def test_a_source_beside_or_a_share_is_what_val_names(few, tmp_path, monkeypatch):
    """A path is no number, a split is found, and images that are trained on are refused."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(few, "2024")
    for split, many in [("train", 9), ("test", 8), ("validation", 7)]:
        for name in few.iterdir():
            (tmp_path / "all" / split / name.name).mkdir(parents=True)
            for path in sorted(name.iterdir())[:many]:
                shutil.copy(path, tmp_path / "all" / split / name.name)

    def images(*options):
        dataset = open_source("all", "train")
        return validation_of(*options, dataset=dataset, source="all", split="train")

    assert len(images("2024", None)) == 19
    assert len(images(str(tmp_path / "all"), None)) == 14
    assert len(images("all", "test")) == 16
    assert images("0.25", None) == 0.25
    link = tmp_path / "link"
    link.symlink_to("all")
    for val in ("all", "link", "all/train"):
        with pytest.raises(ValueError, match=rf"--val is '{val} \(train\)', expected other images"):
            images(val, "train")
    (tmp_path / "2024").rename("other")
    with pytest.raises(ValueError, match="--val is '2024', expected a share between 0 and 1, or a"):
        images("2024", None)
    with pytest.raises(ValueError, match=r"split is 'dev', expected one of .*; pass --val-split"):
        images("all", "dev")
    with pytest.raises(ValueError, match=r"--val is 'other .train.', expected other images than"):
        validation_of(
            "other", None, dataset=open_source("other", "train"), source="other", split="train"
        )


def test_images_that_are_validated_on_and_trained_on_are_told(few, tmp_path, capsys, monkeypatch):
    files = sorted(map(str, few.rglob("*.*")))
    tables = {"old": files[:6], "now": [files[7], files[1], files[8], files[5]], "few": files[2:4]}
    for name, paths in tables.items():
        lines = "\n".join(f"{path},{number % 2}" for number, path in enumerate(paths))
        (tmp_path / f"{name}.csv").write_text(f"path,label\n{lines}\n")
    source = str(tmp_path / "old.csv")

    def validated(name, dataset):
        val = str(tmp_path / name)
        return validation_of(val, None, dataset=dataset, source=source, split="train")

    old = open_source(source, "train")
    assert len(validated("now.csv", old)) == 4
    said = f"--val: 2 of 4 images are trained on, too, the first is {files[1]}\n"
    assert capsys.readouterr().err == said
    monkeypatch.setenv("RANK", "1")
    validated("now.csv", old)
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("RANK")
    with pytest.raises(ValueError, match=r"few.csv \(train\)', expected other images than those"):
        validated("few.csv", old)
    # In the dataset itself they are known by their bytes; of another kind nothing is known.
    for name in ("old", "now"):
        images = [{"bytes": Path(path).read_bytes(), "path": None} for path in tables[name]]
        features = Features({"photo" if name == "now" else "image": DatasetImage()})
        rows = Dataset.from_dict({next(iter(features)): images}, features)
        rows.to_parquet(tmp_path / f"{name}.parquet")
    validated("now.parquet", open_source(str(tmp_path / "old.parquet"), "train"))
    assert capsys.readouterr().err == said.replace(files[1], "example 1")
    validated("now.parquet", old)
    assert capsys.readouterr().err == ""


def test_the_luck_of_a_division_makes_no_good_folder_a_bad_one(few, tmp_path):
    """Of 20 images one is broken: 5 %, but more of those that are trained on."""
    shutil.copytree(few, tmp_path / "images")
    folder = sorted((tmp_path / "images").iterdir())[0]
    for number in range(2):
        (folder / f"broken-{number}.png").write_bytes(b"no image")
        options = [*VALIDATED, "--max-bad-fraction", "0.05", "--dry-run"]
        result = run(tmp_path / "images", tmp_path / "out", *options)
        assert result.exit_code == number, result.output
    message = "packpipe train: rejected is 2 of 21 examples (9.52%), expected at most 5.00%"
    assert message in result.stderr
    assert f"({folder / 'broken-0.png'}, {folder / 'broken-1.png'})" in result.stderr


def test_it_ends_early_and_says_so(few, tmp_path):
    options = [*VALIDATED, "--steps", "40", "--learning-rate", "1", "--patience", "1"]
    options += ["--val-every", "1"]
    result = run(few, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    last = read_log(tmp_path / "out")[-1]["step"]
    assert last < 40
    assert f"ended after step {last}: no lower loss in validation 1 times\n" in result.stdout


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_every_step_and_the_time_that_is_left(tmp_path, monkeypatch):
    (tmp_path / "step-00000006").mkdir()
    monkeypatch.setattr("sys.stderr", Terminal())
    enable_progress_bars()
    options = TrainConfig(steps=10, log_every=4)

    def shown_of(steps, *, interval=0.0):
        with bar_of(options, tmp_path) as found:
            found.bar.mininterval = interval
            steps(found)
        return sys.stderr.getvalue()

    def trained(bar):
        bar.step()
        bar.step()
        bar.record(SimpleNamespace(step=8, loss=0.25))
        logging.getLogger("packpipe.loading").warning("example 3 left out")
        bar.step()

    shown = shown_of(trained)
    assert re.search(r"60%.*6/10", shown)
    assert re.search(r"\r *70%[^\r]*7/10 [^\r]*step/s\]", shown)  # no loss is known
    assert re.search(r"90%[^\r]*9/10 [^\r]*step/s, loss=0\.2500\]", shown)  # that of step 8
    assert re.search(r"^(.*\r)?example 3 left out\n", shown, re.MULTILINE)
    assert not re.search(r"step\S* *example", shown)
    monkeypatch.setattr("sys.stderr", Terminal())
    # Not oftener than a terminal can show: what comes within the interval is counted.
    assert "7/10" not in shown_of(trained, interval=1000.0)
    assert "9/10" in sys.stderr.getvalue()
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert shown_of(trained) == ""


def test_every_step_of_a_training_moves_the_bar(few, tmp_path, monkeypatch):
    class Shown(tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "disable": False, "mininterval": 0})

    monkeypatch.setattr("packpipe.cli.training_run.tqdm", Shown)
    options = [*VALIDATED, "--steps", "3", "--log-every", "2", "--val-every", "3"]
    result = run(few, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    moves = re.findall(r"(\d)/3 [^\r]*?(loss=|validating|\])", result.stderr)
    assert moves[:2] == [("0", "]"), ("1", "]")]
    assert ("3", "loss=") in moves
    assert ("3", "validating") in moves
    assert result.stdout.count("step ") == 2  # as ever: a line a record


def test_too_many_broken_validation_images_are_named_by_their_files(few, tmp_path):
    shutil.copytree(few, tmp_path / "broken")
    broken = sorted(path for path in (tmp_path / "broken").rglob("*") if path.is_file())[:3]
    for path in broken:
        path.write_bytes(b"no image")
    result = run(few, tmp_path / "out", *VALIDATED, "--val", tmp_path / "broken")
    assert result.exit_code == 1
    assert "of the validation images, rejected is 3 of 19 examples" in result.stderr
    assert f"({', '.join(map(str, broken))})" in result.stderr


def test_validation_images_that_cannot_be_decoded_are_named_by_their_files(few, tmp_path):
    shutil.copytree(few, tmp_path / "cut")
    paths = sorted(path for path in (tmp_path / "cut").rglob("*") if path.is_file())
    for path in paths[:3]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = run(few, tmp_path / "out", *VALIDATED, "--val", tmp_path / "cut")
    assert result.exit_code == 1
    assert re.search("train: of the validation images, rejected is . of 19 examples", result.stderr)
    assert any(str(path) in result.stderr.split("(")[-1] for path in paths[:3])
    assert checkpoints(tmp_path / "out")[-1].name == "step-00000002"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--val", "1.5"], "--val is '1.5', expected a share between 0 and 1, or a source of im"),
        (["--val", "nowhere/at/all"], "--val is 'nowhere/at/all', expected a file, a folder or"),
        (
            ["--val", "0.2", "--val-split", "test"],
            "--val-split is 'test', expected none of a share",
        ),
        (["--val-split", "test"], "--val-split is 'test', expected none without --val; pass --val"),
        (["--val-every", "5"], "--val-every is 5, expected none without --val; pass --val, such"),
        (["--val-tokens", "5"], "--val-tokens is 5, expected none without --val; pass --val, su"),
        (["--keep-best", "0"], "--keep-best is 0, expected none without --val; pass --val, such"),
        (["--patience", "5"], "--patience is 5, expected none without --val; pass --val, such as"),
        (
            ["--val", "0.5", "--val-tokens", "65"],
            "max_tokens is 65, expected an integer in 1..64; an image must fit into a row",
        ),
        (
            ["--layout", "tight"],
            "layout is 'tight', expected one of 'packed', 'padded', 'buck",
        ),
        (["--model", "H/14"], "name is 'H/14', expected one of Ti, S, B, L, So400m and a patch"),
        (["--position", "absolute"], "position is 'absolute', expected one of 'factorised_absol"),
        (["--learning-rate", "0"], "learning_rate is 0.0, expected a number above 0; choose a"),
        (["--drop-rate", "1.5"], "drop_rate is 1.5, expected "),
        (["--augment", "two"], "preset is 'two', expected one of 'three', 'inception'; choose a"),
        (["--mixup", "-1"], "mixup is -1.0, expected a number in [0, 1000]; timm uses mixup=0.8"),
        (
            ["--cutmix", "1", "--layout", "padded"],
            "layout is 'padded', expected 'packed' with mixup and cutmix; others put one image",
        ),
        (["--pooling", "none"], "--pooling is 'none', expected one that gives an output an image"),
        (["--batch-size", "99"], "expected at least 99, those of a step (--batch-size x ranks);"),
        (["--ema", "1"], "ema is 1.0, expected in (0, 1); 0.999 is usual, None is none"),
        (["--drop-path", "1"], "drop_path is 1.0, expected in [0, 1); 0.1 is usual, 0 is none"),
        (["--label-smoothing", "0.1"], "label_smoothing is 0.1, expected 0 with loss='sigmoid'"),
        (
            ["--class-weights", "1,2,3"],
            "len(class_weights) is 3, expected 2, one a class; give one",
        ),
    ],
)
def test_a_wrong_option_is_said_in_a_line(options, message, few, tmp_path):
    result = run(few, tmp_path / "out", *SMALL, *QUICK, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    if options[0] in ("--pooling", "--batch-size", "--class-weights"):  # told before, too
        result = run(few, tmp_path / "out", *SMALL, *QUICK, *options, "--dry-run")
        assert (result.exit_code, message in result.stderr) == (2, True)
    assert "Traceback" not in result.output


def test_augmented_it_goes_on_and_without_augmentation_it_does_not(few, tmp_path):
    options = [*SMALL, "--num-workers", "0", "--log-every", "1"]
    options += ["--loss", "softmax", "--label-smoothing", "0.1"]
    options += ["--cutmix", "1"]
    assert run(few, tmp_path / "out", *options, "--augment", "three", "--steps", 1).exit_code == 0
    other = run(few, tmp_path / "out", *options, "--steps", "2")
    assert other.exit_code == 2
    said = "step-00000001 is of a training on other batches: state['augment'] is {'flip': 0.5, "
    assert said in other.stderr
    assert "expected {'flip': 0.0, " in other.stderr
    again = run(few, tmp_path / "out", *options, "--augment", "three", "--steps", "2")
    assert again.exit_code == 0, again.output
    assert [record["step"] for record in read_log(tmp_path / "out")] == [1, 2]


def test_a_source_that_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "empty", tmp_path / "out", *QUICK)
    assert result.exit_code == 2
    assert "empty, without any file', expected a folder of images" in result.stderr
