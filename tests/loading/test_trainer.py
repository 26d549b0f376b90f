"""The Trainer of transformers takes a `PackedLoader` as it is, and resumes with it within an epoch.

Losses are compared exactly with those of a training that was never stopped, and with those of the
sequences alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import consumers
import loading
import pytest
import torch
from torch import Tensor, nn

import packpipe
from packpipe import PackedBatch, PackedLoader
from packpipe.loading.exports import to_transformers

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# The frameworks' own: of deprecated calls, of few workers and of the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


class PackedTrainer(transformers.Trainer):
    """A Trainer whose datasets are loaders."""

    def get_train_dataloader(self) -> PackedLoader:
        return self.train_dataset

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PackedLoader:
        return self.eval_dataset if eval_dataset is None else eval_dataset

    def get_test_dataloader(self, test_dataset: Any) -> PackedLoader:
        return test_dataset


class PackedTextTrainer(PackedTrainer):
    """Its model is given the tokens without padding."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        return super().get_batch_samples(map(to_transformers, epoch_iterator), num_batches, device)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        return super().prediction_step(model, to_transformers(inputs), *args, **options)


class Pooled(nn.Module):
    """A classifier of images by the mean of their patches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(8 * 8 * 3, 9)
        self.dropout = nn.Dropout(0.1)

    def forward(
        self, labels: Tensor, num_items_in_batch: Any = None, **columns: Tensor
    ) -> dict[str, Tensor]:
        batch = PackedBatch(labels=labels, **columns)
        segment = torch.arange(1, labels.shape[1] + 1)
        mask = (batch.segment_ids[:, None] == segment[:, None]).float()
        sums = mask @ (self.dropout(batch.patches.float()) / 255)
        logits = self.head(sums / batch.seq_lens.clamp(1)[..., None])
        count = (labels >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        flat = logits.flatten(0, 1), batch.labels.flatten()
        return {
            "loss": nn.functional.cross_entropy(*flat, reduction="sum") / count,
            "logits": logits,
        }


def llama() -> nn.Module:
    return consumers.llama(attention_dropout=0.1)  # so that random numbers have to be resumed, too


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        **{"learning_rate": 1e-2, **options},
    )


def losses(trainer: Any) -> list[tuple[int, float, float]]:
    history = trainer.state.log_history
    return [(log["step"], log["epoch"], log["loss"]) for log in history if "loss" in log]


def trainer_of(kind: str, folder: Path, **options: Any) -> Any:
    packs = consumers.text(folder) if kind == "text" else loading.packs_of(kind, folder, epochs=2)
    stored = packs if kind == "text" else loading.packs_of("stored", folder)
    return (PackedTextTrainer if kind == "text" else PackedTrainer)(
        llama() if kind == "text" else Pooled(),
        arguments(folder / "run", num_train_epochs=2, **options),
        train_dataset=PackedLoader(packs, 2 if kind == "text" else 4, num_workers=1),
        eval_dataset=PackedLoader(stored, 8, shuffle=False, tail="pad"),
    )


@pytest.mark.parametrize(("kind", "accumulated"), [("text", 2), ("stored", 3), ("planned", 1)])
def test_it_resumes_within_an_epoch_to_the_same_losses(tmp_path, kind, accumulated):
    every = 3 if accumulated > 1 else 5
    options = {"gradient_accumulation_steps": accumulated, "save_steps": every, "eval_steps": 4}
    options["eval_strategy"] = "steps"
    trainer = trainer_of(kind, tmp_path, **options)
    trainer.train()
    wanted, weights = losses(trainer), list(trainer.model.parameters())
    assert len(wanted) > 2 * every
    an_epoch = -(-len(trainer.train_dataset) // accumulated)
    assert an_epoch * accumulated > len(trainer.train_dataset) or accumulated == 1
    for stop in (
        every,
        (len(wanted) - 1) // every * every,
    ):  # within the first epoch, and within the second
        assert stop % an_epoch
        again = trainer_of(kind, tmp_path, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
        assert losses(again) == wanted
        for found, weight in zip(again.model.parameters(), weights, strict=True):
            assert torch.equal(found, weight)


def test_what_is_left_out_when_it_resumes_is_not_filled(tmp_path):
    packs = loading.packs_of("stored", tmp_path)
    from accelerate import skip_first_batches

    loader = PackedLoader(packs, 2)
    whole = [loading.digest(batch) for batch in loader]
    filled = []
    loader = PackedLoader(packs, 2)
    rows = loader.packs.rows
    loader.packs.rows = lambda key, packs: filled.append(packs) or rows(key, packs)
    rest = skip_first_batches(loader, 3)
    assert [loading.digest(batch) for batch in rest] == whole[3:]
    assert len(filled) == len(whole) - 3 > 3


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("trainer", [PackedTextTrainer, PackedTrainer])
def test_losses_are_those_of_the_sequences_alone(tmp_path, monkeypatch, trainer, accumulated):
    """Of several micro-batches, too; and of padded rows, which are mappings of their columns."""
    packed, model = consumers.text(tmp_path), llama().eval()
    options = arguments(
        tmp_path / "run", max_steps=1, gradient_accumulation_steps=accumulated, learning_rate=0.0
    )
    trained = trainer(model, options, train_dataset=PackedLoader(packed, 2))
    # Dropout is left out, so that losses can be compared.
    monkeypatch.setattr(trained.model, "train", lambda *_: model)
    trained.train()
    ((_, _, loss),) = losses(trained)
    batches = list(PackedLoader(packed, 2))[:accumulated]
    assert max((batch.seq_lens > 0).sum(1).max() for batch in batches) > 1
    assert abs(loss - consumers.alone(model, batches).loss) < 1e-5


def test_evaluation_and_prediction_take_all_rows(tmp_path):
    trainer = trainer_of("stored", tmp_path)
    for _ in range(2):
        found = trainer.predict(trainer.eval_dataset)
        labels = torch.cat([batch.labels for batch in trainer.eval_dataset])
        assert found.label_ids.tolist() == labels.tolist()
        assert found.predictions.shape == (*labels.shape, 9)
        assert len(labels) > 40
    assert trainer.evaluate()["eval_loss"] == found.metrics["test_loss"]
    assert trainer.num_examples(trainer.train_dataset) == 4 * len(trainer.train_dataset)


def test_labels_are_taken_out_of_a_dict(tmp_path):
    """By a loss of one's own; a batch itself cannot be changed."""
    given = []

    def loss_of(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
        given.append(labels)
        return outputs["loss"]

    class DictTrainer(PackedTrainer):
        def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
            return super().compute_loss(model, {**inputs, "targets": inputs["labels"]}, **options)

    class Targets(Pooled):
        def forward(self, targets: Tensor, **columns: Any) -> dict[str, Tensor]:
            return super().forward(targets, **columns)

    loader = PackedLoader(loading.packs_of("stored", tmp_path), 2)
    options = {
        "args": arguments(tmp_path / "run", max_steps=2),
        "train_dataset": loader,
        "compute_loss_func": loss_of,
    }
    DictTrainer(Targets(), **options).train()
    wanted = [batch.labels for batch in PackedLoader(loading.packs_of("stored", tmp_path), 2)][:2]
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
    with pytest.raises(AttributeError, match="'PackedBatch' object has no attribute 'pop'"):
        PackedTrainer(Pooled(), **options).train()


def test_a_stream_is_resumed(tmp_path):
    def trainer() -> Any:
        stream = loading.source().to_iterable_dataset()
        packs = packpipe.PackedStream(stream, 24, patch_size=8, window=40)
        return PackedTrainer(
            Pooled(),
            arguments(tmp_path / "run", max_steps=6, save_steps=4),
            train_dataset=PackedLoader(packs, 2, num_workers=1),
        )

    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(again) == losses(whole)
    assert len(losses(whole)) == 6
