"""What a training script of Lightning or accelerate does with a loader; run on two ranks.

Since a start takes long, the ranks of accelerate's group also train a model under DDP.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import consumers
import loading
import torch
from two_ranks import end_the_group_of_a_framework

from packpipe import PackedLoader


def with_accelerate(folder: Path) -> list[list[int]]:
    """The examples of each batch of two epochs."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    packs = loading.packs_of("planned", folder, epochs=2)
    loader = PackedLoader(packs, 2, num_workers=1, tail="pad")
    model, optimizer, prepared = accelerator.prepare(model, optimizer, loader)
    assert prepared is loader
    taken = []
    for epoch in range(2):
        prepared.set_epoch(epoch)
        for batch in prepared:
            moved = batch.to(accelerator.device)
            index, lengths = moved.by_example(moved.seq_lens)
            taken.append(index.tolist())
            accelerator.backward(model(lengths.float()[:, None]).sum())
            optimizer.step()
            optimizer.zero_grad()
    return taken


def with_lightning(
    folder: Path,
    kind: str = "stored",
    *,
    stop: int | None = None,
    resume: bool = False,
    devices: int = 1,
):
    """The examples of each batch of two epochs, or of the rest of them."""
    import pytorch_lightning as lightning
    from pytorch_lightning.callbacks import ModelCheckpoint

    taken = []

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            index, lengths = batch.by_example(batch.seq_lens)
            taken.append(index.tolist())
            return (self.weight * lengths.float().sum()).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self) -> PackedLoader:
            epoch = self.current_epoch
            return PackedLoader(packs, 2, epoch=epoch, num_workers=1, tail="pad")

    packs = loading.packs_of(kind, folder, epochs=2)
    saving = stop is not None
    trainer = lightning.Trainer(
        max_epochs=2,
        max_steps=stop if stop is not None else -1,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        default_root_dir=folder,
        # Lightning asks for the length once, unless told otherwise; epochs planned anew differ.
        reload_dataloaders_every_n_epochs=int(kind == "planned"),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=saving,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=stop)] if saving else [],
    )
    checkpoint = next(folder.glob("step=*.ckpt")) if resume else None
    trainer.fit(Model(), ckpt_path=checkpoint, weights_only=False)
    return taken


if __name__ == "__main__":
    run = {"accelerate": with_accelerate, "lightning": with_lightning}[sys.argv[1]]
    where = Path(sys.argv[2])
    options = {} if sys.argv[1] == "accelerate" else {"devices": 2}
    rank = os.environ["RANK"]
    (where / f"rank-{rank}.json").write_text(json.dumps(run(where, **options)))
    if sys.argv[1] == "accelerate":
        consumers.one_rank_of_ddp(where)
    end_the_group_of_a_framework()
