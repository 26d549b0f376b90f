"""The optimizer of a training: AdamW, and what of a model it changes, and how much.

Source: Zhai et al., arXiv 2106.04560 (two weight decays); Bao et al., arXiv 2106.08254 (rates that
fall from layer to layer).
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from packpipe import checks
from packpipe.model.navit import NaViT
from packpipe.training.train_config import TrainConfig

log = logging.getLogger(__name__)


def layers_of(model: NaViT) -> list[list[nn.Parameter]]:
    """Return a model's parameters from its input to its output.

    Patch embedding, prefix tokens and positions, then each block, then what comes after the blocks.
    """
    first = [model.embed, model.norm_embed, *([] if model.position is None else [model.position])]
    layers = [[p for part in first for p in part.parameters()]]
    layers[0] += [] if model.prefix is None else [model.prefix]
    layers += [list(block.parameters()) for block in model.blocks]
    known = {id(p) for layer in layers for p in layer}
    return [*layers, [p for p in model.parameters() if id(p) not in known]]


def freeze(model: NaViT, blocks: int) -> None:
    """Let the first blocks have no gradients, nor patch embedding and positions; 0 changes nothing.

    What has no gradients already keeps having none, be it by hand or since an earlier training
    froze it; a warning says so.

    Raises:
        ValueError: the model has fewer blocks.
    """
    if blocks > model.config.depth:
        expected = f"at most {model.config.depth} (depth)"
        raise ValueError(checks.sentence("freeze", blocks, expected, "freeze fewer blocks"))
    chosen = [one for layer in layers_of(model)[: blocks + 1 if blocks else 0] for one in layer]
    for parameter in chosen:
        parameter.requires_grad_(False)
    known = {id(parameter) for parameter in chosen}
    left = [n for n, p in model.named_parameters() if not p.requires_grad and id(p) not in known]
    if left:
        found = f"{len(left)} parameters, among them {left[0]}"
        expected = f"what freeze={blocks} says"
        remedy = "they stay frozen; call model.requires_grad_(True) before, to train them"
        log.warning(checks.sentence("what is not trained", found, expected, remedy))


def optimizer_of(model: NaViT, config: TrainConfig, *, captured: bool = False) -> torch.optim.AdamW:
    """Return AdamW over all that has gradients.

    Weight decay is of the matrices of linear layers, another of the head's, of all else 0. The
    rate of a group is that of the step times its ``scale``: layer_decay to the power of how many
    layers come after the parameter's, of `layers_of`. Captured, it is for a CUDA graph, which reads
    the rate from a tensor; `set_rate` sets it.
    """
    head = set() if model.head is None else {id(model.head.weight)}
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for after, layer in enumerate(reversed(layers_of(model))):
        for parameter in layer:
            decay = config.weight_decay if id(parameter) in matrices else 0.0
            decay = config.head_weight_decay if id(parameter) in head else decay
            if parameter.requires_grad:
                groups.setdefault((config.layer_decay**after, decay), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "scale": scale}
            for (scale, decay), parameters in groups.items()
        ],
        lr=config.learning_rate,
        fused=True,
        capturable=captured,
    )
    for group in optimizer.param_groups if captured else []:
        group["lr"] = torch.tensor(config.learning_rate, device=group["params"][0].device)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of a step, for each group times its ``scale``."""
    for group in optimizer.param_groups:
        scaled = rate * group["scale"]
        if isinstance(group["lr"], torch.Tensor):
            # In place, since the graph reads the rate from this memory.
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled
