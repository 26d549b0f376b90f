"""`Start`: the trained model that `packpipe train --init` begins with; where such models lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError

from packpipe import checks
from packpipe.hub.files import CONFIG, folder_of
from packpipe.hub.meaning import meaning_of
from packpipe.hub.pretrained import from_pretrained
from packpipe.model.config import NaViTConfig
from packpipe.model.navit import NaViT
from packpipe.planning.image_config import PackConfig
from packpipe.training.checkpoints import checkpoints
from packpipe.training.run_folder import RunOptions, load_model, read_options


def trained_model(name: str, what: str) -> tuple[NaViT, RunOptions]:
    """Return a trained model, on the CPU, and how it is asked.

    Args:
        name: a training's folder, one that `packpipe.from_pretrained` reads, or the name of a model
            of the Hugging Face Hub; a folder that is there goes first.
        what: it is of, for the error.

    Raises:
        FileNotFoundError: it is none of them, or cannot be downloaded.
    """
    if Path(name).is_dir():
        if (Path(name) / CONFIG).exists():  # a training has model.json
            return _pretrained(name)
        return load_model(name)
    try:
        return _pretrained(name)
    except FileNotFoundError as error:
        if not isinstance(error.__cause__, HFValidationError):  # a name, but of what is not there
            raise
        expected = "a folder that packpipe train wrote or of an encoder, or a name on the Hub"
        remedy = "check its path; names are such as 'google/siglip2-base-patch16-naflex'"
        raise FileNotFoundError(checks.sentence(what, name, expected, remedy)) from error


def _pretrained(name: str) -> tuple[NaViT, RunOptions]:
    folder = folder_of(name)  # looked up on the Hub once
    (model, packing), told = from_pretrained(folder), meaning_of(folder)
    told.check_outputs(model.config.num_classes)
    known: dict[str, Any] = {} if told.loss is None else {"loss": told.loss}
    names, column = told.class_names, told.label_column
    return model, RunOptions(packing=packing, class_names=names, label_column=column, **known)


@dataclass(frozen=True, eq=False)
class Start:
    """A trained model that a training begins with.

    Attributes:
        init: what it was called.
        model: on the CPU.
        packing: how images become rows for it.
    """

    init: str
    model: NaViT
    packing: PackConfig

    def config(self, num_classes: int, attention: str, **switches: Any) -> NaViTConfig:
        """Return its shape, with a head of so many outputs.

        Args:
            num_classes: the outputs.
            attention: backend.
            **switches: others of `NaViTConfig`; without pooling, the pool is left, and the last
                norm is of tokens.
        """
        shape = self.model.config
        if switches.get("pooling") == "none":
            switches["norm_pooled"] = False
        own: dict[str, Any] = {"num_classes": num_classes, "head": "linear", **switches}
        return replace(shape, attention=attention, **own)

    def load_into(self, model: NaViT) -> None:
        """Give a model of `config` the weights, but for the head, which stays as it was drawn."""
        own = model.state_dict()
        trunk = {
            name: value
            for name, value in self.model.state_dict().items()
            if not name.startswith("head.") and (name in own or not name.startswith("pool."))
        }
        model.load_state_dict({**own, **trunk})


def start_of(init: str | None, output: Path, *, dense: bool = False) -> Start | None:
    """Return what a training begins with; None without init.

    One that goes on takes shape and packing from its own folder: what it began with may be gone.

    Args:
        init: as `trained_model` takes it.
        output: the training's folder.
        dense: whether the training is of a model that answers for every token.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the training began with another one, or its model gives no output an image.
    """
    goes_on = bool(checkpoints(output))
    if goes_on:
        known = read_options(output)
        began = None if known is None else known.init
        if init != began:
            expected = (
                f"{began!r}, as at the beginning" if began else "left out, as at the beginning"
            )
            raise ValueError(checks.sentence("--init", init, expected, "or give another folder"))
    if init is None:
        return None
    model, options = trained_model(str(output) if goes_on else init, "--init")
    if model.config.pooling == "none" and not dense:
        expected, remedy = "one that gives an output an image", "choose an encoder with a pool"
        raise ValueError(checks.sentence("pooling of --init", "none", expected, remedy))
    return Start(init, model, options.packing)
