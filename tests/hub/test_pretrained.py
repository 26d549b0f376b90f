"""Encoders of other libraries: their files become models with their outputs and gradients."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import huggingface_hub
import packed
import pytest
import torch
import transformers
from encoders import CASE, MEAN, STD, check_outputs, check_sees_no_neighbours, shaken
from huggingface_hub.errors import LocalEntryNotFoundError
from laws import close
from PIL import Image
from safetensors.torch import load_file, save_file

from packpipe import NaViTConfig, PackConfig, from_pretrained, load_model, predict, save_pretrained
from packpipe.hub import siglip
from packpipe.planning.distributions import Constant
from packpipe.planning.resolution import Square
from packpipe.samples import images_folder

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXTS = {**SMALL, "vocab_size": 50, "max_position_embeddings": 8}
LAYOUTS = ("alone", "transformers 4", "with texts", "in shards")


@dataclass(frozen=True)
class Family:
    """An encoder of transformers, with its tower of texts, and its image processor."""

    vision: dict
    models: tuple
    configs: tuple
    processor: dict
    forward: Callable


def naflex(model, patches, grid_hw):
    """SigLIP 2, whose images keep their aspect ratio."""
    return model(
        pixel_values=patches[None].float() / 127.5 - 1,
        pixel_attention_mask=torch.ones(1, len(patches), dtype=torch.int32),
        spatial_shapes=torch.tensor([grid_hw]),
    ).pooler_output


def fixed(model, patches, grid_hw):
    """SigLIP, whose images are squares; here of other sizes, too, and with another mean."""
    size = packed.PATCH_SIZE
    image = patches.reshape(*grid_hw, size, size, 3).permute(4, 0, 2, 1, 3)
    image = image.reshape(3, grid_hw[0] * size, grid_hw[1] * size) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return model(((image - mean) / std)[None], interpolate_pos_encoding=True).pooler_output


NAFLEX = Family(
    {**SMALL, "patch_size": packed.PATCH_SIZE, "num_patches": 16},
    (transformers.Siglip2VisionModel, transformers.Siglip2Model),
    (transformers.Siglip2VisionConfig, transformers.Siglip2Config),
    {"resample": 2, "max_num_patches": 16},
    naflex,
)
FIXED = Family(
    {**SMALL, "patch_size": packed.PATCH_SIZE, "image_size": 8},
    (transformers.SiglipVisionModel, transformers.SiglipModel),
    (transformers.SiglipVisionConfig, transformers.SiglipConfig),
    {"size": {"height": 8, "width": 8}, "image_mean": MEAN, "image_std": STD},
    fixed,
)
FAMILIES = {"siglip2 naflex": NAFLEX, "siglip": FIXED}


def saved(folder, family, layout="alone"):
    """Save a model of random weights as a version of transformers does; return its image tower."""
    alone, whole = family.models
    of_images, of_both = family.configs
    if layout == "with texts":
        model = shaken(whole(of_both(vision_config=family.vision, text_config=TEXTS)))
    else:
        model = shaken(alone(of_images(**family.vision)))
    size = "20KB" if layout == "in shards" else "1GB"
    model.save_pretrained(folder, max_shard_size=size)
    if layout == "in shards":
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    else:
        rename(folder, "vision_model." if layout == "transformers 4" else "")
    (folder / "preprocessor_config.json").write_text(json.dumps(family.processor))
    return model.vision_model if layout == "with texts" else model


def rename(folder, prefix):
    """Put a prefix before all names of tensors that lack it, as version 4 has it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({prefix + name.removeprefix(prefix): one for name, one in tensors.items()}, path)


def theirs(family, model, batch):
    """The outputs of each image alone, in the order of the images."""
    found = [
        family.forward(model, one.patches[0], one.grid_hw[0, 0].tolist())
        for _, _, one in packed.alone(batch)
    ]
    return torch.cat(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_the_originals(family, layout, tmp_path, caplog):
    family = FAMILIES[family]
    original = saved(tmp_path, family, layout)
    model, _ = from_pretrained(tmp_path)
    batch = packed.batch_of(CASE)
    check_outputs(model(batch)[batch.present], theirs(family, original, batch))
    own, other = dict(model.named_parameters()), dict(original.named_parameters())
    for name, of in {
        "position.table": "embeddings.position_embedding.weight",
        "blocks.0.widen.weight": "encoder.layers.0.mlp.fc1.weight",
        "blocks.1.project.weight": "encoder.layers.1.self_attn.out_proj.weight",
        "pool.project.bias": "head.attention.out_proj.bias",
    }.items():
        assert close(own[name].grad, other[of].grad, 1e-5), name
    assert all(one.grad.abs().sum() > 0 for one in own.values())
    told = [text for name, _, text in caplog.record_tuples if name.startswith("packpipe")]
    if layout == "with texts":
        names = load_file(tmp_path / "model.safetensors")
        number = sum(name.startswith("text_model.") for name in names)
        assert number > 20
        unused = f"logit_bias (1), logit_scale (1), text_model ({number})"
        assert told == [f"{tmp_path}: {number + 2} tensors are not used: {unused}"]
    else:
        assert told == []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_does_not_see_its_neighbours(family, tmp_path):
    saved(tmp_path, FAMILIES[family])
    model, _ = from_pretrained(tmp_path)
    check_sees_no_neighbours(model, packed.batch_of(CASE))


@pytest.mark.parametrize(
    ("family", "packing"),
    [
        (
            NAFLEX,
            {
                "seq_len": 1024,
                "resolution": "budget",
                "max_tokens": 16,
                "downscale_filter": "bilinear",
                "upscale_filter": "bilinear",
            },
        ),
        (FIXED, {"seq_len": 1024, "resolution": Square(Constant(8))}),
    ],
    ids=FAMILIES,
)
def test_images_are_packed_as_the_processor_makes_them(family, packing, tmp_path):
    saved(tmp_path, family)
    expected = PackConfig(patch_size=2, reducing_gap=None, profiles="ignore", **packing)
    assert from_pretrained(tmp_path)[1] == expected
    # The same inside the settings of a processor of texts, too.
    path = tmp_path / "preprocessor_config.json"
    inside = {"image_processor": json.loads(path.read_text()), "processor_class": "Processor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(inside))
    path.unlink()
    assert from_pretrained(tmp_path)[1] == expected


def processed(folder, original, processor):
    """Save a model with its processor; return two real pictures, and the vectors it gives them."""
    files = sorted(images_folder().rglob("*.jpg"))[:2]
    assert len(files) == 2
    shaken(original).save_pretrained(folder)
    processor.save_pretrained(folder)
    pictures = [Image.open(file).convert("RGB") for file in files]
    with torch.no_grad():
        return files, original(**processor(images=pictures, return_tensors="pt")).pooler_output


def fixed_of(size):
    """SigLIP with patches of 16 pixels, and its processor."""
    config = transformers.SiglipVisionConfig(**SMALL, image_size=size)
    processor = transformers.SiglipImageProcessorPil(size={"height": size, "width": size})
    return transformers.SiglipVisionModel(config), processor


def naflex_of(limit):
    """SigLIP 2 with patches of 16 pixels, and its processor."""
    config = transformers.Siglip2VisionConfig(**SMALL, num_patches=limit)
    processor = transformers.Siglip2ImageProcessorPil(max_num_patches=limit)
    return transformers.Siglip2VisionModel(config), processor


@pytest.mark.parametrize(("make", "size"), [(naflex_of, 64), (fixed_of, 96)])
def test_real_pictures_get_the_vectors_of_processor_and_model(make, size, tmp_path):
    files, wanted = processed(tmp_path, *make(size))
    model, packing = from_pretrained(tmp_path)
    found = predict(model, files, **packing.to_options())
    assert (found - wanted).abs().max() < 2e-6 * wanted.abs().max()
    assert wanted.abs().max() > 1


def test_the_edge_that_the_original_does_not_see_is_cropped(tmp_path):
    files, wanted = processed(tmp_path, *fixed_of(91))  # 5 patches of 16 pixels, and 11 pixels
    model, packing = from_pretrained(tmp_path)
    found = predict(model, files, **packing.to_options())
    whole = predict(model, files, **packing.to_options() | {"crop": None})
    assert (found - wanted).abs().max() < (whole - wanted).abs().max() / 10


@pytest.mark.parametrize(
    ("name", "vision"),
    [
        ("siglip2-base-patch16-naflex", transformers.Siglip2VisionConfig()),
        ("siglip-base-patch16-224", transformers.SiglipVisionConfig()),
        (
            "siglip2-so400m-patch14-384",
            transformers.SiglipVisionConfig(
                hidden_size=1152,
                num_hidden_layers=27,
                num_attention_heads=16,
                intermediate_size=4304,
                patch_size=14,
                image_size=384,
            ),
        ),
    ],
)
def test_presets_have_the_shapes_of_the_encoders(name, vision):
    naflex = name.endswith("naflex")
    assert siglip.shape_of(vision.to_dict(), naflex=naflex) == NaViTConfig.preset(
        name, num_classes=None
    )


@pytest.mark.parametrize("num_classes", [None, 3])
def test_what_is_saved_is_what_comes_back(num_classes, tmp_path):
    saved(tmp_path / "theirs", NAFLEX)
    model, packing = from_pretrained(tmp_path / "theirs", num_classes=num_classes)
    save_pretrained(model, packing, tmp_path / "ours")
    again, same_packing = from_pretrained(tmp_path / "ours")
    assert same_packing == packing
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    other, _ = from_pretrained(tmp_path / "ours", num_classes=5)
    assert other.head.weight.shape == (5, 32)
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_what_another_version_saved_or_cannot_be_saved_is_refused(tmp_path):
    saved(tmp_path, NAFLEX)
    model, packing = from_pretrained(tmp_path)
    message = "patch_size is 16, expected 2 (the model's); pass the model's packing"
    with pytest.raises(ValueError, match=re.escape(message)):
        save_pretrained(model, PackConfig(), tmp_path)
    save_pretrained(model, packing, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    message = f"version in {path} is 2, expected 1; use the packpipe that wrote it"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_pretrained(tmp_path)


def test_shards_of_before_are_not_read_for_what_is_saved(tmp_path):
    saved(tmp_path, NAFLEX, "in shards")
    model, packing = from_pretrained(tmp_path)
    torch.nn.init.ones_(model.norm.weight)
    save_pretrained(model, packing, tmp_path)
    again, _ = from_pretrained(tmp_path)
    assert torch.equal(again.norm.weight, model.norm.weight)


def test_what_a_later_packpipe_saved_is_refused_by_name(tmp_path):
    model = packed.model_of()
    save_pretrained(model, PackConfig(patch_size=2), tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    for part, known in (("model", "num_classes"), ("packing", "seq_len")):
        path.write_text(json.dumps({**told, part: {**told[part], "later": 1}}))
        message = f"an option in {path} is 'later', expected one of {known!r}, "
        with pytest.raises(ValueError, match=re.escape(message)):
            from_pretrained(tmp_path)
    path.write_text(json.dumps(told))
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for changed, message in (
        ({"norm.weight": weights["norm.weight"][1:]}, "norm.weight is (15,), expected (16,), the"),
        (
            {"extra": torch.zeros(2)},
            "extra is (2,), expected None, the shape that config.json says",
        ),
    ):
        save_file({**weights, **changed}, path)
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: {message}")):
            from_pretrained(tmp_path)
    save_file({name: one for name, one in weights.items() if name != "norm.weight"}, path)
    message = f"{tmp_path}: norm.weight is None, expected (16,), the shape that config.json says"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint; .* with from_pretrained"):
        load_model(tmp_path)


def test_a_new_head_is_drawn_on_the_old_trunk(tmp_path):
    saved(tmp_path, NAFLEX)
    torch.manual_seed(3)
    model, _ = from_pretrained(tmp_path, num_classes=7, attention="reference")
    assert model.config.num_classes == 7
    assert model.config.attention == "reference"
    assert model.head.weight.std() > 0.01
    trunk, _ = from_pretrained(tmp_path)
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in trunk.state_dict().items())


def test_weights_that_nobody_knows_or_that_are_missing_are_refused_by_name(tmp_path):
    saved(tmp_path, NAFLEX)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "adapter.weight": torch.zeros(2)}, path)
    message = (
        f"tensors of {tmp_path} is 1, expected those of its family, without adapter.weight; remove"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        from_pretrained(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != "head.probe"}, path)
    message = f"{tmp_path}: head.probe is None, expected a tensor of the weights; the weights are"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "bert"}, "config.json is 'bert', expected one of 'packpipe', 'siglip2', "),
        ({"hidden_act": "relu"}, "hidden_act in config.json is 'relu', expected one of 'gelu_py"),
        ({"num_channels": 1}, "num_channels in config.json is 1, expected 3; packed images have"),
        ({"patch_size": 4}, "patch_size in config.json is 4, expected 2 as of the weights; take"),
        ({"hidden_size": 16}, "hidden_size in config.json is 16, expected 32 as of the weights"),
        ({"num_patches": 25}, "√num_patches, in config.json is 5, expected 4 as of the weights"),
    ],
)
def test_what_is_not_known_is_refused(settings, message, tmp_path):
    saved(tmp_path, NAFLEX)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(ValueError, match=re.escape(message)):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 9}, "resample is 9, expected a number of Pillow's filters, 0..5; correct"),
        ({"do_resize": False}, "do_resize is False, expected True; packed images are resized"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, expected 1/255; packed images are"),
        ({"size": {"shortest_edge": 8}}, "size is {'shortest_edge': 8}, expected one height and"),
        ({"size": {"height": 8, "width": 9}}, "size is {'height': 8, 'width': 9}, expected one h"),
        ({"size": 8}, "image processor's size is 8, expected one height and width; write the one"),
        (
            {"size": {"height": 1, "width": 1}},
            "size is 1, expected an integer in 2..32767; correct",
        ),
        (
            {"do_center_crop": True, "crop_size": 4},
            "size is None, expected a shortest_edge; write the one",
        ),
        ({"do_pad": True}, "image processor's do_pad is True, expected False; packed images are"),
        ({"patch_size": 4}, "processor's patch_size is 4, expected 2 (the model's); take the proc"),
        (
            {"image_mean": 0.5},
            "processor's image_mean is 0.5, expected a list of three numbers; wr",
        ),
        ({"image_std": [0.5]}, "processor's image_std is [0.5], expected a list of three numbers"),
        (
            {"image_std": [0.5, 0, 1]},
            "processor's image_std is 0, expected a number above 0; write",
        ),
    ],
)
def test_a_processor_that_is_not_known_is_refused(settings, message, tmp_path):
    saved(tmp_path, FIXED)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=re.escape(message)):
        from_pretrained(tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path):
    saved(tmp_path, FIXED)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    message = f"weights is {str(path)!r}, expected a whole file of safetensors ("
    with pytest.raises(ValueError, match=re.escape(message)):
        from_pretrained(tmp_path)
    path.write_bytes(whole)
    for name, text in (("preprocessor_config.json", "[]"), ("config.json", '{"model_type": ')):
        path = tmp_path / name
        path.write_text(text)
        message = (
            rf"settings is {re.escape(repr(str(path)))}, expected a JSON object \(.+\); it is c"
        )
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path)


def test_without_a_pool_each_token_has_its_own_output(tmp_path):
    torch.manual_seed(1)
    config = transformers.Siglip2VisionConfig(**NAFLEX.vision, vision_use_head=False)
    original = shaken(transformers.Siglip2VisionModel(config))
    original.save_pretrained(tmp_path)
    model, _ = from_pretrained(tmp_path)
    batch = packed.batch_of(packed.RowSet(lens=[[6, 4]], seq_len=12, max_segments=2))
    outputs = model(batch)[0]
    for (_, number, one), place in zip(packed.alone(batch), (0, 6), strict=True):
        patches = one.patches[0]
        wanted = original(
            pixel_values=patches[None].float() / 127.5 - 1,
            pixel_attention_mask=torch.ones(1, len(patches), dtype=torch.int32),
            spatial_shapes=one.grid_hw[0].long(),
        ).last_hidden_state[0]
        assert len(wanted) == batch.seq_lens[0, number]
        assert close(outputs[place : place + len(wanted)], wanted, 1e-5)


def test_a_name_is_looked_up_on_the_hub(tmp_path, monkeypatch):
    saved(tmp_path, NAFLEX)
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        assert "model.safetensors" in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, _ = from_pretrained("someone/encoder", revision="main")
    assert asked == [("someone/encoder", "main")]
    assert model.config.dim == 32


def test_without_a_network_it_is_said_what_is_missing(tmp_path, monkeypatch):
    def download(name, **options):
        del name, options
        raise LocalEntryNotFoundError("no files in the cache, and no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = (
        "source is 'someone/encoder', expected a folder, or a model that can be downloaded (no "
        "files in the cache, and no network); download it where there is a network, and pass the"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        from_pretrained("someone/encoder")
    message = (
        f"source is {str(tmp_path)!r}, expected a folder with config.json and model.safetensors; "
        "pass the folder of a model; load_model reads a training's"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    message = f"source is {str(tmp_path)!r}, expected a folder with model.safetensors; convert its"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        from_pretrained(tmp_path)
