"""Folders of encoders that are broken: one sentence for each, never an error of Python or torch."""

import json
import os
import re
import shutil

import pytest
import torch
import transformers
from golden_naflexvit import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from packpipe import from_pretrained, save_pretrained
from packpipe.cli.starting import trained_model
from packpipe.hub.files import Weights

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
SENTENCE = re.compile(r"[^\n]+ is [^\n]+, expected [^\n]+; [^\n]+")
JUNK = (None, "x", "", [], [1, 2], {}, {"a": 1}, -1, 0, 1, 3, 0.5, 1e9, True, 10**6)
_SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 2}
_WIDE = {**_SHAPE, "intermediate_size": 24}
_SIDE = {"image_size": 8}
MODELS = {
    "siglip": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**_WIDE, **_SIDE)
    ),
    "siglip2": lambda: transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**_WIDE, num_patches=16)
    ),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_WIDE, **_SIDE)),
    "dinov2 with registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**_SHAPE, **_SIDE, mlp_ratio=2)
    ),
    "dinov3 gated": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**_WIDE, **_SIDE, use_gated_mlp=True, hidden_act="silu")
    ),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(**_WIDE, **_SIDE), add_pooling_layer=False
    ),
}
PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "resample": 2}
NAMES = (*MODELS, "timm", "own")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family, whole."""
    there = tmp_path_factory.mktemp("encoders")
    for name, model in MODELS.items():
        model().save_pretrained(there / name)
        size = {"height": 8, "width": 8}
        crops = name in ("clip", "dinov2 with registers")
        more = {"do_center_crop": True, "crop_size": 8, "size": {"shortest_edge": 12}}
        told = {**PROCESSOR, "rescale_factor": 1 / 255, **(more if crops else {"size": size})}
        if name == "siglip2":
            told |= {"max_num_patches": 16, "patch_size": 2}
        (there / name / "preprocessor_config.json").write_text(json.dumps(told))
    shutil.copytree(FOLDER / "naflexvit_base_patch16_map", there / "timm")
    (there / "timm" / "golden.safetensors").unlink()
    model, packing = from_pretrained(there / "vit", num_classes=3)
    save_pretrained(model, packing, there / "own", class_names=["a", "b", "c"], loss="softmax")
    for name in NAMES:
        from_pretrained(there / name)
    return there


def told(folder):
    """What is said of a folder, one sentence; None if it is read all the same."""
    said = None
    try:
        trained_model(str(folder), "RUN")  # reads what is told of the outputs, too
    except (ValueError, TypeError, FileNotFoundError) as error:
        said = str(error)
    assert said is None or SENTENCE.fullmatch(said)
    return said


def changed(folder, name, key, value):
    """Change, or with ... take out, a setting of a file; return the file and what it was."""
    path = folder / name
    before = path.read_text()
    said = json.loads(before)
    within = said
    *parents, last = key
    for parent in parents:
        within = within[parent]
    if value is ...:
        del within[last]
    else:
        within[last] = value
    path.write_text(json.dumps(said))
    return path, before


def keys_of(said, depth=2):
    """The keys of nested settings, as tuples."""
    for key, value in said.items():
        yield (key,)
        if isinstance(value, dict) and depth > 1:
            yield from ((key, *rest) for rest in keys_of(value, depth - 1))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=2000 if NIGHTLY else 12)
@given(data=st.data())
def test_a_setting_of_another_type_or_value_is_a_sentence(name, data, folders):
    folder = folders / name
    files = sorted(path.name for path in folder.glob("*.json"))
    file = data.draw(st.sampled_from(files))
    key = data.draw(st.sampled_from(list(keys_of(json.loads((folder / file).read_text())))))
    path, before = changed(folder, file, key, data.draw(st.sampled_from([..., *JUNK])))
    try:
        told(folder)
    finally:
        path.write_text(before)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=500 if NIGHTLY else 8)
@given(data=st.data())
def test_a_tensor_of_another_shape_or_type_is_a_sentence(name, data, folders):
    path = folders / name / "model.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    key = data.draw(st.sampled_from(sorted(tensors)))
    new = data.draw(
        st.sampled_from(
            [
                lambda one: one.flatten(),
                lambda one: one[:0],
                lambda one: one[None],
                lambda one: torch.cat([one, one]),
                lambda _: torch.zeros(()),
                lambda _: torch.zeros(3, 5, 7, 2),
            ]
        )
    )
    try:
        save_file({**tensors, key: new(tensors[key]).contiguous()}, path)
        told(folders / name)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "settings is 'CONFIG', expected a JSON object (Expecting property"),
        ("config.json", "[1]", "settings is 'CONFIG', expected a JSON object (list); it is cut or"),
        ("config.json", "\xff", "settings is 'CONFIG', expected a JSON object ("),
        ("config.json", "{}", "model_type in CONFIG is None, expected one of 'packpipe', 'siglip2"),
        (
            "config.json",
            '{"model_type": ["vit"]}',
            "model_type in CONFIG is ['vit'], expected one of",
        ),
        (
            "config.json",
            '{"model_type": "vit", "hidden_size": "32"}',
            "hidden_size in config.json is '32', expected an integer in 0..2147483647; correct it",
        ),
        (
            "config.json",
            '{"model_type": "clip", "vision_config": []}',
            "vision_config in config.json is [], expected settings by their names; correct it",
        ),
        (
            "preprocessor_config.json",
            '{"resample": 2.0}',
            "image processor's resample is 2.0, expected a number of Pillow's filters, 0..5; cor",
        ),
        ("model.safetensors", "", "weights is 'WEIGHTS', expected a whole file of safetensors ("),
        ("model.safetensors", "<html>", "weights is 'WEIGHTS', expected a whole file of safetens"),
        (
            "model.safetensors.index.json",
            "{}",
            "weight_map in INDEX is None, expected files by the names of tensors; it is cut or da",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "../b.safetensors"}}',
            "a file in INDEX is '../b.safetensors', expected the name of a file beside it; it is",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "model-2.safetensors"}}',
            "source is 'FOLDER', expected a folder with model-2.safetensors; convert its weights",
        ),
    ],
)
def test_a_broken_file_is_named(file, text, message, folders, tmp_path):
    folder = shutil.copytree(folders / "vit", tmp_path / "vit")
    (folder / file).write_bytes(text.encode("latin-1"))
    names = {"CONFIG": "config.json", "WEIGHTS": "model.safetensors"}
    names["INDEX"] = "model.safetensors.index.json"
    for word, name in names.items():
        message = message.replace(word, str(folder / name))
    assert told(folder).startswith(message.replace("FOLDER", str(folder)))


def test_tensors_of_one_name_are_not_taken_for_each_other(tmp_path):
    save_file({"q.0": torch.zeros(1), "query.0": torch.ones(1)}, tmp_path / "model.safetensors")
    message = "query.0 is 'query.0', expected the only tensor that is query.0; q.0 is, too: remove"
    with pytest.raises(ValueError, match=message):
        Weights(tmp_path).rename({"q.": "query."})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("depth", "depth in config.json is 1000000, expected 1 as of the weights; take both files"),
        ("dim", "1000000), the shape that config.json says; take both files of one model"),
        ("max_side", "position.table is (16, 16), expected (900000000, 16), the shape that conf"),
    ],
)
def test_what_is_too_large_for_memory_is_refused_before_it_is_made(option, message, folders):
    number = 30_000 if option == "max_side" else 10**6
    path, before = changed(folders / "own", "config.json", ("model", option), number)
    try:
        assert message in told(folders / "own")
    finally:
        path.write_text(before)
