"""Encoders with a class token: their files become models with their outputs and gradients."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import datasets
import numpy as np
import packed
import pytest
import torch
import transformers
from encoders import CASE, MEAN, STD, check_outputs, check_sees_no_neighbours, shaken
from laws import close
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from packpipe import (
    EpochPacks,
    NaViT,
    NaViTConfig,
    OnnxModel,
    PackConfig,
    PackedLoader,
    export_onnx,
    from_pretrained,
    load_model,
    predict,
    save_pretrained,
)
from packpipe.cli.main import app
from packpipe.hub import class_token
from packpipe.planning.crops import CenterCrop
from packpipe.planning.distributions import Constant
from packpipe.planning.resolution import Square
from packpipe.samples import images_folder
from packpipe.training.loop import read_log, train
from packpipe.training.run_folder import RunOptions
from packpipe.training.train_config import TrainConfig

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": packed.PATCH_SIZE,
    "image_size": 8,
}
WIDE = {"intermediate_size": 48}
MIDDLE = {"size": {"shortest_edge": 12}, "crop_size": {"height": 8, "width": 8}}
WHOLE = {"size": {"height": 8, "width": 8}}


@dataclass(frozen=True)
class Family:
    """An encoder of transformers, and what of its processor is not as usual."""

    model: Callable
    processor: dict
    prefix_tokens: int
    parts: tuple  # in whose files its names begin otherwise
    gradients: dict  # ours: theirs, of transformers 5
    forward: Callable


def pooled(model, image, **options):
    return model(image, **options).pooler_output


def first(model, image):
    """ViT's class token, without the pooler that most of its files have no weights of."""
    return model(image, interpolate_pos_encoding=True).last_hidden_state[:, 0]


DINO = {
    "position.table": None,
    "blocks.0.widen.weight": "mlp.fc1.weight",
    "blocks.1.scale_mlp.weight": "layer_scale2.lambda1",
}
FAMILIES = {
    "dinov2": Family(
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=2)),
        MIDDLE,
        1,
        ("", "dinov2."),
        DINO,
        pooled,
    ),
    "dinov2 with registers": Family(
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_register_tokens=3)
        ),
        MIDDLE,
        4,
        ("", "dinov2_with_registers."),
        DINO,
        pooled,
    ),
    "dinov3": Family(
        lambda: transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(**SMALL, **WIDE, num_register_tokens=2)
        ),
        WHOLE,
        3,
        ("",),
        {
            "blocks.0.widen.weight": "mlp.up_proj.weight",
            "blocks.1.scale_mlp.weight": "layer_scale2.lambda1",
            "blocks.1.project.bias": "attention.o_proj.bias",
        },
        pooled,
    ),
    "dinov3 gated": Family(
        lambda: transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(**SMALL, **WIDE, use_gated_mlp=True, hidden_act="silu")
        ),
        WHOLE,
        1,
        ("",),
        {
            "blocks.0.narrow.weight": "mlp.down_proj.weight",
            "blocks.1.scale_mlp.weight": "layer_scale2.lambda1",
            "blocks.1.project.bias": "attention.o_proj.bias",
        },
        pooled,
    ),
    "vit": Family(
        lambda: transformers.ViTModel(
            transformers.ViTConfig(**SMALL, **WIDE), add_pooling_layer=False
        ),
        WHOLE,
        1,
        ("", "vit."),
        {
            "position.table": None,
            "blocks.0.widen.weight": "mlp.fc1.weight",
            "blocks.1.norm_mlp.bias": "layernorm_after.bias",
        },
        first,
    ),
    "clip": Family(
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, **WIDE)),
        MIDDLE,
        1,
        ("", "vision_model."),
        {
            "position.table": None,
            "blocks.0.widen.weight": "mlp.fc1.weight",
            "norm_embed.weight": "pre_layrnorm.weight",
        },
        partial(pooled, interpolate_pos_encoding=True),
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def saved(folder, family, prefix=""):
    """Save an encoder of random weights, with its processor; return it."""
    model = shaken(family.model())
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({prefix + name: one for name, one in tensors.items()}, path)
    processor = {"image_mean": MEAN, "image_std": STD, "resample": 3, **family.processor}
    processor["do_center_crop"] = "crop_size" in processor
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def theirs(family, model, batch):
    """The outputs of each image alone, in the order of the images."""
    found, size = [], packed.PATCH_SIZE
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    for _, _, one in packed.alone(batch):
        rows, columns = one.grid_hw[0, 0].tolist()
        image = one.patches[0, family.prefix_tokens :].reshape(rows, columns, size, size, 3)
        image = image.permute(4, 0, 2, 1, 3).reshape(3, rows * size, columns * size) / 255
        found.append(family.forward(model, ((image - mean) / std)[None]))
    return torch.cat(found)


def gradient_of(model, name, ours):
    """A gradient of transformers' model by the end of its name, and the number in our name."""
    own = dict(model.named_parameters())
    if name is None:  # the table but for the class token's place
        (table,) = [v for k, v in own.items() if "position_embedding" in k]
        return table.grad.reshape(-1, table.shape[-1])[1:]
    number = re.match(r"blocks\.(\d)", ours)
    inside = f".{number[1]}." if number else ""
    (found,) = [v for k, v in own.items() if k.endswith(name) and inside in f".{k}"]
    return found.grad


@every_family
def test_outputs_and_gradients_are_the_originals(family, tmp_path, caplog):
    family = FAMILIES[family]
    original = saved(tmp_path, family)
    model, packing = from_pretrained(tmp_path)
    assert packing.prefix_tokens == model.config.prefix_tokens == family.prefix_tokens
    batch = packed.batch_of(CASE, prefix_tokens=family.prefix_tokens)
    check_outputs(model(batch)[batch.present], theirs(family, original, batch))
    own = dict(model.named_parameters())
    assert len(family.gradients) == 3
    for name, of in family.gradients.items():
        assert close(own[name].grad, gradient_of(original, of, name), 1e-5), name
    assert all(one.grad.abs().sum() > 0 for one in own.values())
    told = [text for name, _, text in caplog.record_tuples if name.startswith("packpipe")]
    masked = "mask_token" in str(list(load_file(tmp_path / "model.safetensors")))
    assert len(told) == masked


# Names in the files of transformers 4, but for those of one family alone, and of a layer.
OF_4 = {
    "dinov2": (
        "encoder.layer.0.",
        {"embeddings.patch_embeddings.projection", "layernorm"},
        {
            *("norm1", "norm2", "mlp.fc1", "mlp.fc2", "attention.output.dense"),
            *(f"attention.attention.{name}" for name in ("query", "key", "value")),
        },
    ),
    "dinov3": (
        "layer.0.",
        {"embeddings.patch_embeddings", "norm"},
        {
            *("norm1", "norm2", "mlp.up_proj", "mlp.down_proj"),
            *(f"attention.{name}_proj" for name in "qkvo"),
        },
    ),
    "vit": (
        "encoder.layer.0.",
        {"embeddings.patch_embeddings.projection", "layernorm"},
        {
            *("layernorm_before", "layernorm_after", "intermediate.dense", "output.dense"),
            "attention.output.dense",
            *(f"attention.attention.{name}" for name in ("query", "key", "value")),
        },
    ),
    "clip": (
        "encoder.layers.0.",
        {
            *("embeddings.patch_embedding", "embeddings.position_embedding"),
            *("pre_layrnorm", "post_layernorm"),
        },
        {
            *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
            *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        },
    ),
}
OF_4["dinov2 with registers"] = OF_4["dinov2"]
OF_4["dinov3 gated"] = OF_4["dinov3"]


@every_family
def test_names_of_both_versions_are_read(family, tmp_path):
    """Version 5 writes those of 4, or those of its own modules, which it may have before them."""
    name, family = family, FAMILIES[family]
    original = saved(tmp_path / "4", family)
    shutil.copytree(tmp_path / "4", tmp_path / "5")
    original.save_pretrained(tmp_path / "5", save_original_format=False)
    layer, outside, inside = OF_4[name]
    stored, own = (load_file(tmp_path / n / "model.safetensors") for n in "45")
    weights = {key.removesuffix(".weight") for key in stored if key.endswith(".weight")}
    if name == "dinov3 gated":
        inside = {*inside, "mlp.gate_proj"}
    assert {key for key in weights if ".1." not in key} == outside | {layer + n for n in inside}
    assert (stored.keys() == own.keys()) == (name == "clip")
    wanted, packing = from_pretrained(tmp_path / "4")
    for prefix in family.parts:
        path = tmp_path / "5" / "model.safetensors"
        save_file({prefix + key: value for key, value in own.items()}, path)
        found, same = from_pretrained(tmp_path / "5")
        assert same == packing
        for key, value in wanted.state_dict().items():
            assert torch.equal(found.state_dict()[key], value), key


@every_family
def test_an_image_does_not_see_its_neighbours(family, tmp_path):
    family = FAMILIES[family]
    saved(tmp_path, family, family.parts[-1])  # as a part of a larger model
    model, _ = from_pretrained(tmp_path)
    batch = packed.batch_of(CASE, prefix_tokens=family.prefix_tokens)
    check_sees_no_neighbours(model, batch)


@pytest.mark.parametrize("family", ["dinov2 with registers", "vit"])
def test_packs_are_as_the_processor_makes_images(family, tmp_path):
    crops = FAMILIES[family].processor is MIDDLE
    saved(tmp_path, FAMILIES[family])
    slots = FAMILIES[family].prefix_tokens
    assert from_pretrained(tmp_path)[1] == PackConfig(
        patch_size=2,
        seq_len={4: 1020, 1: 1020}[slots],  # of 20 or 17 tokens an image
        prefix_tokens=slots,
        crop=CenterCrop((8 / 12) ** 2, shape="square") if crops else None,
        resolution=Square(Constant(8)),
        reducing_gap=None,
        profiles="ignore",
    )


def test_real_pictures_get_the_vectors_of_processor_and_model(tmp_path):
    files = sorted(images_folder().rglob("*.jpg"))[:2]
    assert len(files) == 2
    config = transformers.ViTConfig(**SMALL | WIDE | {"patch_size": 16, "image_size": 64})
    original = shaken(transformers.ViTModel(config, add_pooling_layer=False))
    processor = transformers.ViTImageProcessorPil(size={"height": 64, "width": 64})
    original.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pictures = [Image.open(file).convert("RGB") for file in files]
    with torch.no_grad():
        given = processor(images=pictures, return_tensors="pt")
        wanted = original(**given).last_hidden_state[:, 0]
    model, packing = from_pretrained(tmp_path)
    found = predict(model, files, **packing.to_options())
    assert (found - wanted).abs().max() < 2e-6 * wanted.abs().max()
    save_pretrained(model, packing, tmp_path / "ours")
    again, same = from_pretrained(tmp_path / "ours")
    assert same == packing
    assert torch.equal(predict(again, files, **same.to_options()), found)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn in config.json is True, expected Fal"),
        (
            "dinov3",
            {"key_bias": True},
            "key_bias in config.json is True, expected False; other enc",
        ),
        ("dinov3", {"rope_theta": 10.0}, "rope_theta in config.json is 10.0, expected 100.0; oth"),
        ("dinov3", {"num_register_tokens": 4}, "1 + num_register_tokens in config.json is 5, expe"),
        ("vit", {"qkv_bias": False}, "qkv_bias in config.json is False, expected True; other enc"),
        ("vit", {"image_size": 12}, "image_size ÷ patch_size, in config.json is 6, expected 4 as"),
        ("clip", {"hidden_act": "tanh"}, "hidden_act in config.json is 'tanh', expected one of"),
    ],
)
def test_what_is_not_known_is_refused(family, settings, message, tmp_path):
    saved(tmp_path, FAMILIES[family])
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(ValueError, match=re.escape(message)):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": {"height": 7, "width": 7}}, "crop_size is 7, expected a multiple of 2 (pa"),
        ({"crop_size": {"height": 8, "width": 6}}, "crop_size is {'height': 8, 'width': 6}, expec"),
        ({"crop_size": 14}, "crop_size is 14, expected at most 12 (the shorter side); images are"),
        ({"size": {"height": 8, "width": 8}}, "size is {'height': 8, 'width': 8}, expected a shor"),
    ],
)
def test_a_crop_that_is_not_known_is_refused(settings, message, tmp_path):
    saved(tmp_path, FAMILIES["clip"])
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(ValueError, match=re.escape(f"image processor's {message}")):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("dinov2-base", "dinov2", transformers.Dinov2Config(image_size=518)),
        (
            "dinov2-with-registers-base",
            "dinov2_with_registers",
            transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14),
        ),
        ("dinov3-vits16", "dinov3_vit", transformers.DINOv3ViTConfig(num_register_tokens=4)),
        ("vit-base-patch16-224", "vit", transformers.ViTConfig()),
        ("clip-vit-base-patch32", "clip", transformers.CLIPVisionConfig()),
    ],
)
def test_presets_have_the_shapes_of_the_encoders(name, kind, settings):
    shape = class_token.shape_of(settings.to_dict(), kind)
    assert shape == NaViTConfig.preset(name, num_classes=None)


def test_a_table_is_evaluated_on_grids_larger_than_it_was_trained_on(tmp_path):
    family = FAMILIES["dinov2"]
    original = saved(tmp_path, family)
    model, _ = from_pretrained(tmp_path)
    large = packed.RowSet(lens=[[81, 48]], seq_len=130, max_segments=2)  # 9 × 9 and 6 × 8 of 4 × 4
    batch = packed.batch_of(large, prefix_tokens=1)
    assert batch.grid_hw.max() > 2 * model.config.side
    assert close(model(batch)[batch.present], theirs(family, original, batch), 1e-5)


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_it_is_trained_on_grids_larger_than_before(family, tmp_path):
    """A table of 4 × 4 places, and positions without one, on grids of up to 9 × 9 patches."""
    saved(tmp_path, FAMILIES[family])
    torch.manual_seed(0)
    model, packing = from_pretrained(tmp_path, num_classes=2)
    assert packing.resolution == Square(Constant(8))
    draw = np.random.default_rng(0)
    sizes = [(18, 18), (18, 12), (14, 18), (10, 16)] * 2
    levels = 120 * np.arange(len(sizes), dtype=np.uint8) % 240
    images = [
        draw.integers(0, 120, (*size, 3), np.uint8) + level
        for size, level in zip(sizes, levels, strict=True)
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 4}, features)
    options = packing.to_options() | {"resolution": "native", "crop": None, "seq_len": 170}
    packs = EpochPacks(dataset, **options)
    loader = PackedLoader(packs, 2)
    batch = next(iter(loader))
    assert batch.grid_hw.max() == 9
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = TrainConfig(steps=24, loss="softmax", learning_rate=2e-3, warm_up=2)
    records = list(train(model, loader, config))
    assert records[-1].loss < records[0].loss / 2
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {name for name, _ in model.named_parameters()}


def test_a_training_begins_with_its_weights_and_packs(tmp_path):
    family = FAMILIES["dinov2 with registers"]
    saved(tmp_path / "encoder", family)
    draw = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            size = (int(draw.integers(12, 40)), int(draw.integers(12, 40)), 3)
            pixels = np.clip(draw.normal(level, 20, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    command = ["train", tmp_path / "images", tmp_path / "run", "--init", tmp_path / "encoder"]
    command += ["--freeze", 1, "--loss", "softmax", "--steps", 20, "--log-every", 5]
    command += ["--batch-size", 1, "--num-workers", 0, "--seq-len", 90, "--learning-rate", 4e-3]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    losses = [record["loss"] for record in read_log(tmp_path / "run")]
    assert losses[-1] < losses[0] / 2
    before, _ = from_pretrained(tmp_path / "encoder")
    model, options = load_model(tmp_path / "run")
    assert options.packing.prefix_tokens == model.config.prefix_tokens == 4
    assert torch.equal(model.prefix, before.prefix)  # frozen with the patch embedding
    assert torch.equal(model.blocks[0].widen.weight, before.blocks[0].widen.weight)
    assert not torch.equal(model.blocks[1].widen.weight, before.blocks[1].widen.weight)


def test_a_model_with_prefix_tokens_is_exported(tmp_path):
    config = NaViTConfig.preset("dinov2-with-registers-small", num_classes=5, max_side=4)
    small = replace(config, patch_size=2, dim=16, depth=1, heads=2, mlp_dim=24)
    torch.manual_seed(0)
    model = NaViT(small).eval()
    packing = PackConfig(patch_size=2, prefix_tokens=5, seq_len=40, max_tokens=16)
    file = tmp_path / "model.onnx"
    assert export_onnx(model, RunOptions(packing=packing), file) < 1e-5
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (*size, 3), np.uint8) for size in ((8, 6), (4, 4), (2, 9))]
    wanted = predict(model, images, **packing.to_options())
    assert close(torch.from_numpy(OnnxModel(file).predict(images)), wanted, 1e-5)
    with pytest.raises(ValueError, match=r"prefix_tokens of the options is 0, expected 5 \(the"):
        export_onnx(model, RunOptions(packing=PackConfig(patch_size=2)), tmp_path / "other.onnx")
