"""Loads the model of a training's folder, and the options by which images are packed for it.

model.json, beside the checkpoints, says what the outputs mean and how images become rows for them.
It is written whole or not at all, before the first checkpoint.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

from packpipe import checks
from packpipe.durable import write_json
from packpipe.model.navit import NaViT
from packpipe.planning.distributions import Constant
from packpipe.planning.image_config import PackConfig
from packpipe.planning.resolution import Square
from packpipe.training.checkpoints import best_step, checkpoints, model_of
from packpipe.training.log import read_log

log = logging.getLogger(__name__)

_NAME, _VERSION = "model.json", 1


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How images are packed for the model of a training, and what its outputs mean.

    Attributes:
        class_names: by the number of their output; None if nobody knows them.
        label_column: name of the column of labels that was trained on; None if nobody knows it.
        loss: ``"sigmoid"`` or ``"softmax"``, which turns outputs into probabilities; those of
            ``"mse"`` and ``"l1"`` are numbers as they are.
        packing: how images become rows when the model is evaluated, pixel rules included.
        init: the trained model that the training began with, as it was called; None for none.
    """

    class_names: tuple[str, ...] | None = None
    label_column: str | None = None
    loss: str = "sigmoid"
    packing: PackConfig
    init: str | None = None

    @property
    def max_tokens(self) -> int:
        """Most tokens of an image."""
        law = self.packing.resolution
        if isinstance(law, Square) and isinstance(law.pixels, Constant):
            return int(law.pixels.value // self.packing.patch_size) ** 2
        return self.packing.token_limit

    def at(self, max_tokens: int) -> RunOptions:
        """Return the options with images of another size, the largest within so many tokens."""
        tokens = checks.whole_number("max_tokens", max_tokens, 1, 2**15 - 1, "128 is usual")
        changes: dict[str, Any] = {"resolution": "budget", "max_tokens": tokens}
        if isinstance(self.packing.resolution, Square):
            side = isqrt(tokens) * self.packing.patch_size
            changes = {"resolution": Square(Constant(side))}
        seq_len = max(self.packing.seq_len, tokens + self.packing.prefix_tokens)
        return replace(self, packing=replace(self.packing, seq_len=seq_len, **changes))

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        return {
            "version": _VERSION,
            "class_names": None if self.class_names is None else list(self.class_names),
            "label_column": self.label_column,
            "loss": self.loss,
            "packing": self.packing.to_dict(),
            **({} if self.init is None else {"init": self.init}),
        }

    @classmethod
    def from_dict(cls, known: dict[str, Any], source: object = _NAME) -> RunOptions:
        """Return the options that `to_dict` described; source is where, for errors."""
        names = known["class_names"]
        return cls(
            class_names=None if names is None else tuple(names),
            label_column=known["label_column"],
            loss=known["loss"],
            packing=PackConfig.from_dict(known["packing"], source),
            init=known.get("init"),
        )


def read_options(folder: Path | str) -> RunOptions | None:
    """Return the options of a training's folder; None if it has none, as those of earlier versions.

    Raises:
        ValueError: model.json is damaged, or was written by a later version.
    """
    path = Path(folder) / _NAME
    try:
        known = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        expected, remedy = "JSON", "restore it; without the file, the weights can be loaded"
        raise ValueError(checks.sentence(str(path), str(error), expected, remedy)) from error
    version = known.get("version") if isinstance(known, dict) else None
    if version != _VERSION:
        remedy = "use the packpipe that wrote it"
        raise ValueError(checks.sentence(f"{path} version", version, str(_VERSION), remedy))
    return RunOptions.from_dict(known, path)


def check_options(folder: Path, options: RunOptions) -> None:
    """Raise ValueError if a training would go on with another loss, or classes of other names."""
    known = read_options(folder) if checkpoints(folder) else None
    if known is None:
        return
    # Validation losses of two kinds are not compared, and outputs have one meaning.
    remedies = {
        "loss": "pass it, or another folder",
        "class_names": "train on the same classes, or give another folder",
    }
    for name, remedy in remedies.items():
        before, value = getattr(known, name), getattr(options, name)
        if before != value:
            expected = f"{before!r} as in {_NAME}"
            raise ValueError(checks.sentence(name, value, expected, remedy))


def write_options(folder: Path, options: RunOptions) -> None:
    """Write model.json, whole or not at all, unless it says the same."""
    if read_options(folder) != options:
        write_json(folder / _NAME, options.to_dict())


def load_model(
    folder: Path | str, *, num_classes: int | None = None, attention: str = "auto"
) -> tuple[NaViT, RunOptions]:
    """Return the model that a training left in a folder, on the CPU, and how it is asked.

    The weights are those of the lowest validation loss or, without validation, the last ones::

        model, options = packpipe.load_model("run")
        logits = packpipe.predict(model, files, **options.packing.to_options())

    Args:
        folder: where a training kept its checkpoints.
        num_classes: gives the model a new head of so many classes, its weights drawn by torch's
            generator, on the old trunk; None keeps the head.
        attention: backend.

    Returns:
        The model, and its options. Those of a new head have no names of classes. Folders from
        before there was model.json have none, which a warning says: images get 256 tokens then.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no checkpoint.
        ValueError: all checkpoints are damaged, or model.json is.
    """
    if not Path(folder).is_dir():
        expected = "a folder that packpipe train wrote (packpipe train SOURCE RUN)"
        remedy = "check its path; an encoder is trained first, with --init"
        raise FileNotFoundError(checks.sentence("run", str(folder), expected, remedy))
    known = read_options(folder)
    model = model_of(folder, best=True, num_classes=num_classes, attention=attention)
    if known is None:
        log.warning("%s has no %s: classes have no names, images get 256 tokens", folder, _NAME)
        own = {name: getattr(model.config, name) for name in ("patch_size", "prefix_tokens")}
        packing = PackConfig(resolution="budget", max_tokens=256, **own)
        known = RunOptions(packing=packing)
    if num_classes is not None:
        known = replace(known, class_names=None, label_column=None)
    return model, known


def validation_figures(folder: Path | str) -> dict[str, float] | None:
    """Return what was measured of the model that `load_model` returns, on its validation images.

    Returns:
        ``step``, ``images`` (how many), ``loss`` and, where there are, ``accuracy``, ``ece``,
        ``error``, ``iou`` and ``mean_ap`` (`packpipe.training.figures.Record`). None where nothing
        was validated, or by a version that did not write how many images there were.
    """
    step = best_step(folder)
    for record in read_log(folder) if step is not None else ():
        if record["step"] == step and record.get("val_images"):
            names = ("images", "loss", "accuracy", "ece", "error", "iou", "mean_ap")
            found = {name: record.get(f"val_{name}") for name in names}
            return {"step": step} | {k: value for k, value in found.items() if value is not None}
    return None
