"""packpipe's own folders of a pretrained model: config.json, model.safetensors and README.md.

config.json holds the shape of the model and the options of its packing, in words of packpipe;
model.safetensors holds the weights, by the names of ``state_dict``; README.md is for readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from packpipe import checks
from packpipe.durable import commit, json_text, partial_of
from packpipe.hub.card import CARD, card_of
from packpipe.hub.encoder import Encoder, check_size
from packpipe.hub.files import CONFIG, INDEX, WEIGHTS, Weights
from packpipe.hub.meaning import KIND, Meaning
from packpipe.model.config import NaViTConfig
from packpipe.model.navit import NaViT
from packpipe.planning.distributions import distribution
from packpipe.planning.evaluation import evaluation_of
from packpipe.planning.image_config import PackConfig

_VERSION = 1


def save_pretrained(
    model: NaViT,
    packing: PackConfig,
    folder: Path | str,
    *,
    class_names: Sequence[str] | None = None,
    label_column: str | None = None,
    loss: str | None = None,
    name: str | None = None,
    figures: Mapping[str, float] | None = None,
    license: str | None = None,  # noqa: A002
    source: str | None = None,
) -> None:
    """Write a folder that `from_pretrained` reads: the weights, and how images become rows.

    Also of a training, after `load_model`: ``save_pretrained(model, options.packing, "pets",
    class_names=options.class_names, label_column=options.label_column, loss=options.loss)``. What
    is told of the outputs is in config.json (`packpipe.hub.meaning.meaning_of` reads it, and the
    commands ``eval`` and ``predict`` do) and in the card.

    Each file is whole or not there, and those of before stay until all are written, config.json
    last; an index of weights in several files, which would be read instead, is removed.

    Args:
        model: its weights are written as they are, in their dtype; they are read in float32.
        packing: as which images are packed for it, one by one: that of a training is made such by
            `packpipe.planning.evaluation.evaluation_of`.
        folder: made if it is missing.
        class_names: by the number of their output; None if nobody knows them.
        label_column: name of the column of labels that was trained on.
        loss: that it was trained with, such as ``"softmax"``; the commands ``eval``, ``predict``
            and ``export`` need it.
        name: what the card calls it; None for the folder's own name.
        figures: what was measured, for the card; see `packpipe.hub.card.card_of`.
        license: of the weights, for the card.
        source: where the weights come from, for the card.

    Raises:
        NotADirectoryError: folder is a file.
        ValueError: packing has patches of another size than the model, or other prefix tokens; or
            it drops tokens, draws, or has several views; or figures, names or the loss are wrong.
    """
    from safetensors.torch import save_file

    for option in ("patch_size", "prefix_tokens"):
        own, expected = getattr(packing, option), f"{getattr(model.config, option)} (the model's)"
        if own != getattr(model.config, option):
            raise ValueError(checks.sentence(option, own, expected, "pass the model's packing"))
    _check_asked(packing)
    folder = checks.local_path("folder", folder)
    if folder.exists() and not folder.is_dir():
        expected, remedy = "a folder, or a new name", "it is a file: choose another"
        raise NotADirectoryError(checks.sentence("folder", str(folder), expected, remedy))
    called = folder.resolve().name if name is None else name
    names: Any = class_names  # checked there
    meaning = Meaning(class_names=names, label_column=label_column, loss=loss)
    told: dict[str, Any] = {
        "figures": figures,
        "license": license,
        "source": source,
        "meaning": meaning,
    }
    card = card_of(model, packing, called, **told)
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"version": _VERSION, "model": asdict(model.config), "packing": packing.to_dict()}
    config = json_text({"model_type": KIND, **shape, **meaning.to_dict()})
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    try:
        save_file(weights, partial_of(folder / WEIGHTS), {"format": "pt"})
        for name, text in ((CARD, card), (CONFIG, config)):
            partial_of(folder / name).write_bytes(text.encode())
    except BaseException:
        for name in (WEIGHTS, CARD, CONFIG):
            partial_of(folder / name).unlink(missing_ok=True)  # makes room, if the disk is full
        raise
    # A configuration of other weights must not stand beside these, should this be cut short.
    for name in (CONFIG, INDEX):
        (folder / name).unlink(missing_ok=True)
    for name in (WEIGHTS, CARD, CONFIG):
        commit(folder / name)


def _check_asked(packing: PackConfig) -> None:
    """Raise ValueError if an answer to an image would be one of many, which a model is not for."""
    asked = evaluation_of(packing)
    for option in ("views", "crop", "resolution", "drop_rate", "fit_last"):
        own, expected = getattr(packing, option), getattr(asked, option)
        if own != expected and not _is_fixed(own):
            remedy = "pass packpipe.planning.evaluation.evaluation_of(packing)"
            raise ValueError(checks.sentence(option, own, repr(expected), remedy))


def _is_fixed(resolution: Any) -> bool:
    """Return whether a resolution is a law that draws but one value."""
    for name in ("pixels", "tokens"):
        if hasattr(resolution, name):
            low, high = distribution(name, getattr(resolution, name)).support
            return low == high
    return False


def read_own(settings: dict[str, Any], processing: dict[str, Any], weights: Weights) -> Encoder:
    """Return the model that `save_pretrained` wrote, with its head."""
    del processing  # its folders have none
    path = weights.folder / CONFIG
    if settings.get("version") != _VERSION:
        name, remedy = f"version in {path}", "use the packpipe that wrote it"
        raise ValueError(checks.sentence(name, settings.get("version"), str(_VERSION), remedy))
    for part in ("model", "packing"):
        if not isinstance(settings.get(part), dict):
            name, remedy = f"{part} in {path}", "it is cut or damaged, so write it again"
            raise ValueError(checks.sentence(name, settings.get(part), "its options", remedy))
    if "num_classes" not in settings["model"]:
        name, expected = f"model in {path}", "its options, num_classes among them"
        remedy = "it is damaged, so write it again"
        raise ValueError(checks.sentence(name, settings["model"], expected, remedy))
    config = NaViTConfig.from_dict(settings["model"], path)
    blocks = {name.split(".")[1] for name in weights.left() if name.startswith("blocks.")}
    check_size("depth", config.depth, len(blocks))  # before as many are made
    return Encoder(
        config=config,
        weights={name: weights.take(name) for name in weights.left()},
        packing=PackConfig.from_dict(settings["packing"], path),
    )
