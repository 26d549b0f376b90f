"""Every entry point of Lightning takes a `PackedLoader` as it is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import loading
import pytest
import torch

from packpipe import PackedLoader
from packpipe.loading.batch import PackedBatch

lightning = pytest.importorskip("pytorch_lightning")

# The framework's own: of deprecated calls, of few workers and of the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


class Model(lightning.LightningModule):
    """Notes which examples each step is given."""

    def __init__(self, *, estimates: bool = False, keeps: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.estimates, self.keeps = estimates, keeps
        self.taken: dict[str, list[list[int]]] = {name: [] for name in ("fit", "eval", "predict")}
        self.known: dict[str, Any] | None = None

    def note(self, kind: str, batch: PackedBatch) -> torch.Tensor:
        index, lengths = batch.by_example(batch.seq_lens)
        self.taken[kind].append(index.tolist())
        return self.weight.sum() * lengths.float().mean()

    def training_step(self, batch: PackedBatch, _: int) -> torch.Tensor:
        loss = self.note("fit", batch)
        self.log("loss", loss, on_step=True)
        return loss

    def validation_step(self, batch: PackedBatch, _: int) -> None:
        self.log("val_loss", self.note("eval", batch), batch_size=len(batch.seq_lens))

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        assert batch_idx == len(self.taken["eval"])
        self.note("eval", batch)

    def predict_step(self, batch: PackedBatch, _: int) -> torch.Tensor:
        self.note("predict", batch)
        return batch.by_example(batch.seq_lens)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.estimates:
            assert self.trainer.estimated_stepping_batches > 20
        return torch.optim.SGD(self.parameters(), 0.1)

    # The remedy of the documentation: the loader's state by the module's own hooks.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.keeps:
            checkpoint["packs"] = self.trainer.train_dataloader.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.known = checkpoint.get("packs")

    def on_train_start(self) -> None:
        if self.known is not None:
            self.trainer.train_dataloader.load_state_dict(self.known)


def trainer_of(folder: Path, **options: Any) -> Any:
    callbacks = []
    if every := options.pop("save_every", None):
        callbacks.append(
            lightning.callbacks.ModelCheckpoint(
                folder, "{step}", every_n_train_steps=every, save_top_k=-1
            )
        )
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=callbacks,
        **options,
    )


def examples(loader: PackedLoader, epochs: int = 1) -> list[list[int]]:
    return [batch.by_example(batch.seq_lens)[0].tolist() for _ in range(epochs) for batch in loader]


def evaluating(packs: Any) -> PackedLoader:
    return PackedLoader(packs, 3, shuffle=False, tail="pad", num_workers=1)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_it_evaluates_all_rows(tmp_path, entry, shuffle):
    packs = loading.packs_of("stored", tmp_path)
    loader = PackedLoader(packs, 3, shuffle=shuffle, tail="pad")
    model, trainer = Model(), trainer_of(tmp_path)
    found = getattr(trainer, entry)(model, loader)
    wanted = examples(PackedLoader(packs, 3, shuffle=shuffle, tail="pad"))
    assert model.taken["predict" if entry == "predict" else "eval"] == wanted
    assert len(wanted) > 10
    if entry == "predict":
        assert [index.tolist() for index in found] == wanted


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_it_fits_in_any_precision(tmp_path, precision):
    packs = loading.packs_of("stored", tmp_path)
    model, trainer = Model(), trainer_of(tmp_path, max_epochs=1, precision=precision)
    trainer.fit(model, PackedLoader(packs, 2))
    assert model.taken["fit"] == examples(PackedLoader(packs, 2))


@pytest.mark.parametrize("kind", ["stored", "planned"])
def test_it_validates_while_it_fits(tmp_path, kind):
    packs = loading.packs_of(kind, tmp_path, epochs=2)
    stored = loading.packs_of("stored", tmp_path)
    model = Model()
    trainer = trainer_of(tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    model.train_dataloader = lambda: PackedLoader(packs, 2, epoch=model.current_epoch, tail="pad")
    model.val_dataloader = lambda: evaluating(stored)
    trainer.fit(model)
    whole = examples(evaluating(stored))
    checked_first = whole[: trainer.num_sanity_val_steps]
    assert model.taken["eval"] == [*checked_first, *whole, *whole]
    assert model.taken["fit"] == examples(PackedLoader(packs, 2, tail="pad"), 2)


@pytest.mark.parametrize(("shuffle", "accumulated"), [(True, 2), (False, 1)])
def test_it_resumes_within_an_epoch_with_validation(tmp_path, shuffle, accumulated):
    packs = loading.packs_of("stored", tmp_path)

    def fit(path: Path | None = None) -> Model:
        model = Model()
        trainer = trainer_of(
            tmp_path,
            max_epochs=2,
            val_check_interval=5,
            accumulate_grad_batches=accumulated,
            save_every=5,
        )
        loader = PackedLoader(packs, 4, shuffle=shuffle, num_workers=1)
        trainer.fit(model, loader, evaluating(packs), ckpt_path=path, weights_only=False)
        return model

    whole = fit()
    wanted = examples(PackedLoader(packs, 4, shuffle=shuffle), 2)
    assert whole.taken["fit"] == wanted
    an_epoch = len(wanted) // 2
    steps_of_an_epoch = -(-an_epoch // accumulated)
    for stop in (5, steps_of_an_epoch // 5 * 5 + 5):  # within the first epoch, and the second
        assert stop % steps_of_an_epoch
        after = stop // steps_of_an_epoch * an_epoch + stop % steps_of_an_epoch * accumulated
        resumed = fit(tmp_path / f"step={stop}.ckpt")
        assert resumed.taken["fit"] == wanted[after:]
        assert torch.equal(resumed.weight, whole.weight)


def test_it_overfits_to_the_same_batches_in_stored_order(tmp_path, recwarn):
    packs = loading.packs_of("stored", tmp_path)
    model, trainer = Model(), trainer_of(tmp_path, max_epochs=3, overfit_batches=2)
    trainer.fit(model, PackedLoader(packs, 2, shuffle=False), evaluating(packs))
    assert model.taken["fit"] == 3 * examples(PackedLoader(packs, 2, shuffle=False))[:2]
    assert not [warning for warning in recwarn if "shuffling" in str(warning.message)]


@pytest.mark.parametrize("options", [{}, {"shuffle": False, "balance": True}])
def test_it_refuses_to_overfit_to_batches_that_change(tmp_path, options):
    packs = loading.packs_of("stored", tmp_path)
    trainer = trainer_of(tmp_path, max_epochs=3, overfit_batches=2)
    with pytest.raises(ValueError, match=r"PackedLoader.*needs to subclass"):
        trainer.fit(Model(), PackedLoader(packs, 2, **options))


@pytest.mark.parametrize("accumulated", [1, 4])
def test_it_counts_steps_with_accumulation(tmp_path, accumulated):
    packs = loading.packs_of("stored", tmp_path)
    loader = PackedLoader(packs, 2)
    trainer = trainer_of(tmp_path, max_epochs=2, accumulate_grad_batches=accumulated)
    trainer.fit(Model(estimates=False), loader)
    assert trainer.global_step == 2 * -(-len(loader) // accumulated)
    assert trainer.estimated_stepping_batches == trainer.global_step


@pytest.mark.parametrize(
    ("estimates", "keeps"),
    [
        (False, False),
        # Lightning then sets the loader up before it restores the checkpoint's loops, and looks at
        # the loader's state in them no more.
        pytest.param(True, False, marks=pytest.mark.xfail(strict=True, reason="lost upstream")),
        (True, True),
    ],
)
def test_a_state_that_estimating_the_steps_loses_is_kept_by_hooks(tmp_path, estimates, keeps):
    stop = 31  # within the second epoch
    packs = loading.packs_of("stored", tmp_path)

    def fit(path: Path | None = None) -> Model:
        model = Model(estimates=estimates, keeps=keeps)
        trainer = trainer_of(tmp_path, max_epochs=2, save_every=stop)
        trainer.fit(model, PackedLoader(packs, 2), ckpt_path=path, weights_only=False)
        return model

    whole = fit()
    resumed = fit(tmp_path / f"step={stop}.ckpt")
    assert resumed.taken["fit"] == whole.taken["fit"][stop:]
    assert len(set(map(tuple, itertools.chain(whole.taken["fit"])))) > stop
