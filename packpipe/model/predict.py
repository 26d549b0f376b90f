"""`predict`: packs images of any size, runs a model, returns its outputs in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from packpipe import checks
from packpipe.loading.batch import PackedBatch
from packpipe.loading.image_packs import image_packs
from packpipe.loading.loader import PackedLoader
from packpipe.model.config import NaViTConfig
from packpipe.model.maps import token_maps
from packpipe.model.precision import in_precision
from packpipe.model.prefix import check_prefix
from packpipe.planning.image_config import config_from


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
    precision: str | None = None,
    **options: Any,
) -> Tensor | list[Tensor]:
    """Return a model's output for each image, in the order of the images.

    The images are packed as for training; an output does not depend on the others in its row.

    Args:
        model: with its weights, on its device. Runs in evaluation mode, without gradients.
        images: encoded bytes, open files, paths (also with a scheme, such as ``s3://``), arrays or
            `PIL` images; or one of these alone, but for an array.
        seq_len: tokens a row.
        batch_size: rows a step.
        num_workers: threads that decode ahead.
        precision: of matrix products: ``"float32"``, ``"bfloat16"``, or ``"auto"``, which is
            bfloat16 on a GPU alone; None leaves it to a ``torch.autocast`` around the call.
        **options: of `PackConfig`, such as ``resolution="budget", max_tokens=128``; patch_size and
            prefix_tokens are the model's. A crop leaves the model its box of each image:
            ``CenterCrop()`` as usual in evaluation; what is drawn, such as a `Crop`, is drawn by
            the number of the image.

    Returns:
        [images, K] on the CPU; of a model without pooling a list of maps, [rows, columns, K] or,
        with ``target_stride``, [rows, columns, cells, K].

    Raises:
        ValueError: an image cannot be read, and the message has its number; an option is wrong, or
            would drop tokens; or the CPU has no instructions for bfloat16.
    """
    of_model = {name: getattr(model.config, name) for name in ("patch_size", "prefix_tokens")}
    config = config_from(seq_len, of_model | options)
    for name, own in of_model.items():
        if (given := getattr(config, name)) != own:
            expected = f"{own} (the model's)"
            raise ValueError(checks.sentence(name, given, expected, "leave it out"))
    packs = image_packs(images, config)
    answers = predict_packs(
        model, packs, batch_size=batch_size, num_workers=num_workers, precision=precision
    )
    return cast("Tensor | list[Tensor]", answers.outputs)


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's outputs for the images of some packs, in the order of the source, on the CPU.

    If images have several views, each is one of the n, in their order.

    Attributes:
        example_index: int64[n], ascending.
        outputs: [n, K]; of a model without pooling a list of n maps, each [rows, columns, K] or,
            with ``target_stride``, [rows, columns, cells, K].
        seq_lens: int64[n], tokens of each image.
        labels: int64[n], -100 for none; or, of lists of K numbers and of floats (K = 1),
            float32[n, K], NaN for none; None without labels.
    """

    example_index: Tensor
    outputs: Any
    seq_lens: Tensor
    labels: Tensor | None


def predict_packs(
    model: Model,
    packs: Any,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    precision: str | None = None,
) -> Answers:
    """Return a model's outputs for the images of all packs.

    Args:
        model: with its weights, on its device. Runs in evaluation mode, without gradients.
        packs: what `PackedLoader` takes; its epoch 0 is predicted.
        batch_size: rows a step.
        num_workers: threads that fill batches ahead.
        precision: as of `predict`.
    """
    device = next(model.parameters()).device
    autocast = in_precision(precision, device)
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
        with torch.inference_mode(), autocast:
            for batch in loader:
                check_prefix(batch, model.config.prefix_tokens)
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
