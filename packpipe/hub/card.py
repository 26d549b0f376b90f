"""Writes the model card: README.md of a model's folder, which the Hub shows to readers.

It says what is known of the model here: its shape, how images are packed for it, and the figures it
was given. Nothing is claimed that was not measured or told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from packpipe import checks
from packpipe.hub.meaning import LOSSES, Meaning
from packpipe.model.navit import NaViT
from packpipe.planning.image_config import PackConfig

CARD = "README.md"
UNTOLD = Meaning()
_SHARES = ("accuracy", "ece", "mean_ap")
_USE = """\
```python
import packpipe

model, packing = packpipe.from_pretrained({name!r})
outputs = packpipe.predict(model, ["a.jpg", "b.png"], **packing.to_options())
```"""


def card_of(
    model: NaViT,
    packing: PackConfig,
    name: str,
    *,
    figures: Mapping[str, float] | None = None,
    license: str | None = None,  # noqa: A002
    source: str | None = None,
    meaning: Meaning = UNTOLD,
) -> str:
    """Return the text of a card, its metadata first.

    Args:
        model: the one that is described.
        packing: as which images are packed for it.
        name: what `from_pretrained` is given to read it.
        figures: what was measured, such as `packpipe.training.run_folder.validation_figures`
            returns; ``images`` says of how many images. None for nothing.
        license: of the weights, as the Hub knows it, such as "apache-2.0"; None leaves it out.
        source: where the weights come from, and what they were trained on, in Markdown; None says
            that nobody told.
        meaning: what its outputs are.

    Raises:
        TypeError, ValueError: a figure is no finite number, there are some without ``images``, a
            whole number, a share is none, or a name cannot stand in a table; or there is not a
            name for each output.
    """
    from huggingface_hub import ModelCardData

    told = _checked({} if figures is None else figures)
    config = model.config
    meaning.check_outputs(config.num_classes)
    features = config.num_classes is None
    data = ModelCardData(
        license=license,
        library_name="packpipe",
        pipeline_tag="image-feature-extraction" if features else None,
        tags=["navit", "vision-transformer"],
    )
    outputs = f"features of {config.dim} channels" if features else f"{config.num_classes} outputs"
    of_one = "token" if config.pooling == "none" else "image"
    weights = sum(weight.numel() for weight in model.parameters())
    usual = PackConfig(patch_size=packing.patch_size).to_options()
    packed = {k: f"`{v!r}`" for k, v in packing.to_options().items() if v != usual[k]}
    summary = (
        f"A vision transformer for packed images: {weights:,} weights, patches of "
        f"{config.patch_size} pixels, {config.depth} blocks of width {config.dim}; {outputs} of "
        f"each {of_one}."
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        summary,
        _USE.format(name=name),
        *_said(meaning),
        "## Measured",
        "Nothing was measured." if not told else _table(("figure", "value"), _printed(told)),
        "## Source",
        "Nothing was said of where the weights come from." if source is None else source.strip(),
        "## Packing",
        "What is not as packpipe has it by default:"
        if packed
        else "As packpipe has it by default.",
        *([_table(("option", "value"), packed)] if packed else []),
    ]
    return "\n\n".join(parts) + "\n"


def _said(meaning: Meaning) -> list[str]:
    """Return paragraphs on the outputs; none if nothing is known of them."""
    parts = []
    if meaning.class_names is not None:
        # As JSON, so that a name of several words, or with a comma, is read as one.
        names = ", ".join(json.dumps(name, ensure_ascii=False) for name in meaning.class_names)
        parts.append(f"In their order, they are of: {names}.")
    if meaning.loss is not None:
        parts.append(f"Trained with the loss `{meaning.loss}`: {LOSSES[meaning.loss]}.")
    if meaning.label_column is not None:
        parts.append(f"The labels were the column {json.dumps(meaning.label_column)}.")
    return ["## Outputs", *parts] if parts else []


def _checked(figures: Mapping[str, float]) -> dict[str, float]:
    """Return figures as numbers of Python; refuse what is none, or cannot be."""
    remedy = "give what was measured"
    if not isinstance(figures, Mapping):
        expected = "numbers by their names"
        raise TypeError(checks.sentence("figures", type(figures).__name__, expected, remedy))
    found: dict[str, float] = {}
    for name, value in figures.items():
        if not isinstance(name, str) or "|" in name or not name.isprintable():
            expected, change = "a name on one line, without |", "rename it"
            raise ValueError(checks.sentence("a figure", name, expected, change))
        called = f"figures[{name!r}]"
        if name == "images":
            found[name] = checks.whole_number(called, value, 1, 2**63 - 1, remedy)
            continue
        found[name] = checks.real_number(called, value, remedy)
        if name in _SHARES and not 0 <= found[name] <= 1:
            raise ValueError(checks.sentence(called, value, "a share in 0..1", remedy))
    if found and "images" not in found:
        expected, remedy = "'images' among them", "say on how many images they were measured"
        raise ValueError(checks.sentence("figures", list(found), expected, remedy))
    return found


def _printed(figures: Mapping[str, float]) -> dict[str, str]:
    # Counts as they are; six digits of all others.
    return {
        name: str(value) if isinstance(value, int) else f"{value:.6g}"
        for name, value in figures.items()
    }


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [head, ("---", "---"), *rows.items()]
    return "\n".join(f"| {first} | {second} |" for first, second in lines)
