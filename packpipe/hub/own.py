"""packpipe's own folders of a pretrained model: config.json, model.safetensors and README.md.

config.json holds the shape of the model and the options of its packing, in words of packpipe;
model.safetensors holds the weights, by the names of ``state_dict``; README.md is for readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from packpipe import checks
from packpipe.durable import commit, partial_of, write_json, write_text
from packpipe.hub.card import CARD, card_of
from packpipe.hub.encoder import Encoder
from packpipe.hub.files import CONFIG, INDEX, WEIGHTS, Weights
from packpipe.model.config import NaViTConfig
from packpipe.model.navit import NaViT
from packpipe.planning.image_config import PackConfig

KIND = "packpipe"  # the model_type
_VERSION = 1


def save_pretrained(
    model: NaViT,
    packing: PackConfig,
    folder: Path | str,
    *,
    name: str | None = None,
    figures: Mapping[str, float] | None = None,
    license: str | None = None,  # noqa: A002
    source: str | None = None,
) -> None:
    """Write a folder that `from_pretrained` reads: the weights, and how images become rows.

    Also of a training: ``save_pretrained(model, options.packing, "encoder")`` after `load_model`.
    Each file is whole or not there, config.json is written last; files of these names are replaced,
    and an index of weights in several files, which would be read instead, is removed.

    Args:
        model: its weights are written as they are, in their dtype; they are read in float32.
        packing: as which images are packed for it.
        folder: made if it is missing.
        name: what the card calls it; None for the folder's own name.
        figures: what was measured, for the card; see `packpipe.hub.card.card_of`.
        license: of the weights, for the card.
        source: where the weights come from, for the card.

    Raises:
        ValueError: packing has patches of another size than the model, or other prefix tokens; or
            figures are wrong.
    """
    from safetensors.torch import save_file

    for option in ("patch_size", "prefix_tokens"):
        own, expected = getattr(packing, option), f"{getattr(model.config, option)} (the model's)"
        if own != getattr(model.config, option):
            raise ValueError(checks.sentence(option, own, expected, "pass the model's packing"))
    folder = checks.local_path("folder", folder)
    called = folder.name if name is None else name
    card = card_of(model, packing, called, figures=figures, license=license, source=source)
    folder.mkdir(parents=True, exist_ok=True)
    # A configuration of other weights must not stand beside these, should this be cut short.
    for name in (CONFIG, INDEX):
        (folder / name).unlink(missing_ok=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, partial_of(folder / WEIGHTS), {"format": "pt"})
    commit(folder / WEIGHTS)
    write_text(folder / CARD, card)
    told = {"version": _VERSION, "model": asdict(model.config), "packing": packing.to_dict()}
    write_json(folder / CONFIG, {"model_type": KIND, **told})


def read_own(settings: dict[str, Any], processing: dict[str, Any], weights: Weights) -> Encoder:
    """Return the model that `save_pretrained` wrote, with its head."""
    del processing  # its folders have none
    path = weights.folder / CONFIG
    if settings.get("version") != _VERSION:
        name, remedy = f"version in {path}", "use the packpipe that wrote it"
        raise ValueError(checks.sentence(name, settings.get("version"), str(_VERSION), remedy))
    return Encoder(
        config=NaViTConfig.from_dict(settings["model"], path),
        weights={name: weights.take(name) for name in weights.left()},
        packing=PackConfig.from_dict(settings["packing"], path),
    )
