"""`predict`: packs images of any size, runs a model, returns its outputs in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packpipe import checks
from packpipe.images.decode import probe
from packpipe.images.given import given
from packpipe.images.opening import BadImage, ImageData, check_settings
from packpipe.images.remote import fetched
from packpipe.loading.batch import PackedBatch
from packpipe.loading.loader import PackedLoader
from packpipe.model.config import NaViTConfig
from packpipe.model.maps import token_maps
from packpipe.philox import Key
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig, config_from
from packpipe.planning.plan import plan_epoch
from packpipe.rows.fill_images import fill_rows, planned_images
from packpipe.rows.rows import Rows


class Model(Protocol):
    """What `predict` needs of a model; `NaViT` has all of it."""

    config: NaViTConfig
    training: bool

    def __call__(self, batch: PackedBatch, /) -> Tensor:
        """Return the outputs of a batch, [B, S, K] or, without pooling, [B, L, K]."""

    def parameters(self) -> Iterator[Tensor]:
        """Yield the weights; the first one's device is the model's."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training, or to evaluation with False."""


def predict(
    model: Model,
    images: Iterable[Any],
    *,
    seq_len: int = 1024,
    batch_size: int = 8,
    num_workers: int = 0,
    **options: Any,
) -> Tensor | list[Tensor]:
    """Return a model's output for each image, in the order of the images.

    The images are packed as for training; an output does not depend on the others in its row.

    Args:
        model: with its weights, on its device. Runs in evaluation mode, without gradients; wrap the
            call in ``torch.autocast`` for half precision.
        images: encoded bytes, open files, paths (also with a scheme, such as ``s3://``), arrays or
            `PIL` images; or one of these alone, but for an array.
        seq_len: tokens a row.
        batch_size: rows a step.
        num_workers: threads that decode ahead.
        **options: of `PackConfig`, such as ``resolution="budget", max_tokens=128``; patch_size is
            the model's. A crop leaves the model its box of each image: ``CenterCrop()`` as usual in
            evaluation; what is drawn, such as a `Crop`, is drawn by the number of the image.

    Returns:
        [images, K] on the CPU; of a model without pooling a list of maps, [rows, columns, K].

    Raises:
        ValueError: an image cannot be read, and the message has its number; an option is wrong, or
            would drop tokens.
    """
    config = config_from(seq_len, {"patch_size": model.config.patch_size, **options})
    if config.patch_size != model.config.patch_size:
        name, expected = "patch_size", f"{model.config.patch_size} (the model's)"
        raise ValueError(checks.sentence(name, config.patch_size, expected, "leave it out"))
    for name, dropping in (("drop_rate", config.drops), ("fit_last", config.fit_last)):
        if dropping:
            expected = "its default, since fewer tokens come from smaller images"
            remedy = "resize with resolution='budget' and max_tokens"
            raise ValueError(checks.sentence(name, getattr(config, name), expected, remedy))
    if config.num_views > 1:
        expected, remedy = "1, an output an image", "pass rows of several to predict_packs"
        raise ValueError(checks.sentence("views", config.num_views, expected, remedy))
    check_settings()
    # Kept, since images may come from a generator, and are read twice: header, then pixels.
    data = _given(images)
    packs = _ImagePacks(config, data, plan_epoch(_sizes(data, config), config))
    answers = predict_packs(model, packs, batch_size=batch_size, num_workers=num_workers)
    return cast("Tensor | list[Tensor]", answers.outputs)


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's outputs for the images of some packs, in the order of the source, on the CPU.

    If images have several views, each is one of the n, in their order.

    Attributes:
        example_index: int64[n], ascending.
        outputs: [n, K]; of a model without pooling a list of n maps, each [rows, columns, K].
        seq_lens: int64[n], tokens of each image.
        labels: int64[n]; None without labels.
    """

    example_index: Tensor
    outputs: Any
    seq_lens: Tensor
    labels: Tensor | None


def predict_packs(
    model: Model, packs: Any, *, batch_size: int = 8, num_workers: int = 0
) -> Answers:
    """Return a model's outputs for the images of all packs.

    Args:
        model: with its weights, on its device. Runs in evaluation mode, without gradients.
        packs: what `PackedLoader` takes; its epoch 0 is predicted.
        batch_size: rows a step.
        num_workers: threads that fill batches ahead.
    """
    device = next(model.parameters()).device
    # A rank of its own: under torchrun, too, each process that calls this predicts all images. The
    # last batch is padded with empty rows, or its images would be left out.
    loader = PackedLoader(
        packs,
        batch_size,
        rank=0,
        world_size=1,
        tail="pad",
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    was_training = model.training
    model.train(False)
    width = model.config.dim if model.config.num_classes is None else model.config.num_classes
    # Each list begins with an empty tensor, so that there is something to join without any images.
    nothing = torch.empty(0, dtype=torch.int64)
    indices, lens, labels, outputs = [nothing], [nothing], [nothing], [torch.empty(0, width)]
    views = [nothing]
    maps: list[Tensor] = []
    labelled = True
    try:
        with torch.inference_mode():
            for batch in loader:
                values = model(batch.to(device, non_blocking=True)).cpu()
                if model.config.pooling == "none":
                    maps += [one for _, one in token_maps(batch, values)]
                else:
                    outputs.append(values[batch.present])
                indices.append(batch.example_index[batch.present])
                view = torch.zeros_like(batch.seq_lens) if batch.view is None else batch.view
                views.append(view[batch.present].long())
                lens.append(batch.seq_lens[batch.present].long())
                labelled = labelled and batch.labels is not None
                if batch.labels is not None:
                    labels.append(batch.labels[batch.present])
    finally:  # an image that cannot be read ends the pass
        model.train(was_training)
    example_index = torch.cat(indices)
    # Batches come in the order of packs, not of images. The second sort keeps that of views.
    order = torch.cat(views).argsort()
    order = order[example_index[order].argsort(stable=True)]
    found: Any = torch.cat(outputs)
    dense = model.config.pooling == "none"
    found = [maps[place] for place in order.tolist()] if dense else found[order]
    return Answers(
        example_index=example_index[order],
        outputs=found,
        seq_lens=torch.cat(lens)[order],
        labels=torch.cat(labels)[order] if labelled else None,
    )


@dataclass(frozen=True)
class _ImagePacks:
    """The images of `predict` as packs, with the methods that `PackedLoader` calls."""

    config: PackConfig
    images: Sequence[ImageData]
    plan: EpochPlan

    @property
    def max_segments(self) -> int:
        return self.config.max_segments

    def num_packs(self, key: Key) -> int:
        del key
        return len(self.plan)

    def fingerprint(self, key: Key) -> str:
        del key
        return self.plan.fingerprint

    def work(self, key: Key) -> NDArray[np.int64]:
        del key
        return self.plan.packs.attention_work

    def rows(self, key: Key, packs: NDArray[np.int64]) -> Rows:
        planned = planned_images(self.plan, packs, None)
        read = partial(_read, self.images)
        rows, rejects, _ = fill_rows(planned, read, self.config, key)
        for reject in rejects:  # the header was fine, but not the pixels
            raise ValueError(_unreadable(reject.example_index, reject.exception))
        return rows


def _given(images: Any) -> list[ImageData]:
    """Return the images of `predict` in the forms that they are decoded from."""
    if isinstance(images, np.ndarray):
        # Rows of one image would pass for small grey ones.
        if images.ndim == 3 and images.shape[2] in (3, 4):
            found, expected = list(images.shape), "a list of arrays"
            raise ValueError(checks.sentence("images.shape", found, expected, "pass [image]"))
    elif (alone := given(images)) is not None:
        return [alone]
    found = []
    for number, image in enumerate(images):
        one = given(image)
        if one is None:
            what, expected = type(image).__name__, "bytes, a path or pixels"
            remedy = "pass one image after the other"
            raise ValueError(checks.sentence(f"type(images[{number}])", what, expected, remedy))
        found.append(one)
    return found


def _read(images: Sequence[ImageData], number: int) -> ImageData:
    return fetched(images[number])


def _sizes(images: Sequence[ImageData], config: PackConfig) -> NDArray[np.int64]:
    sizes = np.empty((len(images), 2), np.int64)
    for number, image in enumerate(images):
        try:
            found = probe(fetched(image), max_pixels=config.max_pixels)
        except BadImage as error:
            raise ValueError(_unreadable(number, error.exception)) from error
        sizes[number] = found.image_hw
    return sizes


def _unreadable(number: int, why: str) -> str:
    remedy = "leave it out, or pack a dataset, which lists such images"
    return checks.sentence(f"images[{number}]", why, "an image that can be read", remedy)
