"""The optimizer of a training: AdamW, whose weight decay depends on what a parameter is.

Source: Zhai et al., arXiv 2106.04560 (two weight decays).
"""

from __future__ import annotations

import torch
from torch import nn

from packpipe.model.navit import NaViT
from packpipe.training.train_config import TrainConfig


def optimizer_of(model: NaViT, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW; weight decay on matrices of linear layers, another on the head's, else none."""
    head = {id(p) for p in model.head.parameters()} if model.head is not None else set()
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - head
    groups = [
        {"params": [p for p in model.parameters() if id(p) in chosen], "weight_decay": decay}
        for chosen, decay in (
            (head, config.head_weight_decay),
            (matrices, config.weight_decay),
            ({id(p) for p in model.parameters()} - head - matrices, 0.0),
        )
    ]
    # Without num_classes there is no head.
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
