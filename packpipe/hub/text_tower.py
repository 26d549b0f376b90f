"""`TextTower`: SigLIP's tower of texts, on packed rows; and how texts become tokens for it.

It pools its last token, which is padding for nearly every text: texts are padded to their full
length, 64 tokens, as in its training, and packed so. It sees all of them, without a mask.

The tower is transformers' own, the one thing here that imports it.

Source: Zhai et al., arXiv 2303.15343; Tschannen et al., arXiv 2502.14786.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packpipe import checks
from packpipe.hub.files import CONFIG, Weights
from packpipe.loading.batch import TokenBatch

PREFIX = "text_model."
_AT_ONCE = 256  # texts


class TextTower(nn.Module):
    """Vectors of length 1, one a text.

    Args:
        model: a ``SiglipTextModel`` or ``Siglip2TextModel`` of transformers.

    Attributes:
        length: tokens of every text, padding included.
        width: channels of a vector.
        vocabulary: how many numbers of tokens there are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config = cast(Any, model).config
        self.length, self.width = int(config.max_position_embeddings), int(config.projection_size)
        self.vocabulary = int(config.vocab_size)

    def forward(self, texts: TokenBatch) -> Tensor:
        """Return the vectors of packed texts, [B, S, C]; 0 where none is present.

        Only texts that are there are computed, so that their number is another one every batch.

        Raises:
            ValueError: a text is not padded to the full length.
        """
        present = texts.present
        lens = texts.seq_lens[present]
        if len(other := lens[lens != self.length]):
            remedy = (
                "pack all of `input_ids_of`, without an attention_mask, which leaves padding out"
            )
            raise ValueError(
                checks.sentence("tokens of a text", int(other[0]), str(self.length), remedy)
            )
        input_ids = texts.tokens["input_ids"][texts.segment_ids > 0].view(-1, self.length).long()
        # Transformers' attention takes no batch of none, and its weights must be in the graph.
        asked = input_ids if len(input_ids) else input_ids.new_zeros(1, self.length)
        vectors = self.encode(asked)[: len(input_ids)]
        out = vectors.new_zeros(*present.shape, self.width)
        out[present] = vectors
        return out

    def encode(self, input_ids: Tensor) -> Tensor:
        """Return the vectors, [N, C], of texts as tokens, int64[N, length]."""
        found: Tensor = F.normalize(self.model(input_ids=input_ids).pooler_output, dim=-1)
        return found


def read_text_tower(settings: dict[str, Any], weights: Weights) -> TextTower:
    """Return the tower of texts of a SigLIP, its weights in float32.

    Args:
        settings: what config.json says, of both towers.
        weights: of both towers.

    Raises:
        ModuleNotFoundError: there is no transformers.
        ValueError: the weights are not those of config.json.
    """
    import transformers

    name = "Siglip2Text" if settings["model_type"] == "siglip2" else "SiglipText"
    config = getattr(transformers, f"{name}Config").from_dict(settings.get("text_config") or {})
    model = getattr(transformers, f"{name}Model")(config)
    found = {
        key.removeprefix(PREFIX): weights.take(key)
        for key in weights.left()
        # Older versions stored the numbers of positions, which hold nothing.
        if key.startswith(PREFIX) and not key.endswith("position_ids")
    }
    # Checked by name, where `load_state_dict` would list hundreds in one error.
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in [*wanted, *(found.keys() - wanted.keys())]:
        have = tuple(found[key].shape) if key in found else None
        if have != wanted.get(key):
            expected = f"{wanted.get(key)}, the shape that {CONFIG} says"
            remedy = "take both files of one model, and transformers 5 or later"
            what = f"{weights.folder}: {PREFIX}{key}"
            raise ValueError(checks.sentence(what, have, expected, remedy))
    model.load_state_dict(found)
    return TextTower(model)


def input_ids_of(tokenizer: Any, texts: Sequence[str], length: int = 64) -> list[list[int]]:
    """Return the tokens of texts, all of one length: a column ``input_ids`` for `pack_pairs`.

    Args:
        tokenizer: the model's, ``transformers.AutoTokenizer.from_pretrained(source)``.
        texts: one or more.
        length: tokens of each, `TextTower.length`.

    Raises:
        TypeError: texts is a single one.
        ValueError: there is none, or one is too long.
    """
    if isinstance(texts, str):
        raise TypeError(checks.sentence("texts", texts, "a list of texts", "pass [text]"))
    if not len(texts):
        raise ValueError(checks.sentence("texts", [], "one at least", "pass some"))
    options = {"padding": "max_length", "max_length": length, "truncation": False}
    found: list[list[int]] = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    for number, one in enumerate(found):
        if len(one) != length:
            expected, remedy = f"at most {length}", "shorten it; nothing is cut in silence"
            raise ValueError(
                checks.sentence(f"tokens of texts[{number}]", len(one), expected, remedy)
            )
    return found


def class_vectors(
    tower: TextTower, tokenizer: Any, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Return float[classes, C]: of each class the mean of its texts' vectors, of length 1.

    Args:
        tower: of texts, on its device.
        tokenizer: the model's.
        names: of the classes.
        templates: of texts, with ``{}`` in the place of the name; of several, each class is the
            mean of all (Radford et al., arXiv 2103.00020, 3.1.4).

    Raises:
        TypeError: names or templates is a single one.
        ValueError: there is no name or template, or one without a place for the name; or a text
            is too long; or the tokenizer is of another model, or tells two names not apart.
    """
    for what, given in (("names", names), ("templates", templates)):
        if isinstance(given, str):
            raise TypeError(checks.sentence(what, given, "a list of texts", "pass [text]"))
        if not given:
            raise ValueError(checks.sentence(what, [], "one at least", "pass some"))
    for template in templates:
        if "{}" not in template:
            remedy = "such as 'This is a photo of {}.'"
            raise ValueError(checks.sentence("a template", template, "a text with {}", remedy))
    texts = [template.replace("{}", name) for name in names for template in templates]
    found = input_ids_of(tokenizer, texts, tower.length)
    _check_tokens(found, names, len(templates), tower.vocabulary)
    input_ids = torch.tensor(found, device=next(tower.parameters()).device)
    with torch.inference_mode():
        # In parts: activations for all texts of a thousand classes may not fit into memory.
        vectors = torch.cat([tower.encode(some) for some in input_ids.split(_AT_ONCE)])
        return F.normalize(vectors.unflatten(0, (len(names), -1)).mean(1), dim=-1)


def _check_tokens(
    input_ids: list[list[int]], names: Sequence[str], num_templates: int, vocabulary: int
) -> None:
    """Raise ValueError if tokens are not of the model's vocabulary, or those of two names equal."""
    remedy = "name each class once, and pass a folder with the model's own tokenizer"
    highest = max(map(max, input_ids))
    if highest >= vocabulary:
        expected = f"below {vocabulary}, as the model has them"
        raise ValueError(checks.sentence("a token of the tokenizer", highest, expected, remedy))
    first: dict[tuple[int, ...], int] = {}
    for number in range(len(names)):
        own = tuple(input_ids[number * num_templates])  # the first template tells, as any other
        if (other := first.setdefault(own, number)) != number:
            what, expected = f"tokens of names[{number}]", f"others than those of {names[other]!r}"
            raise ValueError(checks.sentence(what, names[number], expected, remedy))
