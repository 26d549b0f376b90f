"""The main job on the 176 bundled images, and what the issue's figures rest on."""

import json
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import packpipe
from packpipe import demo, samples
from packpipe.cli.output import console
from packpipe.loading.batch import PackedBatch
from packpipe.training.loop import TrainConfig, train


@pytest.fixture(scope="module")
def images():
    folder = str(samples.images_folder())
    return datasets.load_dataset("imagefolder", data_dir=folder, split="train").class_encode_column(
        "label"
    )


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory):
    return packpipe.pack(
        images, 1024, output=tmp_path_factory.mktemp("rows") / "out", num_workers=2
    )


def test_all_bundled_images_pack_within_one_pack_of_the_bound(packed):
    counts = packpipe.manifest(packed)["counts"]
    assert (counts["read"], counts["packed"], counts["rejected"]) == (176, 176, 0)
    assert counts["packs"] - counts["bound"] <= 1
    assert packpipe.manifest(packed)["fill"] > 0.98


def squashed(path, side):
    """uint8[side, side, 3] by Pillow alone, transparent pixels on white."""
    image = Image.open(path).convert("RGBA")
    upon = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(upon.resize((side, side), Image.Resampling.BICUBIC))


def test_squares_are_a_plain_vits_rows(images, tmp_path):
    options = {"max_segments": 1, "resolution": packpipe.Square(224), "reducing_gap": None}
    packed = packpipe.pack(images, 196, output=tmp_path / "out", num_workers=2, **options)
    rows = packpipe.read_rows(packed)
    index = rows.example_index.tolist()
    assert sorted(index) == list(range(176))
    assert len(rows) == 176
    assert (rows.segment_ids == 1).all()
    assert np.unique(rows.grid_hw).tolist() == [14]
    paths = [
        image["path"]
        for image in images.cast_column("image", datasets.Image(decode=False))["image"]
    ]
    for row, example in enumerate(index):
        patches = rows.patches[row].reshape(14, 14, 16, 16, 3)
        pixels = patches.transpose(0, 2, 1, 3, 4).reshape(224, 224, 3)
        assert (pixels == squashed(paths[example], 224)).all(), paths[example]


@pytest.mark.parametrize("window", [1024, 4096, 16384])
def test_padding_on_the_sizes_of_the_pictures_is_below_one_percent(window):
    config = packpipe.PackConfig(seq_len=1024, window=window)
    plan = packpipe.plan_epoch(samples.image_sizes("pictures"), config)
    assert 0 < plan.quality.padding < 0.01


def test_the_sizes_shipped_are_those_of_the_images(images):
    metadata = samples.images_folder() / "metadata.jsonl"
    lines = [json.loads(line) for line in metadata.read_text().splitlines()]
    sizes = [[line["height"], line["width"]] for line in lines]
    assert samples.image_sizes("images").tolist() == sizes
    assert len(sizes) == len(images) == 176


def test_logits_go_back_to_the_source_order(images, packed):
    model = packpipe.NaViT(packpipe.NaViTConfig(num_classes=10, dim=32, depth=1, heads=1))
    logits = torch.full((176, 10), torch.nan)
    labels = torch.full((176,), -1)
    with torch.no_grad():
        for start in range(0, len(packed), 16):
            rows = packpipe.read_rows(packed, range(start, min(start + 16, len(packed))))
            batch = PackedBatch.from_rows(rows)
            index, values = batch.by_example(model(batch))
            logits[index] = values
            labels[index] = batch.by_example(batch.labels)[1]
    assert logits.isfinite().all()
    assert labels.tolist() == images["label"][:]


def test_training_lowers_the_loss_and_repeats_to_the_bit(packed):
    few = packed.select(range(8))
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = packpipe.NaViT(packpipe.NaViTConfig(num_classes=10, dim=32, depth=1, heads=1))
        config = TrainConfig(steps=40, learning_rate=3e-3, loss="softmax", log_every=1)
        run = train(model, packpipe.PackedLoader(few, 4), config)
        runs.append([record.loss for record in run])
    assert runs[0] == runs[1]
    assert np.mean(runs[0][-4:]) < 0.9 * np.mean(runs[0][:4])


def test_the_demo_prints_its_table_and_leaves_pictures(tmp_path, capsys):
    demo.main([str(tmp_path / "demo"), "--seq-len", "512", "--steps", "2", "--num-workers", "2"])
    printed = capsys.readouterr().out
    wanted = ["176", "padding, packed", "padding, one image a row", "gap to the lower bound"]
    assert all(text in printed for text in wanted)
    for name in ("rows.png", "loss.png"):
        assert (tmp_path / "demo" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "demo" / "packed-512" / "manifest.json").is_file()
    demo.run(tmp_path / "demo", 512, 0, 2, as_json=True)
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert (figures["images"], figures["packs"] - figures["bound"]) == (176, 0)
    assert 0 < figures["padding"] < 0.1 < figures["padding_batches"] < figures["padding_alone"] < 1
    assert all(name.isidentifier() for name in figures)
    assert "training" not in figures
    assert "padding, packed" in err


def test_a_demo_that_nobody_reads_ends_quietly(capsys, monkeypatch):
    def printed(*_, **__):
        console().print("figures")

    monkeypatch.setattr(demo, "run", printed)
    monkeypatch.setattr(demo, "prepare", lambda _: None)
    read, written = os.pipe()
    os.close(read)
    with open(written, "w", encoding="utf-8") as gone, monkeypatch.context() as meanwhile:
        meanwhile.setattr("sys.stdout", gone)
        with pytest.raises(SystemExit) as ended:
            demo.main([])
        assert ended.value.code == 141
    assert capsys.readouterr().err == ""
