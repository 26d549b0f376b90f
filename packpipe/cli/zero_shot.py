"""`packpipe zero-shot`: a SigLIP chooses among classes by their names alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from packpipe import checks
from packpipe.cli.asking import in_rejects_alone
from packpipe.cli.labels import classes_of, labelled, with_names
from packpipe.cli.layouts import packs_of
from packpipe.cli.training_run import device_of_this_rank
from packpipe.hub.contrastive import image_text_model
from packpipe.hub.text_tower import class_vectors
from packpipe.model.predict import predict_packs
from packpipe.rows.own_columns import holds_rows
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import NO_LABEL
from packpipe.sources.image_columns import label_column_of

TEMPLATE = "This is a photo of {}."  # SigLIP's


class ZeroShot(NamedTuple):
    """What a model says of images that it was not trained to classify.

    Attributes:
        names: of the classes.
        example_index: int64[n], images that can be read, ascending.
        logits: float32[n, classes]; a sigmoid makes them shares, which need not add up to 1.
        labels: int64[n], -100 for none; None without labels.
        rejects: images that cannot be read.
    """

    names: list[str]
    example_index: Tensor
    logits: Tensor
    labels: Tensor | None
    rejects: list[Reject]

    @property
    def num_labelled(self) -> int:
        """How many images have a label."""
        return 0 if self.labels is None else int((self.labels != NO_LABEL).sum())

    @property
    def accuracy(self) -> float | None:
        """The share of labelled images whose largest logit is that of their label."""
        if self.labels is None or not self.num_labelled:
            return None
        known = self.labels != NO_LABEL
        right = self.logits[known].argmax(1) == self.labels[known]
        return int(right.sum()) / self.num_labelled

    def best(self, top: int) -> list[list[tuple[str, float]]]:
        """Return the likeliest classes of each image with their shares, the likeliest first."""
        # Sigmoids, as SigLIP is trained: shares of classes need not add up to 1.
        shares = self.logits.double().sigmoid()
        order = shares.argsort(dim=1, descending=True, stable=True)[:, :top].tolist()
        return [
            [(self.names[k], float(row[k])) for k in ranked]
            for row, ranked in zip(shares, order, strict=True)
        ]


def zero_shot(
    source: str,
    dataset: Dataset,
    names: list[str] | None,
    templates: list[str],
    *,
    batch_size: int,
    num_workers: int,
    max_bad_fraction: float,
    precision: str = "auto",
) -> ZeroShot:
    """Return what a SigLIP says of images.

    Args:
        source: a folder with both towers and a tokenizer, or a name on the Hub.
        dataset: images, with labels or without.
        names: of the classes, in the order of the labels' numbers, or of labels whose own names are
            numbers in that of these; None for the labels' own. Those of labels, in any order, are
            taken in the labels' order.
        templates: see `class_vectors`.
        batch_size: rows a step.
        num_workers: threads that decode ahead.
        max_bad_fraction: a larger share of images that cannot be read is an error.
        precision: of the images' tower, see `packpipe.model.precision`.

    Raises:
        TooManyRejects: too many images cannot be read.
        ValueError: nobody says what the classes are, the labels have more or fewer of them, or a
            name is that of another label; or these are packed rows, or their labels no classes.
    """
    if holds_rows(dataset.column_names):
        expected, remedy = "images", "pass the source of the rows"
        raise ValueError(checks.sentence("IMAGES", "packed rows", expected, remedy))
    if label_column_of(dataset.features, "auto") is not None:
        dataset = labelled(with_names(dataset, names))
        names = _of_labels(names, classes_of(dataset))
    if not names:
        expected, remedy = "names", "pass --classes FILE, a name a line"
        raise ValueError(checks.sentence("classes", names, expected, remedy))
    # After the checks above, which need none of its seconds.
    import transformers

    model, packing = image_text_model(source)
    model = model.to(device_of_this_rank()).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    texts = class_vectors(model.texts, tokenizer, names, templates)
    packs = packs_of(dataset, packing, num_workers, max_bad_fraction=max_bad_fraction)
    with in_rejects_alone():
        answers = predict_packs(
            model.images,
            packs,
            batch_size=batch_size,
            num_workers=num_workers,
            precision=precision,
        )
    with torch.inference_mode():
        logits = model.logits(answers.outputs.to(texts), texts).cpu()
    return ZeroShot(
        names=names,
        example_index=answers.example_index,
        logits=logits,
        labels=answers.labels,
        rejects=sorted([*packs.rejects, *packs.undecodable]),
    )


def _of_labels(names: list[str] | None, classes: ClassLabel | None) -> list[str]:
    """Return the names of classes by the numbers of labels."""
    if classes is None:
        expected, remedy = "classes, of which each image is one", "pass their --label-column"
        raise ValueError(checks.sentence("labels", "lists of numbers", expected, remedy))
    own: list[str] = classes.names
    if names is None or set(names) == set(own):
        return own
    if len(names) != len(own):
        expected = f"{len(own)}, as of the labels ({', '.join(own[:3])}, ...)"
        remedy = "write a line for each, in their order"
        raise ValueError(checks.sentence("number of classes", len(names), expected, remedy))
    if all(map(str.isdecimal, own)):  # sorted as texts, 10 before 2, while names are by number
        by_number = sorted(range(len(own)), key=lambda k: int(own[k]))
        names = [name for _, name in sorted(zip(by_number, names, strict=True))]
    for name, label in zip(names, own, strict=True):
        if name != label and name in own:
            expected = f"{label!r} in its place, or a name that no label has"
            remedy = "write a line for each, in the labels' order"
            raise ValueError(checks.sentence("a class", name, expected, remedy))
    return names
