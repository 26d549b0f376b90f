"""The command line: every command on real images, and a bad call of each with its exit status."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pictures
import pytest
import typer
from datasets import Dataset
from numba.core import event
from PIL import Image
from processes import wait_until
from rich.text import Text
from typer.testing import CliRunner

import packpipe
from packpipe import CenterCrop, Crop, Uniform
from packpipe.cli import bench as bench_module
from packpipe.cli import labels
from packpipe.cli.bench import Comparison, LayoutFigures
from packpipe.cli.errors import in_a_line, one_line_errors
from packpipe.cli.main import app
from packpipe.cli.open_source import open_source
from packpipe.cli.output import print_json, print_table, say_what_is_done_once, saying
from packpipe.samples import images_folder
from packpipe.sources import sizes
from packpipe.sources.image_source import ImageSource
from packpipe.training.loop import Record, read_log

QUICK = ["--model", "Ti/32", "--seq-len", 64, "--sides", 32, 128, "--batch-size", 2]
QUICK += ["--num-workers", 0, "--log-every", 1]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder of some bundled images of two classes."""
    folder = tmp_path_factory.mktemp("images")
    for name in sorted(p for p in images_folder().iterdir() if p.is_dir())[:2]:
        (folder / name.name).mkdir()
        for path in sorted(name.iterdir())[:7]:
            shutil.copy(path, folder / name.name / path.name)
    return folder


@pytest.fixture(scope="module")
def packed(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "rows"
    assert run("pack", few, folder, "--seq-len", 256).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.parquet"
    rows = [list(range(1, length + 1)) for length in (3, 9, 4, 20, 1)]
    Dataset.from_dict({"input_ids": rows}).to_parquet(path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def picture(path):
    with Image.open(path) as found:
        return found.convert("RGB")


def told(*arguments):
    """Return what a command that is fine has printed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_help_shows_every_command_with_an_example():
    assert "Exit status" in told("--help")
    assert told("--version").strip() == packpipe.__version__
    for name in (
        "pack",
        "plan",
        "stats",
        "show",
        "verify",
        "bench",
        "train",
        "eval",
        "predict",
        "demo",
    ):
        assert name in told("--help")
        assert "Example" in told(name, "--help")
        assert f"packpipe {name}" in told(name, "--help")


def test_help_loses_nothing_in_brackets():
    """Rich takes [train] for a style, and shows nothing, unless its bracket is escaped."""
    helps = [
        text
        for command in typer.main.get_command(app).commands.values()
        for text in (command.help, *(getattr(one, "help", None) for one in command.params))
        if text
    ]
    assert sum("[" in text for text in helps) > 10
    for text in helps:
        assert Text.from_markup(text).plain == text.replace("\\[", "[")
    shown = " ".join(told("eval", "--help").replace("│", " ").split())
    assert "[as in validation]" in shown


def test_what_is_packed_is_said_and_packed_again_in_no_time(few, tmp_path):
    said = told("pack", few, tmp_path / "a", "--seq-len", 256, "--num-workers", 0)
    assert "14 of 14" in said
    assert f"{packpipe.summarize(tmp_path / 'a').quality.padding:.3%}" in said
    again = json.loads(told("pack", few, tmp_path / "a", "--seq-len", 256, "--json"))
    assert again["counts"]["packed"] == 14
    assert again["padding"] == packpipe.summarize(tmp_path / "a").quality.padding
    assert packpipe.verify(tmp_path / "a") == []


def test_options_reach_the_configuration(few, tmp_path):
    options = ["--patch-size", 32, "--sides", 64, 128, "--drop-rate", 0.5, "--max-segments", 3]
    options += ["--strategy", "bfd", "--seed", 3, "--epoch", 2, "--label-column", "none"]
    options += ["--value-range", "-1", "2.5", "--prefix-tokens", 5]
    told("pack", few, tmp_path / "a", "--seq-len", 64, *options)
    found = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (found["seed"], found["epoch"], found["label_column"]) == (3, 2, None)
    config = found["config"]
    assert (config["patch_size"], config["drop_rate"], config["max_segments"]) == (32, 0.5, 3)
    assert (config["strategy"], config["value_range"]) == ("bfd", [-1.0, 2.5])
    assert config["prefix_tokens"] == 5
    assert "Side" in str(config["resolution"])
    # The values by which rows were made before there were these options are not told.
    assert (config["profiles"], config["damaged_scans"]) == ("srgb", "reject")
    pixels = ["--profiles", "ignore", "--damaged-scans", "keep"]
    told("pack", few, tmp_path / "b", "--seq-len", 64, *pixels)
    config = json.loads((tmp_path / "b" / "manifest.json").read_text())["config"]
    assert not {"profiles", "damaged_scans"} & set(config)


@pytest.mark.parametrize(
    ("options", "crop"),
    [
        (["--crop-area", 0.25, 0.5], Crop(Uniform(0.25, 0.5))),
        (["--crop-area", 0.5, 0.5, "--crop-aspect", 1, 2], Crop(0.5, (1, 2))),
        (["--crop-aspect", 1, 2], Crop(aspect=(1, 2))),
        (["--center-crop", 0.25], CenterCrop(0.25)),
    ],
)
def test_crops_reach_the_configuration(few, options, crop):
    found = json.loads(told("plan", few, "--seq-len", 256, *options, "--json"))
    dataset = open_source(str(few), "train")
    cropped, whole = (
        packpipe.EpochPacks(dataset, 256, crop=one).plan(0, 0).quality.num_tokens
        for one in (crop, None)
    )
    assert found["counts"]["tokens"] == cropped < whole


def test_views_reach_the_configuration(few):
    options = ["--seq-len", 256, "--max-tokens", 64, "--views", 3, "--views-together"]
    counts = json.loads(told("plan", few, *options, "--json"))["counts"]
    assert counts["segments"] == 3 * counts["read"] > 0
    dataset = open_source(str(few), "train")
    together = {"max_tokens": 64, "views": 3, "views_together": True}
    plan = packpipe.EpochPacks(dataset, 256, label_column=None, **together).plan(0, 0)
    assert counts["packs"] == len(plan)
    assert f"images of 3 views in {len(plan)} rows" in told("plan", few, *options)


def test_a_dry_run_says_what_it_would_be_and_writes_nothing(few, packed, tmp_path):
    said = told("pack", few, tmp_path / "a", "--seq-len", 256, "--dry-run")
    assert f"{packpipe.summarize(packed).quality.padding:.3%}" in said
    assert "other seq_len" in said
    found = json.loads(told("pack", few, tmp_path / "a", "--seq-len", 256, "--dry-run", "--json"))
    assert found["counts"]["packs"] == packpipe.summarize(packed).quality.num_packs
    assert not (tmp_path / "a").exists()


def test_a_plan_is_what_packing_gives(few, packed):
    found = json.loads(told("plan", few, "--seq-len", 256, "--json"))
    summary = packpipe.summarize(packed)
    assert found["fill"] == summary.quality.fill
    assert found["gap"] == summary.quality.gap
    said = told("plan", few, "--seq-len", 256)
    assert "other seq_len" in said
    alone = told("plan", few, "--seq-len", 256, "--max-segments", 1)
    table = alone.split("each by --strategy ffd:\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(table) > 1
    assert all(line.split()[3:5] == ["1.00", "(1)"] for line in table)
    assert re.search(r" <\n.*^<  the shortest that pads 1% at most", said, re.DOTALL | re.MULTILINE)
    assert "\n(most): segments of the fullest row; ffd puts short examples together" in said


def test_rows_are_called_rows_wherever_a_command_speaks_of_them(few, packed):
    helps = [told(name, "--help") for name in ("plan", "pack", "stats", "show", "train", "bench")]
    tables = [told("plan", few, "--seq-len", 256), told("stats", packed)]
    for said in tables:
        assert re.search(r"^  images    14 of 14\n", said, re.MULTILINE)
        assert re.search(r"^  rows      \d+ of 256 tokens .*gap", said, re.MULTILINE)
        assert re.search(r"^  segments  [\d.]+ a row, \d+ at most\n", said, re.MULTILINE)
    for said in (*helps, *tables):
        assert not re.search(r"\bpacks\b|\ba pack\b", said)


def test_token_sequences_are_planned_and_packed(texts, tmp_path):
    assert "3 too long" not in told("plan", texts, "--seq-len", 32)
    told("pack", texts, tmp_path / "a", "--seq-len", 8, "--overflow", "split", "--mask-first-label")
    found = json.loads(told("stats", tmp_path / "a", "--json"))
    assert (found["unit"], found["counts"]["cut"], found["counts"]["tokens"]) == ("sequence", 2, 37)
    assert told("verify", tmp_path / "a", "--source", texts).endswith("nothing is wrong\n")
    assert told("show", tmp_path / "a", 0, "-o", tmp_path / "mask.png")
    assert picture(tmp_path / "mask.png").size[0] > 100
    told("stats", tmp_path / "a", "--html", tmp_path / "a.html")


def test_what_a_source_is_said_to_be_is_refused_without_one(packed):
    for command in ("stats", "verify"):
        for option in ("--split", "--image-column", "--label-column"):
            result = run(command, packed, option, "nonsense")
            assert result.exit_code == 2
            expected = f"{option} is 'nonsense', expected left out without --source; pass what was"
            assert expected in result.stderr


def test_texts_beside_tokens_stay_texts(tmp_path):
    columns = {"input_ids": [[1, 2], [3]], "label": ["a", "b"], "blob": [b"x", b"y"]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    options = ["--seq-len", 8, "--token-column", "input_ids"]
    told("pack", tmp_path / "rows.parquet", tmp_path / "rows", *options)
    assert sorted(packpipe.open_packed(str(tmp_path / "rows"))["label"][0]) == ["a", "b"]
    told("verify", tmp_path / "rows", "--source", tmp_path / "rows.parquet")


def test_labels_that_are_texts_are_packed_and_verified_as_classes(few, tmp_path):
    """Of a folder whose metadata says them; and a column that is named is stored as it is."""
    (tmp_path / "images").mkdir()
    lines = []
    for number, path in enumerate(sorted(few.rglob("*.*"))[:4]):
        shutil.copy(path, tmp_path / "images" / path.name)
        lines.append({"file_name": path.name, "label": "ba"[number % 2]})
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "images" / "metadata.jsonl").write_text(text)
    images, classes, texts = (str(tmp_path / name) for name in ("images", "classes", "texts"))
    told("pack", images, classes, "--seq-len", 256)
    stored = packpipe.open_packed(classes)
    assert stored.features["labels"].feature.names == ["a", "b"]
    assert sorted(label for row in stored["labels"] for label in row) == [0, 0, 1, 1]
    told("verify", classes, "--source", images)
    told("stats", classes, "--source", images)
    # Packed before by naming the column: the record is what it was.
    named = ["--label-column", "label"]
    told("pack", images, texts, "--seq-len", 256, *named)
    found = open_source(images, "train")
    assert (
        packpipe.manifest(packpipe.open_packed(texts))["source_fingerprint"] == found._fingerprint
    )
    assert {label for row in packpipe.open_packed(texts)["labels"] for label in row} == {"a", "b"}
    told("verify", texts, "--source", images)
    # A copy elsewhere is verified, too.
    shutil.move(images, tmp_path / "moved")
    told("verify", classes, "--source", tmp_path / "moved")
    told("verify", texts, "--source", tmp_path / "moved", *named)


def test_rejects_are_counted_by_reason(few, tmp_path):
    broken = shutil.copytree(few, tmp_path / "images")
    bad = sorted(broken.rglob("*.*"))[4]
    bad.write_bytes(b"no image")
    result = run("pack", broken, tmp_path / "a", "--seq-len", 256, "--max-bad-fraction", 0.5)
    assert result.exit_code == 0
    assert f"rejected {bad}: UnidentifiedImageError: no known image format" in result.stderr
    assert "1 (1 " in told("stats", tmp_path / "a")
    html = ["--html", tmp_path / "a.html"]
    assert "rejected example 4: Un" in run("stats", tmp_path / "a", *html).stderr
    assert "<th>example 4</th>" in (tmp_path / "a.html").read_text()
    assert f"rejected {bad}: Un" in run("stats", tmp_path / "a", "--source", broken, *html).stderr
    assert f"<th>{bad}</th>" in (tmp_path / "a.html").read_text()
    # Of another source the files are others, of a shorter one there may be none.
    result = run("stats", tmp_path / "a", "--source", few)
    assert result.exit_code == 2
    assert "fingerprint of --source is '" in result.stderr
    assert "that of what was packed; pass it as it was packed, --split and col" in result.stderr
    shutil.rmtree(bad.parent)
    result = run("stats", tmp_path / "a", "--source", broken)
    assert "--source is '7 examples', expected the 14 that were packed; pass it" in result.stderr
    shutil.copytree(few / bad.parent.name, bad.parent)
    bad.write_bytes(b"no image")
    result = run("pack", broken, tmp_path / "b", "--seq-len", 256)
    assert result.exit_code == 1
    assert result.stderr.startswith("packpipe pack: rejected is 1 of 14 examples (7.14%), expected")
    assert result.stderr.endswith(f"({bad})\n")
    assert len(result.stderr.splitlines()) == 1
    result = run("train", broken, tmp_path / "run", *QUICK, "--batch-size", 1, "--steps", 1)
    assert (result.exit_code, result.stderr[-len(str(bad)) - 3 :]) == (1, f"({bad})\n")
    options = [*QUICK, "--batch-size", 1, "--steps", 1, "--max-bad-fraction", 0.5]
    told("train", broken, tmp_path / "run", *options)


def test_stats_are_those_of_the_summary(packed):
    said = told("stats", packed)
    assert str(packpipe.summarize(packed)).splitlines()[2] in said.replace("  tokens", "tokens")
    found = json.loads(told("stats", packed, "--json"))
    assert sum(found["lengths"].values()) == 14
    assert found["padding_alone"] > found["padding"]


def test_rows_are_drawn(packed, tmp_path):
    assert "rows.png" in told("show", packed, 0, 1, "--output", tmp_path / "rows.png")
    rows = picture(tmp_path / "rows.png")
    told("show", packed, "--mask", "--output", tmp_path / "mask.png")
    mask = picture(tmp_path / "mask.png")
    assert rows.size != mask.size
    assert len(rows.getcolors(2**24)) > 1000


RED, DROPPED = (255, 0, 0), (222, 222, 222)  # of a crop's frame, and of dropped tokens


def test_one_image_is_drawn_over_epochs(few, packed, tmp_path):
    counts = {}
    for name, arguments in {
        "cropped": [few, 3, "--crop-area", 0.08, 0.5, "--epochs", 3],
        "dropped": [few, 3, "--drop-rate", 0.5, "--epochs", 3],
        "more": [few, 3, "--drop-rate", 0.5, "--epochs", 6],
        "packed": [packed, 3, "--epochs", 3],
    }.items():
        path = tmp_path / f"{name}.png"
        told("show", *arguments, "--augment", "inception", "-o", path)
        pixels = np.asarray(picture(path))
        counts[name] = [int((pixels == colour).all(2).sum()) for colour in (RED, DROPPED)]
    assert counts["cropped"][0] > 300
    assert counts["dropped"][0] == counts["packed"][0] == 0
    assert counts["cropped"][1] < 300  # pixels that have that grey by themselves
    assert counts["more"][1] > 1.5 * counts["dropped"][1] > 3000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{packed}", "--drop-rate", 0.5], "drop_rate is 0.5, expected left out without augment"),
        (["{packed}", "--epochs", 8], "epochs is 8, expected left out without augment; pass --aug"),
        (["{packed}", "--seed", 0], "seed is 0, expected left out without augment; pass --augment"),
        (["{packed}", "--split", "test"], "split is 'test', expected left out without augment"),
        (
            ["{packed}", "--split", "test", "--augment", "three"],
            "split is 'test', expected left out for packed rows",
        ),
        (
            ["{packed}", "-o", "row.xyz"],
            "--output is 'row.xyz', expected a name that ends in .",
        ),
        (["{packed}", "-o", "row"], "--output is 'row', expected a name that ends in ."),
        (
            ["{packed}", "-o", "nowhere/row.png"],
            "--output is 'nowhere/row.png', expected a file in a folder that is there; make nowher",
        ),
        (["{packed}", "--drop-rate", 0.5, "--augment", "three"], "left out for packed rows"),
        (["{packed}", "--mask", "--augment", "three"], "mask is True, expected left out with augm"),
        (["{packed}", 1, 2, "--augment", "three"], "rows is [1, 2], expected one image, with"),
        (["{packed}", 99, "--augment", "three"], "example is 99, expected one that a row holds"),
        (["{few}", 99, "--augment", "three"], "example is 99, expected an integer in 0..13"),
        (["{few}", 1, "--augment", "two"], "preset is 'two'"),
    ],
)
def test_what_cannot_be_drawn_over_epochs_is_said(few, packed, arguments, message):
    places = {"{few}": few, "{packed}": packed}
    result = run("show", *(places.get(one, one) for one in arguments))
    assert result.exit_code == 2
    assert message in result.stderr


def test_problems_are_json_too(packed, tmp_path):
    counts = json.loads((packed / "manifest.json").read_text())["counts"]
    found = json.loads(told("verify", packed, "--json"))
    assert found == {"folder": str(packed), "ok": True, "problems": [], "counts": counts}
    folder = shutil.copytree(packed, tmp_path / "a")
    (folder / "data-00099.arrow").touch()
    result = run("verify", folder, "--json")
    assert result.exit_code == 1
    problem = {"where": "data-00099.arrow", "what": "is not in the manifest"}
    expected = {"folder": str(folder), "ok": False, "problems": [problem], "counts": counts}
    assert json.loads(result.stdout) == expected


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"counts": 3}'])
def test_problems_of_a_folder_without_a_manifest_are_json_too(tmp_path, manifest):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    result = run("verify", tmp_path, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["ok"], found["counts"]) == (1, False, {})
    assert [problem["where"] for problem in found["problems"]] == ["manifest.json"]


def test_bench_compares_packed_with_padded(few, monkeypatch):
    rate = 1e18  # beyond any machine: a rate that is measured depends on what else runs
    monkeypatch.setattr("packpipe.cli.bench.matrix_rate", lambda *_: rate)
    options = ["--model", "Ti/32", "--seq-len", 128, "--sides", 64, 256, "--steps", 2]
    options += ["--batch-size", 1, "--num-workers", 0]
    result = run("bench", few, *options, "--json")
    found = json.loads(result.stdout)
    said = "training Ti/32 on packed and on padded rows by turns, 2 steps of each"
    assert result.stderr == f"{said}, after 1 not counted ...\n"
    packed, padded = found["layouts"]
    assert (packed["layout"], padded["layout"]) == ("packed", "padded")
    assert packed["fill"] > padded["fill"]
    assert found["speedup"] == packed["images_per_s"] / padded["images_per_s"] > 0
    assert found["matrix_rate"] == rate
    for one in found["layouts"]:  # of ViT-Ti's 5.4 million weights, each token meets most
        flops_a_token = one["mfu"] * rate / one["tokens_per_s"]
        assert 3 * 2 * 5e6 < flops_a_token < 3 * 2 * 8e6
    assert found["num_images"] == 14
    assert padded["epoch_s"] / packed["epoch_s"] == pytest.approx(found["speedup"])
    said = told("bench", few, *options).splitlines()[-1]
    assert said.startswith("An epoch of these 14 images takes ")


def test_bench_says_what_its_figures_mean_for_an_epoch():
    packed = LayoutFigures("packed", 0.98, 25.0, 2500.0, 0.3, 0.0, 4000.0)
    padded = LayoutFigures("padded", 0.43, 10.0, 1000.0, 0.1, 0.0, 10000.0)
    found = Comparison("the CPU", 1e12, 100_000, (packed, padded))
    assert found.sentence == (
        "An epoch of these 100,000 images takes 67 min packed and 2.8 h padded: packed gives 2.50 "
        "times the images a second of padded, where 57% of the tokens are padding (packed: 2%)."
    )
    header, first, second = str(found).splitlines()[1:4]
    assert header.split()[:3] == ["layout", "padding", "images/s"]
    assert first.split()[:3] == ["packed", "2.0%", "25.0"]
    assert second.split()[:3] == ["padded", "57.0%", "10.0"]
    assert [first.index("%"), second.index("%")] == [header.index("padding") + 6] * 2
    assert str(found).endswith(found.sentence)
    assert found.to_dict()["sentence"] == found.sentence


class Clock:
    """A clock that stands still unless it is told how long something took."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize(("steps", "taken"), [([], 3), (["--steps", 5], 6)])
def test_a_step_s_time_is_its_own_and_bench_ends_by_itself(few, steps, taken, monkeypatch):
    """The layouts take turns; on a slow machine two steps of each are measured, if not asked."""
    clock, counts = Clock(), Counter()

    def train(model, loader, config):
        del model, config
        began, seconds = clock.now, 1.0 if not counts else 4.0
        counts[seconds] = 0
        for batch in chain(loader, loader, loader):
            clock.now += seconds
            counts[seconds] += 1
            whole, began = clock.now - began, clock.now  # as a record counts, with the other's time
            tokens, slots = int(batch.seq_lens.sum()), batch.segment_ids.numel()
            images = int(batch.present.sum()) / whole
            yield Record(1, 0.0, 0.0, 0.0, images, tokens / whole, tokens / slots, 0.1, 9.0, None)

    monkeypatch.setattr(bench_module, "time", clock)
    monkeypatch.setattr(bench_module, "train", train)
    monkeypatch.setattr(bench_module, "matrix_rate", lambda *_: 1.0)
    options = ["--model", "Ti/32", "--seq-len", 32, "--sides", 64, 128, "--num-workers", 0]
    found = json.loads(told("bench", few, *options, *steps, "--json"))
    assert counts == {1.0: taken, 4.0: taken}
    packed, padded = found["layouts"]
    # Rows of 16 tokens, two of which have the slots of a packed row.
    assert padded["epoch_s"] == 14 / 2 * 4.0
    assert packed["epoch_s"] == 14 / packed["images_per_s"]
    assert packed["epoch_s"] == int(packed["epoch_s"]) < 7


def test_bench_is_of_one_device(few, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = run("bench", few)
    assert result.exit_code == 2
    assert "RANK is '1', expected no rank: one device is measured; run it without" in result.stderr


def test_a_training_is_described_without_training(few, tmp_path):
    found = json.loads(told("train", few, tmp_path / "a", *QUICK, "--dry-run", "--json"))
    assert (found["images"], found["classes"], found["steps"]) == (14, 2, 1000)
    assert found["parameters"] > 5_000_000
    assert "parameters" in told("train", few, tmp_path / "a", *QUICK, "--dry-run")
    assert not (tmp_path / "a").exists()


def test_records_are_json_lines(few, tmp_path):
    said = told("train", few, tmp_path / "a", *QUICK, "--steps", 2, "--json")
    assert [json.loads(line)["step"] for line in said.splitlines()] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "{few}", "{out}", "--seq-len", 0], "seq_len is 0, expected an integer in 1.."),
        (["pack", "{few}", "{out}", "--overflow", "split"], "option is 'overflow', expected one"),
        (["pack", "{few}", "{packed}", "--seq-len", 8], "expected rows made with the same seq_len"),
        (["pack", "{few}", "{out}", "--on-error", "skip"], "on_error is 'skip', expected one of"),
        (["pack", "{few}", "{out}", "--profiles", "p3"], "profiles is 'p3', expected one of "),
        (
            ["pack", "{texts}", "{out}", "--profiles", "ignore"],
            "option is 'profiles', expected one",
        ),
        (["train", "{few}", "{out}", "--profiles", "p3"], "profiles is 'p3', expected one of"),
        (["train", "{few}", "{out}", "--damaged-scans", "fix"], "damaged_scans is 'fix', expected"),
        (["pack", "a/b/c.parquet", "{out}"], "SOURCE is 'a/b/c.parquet', expected a file"),
        (["pack", "{few}", "{out}", "--split", "dev"], "split is 'dev', expected one of train"),
        (["plan", "{few}", "--patch-size", 999], "patch_size is 999, expected an integer in"),
        (["plan", "{few}", "--resolution", "native", "--sides", 3, 4], "--sides is (3, 4), expec"),
        (
            ["plan", "{few}", "--center-crop", 0.5, "--crop-area", 0.1, 1],
            "--center-crop is 0.5, expected none beside --crop-area and --crop-aspect",
        ),
        (["plan", "{few}", "--sides", 3, 1], "--sides is (3, 1), expected the smaller number fir"),
        (["bench", "{few}", "--sides", 3, 1], "--sides is (3, 1), expected the smaller number fi"),
        (["train", "{few}", "{out}", "--sides", 3, 1], "number first; pass --sides 1 3"),
        (["plan", "{few}", "--crop-area", 0.9, 0.2], "first; pass --crop-area 0.2 0.9"),
        (["plan", "{few}", "--crop-area", 0, 1], "area is Uniform(low=0.0, high=1.0), expected s"),
        (["plan", "{texts}", "--seq-len", 8], "lengths[1] is 9, expected at most 8 (seq_len)"),
        (["stats", "{few}"], "expected a folder that packpipe.pack wrote; pass what pack"),
        (["show", "{packed}", 5000], "rows[0] is 5000, expected -"),
        (["show", "{few}"], "expected a folder that packpipe.pack wrote"),
        (["verify", "nowhere"], "folder is 'nowhere', expected a folder"),
        (["bench", "{few}", "--model", "H/14"], "name is 'H/14', expected one of Ti, S, B, L"),
        (["bench", "{texts}"], "expected "),
        (["train", "{few}", "{out}", "--loss", "hinge"], "loss is 'hinge', expected one of"),
        (
            ["train", "{texts}", "{out}"],
            "columns of tokens is ['input_ids'], expected images; pack",
        ),
    ],
)
def test_a_bad_call_is_a_line_and_2(arguments, message, few, packed, texts, tmp_path):
    places = {"few": few, "packed": packed, "texts": texts, "out": tmp_path / "out"}
    result = run(*(str(argument).format(**places) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"packpipe {arguments[0]}: ")
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack", "{few}", "s3://out"],
        ["pack", "{few}", "s3://out", "--dry-run"],
        ["train", "{few}", "s3://out"],
        ["stats", "{packed}", "--html", "s3://out"],
        ["show", "{packed}", "--output", "s3://out"],
        ["demo", "s3://out"],
    ],
)
def test_what_would_be_written_behind_a_scheme_is_refused(
    arguments, few, packed, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = run(*(argument.format(few=few, packed=packed) for argument in arguments))
    assert result.exit_code == 2, result.output
    said = result.stderr.replace("s3://", "s3:/")
    assert "is 's3:/out', expected a path without a scheme; write to a local" in said
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["pack"], ["plan", "x", "--nothing"], ["paint"], ["demo", "--steps", "-1"]],
)
def test_a_call_that_nobody_can_parse_is_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_names_of_files_do_not_reach_the_terminal_as_commands(few, tmp_path):
    folder = tmp_path / "\x1bcred"
    shutil.copytree(few, folder / "one")
    (folder / "one" / "\x1b]0;title\x07.png").write_bytes(b"junk")
    packing = ["pack", folder, tmp_path / "\x1bcout", "--seq-len", 64]
    results = [run(*packing, "--max-bad-fraction", share) for share in (0, 0.5)]
    results += [run("verify", tmp_path / "\x1bcout"), run("stats", tmp_path / "\x1bcnone")]
    assert [result.exit_code for result in results] == [1, 0, 0, 2]
    shown = "".join(result.stdout + result.stderr for result in results)
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert r"\x1b]0;title\x07.png" in results[1].stderr


def test_debug_shows_where_an_error_is_from(few, tmp_path):
    result = run("--debug", "pack", few, tmp_path / "a", "--seq-len", 0)
    assert isinstance(result.exception, ValueError)


def test_what_nobody_thought_of_is_a_line_and_1(packed, monkeypatch):
    def breaks(_):
        raise RuntimeError("of\nall things")

    monkeypatch.setattr("packpipe.building.summary.summarize", breaks)
    result = run("stats", packed)
    assert (result.exit_code, result.stderr) == (1, "packpipe stats: RuntimeError: of all things\n")


def test_what_is_not_installed_is_named(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "packpipe.cli.report", None)
    result = run("show", packed)
    assert result.exit_code == 2
    assert "is not installed; pip install 'packpipe[demo]'" in result.stderr
    missing = in_a_line(ModuleNotFoundError("", name="onnxruntime"))
    assert missing == "onnxruntime is not installed; pip install 'packpipe[onnx]'"
    missing = in_a_line(ModuleNotFoundError("", name="transformers"))
    assert missing == "transformers is not installed; pip install 'packpipe[texts]'"


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command as a shell starts it; it does not outlive the block."""
    command = [sys.executable, "-W", "ignore", "-m", "packpipe", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_while_it_runs(process: subprocess.Popen[str], holds: Callable[[], object]) -> None:
    """Wait until something holds; fail with what the process said if it ends before that."""
    wait_until(lambda: holds() or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]


def test_a_training_that_is_stopped_saves_its_step_and_goes_on(few, tmp_path):
    out = tmp_path / "run"
    with started("train", few, out, *QUICK, "--steps", 100_000) as process:
        wait_while_it_runs(process, lambda: len(read_log(out)) >= 2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "stopped; the same command goes on from here"
    done = len(read_log(out))
    assert f"step {done} " in stdout
    said = told("train", few, out, *QUICK, "--steps", done + 2)
    assert [line.split()[1] for line in said.splitlines()[:-1]] == [str(done + 1), str(done + 2)]


@pytest.mark.parametrize(
    ("name", "said"),
    [("eval_", "stopped\n"), ("train", "stopped; the same command goes on from here\n")],
)
def test_commands_that_keep_what_they_have_done_say_so_when_stopped(name, said, capsys):
    def command():
        raise KeyboardInterrupt

    command.__name__ = name
    with pytest.raises(typer.Exit) as ended:
        one_line_errors(command)()
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "printing",
    [
        lambda: print_json(list(range(100))),
        lambda: print_table("figures", [(f"figure {number}", "1") for number in range(5000)]),
    ],
    ids=["json", "table"],
)
def test_an_output_that_nobody_reads_any_more_is_no_error(printing, capsys, monkeypatch):
    def stats():
        printing()

    read, written = os.pipe()
    os.close(read)
    with open(written, "w", encoding="utf-8") as gone, monkeypatch.context() as meanwhile:
        meanwhile.setattr("sys.stdout", gone)
        with pytest.raises(typer.Exit) as ended:
            one_line_errors(stats)()
        assert ended.value.exit_code == 141
        gone.write("goes nowhere")
        gone.flush()
    assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_an_error(capsys):
    def stats():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(typer.Exit) as ended:
        one_line_errors(stats)()
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "packpipe stats: [Errno 32] Broken pipe\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_who_waits_is_told_what_takes_more_than_a_moment(monkeypatch):
    with saying("what no terminal shows", after=0):
        time.sleep(0.02)
    monkeypatch.setattr("sys.stderr", shown := Terminal())
    with saying("what takes no time"):
        pass
    with saying("what\x1b takes long", after=0):
        deadline = time.monotonic() + 60
        while not shown.getvalue() and time.monotonic() < deadline:
            time.sleep(0.001)
    assert shown.getvalue() == "what\\x1b takes long ...\n"


def test_labels_that_are_soon_classes_have_no_bar(monkeypatch):
    images = [{"bytes": b"", "path": None}] * 2
    texts = Dataset.from_dict({"image": images, "label": ["b", "a"]}).cast_column(
        "image", datasets.Image()
    )
    datasets.enable_progress_bars()
    monkeypatch.setattr("sys.stderr", shown := Terminal())
    assert labels.labelled(texts)["label"][:] == [1, 0]
    assert shown.getvalue() == ""
    assert not datasets.are_progress_bars_disabled()
    monkeypatch.setattr(labels, "_QUICK", 0)
    assert labels.labelled(texts.select([1]))["label"][:] == [0]
    assert "Casting to class labels" in shown.getvalue()


@pytest.fixture
def own_log():
    """The log of sizes, which a terminal changes; as it was afterwards."""
    log = logging.getLogger("packpipe.sources.sizes")
    yield
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.mark.usefixtures("own_log")
def test_who_waits_is_told_once_that_kernels_compile_and_sizes_are_read(monkeypatch):
    from numba import njit

    monkeypatch.setattr("sys.stderr", shown := Terminal())
    listeners = []
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr("numba.core.event.register", lambda *told: listeners.append(told))
        say_what_is_done_once()
    ((kind, listener),) = listeners
    with event.install_listener(kind, listener):
        for add in (1, 2):
            njit(lambda x, add=add: x + add)(1)
    compiles = "compiling kernels, at the first start alone ...\n"
    assert shown.getvalue() == compiles
    images = [{"bytes": image, "path": None} for image in pictures.encoded_images()]
    source = Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    sizes.kept_sizes(ImageSource(source.with_format("arrow")), max_pixels=10**6)
    assert shown.getvalue() == compiles  # these few take no time
    monkeypatch.setattr(sizes, "_MANY", 9)
    sizes.kept_sizes(ImageSource(source.with_format("arrow")), max_pixels=10**6 + 1)
    assert shown.getvalue() == f"{compiles}reading the sizes of {len(images)} images ...\n"


@pytest.mark.slow
def test_packing_that_is_stopped_leaves_no_process_and_goes_on(few, tmp_path):
    many = tmp_path / "many"
    for number in range(40):
        for path in few.rglob("*.*"):
            (many / str(number)).mkdir(parents=True, exist_ok=True)
            os.link(path, many / str(number) / path.name)
    options = ["--seq-len", 1024, "--num-workers", 1]
    with started("pack", many, tmp_path / "a", *options) as process:
        wait_while_it_runs(process, lambda: list(tmp_path.glob("a/*.partial")))
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "stopped; the same command goes on from here"
    assert not list(tmp_path.glob("a/*.partial"))
    told("pack", many, tmp_path / "a", "--seq-len", 1024, "--num-workers", 0)
    assert packpipe.verify(tmp_path / "a") == []
    assert Path(tmp_path / "a" / "manifest.json").is_file()
