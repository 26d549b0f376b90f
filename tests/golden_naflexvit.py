"""Small NaFlexViTs of timm with random weights, and what timm computes with them.

Their files are in tests/data/naflexvit, so that the agreement is tested where timm is not, or does
not import, since torchvision's operators do not load beside every torch. They were written with
timm 1.0.31 and torch 2.13, by this file; it writes them again::

    PYTHONPATH=.:tests python tests/golden_naflexvit.py

A folder is a model as timm saves it, but for its weights, which are rounded to float16 before
anything is computed; golden.safetensors holds patches, outputs and gradients.
"""

import shutil
from pathlib import Path

import packed
import torch
from encoders import CASE, MEAN, STD, shaken
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent / "data" / "naflexvit"
SLOTS = {
    "naflexvit_base_patch16_siglip": 0,
    "naflexvit_base_patch16_map": 1,
    "naflexvit_base_patch16_par_gap": 4,
    "naflexvit_so150m2_patch16_reg1_gap": 1,
}
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": packed.PATCH_SIZE}
GRADIENTS = (
    *("embeds.pos_embed", "embeds.reg_token"),
    *("blocks.0.mlp.fc1.weight", "blocks.1.attn.proj.weight"),
)


def saved(timm, folder, name, num_classes=0, **options):
    """Save a model of random weights as timm does; return it."""
    model = shaken(timm.create_model(name, num_classes=num_classes, **options))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half())
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": MEAN, "std": STD}
    model.pretrained_cfg["input_size"] = (3, 8, 8)
    timm.models.save_for_hf(model, folder, model_args=options, safe_serialization=True)
    return model


def theirs(model, batch):
    """The outputs of each image alone, in the order of the images."""
    found = []
    mean, std = (torch.tensor(v).repeat(packed.PATCH_SIZE**2) for v in (MEAN, STD))
    for _, _, one in packed.alone(batch):
        real = one.coords[0, :, 0] >= 0
        patches = (one.patches[:, real].float() / 255 - mean) / std
        given = {"patches": patches, "patch_coord": one.coords[:, real].long()}
        valid = torch.ones(1, patches.shape[1], dtype=torch.bool)
        found.append(model({**given, "patch_valid": valid}))
    return torch.cat(found)


def slope_of(outputs):
    """What outputs are multiplied by before their sum is differentiated."""
    return torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))


def told(gradient, name):
    """What is kept of a gradient; the table is large, so its channels are added up."""
    return gradient.sum(-1).flatten() if name == "embeds.pos_embed" else gradient


def main():
    import timm

    for name, slots in SLOTS.items():
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model = saved(timm, folder, name, **TINY)
        for path in folder.iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                path.unlink()
        path = folder / "model.safetensors"
        save_file({key: value.half() for key, value in load_file(path).items()}, path)
        batch = packed.batch_of(CASE, prefix_tokens=slots)
        outputs = theirs(model, batch)
        slope = slope_of(outputs)
        (outputs * slope).sum().backward()
        own = dict(model.named_parameters())
        gradients = {key: told(own[key].grad, key) for key in GRADIENTS if key in own}
        given = {"patches": batch.patches, "coords": batch.coords, "slope": slope}
        golden = {**given, "outputs": outputs.detach(), **gradients}
        kept = {key: value.contiguous() for key, value in golden.items()}
        save_file(kept, folder / "golden.safetensors")


if __name__ == "__main__":
    main()
