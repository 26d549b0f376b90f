"""`packpipe eval`, `predict` and `embed`: what a run answers, and images that cannot be read."""

import json
import os
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from golden_naflexvit import FOLDER
from pictures import two_classes
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from typer.testing import CliRunner

import packpipe
from packpipe.cli import embedding
from packpipe.cli.main import app
from packpipe.cli.open_source import open_source
from packpipe.loading.epochs import EpochPacks
from packpipe.model import precision
from packpipe.model.attention import FlatTokens
from packpipe.model.predict import predict_packs
from packpipe.training.evaluation import accuracy, calibration_error

STRIDE = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 3  # of the moments of a kill


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of two classes of images: dark and light ones, of several sizes."""
    return two_classes(tmp_path_factory.mktemp("shapes"), 40, 210)


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


def test_eval_names_the_images_that_are_left_out(some_broken, trained):
    result = run("eval", trained, some_broken, "--max-bad-fraction", 0.2, "--num-workers", 0)
    assert result.exit_code == 0, result.output
    assert "on 14 images of" in result.stdout
    bad = some_broken / "light" / "0.png"
    assert result.stderr == f"rejected {bad}: UnidentifiedImageError: no known image format\n"


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


@pytest.fixture(scope="module")
def some_broken(shapes, tmp_path_factory):
    """The same images, of which one has no header and one is cut off within its pixels."""
    folder = shutil.copytree(shapes, tmp_path_factory.mktemp("broken") / "shapes")
    whole = (folder / "dark" / "6.png").read_bytes()
    (folder / "dark" / "6.png").write_bytes(whole[: len(whole) // 2])
    (folder / "light" / "0.png").write_bytes(b"no image")
    return folder


def test_embed_writes_the_pooled_features_of_each_image(
    some_broken, trained, tmp_path, monkeypatch
):
    bars = []

    def bar(**options):  # that of `datasets` shows nothing where stderr is no terminal
        bars.append(tqdm(**{**options, "disable": False}))
        return bars[-1]

    monkeypatch.setattr(embedding, "tqdm", bar)
    out = tmp_path / "new" / "vectors.parquet"
    options = ["--part-size", 5, "--max-bad-fraction", 0.2, "--num-workers", 0]
    found = json.loads(told("embed", trained, some_broken, out, *options, "--json"))
    assert found == {"output": str(out), "images": 14, "rejects": 2}
    assert [(one.n, one.total) for one in bars] == [(16, 16)]
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "vectors.parquet",
        "vectors.rejects.parquet",
    ]
    table = pq.read_table(out)
    assert table.schema.names == ["example_index", "label", "path", "embedding", "num_tokens"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 192)
    index = [number for number in range(16) if number not in (6, 8)]
    assert table["example_index"].to_pylist() == index
    assert table["label"].to_pylist() == [int(number >= 8) for number in index]
    rejects = pq.read_table(embedding.rejects_path(out)).to_pylist()
    assert [reject["example_index"] for reject in rejects] == [6, 8]
    assert [reject["stage"] for reject in rejects] == ["decode", "probe"]
    # As `datasets` reads it, with the names of the classes.
    features = datasets.Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "hf")).features
    assert features["label"].names == ["dark", "light"]
    model, asked = packpipe.load_model(trained)
    head, model.head = model.head.weight, None
    model.config = packpipe.NaViTConfig(**{**vars(model.config), "num_classes": None})
    images = open_source(str(some_broken), "train")
    paths = [images.data["image"][number].as_py()["path"] for number in index]
    wanted = packpipe.predict(model, paths, **asked.packing.to_options())
    assert table["path"].to_pylist() == paths
    bad = [str(some_broken / name) for name in ("dark/6.png", "light/0.png")]
    assert [reject["path"] for reject in rejects] == bad
    vectors = torch.tensor(table["embedding"].to_pylist())
    assert (vectors - wanted).abs().max() < 1e-5
    assert all(16 >= tokens > 0 for tokens in table["num_tokens"].to_pylist())
    # With the head they are the logits.
    logits = packpipe.predict(packpipe.load_model(trained)[0], paths, **asked.packing.to_options())
    assert (vectors @ head.T - logits).abs().max() < 1e-4


def test_embed_writes_the_tokens_of_each_image(some_broken, trained, tmp_path):
    files = [tmp_path / "maps.parquet", tmp_path / "vectors.parquet"]
    options = ["--max-bad-fraction", 0.2, "--num-workers", 0]
    said = told("embed", trained, some_broken, files[0], "--tokens", "--part-size", 5, *options)
    assert "14 images' tokens are in" in said
    told("embed", trained, some_broken, files[1], *options)
    maps, vectors = map(pq.read_table, files)
    names = ["example_index", "label", "path", "tokens", "coords", "num_tokens"]
    assert maps.schema.names == names
    assert maps.schema.field("tokens").type == pa.list_(pa.list_(pa.float32(), 192))
    assert maps.schema.field("coords").type == pa.list_(pa.list_(pa.int16(), 2))
    for name in ("example_index", "label", "num_tokens"):
        assert maps[name].equals(vectors[name])
    assert [
        one["example_index"] for one in pq.read_table(tmp_path / "maps.rejects.parquet").to_pylist()
    ] == [6, 8]
    model, asked = packpipe.load_model(trained)
    images = open_source(str(some_broken), "train").data["image"]
    for row in maps.to_pylist():
        tokens, coords = torch.tensor(row["tokens"]), row["coords"]
        height, width = (1 + max(one[axis] for one in coords) for axis in (0, 1))
        assert coords == [[y, x] for y in range(height) for x in range(width)]
        assert len(tokens) == height * width == row["num_tokens"]
        # Pooled, they are the image's vector.
        alone = FlatTokens(None, torch.zeros(len(tokens), dtype=torch.int64), torch.zeros(1), None)
        index = vectors["example_index"].to_pylist().index(row["example_index"])
        wanted = torch.tensor(vectors["embedding"][index].as_py())
        assert (model.pool(tokens, alone)[0] - wanted).abs().max() < 1e-5
    # Each at its place: as of the model without a pool.
    config = {**vars(model.config), "num_classes": None, "pooling": "none"}
    dense = packpipe.NaViT(packpipe.NaViTConfig(**config))
    dense.load_state_dict(model.state_dict(), strict=False)
    path = images[maps["example_index"][3].as_py()].as_py()["path"]
    (wanted,) = packpipe.predict(dense, [path], **asked.packing.to_options())
    found = torch.tensor(maps["tokens"][3].as_py())
    assert (found.reshape(wanted.shape) - wanted).abs().max() < 1e-5
    assert len({*maps["num_tokens"].to_pylist()}) > 1


def test_embed_takes_a_pretrained_encoder_too(shapes, trained, tmp_path):
    model, options = packpipe.load_model(trained)
    packpipe.save_pretrained(model, options.packing, tmp_path / "encoder")
    vectors = {}
    for folder in (trained, tmp_path / "encoder"):
        out = tmp_path / f"{folder.name}.parquet"
        told("embed", folder, shapes, out, "--num-workers", 0)
        vectors[folder.name] = pq.read_table(out)["embedding"].to_pylist()
    assert len(vectors["encoder"]) == 16
    assert vectors["encoder"] == vectors[trained.name]


def test_a_model_that_is_handed_on_answers_by_its_names(shapes, trained, tmp_path):
    model, options = packpipe.load_model(trained)
    told_of = {"class_names": options.class_names, "label_column": "label", "loss": options.loss}
    packpipe.save_pretrained(model, options.packing, tmp_path / "pets", **told_of)
    asked = [shapes / "dark", "--top", 1, "--json", "--num-workers", 0]
    found = [told("predict", folder, *asked) for folder in (trained, tmp_path / "pets")]
    assert found[0] == found[1]
    assert '"name": "dark"' in found[0]
    lines = [
        json.loads(told("eval", folder, shapes, "--json"))["budgets"]
        for folder in (trained, tmp_path / "pets")
    ]
    assert lines[0] == lines[1]
    model.head, model.config = None, replace(model.config, num_classes=None)
    packpipe.save_pretrained(model, options.packing, tmp_path / "encoder")
    result = run("predict", tmp_path / "encoder", shapes)
    message = f"RUN is '{tmp_path / 'encoder'}, an encoder', expected a model with a head, which an"
    assert message in result.stderr


def test_what_outputs_are_is_told_or_asked_for_and_never_guessed(shapes, trained, tmp_path):
    model, options = packpipe.load_model(trained)
    packpipe.save_pretrained(model, options.packing, tmp_path / "untold")
    for command in (["predict", shapes], ["eval", shapes], ["export", tmp_path / "model.onnx"]):
        result = run(command[0], tmp_path / "untold", *command[1:])
        message = (
            f"loss in {tmp_path / 'untold' / 'config.json'} is None, expected one of 'softmax'"
        )
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
    config = tmp_path / "untold" / "config.json"
    names = {"id2label": {str(k): str(k) for k in range(3)}, "loss": "softmax"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **names}))
    result = run("predict", tmp_path / "untold", shapes / "dark")
    assert "len(class_names) is 3, expected 2 (num_classes); give the name of ea" in result.stderr


def test_a_head_of_timm_gives_probabilities_that_add_up(shapes, tmp_path):
    folder = shutil.copytree(FOLDER / "naflexvit_base_patch16_par_gap", tmp_path / "timm")
    weights = load_file(folder / "model.safetensors")
    head = {"head.weight": torch.linspace(-1, 1, 48).view(3, 16), "head.bias": torch.ones(3)}
    save_file({**weights, **head}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_classes": 3}))
    asked = ["predict", folder, shapes / "dark", "--json", "--num-workers", 0]
    found = json.loads(told(*asked))["predictions"]
    sums = [sum(one["probability"] for one in image["classes"]) for image in found]
    assert sums == pytest.approx([1.0] * 8)


class Killed(BaseException):
    """What nothing catches, as nothing catches SIGKILL."""


@pytest.mark.parametrize(("tokens", "stride"), [(False, STRIDE), (True, 13 if STRIDE > 1 else 1)])
def test_embedding_that_is_killed_goes_on_to_the_same_bytes(
    tokens, stride, some_broken, trained, tmp_path, monkeypatch, caplog
):
    dataset, commit = open_source(str(some_broken), "train"), embedding.commit
    done = []

    def embed(folder, most=1000):
        """Embed, killed before the file of that number gets its name, or after it has it."""
        done.clear()

        def counted(path):
            if len(done) == most // 2 and most % 2 == 0:
                raise Killed
            commit(path)
            done.append(path.name)
            if len(done) == most // 2 + 1 and most % 2:
                raise Killed

        monkeypatch.setattr(embedding, "commit", counted)
        options = {"part_size": 6, "max_bad_fraction": 0.2, "dtype": "float16", "tokens": tokens}
        return embedding.embed(trained, dataset, folder / "v.parquet", **options)

    def files_in(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    (tmp_path / "whole").mkdir()
    rejects = embed(tmp_path / "whole")
    assert [reject.example_index for reject in rejects] == [6, 8]
    wanted, number = files_in(tmp_path / "whole"), len(done)
    assert number == 8
    assert len(wanted) == 2
    for most in range(0, 2 * number, stride):
        folder = tmp_path / str(most)
        with pytest.raises(Killed):
            embed(folder, most)
        assert embed(folder) == rejects
        # Of a part two files get their names, the rejects first: one alone is written again.
        assert len(done) == number - (most + 1) // 2 // 2 * 2
        assert files_in(folder) == wanted
        assert not (folder / "v.parquet.parts").exists()
    # Its number in its part would be logged; the rejects have the right one.
    assert caplog.messages == []


def test_parts_of_other_vectors_are_not_gone_on_with(shapes, trained, tmp_path, monkeypatch):
    dataset = open_source(str(shapes), "train")
    out = tmp_path / "v.parquet"
    monkeypatch.setattr(embedding, "_part", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(precision, "has_instructions", lambda: True)
    with pytest.raises(ZeroDivisionError):
        embedding.embed(trained, dataset, out)
    for options, message in (
        ({"dtype": "float16"}, "dtype is 'float16', expected 'float32' as in v.parquet.parts; use"),
        ({"part_size": 7}, "part_size is 7, expected 4096 as in v.parquet.parts; use it again, or"),
        ({"columns": []}, "columns is"),
        ({"tokens": True}, "columns is"),
        (
            {"precision": "bfloat16"},
            "precision is 'bfloat16', expected 'float32' as in v.parquet.p",
        ),
    ):
        with pytest.raises(FileExistsError, match=message):
            embedding.embed(trained, dataset, out, **options)
    # Records of versions without that option go on.
    record = json.loads((tmp_path / "v.parquet.parts" / "record.json").read_bytes())
    del record["precision"]
    (tmp_path / "v.parquet.parts" / "record.json").write_text(json.dumps(record))
    with pytest.raises(ZeroDivisionError):
        embedding.embed(trained, dataset, out)
    # Nor is a file of them taken for that of others, when the parts were not removed.
    out.write_bytes(b"")
    with pytest.raises(
        FileExistsError, match=r"dtype is 'float16', expected 'float32' as in v\.pa"
    ):
        embedding.embed(trained, dataset, out, dtype="float16")
    assert (tmp_path / "v.parquet.parts").exists()
    shutil.rmtree(tmp_path / "v.parquet.parts")
    with pytest.raises(FileExistsError, match="expected a file that is not there yet; remove it"):
        embedding.embed(trained, dataset, out)


def test_parts_of_images_that_have_changed_are_not_gone_on_with(
    shapes, trained, tmp_path, monkeypatch
):
    folder, part = shutil.copytree(shapes, tmp_path / "shapes"), embedding._part
    dataset, out = open_source(str(folder), "train"), tmp_path / "v.parquet"

    def first_alone(*arguments, **options):
        return part(*arguments, **options) if arguments[3][0] == 0 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "_part", first_alone)
        with pytest.raises(ZeroDivisionError):
            embedding.embed(trained, dataset, out, part_size=8)
    image = folder / "dark" / "3.png"
    before = image.stat()
    shutil.copyfile(folder / "light" / "3.png", image)
    os.utime(image, ns=(0, before.st_mtime_ns + 10**9))
    message = r"image is '.*/dark/3.png, changed', expected as it was when v.parquet.parts was beg"
    with pytest.raises(FileExistsError, match=message):
        embedding.embed(trained, dataset, out, part_size=8)
    # A part that is not there yet is of the images as they are now.
    shutil.copy2(shapes / "dark" / "3.png", image)
    shutil.copy2(shapes / "dark" / "3.png", folder / "light" / "3.png")
    assert embedding.embed(trained, dataset, out, part_size=8) == []
    vectors = pq.read_table(out)["embedding"].to_pylist()
    assert len(vectors) == 16
    assert np.allclose(vectors[11], vectors[3], atol=1e-5)


def test_too_many_broken_images_end_it_and_are_named(some_broken, trained, tmp_path):
    result = run("embed", trained, some_broken, tmp_path / "v.parquet", "--part-size", 8)
    assert result.exit_code == 1
    assert "rejected is 1 of 16 examples (6.25%), expected at most 1.00%" in result.stderr
    assert "dark/6.png" in result.stderr
    assert not (tmp_path / "v.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "RUN", "SHAPES", "OUT", "--columns", "page"], "columns is 'page', expected one"),
        (["embed", "RUN", "SHAPES", "OUT", "--dtype", "int8"], "dtype is 'int8', expected one of"),
        (["eval", "RUN", "SHAPES", "--budgets", "64;128"], "budgets is '64;128', expected whole n"),
        (["eval", "RUN", "SHAPES", "--budgets", "0"], "max_tokens is 0, expected an integer in 1"),
        (["eval", "RUN", "SHAPES", "--precision", "half"], "precision is 'half', expected one of"),
        (["predict", "RUN", "a.png", "--precision", "half"], "precision is 'half', expected one"),
        (["embed", "RUN", "SHAPES", "OUT", "--precision", "half"], "precision is 'half', expected"),
        (
            ["embed", "./vit_b", "SHAPES", "OUT"],
            "RUN is './vit_b', expected a folder that packpipe",
        ),
        (["export", "vit_b", "OUT"], "run is 'vit_b', expected a folder that packpipe train wrote"),
        (["eval", "SHAPES", "SHAPES"], "holds no checkpoint; train with this folder first"),
        (["predict", "SHAPES", "a.png"], "holds no checkpoint; train with this folder first"),
    ],
)
def test_a_wrong_call_is_said_in_a_line(arguments, message, shapes, trained, tmp_path):
    places = {"RUN": trained, "SHAPES": shapes, "OUT": tmp_path / "v.parquet"}
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert f"packpipe {arguments[0]}: " in result.stderr


def test_a_regression_is_trained_measured_and_asked_by_numbers(shapes, tmp_path):
    files = [str(path) for path in sorted(shapes.rglob("*.png"))]
    labels = [[number / 16, float("nan") if number == 3 else 0.5] for number in range(len(files))]
    source = datasets.Dataset.from_dict({"image": files, "label": labels})
    source.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "source"))
    options = ["--model", "Ti/32", "--seq-len", 64, "--sides", 32, 64, "--batch-size", 1]
    options += ["--steps", 2, "--num-workers", 0, "--val", 0.25, "--loss", "mse"]
    said = told("train", tmp_path / "source", tmp_path / "run", *options)
    assert "error" in said
    assert "accuracy" not in said
    _, known = packpipe.load_model(tmp_path / "run")
    assert (known.class_names, known.loss) == (None, "mse")
    line = json.loads(told("eval", tmp_path / "run", tmp_path / "source", "--json"))["budgets"][0]
    assert (line["accuracy"], line["ece"], line["num_images"]) == (None, None, 16)
    assert line["error"] > 0
    found = json.loads(told("predict", tmp_path / "run", files[0], "--json"))["predictions"][0]
    assert [one["name"] for one in found["classes"]] == ["0", "1"]
    model, known = packpipe.load_model(tmp_path / "run")
    (outputs,) = packpipe.predict(model, files[:1], **known.packing.to_options()).tolist()
    assert [one["value"] for one in found["classes"]] == pytest.approx(outputs, abs=1e-5)
