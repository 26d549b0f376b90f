from __future__ import annotations

import re

import pytest

import packpipe

PUBLIC = [
    "Area",
    "Augment",
    "Beta",
    "Budget",
    "ByResolution",
    "CenterCrop",
    "Choice",
    "Constant",
    "Crop",
    "EpochPacks",
    "EpochPlan",
    "FixedCrop",
    "HistogramPlan",
    "ImageFiles",
    "NaViT",
    "NaViTConfig",
    "OnlinePacker",
    "OnnxModel",
    "OverTraining",
    "PackConfig",
    "PackedBatch",
    "PackedLoader",
    "PackedStream",
    "Packer",
    "Packs",
    "PairBatch",
    "PixelRange",
    "RayExecutor",
    "Side",
    "Square",
    "TokenBatch",
    "TokenConfig",
    "TruncatedNormal",
    "Uniform",
    "View",
    "WindowPacks",
    "__version__",
    "balance_steps",
    "compile_parts",
    "count_lengths",
    "export_onnx",
    "from_pretrained",
    "load_model",
    "manifest",
    "open_packed",
    "pack",
    "pack_lengths",
    "pack_pairs",
    "plan_epoch",
    "plan_histogram",
    "plan_tokens",
    "predict",
    "push_to_hub",
    "read_rows",
    "read_tokens",
    "rejects",
    "save_pretrained",
    "suggest_seq_len",
    "summarize",
    "verify",
]


def test_the_public_names_are_these_and_no_others():
    assert sorted(packpipe.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_resolves_and_is_listed(name):
    assert name in dir(packpipe)
    found = getattr(packpipe, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+", found)
    else:
        assert found.__name__ == {"read_tokens": "read_rows"}.get(name, name)
        assert found.__module__.startswith("packpipe.")
        assert found.__doc__


def test_an_unknown_name_is_an_attribute_error_that_says_it():
    with pytest.raises(AttributeError, match=r"^module 'packpipe' has no attribute 'Pack'$"):
        packpipe.Pack  # noqa: B018
