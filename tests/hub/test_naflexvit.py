"""timm's NaFlexViT: its files become models with its outputs and gradients."""

import json
import re
from dataclasses import replace

import golden_naflexvit
import packed
import pytest
import torch
from encoders import CASE, check_outputs, check_sees_no_neighbours
from golden_naflexvit import FOLDER, SLOTS, TINY, theirs, told
from laws import close
from safetensors.torch import load_file

from packpipe import NaViTConfig, PackConfig, from_pretrained
from packpipe.model.presets import NAFLEXVIT

SMALL = {**TINY, "embed_dim": 32}
NAMES = []  # of operators, for as long as they are read


@pytest.fixture(scope="module")
def timm():
    """The package; it imports torchvision, whose operators may not load beside this torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip("timm needs torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist; its name is all that is read
        NAMES.append(torch.library.Library("torchvision", "DEF"))
        NAMES[0].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("timm")


def saved(timm, folder, name, num_classes=0, **options):
    """Save a model of random weights as timm does; return it."""
    return golden_naflexvit.saved(timm, folder, name, num_classes, **SMALL | options)


def gradients_of(model, slots):
    """Gradients of ours by the names of timm's."""
    names = {
        "embeds.pos_embed": "position.table",
        "blocks.0.mlp.fc1.weight": "blocks.0.widen.weight",
        "blocks.1.attn.proj.weight": "blocks.1.project.weight",
        **({"embeds.reg_token": "prefix"} if slots else {}),
    }
    own = dict(model.named_parameters())
    return {of: own[ours].grad for of, ours in names.items()}


@pytest.mark.parametrize("name", SLOTS)
def test_outputs_and_gradients_are_those_that_timm_gave(name):
    """Of files, so that it is tested where timm does not import."""
    golden = load_file(FOLDER / name / "golden.safetensors")
    model, _ = from_pretrained(FOLDER / name)
    batch = packed.batch_of(CASE, prefix_tokens=SLOTS[name])
    assert torch.equal(batch.coords, golden["coords"])
    outputs = model(replace(batch, patches=golden["patches"]))[batch.present]
    assert outputs.shape == (9, 16)
    assert close(outputs, golden["outputs"], 1e-5)
    assert golden["outputs"].std(0).min() > 0.01
    (outputs * golden["slope"]).sum().backward()
    for of, gradient in gradients_of(model, SLOTS[name]).items():
        assert close(told(gradient, of), golden[of].view_as(told(gradient, of)), 1e-5), of
        assert golden[of].abs().sum() > 0


@pytest.mark.parametrize("name", SLOTS)
def test_outputs_and_gradients_are_the_originals(name, timm, tmp_path):
    original = saved(timm, tmp_path, name)
    model, packing = from_pretrained(tmp_path)
    slots = SLOTS[name]
    assert model.config.prefix_tokens == packing.prefix_tokens == slots
    batch = packed.batch_of(CASE, prefix_tokens=slots)
    check_outputs(model(batch)[batch.present], theirs(original, batch))
    other = dict(original.named_parameters())
    for of, gradient in gradients_of(model, slots).items():
        assert close(gradient, other[of].grad.view_as(gradient), 1e-5), of
    assert all(one.grad.abs().sum() > 0 for one in model.parameters())


def test_an_image_does_not_see_its_neighbours(timm, tmp_path):
    saved(timm, tmp_path, "naflexvit_base_patch16_map")
    model, _ = from_pretrained(tmp_path)
    check_sees_no_neighbours(model, packed.batch_of(CASE, prefix_tokens=1))


def test_its_head_and_its_packs_come_along(timm, tmp_path):
    original = saved(timm, tmp_path, "naflexvit_base_patch16_gap", 7, mlp_ratio=2.0, reg_tokens=2)
    model, packing = from_pretrained(tmp_path)
    batch = packed.batch_of(CASE, prefix_tokens=2)
    outputs = model(batch)[batch.present]
    assert outputs.shape == (9, 7)
    assert close(outputs, theirs(original, batch), 1e-5)
    assert packing == PackConfig(
        seq_len=1026,  # 57 images of 16 patches and two registers
        patch_size=2,
        prefix_tokens=2,
        resolution="budget",
        max_tokens=16,
        reducing_gap=None,
        profiles="ignore",
    )
    other, _ = from_pretrained(tmp_path, num_classes=3)
    assert other.head.weight.shape == (3, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "naflexvit_base_patch16_parfac_gap"},
            "patch16_parfac_gap', expected one",
        ),
        ({"model_args": {"class_token": True}}, "an option in model_args in config.json is 'class"),
        ({"model_args": {"in_chans": 1}}, "in_chans in config.json is 1, expected 3; packed image"),
        ({"global_pool": "map"}, "global_pool in config.json is 'map', expected that of the arch"),
        ({"model_args": {"depth": 0}}, "depth is 0, expected an integer in 1..2147483647; choose"),
    ],
)
def test_what_is_not_known_is_refused(change, message, tmp_path):
    settings = {"architecture": "naflexvit_base_patch16_gap", "num_classes": 0, **change}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ValueError, match=re.escape(message)):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", NAFLEXVIT)
def test_presets_have_the_shapes_of_the_encoders(name, timm):
    with torch.device("meta"):
        original = timm.create_model(name, num_classes=0, depth=1)
    shape = NaViTConfig.preset(name, num_classes=None)
    (block,) = original.blocks
    assert (shape.dim, shape.heads) == (original.embed_dim, block.attn.num_heads)
    assert shape.mlp_width == block.mlp.fc1.out_features
    assert shape.prefix_tokens == original.num_prefix_tokens
    assert shape.norm_pooled == isinstance(original.fc_norm, torch.nn.LayerNorm)
    assert shape.keep_aspect == original.embeds.pos_embed_ar_preserving
    assert shape.resize == original.embeds.pos_embed_interp_mode
