"""`packpipe train --init`: a trained model goes on with a new head, on images packed as for it."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pyarrow.parquet as pq
import pytest
import torch
from commands import run, told
from huggingface_hub.errors import LocalEntryNotFoundError
from pictures import two_classes
from safetensors.torch import save_file

import packpipe
from packpipe import Constant, NaViTConfig, PackConfig, Side, Square, Uniform
from packpipe.cli.layouts import EncoderLayout
from packpipe.cli.open_source import open_source
from packpipe.cli.starting import start_of
from packpipe.model.navit import NaViT
from packpipe.planning.crops import Crop
from packpipe.training import loop
from packpipe.training.checkpoints import checkpoints, model_of
from packpipe.training.loop import read_log

DIM, WIDTH, PATCH = 32, 48, 8
FROZEN = ("embed.", "position.", "blocks.0.")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of two classes of images: dark and light ones, of several sizes."""
    return two_classes(tmp_path_factory.mktemp("shapes"), 60, 190)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The files of a SigLIP 2 with drawn weights, as transformers stores them."""
    folder = tmp_path_factory.mktemp("encoder")
    linear = {
        "self_attn.q_proj": (DIM, DIM),
        "self_attn.k_proj": (DIM, DIM),
        "self_attn.v_proj": (DIM, DIM),
        "self_attn.out_proj": (DIM, DIM),
        "mlp.fc1": (WIDTH, DIM),
        "mlp.fc2": (DIM, WIDTH),
    }
    shapes = {
        f"encoder.layers.{n}.{name}": shape for n in range(2) for name, shape in linear.items()
    }
    shapes |= {f"head.{name}": shape for name, shape in linear.items() if name.startswith("mlp")}
    shapes |= {"head.attention.out_proj": (DIM, DIM)}
    shapes |= {"embeddings.patch_embedding": (DIM, 3 * PATCH**2)}
    norms = [f"encoder.layers.{n}.layer_norm{k}" for n in range(2) for k in (1, 2)]
    draw = torch.Generator().manual_seed(1)
    drawn = {f"{name}.weight": shape for name, shape in shapes.items()}
    drawn |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    drawn |= {"embeddings.position_embedding.weight": (16, DIM), "head.probe": (1, 1, DIM)}
    drawn |= {"head.attention.in_proj_weight": (3 * DIM, DIM)}
    drawn |= {"head.attention.in_proj_bias": (3 * DIM,)}
    weights = {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in drawn.items()}
    for name in (*norms, "post_layernorm", "head.layernorm"):
        weights |= {f"{name}.weight": torch.ones(DIM), f"{name}.bias": torch.zeros(DIM)}
    save_file(weights, folder / "model.safetensors")
    settings = {
        "model_type": "siglip2_vision_model",
        "hidden_size": DIM,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": PATCH,
        "num_patches": 16,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


QUICK = ["--batch-size", 1, "--num-workers", 0, "--seq-len", 64, "--learning-rate", 1e-3]
TUNED = [*QUICK, "--freeze", 1, "--layer-decay", 0.5, "--loss", "softmax", "--log-every", 5]


@pytest.fixture(scope="module")
def tuned(shapes, encoder, tmp_path_factory):
    """The folder of a training that began with the encoder, and the rates of its last step."""
    folder, made = tmp_path_factory.mktemp("tuned"), []

    def optimizer_of(*arguments, **options):
        made.append(loop_optimizer(*arguments, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        loop_optimizer = loop.optimizer_of
        patch.setattr(loop, "optimizer_of", optimizer_of)
        told("train", shapes, folder, "--init", encoder, *TUNED, "--steps", 40, "--val", 0.25)
    assert len(made) == 1
    return folder, made[0]


def test_losses_fall_and_what_is_frozen_keeps_every_bit(encoder, tuned):
    losses = [record["loss"] for record in read_log(tuned[0])]
    assert len(losses) == 8
    assert losses[-1] < losses[0] / 2
    before, _ = packpipe.from_pretrained(encoder)
    after = packpipe.load_model(tuned[0])[0].state_dict()
    assert {*after} - {*before.state_dict()} == {"head.weight", "head.bias"}
    kept = {name for name, value in before.state_dict().items() if torch.equal(value, after[name])}
    assert kept == {name for name in after if name.startswith(FROZEN)}
    assert len(kept) > 10


def test_rates_fall_from_layer_to_layer(tuned):
    folder, optimizer = tuned
    sizes = {name: one.numel() for name, one in model_of(folder).named_parameters()}
    last = sum(size for name, size in sizes.items() if name.startswith("blocks.1."))
    frozen = sum(size for name, size in sizes.items() if name.startswith(FROZEN))
    wanted = {0.5: last, 1.0: sum(sizes.values()) - last - frozen}
    found = dict.fromkeys(wanted, 0)
    rate = read_log(folder)[-1]["learning_rate"]
    for group in optimizer.param_groups:
        found[group["scale"]] += sum(p.numel() for p in group["params"])
        assert group["lr"] == pytest.approx(rate * group["scale"])
    assert found == wanted


def test_the_run_is_asked_as_the_encoder_expects(shapes, encoder, tuned):
    model, packing = packpipe.from_pretrained(encoder)
    found, options = packpipe.load_model(tuned[0])
    assert options.packing == replace(packing, seq_len=64)
    assert (packing.resolution, packing.max_tokens, packing.reducing_gap) == ("budget", 16, None)
    assert options.class_names == ("dark", "light")
    assert options.init == str(encoder)
    assert found.config == replace(model.config, num_classes=2)

    files = [shapes / "light" / "3.png", shapes / "dark" / "0.png"]
    said = json.loads(told("predict", tuned[0], *files, "--json", "--num-workers", 0))
    shares = packpipe.predict(found, files, **packing.to_options()).softmax(-1)
    for one, row in zip(said["predictions"], shares, strict=True):
        by_name = {each["name"]: each["probability"] for each in one["classes"]}
        assert by_name == pytest.approx(dict(zip(("dark", "light"), row.tolist(), strict=True)))
    measured = json.loads(told("eval", tuned[0], shapes, "--json", "--num-workers", 0))
    assert measured["budgets"][0]["num_images"] == 16
    assert measured["budgets"][0]["accuracy"] > 0.9


def test_stopped_it_goes_on_without_what_it_began_with(shapes, encoder, tmp_path):
    begun = shutil.copytree(encoder, tmp_path / "encoder")
    command = ["train", shapes, tmp_path / "run", "--init", begun, *TUNED]
    told(*command, "--steps", 2)
    shutil.rmtree(begun)
    told(*command, "--steps", 4)
    told("train", shapes, tmp_path / "whole", "--init", encoder, *TUNED, "--steps", 4)
    files = [checkpoints(tmp_path / name)[-1] for name in ("run", "whole")]
    assert [path.name for path in files] == ["step-00000004"] * 2
    stopped, whole = ((path / "model.safetensors").read_bytes() for path in files)
    assert stopped == whole
    for init, message in [
        (
            ["--init", encoder],
            f"--init is '{encoder}', expected '{begun}', as at the beginning; or",
        ),
        ([], f"--init is None, expected '{begun}', as at the beginning; or give another folder"),
    ]:
        result = run("train", shapes, tmp_path / "run", *init, *QUICK)
        assert result.exit_code == 2
        assert message in result.stderr


def test_another_training_is_begun_with_as_it_is_validated(tuned, tmp_path):
    start = start_of(str(tuned[0]), tmp_path)
    assert start.packing == packpipe.load_model(tuned[0])[1].packing
    torch.manual_seed(0)
    model = NaViT(start.config(5, "reference"))
    assert model.config.num_classes == 5
    head = model.head.weight.clone()
    start.load_into(model)
    assert torch.equal(model.head.weight, head)
    for name, value in model_of(tuned[0], best=True).state_dict().items():
        assert name.startswith("head.") or torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("law", "sizes"),
    [
        ({"resolution": "budget", "max_tokens": 16}, Side(Uniform(16, 48))),
        ({"resolution": Square(Constant(32))}, Square(Uniform(16, 48))),
    ],
)
def test_sizes_are_the_encoders_unless_they_are_drawn(law, sizes, shapes):
    packing = PackConfig(seq_len=64, patch_size=PATCH, profiles="ignore", reducing_gap=None, **law)
    images = open_source(str(shapes), "train")
    layout = EncoderLayout(packing)
    assert layout.evaluation(PATCH) == packing
    assert layout.packs(images, PATCH, 0).config == packing
    drawn = replace(layout, seq_len=80, sides=(16, 48), drop_rate=0.25, crop=Crop(0.5))
    assert drawn.evaluation(PATCH) == replace(packing, seq_len=80)
    shape = "square" if isinstance(sizes, Square) else "image"
    assert drawn.packs(images, PATCH, 0).config == replace(
        packing,
        seq_len=80,
        resolution=sizes,
        max_tokens=None,
        drop_rate=0.25,
        crop=Crop(0.5, shape=shape),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model", "Ti/8"],
            "--model is 'Ti/8', expected left out beside --init {encoder}, which",
        ),
        (["--position", "rotary"], "--position is 'rotary', expected left out beside --init"),
        (["--pooling", "mean"], "--pooling is 'mean', expected left out beside --init"),
        (["--layout", "packed"], "--layout is 'packed', expected left out beside --init"),
        (["--profiles", "srgb"], "--profiles is 'srgb', expected left out beside --init"),
        (
            ["--val", 0.25, "--val-tokens", 8],
            "--val-tokens is 8, expected left out beside --init {encoder}, which has its own; drop",
        ),
        (["--freeze", 3], "freeze is 3, expected at most 2 (depth); freeze fewer blocks"),
        (["--seq-len", 8], "max_tokens is 16, expected an integer in 1..8; an image must fit into"),
        (
            ["--init", "/no/where"],
            "--init is '/no/where', expected a folder that packpipe train wrote or of an encod",
        ),
    ],
)
def test_what_does_not_go_with_a_trained_model_is_refused(
    options, message, shapes, encoder, tmp_path
):
    command = ["train", shapes, tmp_path / "out", "--init", encoder, *QUICK, "--steps", 1]
    result = run(*command, *options)
    assert result.exit_code == 2
    assert message.format(encoder=encoder) in result.stderr


def test_rows_stay_as_they_were_packed(shapes, encoder, tmp_path):
    images = open_source(str(shapes), "train")
    packpipe.pack(images, 128, patch_size=PATCH, output=tmp_path / "rows", progress=False)
    options = ["--batch-size", 1, "--num-workers", 0, "--steps", 1]
    told("train", tmp_path / "rows", tmp_path / "run", "--init", encoder, *options)
    model, found = packpipe.load_model(tmp_path / "run")
    assert model.config.position == "resized"
    assert found.packing == PackConfig(seq_len=128, patch_size=PATCH)
    assert found.init == str(encoder)


def test_a_model_of_maps_is_refused(tmp_path):
    config = NaViTConfig(num_classes=None, dim=8, depth=1, heads=1, pooling="none")
    packpipe.save_pretrained(NaViT(config), PackConfig(), tmp_path / "maps")
    message = "pooling of --init is 'none', expected one that gives an output an image; choose"
    with pytest.raises(ValueError, match=re.escape(message)):
        start_of(str(tmp_path / "maps"), tmp_path)


def test_drawn_weights_are_not_frozen(shapes, tmp_path):
    result = run("train", shapes, tmp_path / "out", "--freeze", 2)
    assert result.exit_code == 2
    assert "--freeze is 2, expected 0 without --init; pass --init: weights that" in result.stderr


def test_a_training_that_began_without_goes_on_without(encoder, tuned, tmp_path):
    begun = shutil.copytree(tuned[0], tmp_path / "run")
    known = json.loads((begun / "model.json").read_text())
    assert known.pop("init") == str(encoder)
    (begun / "model.json").write_text(json.dumps(known))
    message = f"--init is '{encoder}', expected left out, as at the beginning; or give another"
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            start_of(str(encoder), begun)
        assert start_of(None, begun) is None
        (begun / "model.json").unlink(missing_ok=True)  # as folders of earlier versions


def test_embed_takes_a_name_on_the_hub_and_a_folder_first(shapes, encoder, tmp_path, monkeypatch):
    asked = []

    def download(name, **options):
        del options
        asked.append(name)
        if name == "someone/else":
            raise LocalEntryNotFoundError("no files in the cache, and no network")
        return str(encoder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    told("embed", "someone/encoder", shapes, "named.parquet", "--num-workers", 0)
    assert asked == ["someone/encoder"]
    shutil.copytree(encoder, Path("someone/encoder"))
    told("embed", "someone/encoder", shapes, "here.parquet", "--num-workers", 0)
    assert asked == ["someone/encoder"]
    named, here = (pq.read_table(f"{name}.parquet") for name in ("named", "here"))
    assert named.equals(here)
    assert len(named) == 16
    result = run("embed", "someone/else", shapes, "no.parquet")
    assert result.exit_code == 2
    message = (
        "'someone/else', expected a folder, or a model that can be downloaded (no files in the"
    )
    assert message in result.stderr
