"""Consumers of packed rows with tiny random models: their losses beside those of sequences alone.

Trainers take one step of plain gradient descent at a rate of 1, so the gradient is what the weights
have lost. As a script, it is one of the two ranks of the plain training under DDP.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import one_of_two_ranks

from packpipe import PackedLoader, pack
from packpipe.loading.batch import TokenBatch
from packpipe.loading.exports import to_attention_mask, to_transformers, to_trl
from packpipe.loading.ranks import rank_of_world
from packpipe.rows.rows import NO_LABEL
from packpipe.training.losses import global_count

VOCABULARY = 50
SEQ_LEN = 16
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,  # so that what a token sees decides much of its loss
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Gradients = dict[str, Tensor]


class Step(NamedTuple):
    """The mean loss of all labels, and its gradient by each weight; empty where there is none."""

    loss: float
    gradients: Gradients


class Pair(NamedTuple):
    """The same step with packed rows, and with one sequence at a time."""

    packed: Step
    alone: Step

    @property
    def differences(self) -> tuple[float, float]:
        """That of the losses, and the largest of a gradient ÷ the largest of its weight."""
        (loss, found), (wanted_loss, wanted) = self
        assert found.keys() == wanted.keys() != set()
        of_weights = ((found[n] - wanted[n]).abs().max() / wanted[n].abs().max() for n in wanted)
        return abs(loss - wanted_loss), float(max(of_weights))


def made(config: Any, model: Any, implementation: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return model(config(**SIZES, attn_implementation=implementation, **options)).double()


def llama(implementation: str = "sdpa", **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return made(LlamaConfig, LlamaForCausalLM, implementation, num_key_value_heads=2, **options)


def qwen(implementation: str = "sdpa") -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = {"num_key_value_heads": 2, "head_dim": 8}
    return made(Qwen3Config, Qwen3ForCausalLM, implementation, **heads)


def bert(implementation: str = "sdpa") -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return made(BertConfig, BertForMaskedLM, implementation, **NO_DROPOUT)


def xlm_roberta(implementation: str = "sdpa") -> Any:
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    return made(XLMRobertaConfig, XLMRobertaForMaskedLM, implementation, **NO_DROPOUT)


DECODERS, ENCODERS = [llama, qwen], [bert, xlm_roberta]
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
FIRST_POSITION = {xlm_roberta: 2}  # padding_idx + 1


def text(folder: Path, **options: Any) -> Dataset:
    """Packed sequences whose loss each can be computed alone: 23 rows of 40."""
    rng = np.random.default_rng(3)
    # Of two tokens or more, since the only token of a sequence has no loss; 1 is XLM-R's padding.
    rows = [rng.integers(2, VOCABULARY, n).tolist() for n in rng.integers(2, SEQ_LEN + 1, 40)]
    # As tokenizers give it; packed beside the others, it would have models mix the sequences.
    masks = [[1] * len(row) for row in rows]
    source = Dataset.from_dict({"input_ids": rows, "labels": rows, "attention_mask": masks})
    options = {"mask_first_label": True, "progress": False, **options}
    return pack(source, SEQ_LEN, output=folder / options.get("layout", "fixed"), **options)


def one_batch(packed: Dataset) -> TokenBatch:
    (batch,) = PackedLoader(packed, len(packed), rank=0, world_size=1)
    return batch


def sequences(batches: Iterable[TokenBatch]) -> Iterator[dict[str, Tensor]]:
    """The tokens and labels of every segment, int64[1, length]."""
    for batch in batches:
        for row, lens in enumerate(batch.seq_lens.tolist()):
            for start, end in itertools.pairwise(np.cumsum([0, *filter(None, lens)])):
                yield {
                    name: batch.tokens[name][row : row + 1, start:end].long()
                    for name in ("input_ids", "labels")
                }


def alone(model: nn.Module, batches: Iterable[TokenBatch]) -> Step:
    """The step of one sequence at a time, with a mean over all labels."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one in sequences(batches):
        number = int((one["labels"] != NO_LABEL).sum())
        total, count = total + model(**one).loss * number, count + number
    return step_of(model, total / count)


def step_of(model: nn.Module, loss: Tensor) -> Step:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = {n: g for n, g in zip(names, found, strict=True) if g is not None}
    return Step(loss.item(), gradients)


def masked_loss(
    made_by: Any, model: nn.Module, batch: TokenBatch, implementation: str, *dtype: torch.dtype
) -> Tensor:
    """The loss of padded rows, whose mask says which sequence a token is of."""
    mask = to_attention_mask(
        batch,
        causal=made_by in DECODERS,
        implementation=implementation,
        **({"dtype": dtype[0]} if dtype else {}),
    )
    loss: Tensor = model(
        input_ids=batch.tokens["input_ids"].long(),
        labels=batch.tokens["labels"].long(),
        position_ids=batch.position_ids.long() + FIRST_POSITION.get(made_by, 0),
        attention_mask=mask,
    ).loss
    return loss


def plain_flex_attention() -> Any:
    """A context in which transformers calls FlexAttention as it is: without a C++ compiler.

    It computes no gradients on a CPU, compiled or not.
    """
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as theirs

    def plain(query: Any, key: Any, value: Any, training: Any = False, **options: Any) -> Any:
        del training
        return flex_attention(query, key, value, **options)

    return mock.patch.object(theirs, "compile_friendly_flex_attention", plain)


def with_a_mask(made_by: Any, implementation: str, folder: Path) -> Pair:
    batch = one_batch(text(folder))
    with torch.no_grad(), plain_flex_attention():
        loss = masked_loss(made_by, made_by(implementation), batch, implementation, torch.float64)
    return Pair(Step(loss.item(), {}), alone(made_by(), [batch]))


def without_padding(made_by: Any, implementation: str, folder: Path) -> Pair:
    batch = one_batch(text(folder))
    with torch.no_grad(), plain_flex_attention():
        loss = made_by(implementation)(**to_transformers(batch)).loss
    return Pair(Step(loss.item(), {}), alone(made_by(), [batch]))


def trained(packed: Dataset, train: Callable[[nn.Module], float]) -> Pair:
    """The step that a trainer takes on all rows, which takes the gradient off the weights."""
    model = llama()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    loss = train(model)
    lost = {name: before[name] - weight.detach() for name, weight in model.named_parameters()}
    return Pair(Step(loss, lost), alone(llama(), [one_batch(packed)]))


def of_all_rows(packed: Dataset, micro_batches: int) -> dict[str, int]:
    """The options of a Trainer that takes one step on all rows; the last micro-batch is smaller."""
    return {
        "per_device_train_batch_size": -(-len(packed) // micro_batches),
        "gradient_accumulation_steps": micro_batches,
    }


def arguments(kind: Any, folder: Path, **options: Any) -> Any:
    """Arguments of a Trainer for one step of gradient descent."""
    return kind(
        output_dir=str(folder / "run"),
        **{
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_steps": 1,
            "logging_steps": 1,
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            **options,
        },
    )


def logged_loss(trainer: Any) -> float:
    """Train, and return the one loss that is logged; nothing is printed."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    (loss,) = (log["loss"] for log in trainer.state.log_history if "loss" in log)
    return float(loss)


def hf_trainer(folder: Path, *, micro_batches: int = 3, **options: Any) -> Pair:
    """Fixed rows in a plain Trainer, with its default collator unless options name another."""
    from transformers import Trainer, TrainingArguments

    packed = text(folder)
    sizes = of_all_rows(packed, micro_batches)
    args = arguments(TrainingArguments, folder, **sizes)
    options = {"train_dataset": packed, **options}
    return trained(packed, lambda model: logged_loss(Trainer(model, args, **options)))


def flattened(folder: Path) -> Pair:
    """Ragged rows in transformers' collator that flattens, which takes each for one sequence."""
    from transformers import DataCollatorWithFlattening

    ragged, collator = text(folder, layout="ragged"), DataCollatorWithFlattening()
    return hf_trainer(folder, train_dataset=ragged, data_collator=collator)


def hf_trainer_with_all_labels(folder: Path) -> Pair:
    """Fixed rows whose first labels stand, so that a sequence's last token predicts the next's."""
    return hf_trainer(folder, train_dataset=text(folder / "all labels", mask_first_label=False))


def sft_trainer_with_fixed_rows(folder: Path) -> Pair:
    """Fixed rows in TRL's SFTTrainer, which leaves their position_ids out."""
    return sft_trainer(folder, train_dataset=text(folder / "rows"), padding_free=False)


def tokenizer() -> Any:
    """A tokenizer of numbers, which a trainer asks for padding alone."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0"))
    names = dict.fromkeys(["pad_token", "eos_token", "unk_token"], "0")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def sft_trainer(
    folder: Path,
    *,
    micro_batches: int = 3,
    checked: bool = True,
    train_dataset: Dataset | None = None,
    **options: Any,
) -> Pair:
    """Ragged rows in TRL's SFTTrainer, whose config `to_trl` looks at if it is to be checked."""
    from trl import SFTConfig, SFTTrainer

    packed, fixed = text(folder, layout="ragged", mask_first_label=False), text(folder)
    sizes = of_all_rows(packed, micro_batches)
    options = {"padding_free": True, "max_length": None, **options}
    config = arguments(SFTConfig, folder, bf16=False, **sizes, **options)

    def train(model: nn.Module) -> float:
        rows = train_dataset or to_trl(packed, config if checked else None)
        return logged_loss(
            SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer())
        )

    return trained(fixed, train)


def lightning(folder: Path, *, micro_batches: int = 4) -> Pair:
    """Lightning divides the loss of a micro-batch by their number, and so is the count."""
    import pytorch_lightning

    packed = text(folder)
    count = (one_batch(packed).tokens["labels"] != NO_LABEL).sum() / micro_batches
    losses = []

    class Module(pytorch_lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: TokenBatch, _: int) -> Tensor:
            loss = self.model(**to_transformers(batch), num_items_in_batch=count).loss
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1.0)

    def train(model: nn.Module) -> float:
        trainer = pytorch_lightning.Trainer(
            max_epochs=1,
            accumulate_grad_batches=micro_batches,
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Module(model.train()), loader_of(packed, micro_batches))
        assert (trainer.global_step, len(losses)) == (1, micro_batches)
        return sum(losses) / micro_batches

    return trained(packed, train)


def loader_of(packed: Dataset, micro_batches: int, **options: Any) -> PackedLoader:
    size = -(-len(packed) // micro_batches)
    return PackedLoader(packed, size, tail="pad", **options)


def with_accelerate(folder: Path, *, micro_batches: int = 4) -> Pair:
    """Accelerate divides the loss of a micro-batch by their number, and so is the count."""
    from accelerate import Accelerator

    packed = text(folder)

    def train(model: nn.Module) -> float:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        loader = loader_of(packed, micro_batches)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        batches = [to_transformers(batch) for batch in loader]
        count = global_count(*(batch["labels"] != NO_LABEL for batch in batches)) / micro_batches
        total = 0.0
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch, num_items_in_batch=count).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item() / micro_batches
        return total

    return trained(packed, train)


def one_rank_of_ddp(folder: Path, *, micro_batches: int = 4) -> None:
    """Take the step as one of some ranks, whose rows lie in the folder, and write what came of it.

    The count is that of all micro-batches of all ranks, ÷ ranks.
    """
    rank, ranks = rank_of_world()
    packed = Dataset.load_from_disk(folder / "fixed")
    own = llama()
    model = DistributedDataParallel(own)
    loader = loader_of(packed, ranks * micro_batches)
    batches = [to_transformers(batch) for batch in loader]
    count = global_count(*(batch["labels"] != NO_LABEL for batch in batches))
    total = 0.0
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with nullcontext() if last else model.no_sync():
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
        total += loss.item()
    gradients = {name: weight.grad for name, weight in own.named_parameters()}
    torch.save((len(batches), total, gradients), folder / f"ddp-{rank}.pt")


def ddp(folder: Path, run: Callable[..., None], micro_batches: int = 4) -> Pair:
    """What `one_rank_of_ddp` wrote, once run has run it on two ranks.

    Args:
        folder: an empty folder.
        run: given the folder with rows in it, runs both ranks.
        micro_batches: that each rank takes.
    """
    packed = text(folder)
    run(folder)
    ranks = [torch.load(folder / f"ddp-{rank}.pt") for rank in range(2)]
    assert [number for number, _, _ in ranks] == [micro_batches] * 2
    (_, first, gradients), (_, second, others) = ranks
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    return Pair(Step((first + second) / 2, gradients), alone(llama(), [one_batch(packed)]))


if __name__ == "__main__":
    with one_of_two_ranks():
        one_rank_of_ddp(Path(sys.argv[1]))
