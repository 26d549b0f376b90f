"""`Meaning`: what the outputs of a pretrained model are, as its config.json says.

The names of classes are written as the field writes them, as ``id2label`` and ``label2id``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packpipe import checks
from packpipe.hub.files import CONFIG, folder_of, settings_of
from packpipe.hub.naflexvit import shape_of
from packpipe.model.presets import NAFLEXVIT

KIND = "packpipe"  # the model_type of folders that say it
# Of `packpipe.training.losses.LOSSES`, and what makes of outputs what they are for.
LOSSES = {
    "softmax": "their softmax gives the probability of each",
    "sigmoid": "the sigmoid of each gives its probability, and they need not add up to 1",
    "mse": "they are numbers as they are",
    "l1": "they are numbers as they are",
}


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What the outputs of a model mean, as far as it is known.

    Attributes:
        class_names: by the number of their output; None if nobody knows them.
        label_column: name of the column of labels that was trained on.
        loss: that it was trained with, which says what becomes of outputs.

    Raises:
        TypeError, ValueError: names are no texts, or the same, or the loss is not known.
    """

    class_names: tuple[str, ...] | None = None
    label_column: str | None = None
    loss: str | None = None

    def __post_init__(self) -> None:
        names, remedy = self.class_names, "give the name of each output, in their order"
        if names is not None:
            if isinstance(names, str) or not isinstance(names, Sequence):
                raise TypeError(checks.sentence("class_names", names, "a list of names", remedy))
            for number, name in enumerate(names):
                if not isinstance(name, str):
                    what = f"class_names[{number}]"
                    raise TypeError(checks.sentence(what, name, "a text", remedy))
                if name in names[:number]:
                    what = f"class_names[{number}]"
                    raise ValueError(checks.sentence(what, name, "a name of its own", remedy))
            object.__setattr__(self, "class_names", tuple(names))  # the class is frozen
        if self.label_column is not None and not isinstance(self.label_column, str):
            what, expected = "label_column", "a name, or None"
            raise TypeError(checks.sentence(what, self.label_column, expected, "pass its name"))
        if self.loss is not None:
            checks.choice("loss", self.loss, LOSSES, "pass that of the training")

    def check_outputs(self, outputs: int | None) -> None:
        """Raise ValueError if a model has another number of outputs than there are names."""
        if self.class_names is not None and len(self.class_names) != outputs:
            expected, remedy = f"{outputs} (num_classes)", "give the name of each output"
            raise ValueError(
                checks.sentence("len(class_names)", len(self.class_names), expected, remedy)
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what is known as settings of config.json."""
        found: dict[str, Any] = {"label_column": self.label_column, "loss": self.loss}
        if self.class_names is not None:
            found["id2label"] = {str(k): name for k, name in enumerate(self.class_names)}
            found["label2id"] = {name: k for k, name in enumerate(self.class_names)}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_dict(cls, settings: dict[str, Any], source: object) -> Meaning:
        """Return what settings of config.json say; source is where they were read, for errors.

        Raises:
            ValueError: ``id2label`` does not name the outputs 0, 1, ... each.
        """
        names = settings.get("id2label")
        if names is not None:
            numbers = list(map(str, range(len(names)))) if isinstance(names, dict) else []
            if not isinstance(names, dict) or names.keys() != set(numbers):
                what, expected = f"id2label in {source}", "the names of outputs '0', '1', ..."
                raise ValueError(checks.sentence(what, names, expected, "correct it"))
            names = tuple(names[number] for number in numbers)
        column, loss = settings.get("label_column"), settings.get("loss")
        return cls(class_names=names, label_column=column, loss=loss)


def meaning_of(source: str | Path, *, revision: str | None = None) -> Meaning:
    """Return what a folder of `save_pretrained`, or of the Hub, says of its model's outputs.

    Args:
        source: as `packpipe.from_pretrained` takes it. Of timm's, whose outputs timm itself puts
            through a softmax, it is the loss; other families' folders tell nothing, since their
            head is not read.
        revision: branch, tag or commit of the Hub.

    Raises:
        FileNotFoundError: there are no such files, and they cannot be downloaded.
        ValueError: what is said is damaged.
    """
    folder = folder_of(source, revision)
    settings = settings_of(folder)
    kind = settings.get("model_type", settings.get("architecture"))
    if kind == KIND:
        return Meaning.from_dict(settings, folder / CONFIG)
    has_head = str(kind) in NAFLEXVIT and shape_of(settings).num_classes is not None
    return Meaning(loss="softmax") if has_head else Meaning()
