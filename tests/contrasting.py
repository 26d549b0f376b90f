"""Pairs for the contrastive losses; run on two ranks, each with its own pairs and examples."""

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from two_ranks import one_of_two_ranks

from packpipe.loading.ranks import rank_of_world
from packpipe.training.contrastive import sigmoid_contrastive, softmax_contrastive
from packpipe.training.losses import global_count, segment_cross_entropy

PRESENT = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1, 1], dtype=torch.bool)


def inputs(number, seed, dtype):
    """Images and texts of length 1, scale and bias, all with gradients."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, number, 5, dtype=dtype, generator=generator)
    scale, bias = torch.tensor(3.0, dtype=dtype), torch.tensor(-1.5, dtype=dtype)
    values = (F.normalize(images, dim=-1), F.normalize(texts, dim=-1), scale, bias)
    return [value.clone().requires_grad_() for value in values]


def loss_of(kind, images, texts, scale, bias, present, chunk):
    if kind == "softmax":
        return softmax_contrastive(images, texts, scale, present=present, chunk=chunk)
    return sigmoid_contrastive(images, texts, scale, bias, present=present, chunk=chunk)


def pairs(kind, rank, ranks):
    """The loss of a rank's pairs, and the gradients by a weight that all ranks share."""
    images, texts, scale, bias = inputs(len(PRESENT), 1, torch.float64)
    own = slice(rank * len(PRESENT) // ranks, (rank + 1) * len(PRESENT) // ranks)
    weights = [torch.eye(5, dtype=torch.float64).requires_grad_() for _ in range(2)]
    sides = [(side[own] @ w) for side, w in zip((images, texts), weights, strict=True)]
    loss = loss_of(kind, *sides, scale, bias, PRESENT[own], 4)
    found = torch.autograd.grad(
        loss, (*weights, scale, bias), allow_unused=True, materialize_grads=True
    )
    return loss.item(), list(found)


def whole(kind):
    loss, found = pairs(kind, 0, 1)
    return loss, [one.tolist() for one in found]


def classified(rank, ranks):
    """The cross-entropy of a rank's examples, in micro-batches, its gradient, and their numbers."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(8, 1, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 3, (8, 1), generator=generator)
    sizes = [8] if ranks == 1 else [1, 2, 4, 1]
    parts = list(zip(features.split(sizes), labels.split(sizes), strict=True))
    own = parts[rank * len(parts) // ranks : (rank + 1) * len(parts) // ranks]
    weight = torch.eye(3, dtype=torch.float64).requires_grad_()
    count = global_count(*(labels >= 0 for _, labels in own))
    total = 0.0
    for features, labels in own:
        loss = segment_cross_entropy(features @ weight, labels, count=count)
        loss.backward()  # adds to the gradient
        total += loss.item()
    return total, weight.grad, [len(labels) for _, labels in own]


def main(kind, folder):
    rank, _ = rank_of_world()
    loss, found = pairs(kind, rank, 2)
    classes, gradient, examples = classified(rank, 2)
    for one in (*found, gradient):  # as DDP does
        torch.distributed.all_reduce(one)
        one /= 2
    result = {
        "loss": loss,
        "gradients": [one.tolist() for one in found],
        "classified": classes,
        "classified gradient": gradient.tolist(),
        "examples": examples,
    }
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    with one_of_two_ranks():
        main(*sys.argv[1:])
