"""`Start`: the trained model that `packpipe train --init` begins with; where such models lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub.errors import HFValidationError

from packpipe import checks
from packpipe.hub.files import CONFIG
from packpipe.hub.pretrained import from_pretrained
from packpipe.model.config import NaViTConfig
from packpipe.model.navit import NaViT
from packpipe.planning.image_config import PackConfig
from packpipe.training.checkpoints import checkpoints
from packpipe.training.run_folder import load_model, read_options


def trained_model(name: str, what: str) -> tuple[NaViT, PackConfig]:
    """Return a trained model, on the CPU, and how images are packed for it.

    Args:
        name: a training's folder, one that `packpipe.from_pretrained` reads, or the name of a model
            of the Hugging Face Hub; a folder that is there goes first.
        what: it is of, for the error.

    Raises:
        FileNotFoundError: it is none of them, or cannot be downloaded.
    """
    if Path(name).is_dir():
        if (Path(name) / CONFIG).exists():  # a training has model.json
            return from_pretrained(name)
        model, options = load_model(name)
        return model, options.packing
    try:
        return from_pretrained(name)
    except FileNotFoundError as error:
        if not isinstance(error.__cause__, HFValidationError):  # a name, but of what is not there
            raise
        expected = "a folder that packpipe train wrote or of an encoder, or a name on the Hub"
        remedy = "check its path; names are such as 'google/siglip2-base-patch16-naflex'"
        raise FileNotFoundError(checks.sentence(what, name, expected, remedy)) from error


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

    def config(self, num_classes: int, attention: str) -> NaViTConfig:
        """Return its shape, with a head of so many outputs."""
        shape = self.model.config
        return replace(shape, num_classes=num_classes, head="linear", attention=attention)

    def load_into(self, model: NaViT) -> None:
        """Give a model of `config` the weights, but for the head, which stays as it was drawn."""
        trunk = {k: v for k, v in self.model.state_dict().items() if not k.startswith("head.")}
        model.load_state_dict({**model.state_dict(), **trunk})


def start_of(init: str | None, output: Path) -> Start | None:
    """Return what a training begins with; None without init.

    One that goes on takes shape and packing from its own folder: what it began with may be gone.

    Args:
        init: as `trained_model` takes it.
        output: the training's folder.

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
    model, packing = trained_model(str(output) if goes_on else init, "--init")
    if model.config.pooling == "none":
        expected, remedy = "one that gives an output an image", "choose an encoder with a pool"
        raise ValueError(checks.sentence("pooling of --init", "none", expected, remedy))
    return Start(init, model, packing)
