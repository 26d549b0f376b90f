"""What trains on packed rows: the loss of its first step, and that of the sequences one at a time.

    pip install -e '.[test]'
    python benchmarks/consumers.py

Forty random sequences in 23 rows, tiny random models in float64 on a CPU. Trainers take the rows in
several micro-batches. A second table has the ways that mix sequences. Writes consumers.md; fails
if the losses of a pair differ in five decimals, or if they do not where sequences are mixed.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

sys.path[:0] = [f"{Path(__file__).parent.parent / 'tests'}"]
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")  # the frameworks' own

import consumers  # noqa: E402
import datasets  # noqa: E402
from consumers import Pair  # noqa: E402
from two_ranks import run_on_two_ranks  # noqa: E402

RESULTS = Path(__file__).parent / "results"
HEAD = "| consumer | call | loss packed | loss alone |\n| --- | --- | ---: | ---: |"
Row = tuple[str, str, Callable[[Path], Pair]]


def models() -> Iterator[Row]:
    """Yield every model with each of its kinds of attention."""
    for made_by in consumers.DECODERS:
        for kind in consumers.IMPLEMENTATIONS:
            run = functools.partial(consumers.without_padding, made_by, kind)
            yield f"{title(made_by)}, {kind}", "`model(**to_transformers(batch))`", run
    for made_by in (*consumers.DECODERS, *consumers.ENCODERS):
        for kind in consumers.IMPLEMENTATIONS:
            run = functools.partial(consumers.with_a_mask, made_by, kind)
            yield f"{title(made_by)}, {kind}", "`model(..., to_attention_mask(batch))`", run


def title(made_by: Callable[..., object]) -> str:
    """Return the name of a model."""
    return {"llama": "Llama", "qwen": "Qwen3", "bert": "BERT", "xlm_roberta": "XLM-R"}[
        made_by.__name__
    ]


def under_ddp(folder: Path) -> Pair:
    """Train on two ranks."""
    return consumers.ddp(folder, functools.partial(run_on_two_ranks, consumers.__file__))


EQUAL: list[Row] = [
    ("transformers Trainer", "`Trainer(model, args, train_dataset=packed)`", consumers.hf_trainer),
    (
        "TRL SFTTrainer",
        "`SFTTrainer(model, config, train_dataset=to_trl(ragged, config))`",
        consumers.sft_trainer,
    ),
    ("Lightning", "`Trainer().fit(module, PackedLoader(packed, 6))`", consumers.lightning),
    ("accelerate", "`prepare(model, optimizer, loader)`", consumers.with_accelerate),
    (
        "DDP, two ranks",
        "`model(**to_transformers(batch), num_items_in_batch=global_count(...))`",
        under_ddp,
    ),
    *models(),
]
MIXED: list[Row] = [
    (
        "TRL SFTTrainer",
        "`SFTTrainer(..., train_dataset=packed)`, fixed rows: it drops their `position_ids`",
        consumers.sft_trainer_with_fixed_rows,
    ),
    (
        "transformers Trainer",
        "`Trainer(..., train_dataset=ragged, data_collator=DataCollatorWithFlattening())`",
        consumers.flattened,
    ),
    (
        "transformers Trainer",
        "`Trainer(..., train_dataset=packed)`, rows without `mask_first_label=True`",
        consumers.hf_trainer_with_all_labels,
    ),
    (
        "TRL SFTTrainer",
        "`SFTConfig(padding_free=False)`, the default; `to_trl(ragged, config)` refuses it",
        functools.partial(consumers.sft_trainer, checked=False, padding_free=False),
    ),
    (
        "TRL SFTTrainer",
        "`SFTConfig(packing=True)`; `to_trl(ragged, config)` refuses it",
        functools.partial(
            consumers.sft_trainer, checked=False, packing=True, max_length=consumers.SEQ_LEN
        ),
    ),
]


def main() -> None:
    """Print both tables, write them, and fail if a pair is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--machine", default="CPU", help="as the results should name it")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    for name in ("pytorch_lightning.utilities.rank_zero", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    (equal, differ), (mixed, same) = printed(EQUAL, equal=True), printed(MIXED, equal=False)
    names = ("torch", "transformers", "trl", "accelerate", "pytorch-lightning")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    python = ".".join(map(str, sys.version_info[:3]))
    text = (
        "# What trains on packed rows\n\n"
        f"{datetime.date.today()}, {options.machine}, CPython {python}, {versions}.\n\n"
        f"{NOTES}\n{equal}\n\n{CONTROLS}\n{mixed}\n"
    )
    options.results.mkdir(exist_ok=True, parents=True)
    (options.results / "consumers.md").write_text(text)
    if differ or same:
        raise SystemExit(f"these differ: {differ}; these do not: {same}")


def printed(rows: list[Row], *, equal: bool) -> tuple[str, list[str]]:
    """Print a table, and return it with the consumers whose losses are not as equal as they should.

    Args:
        rows: of the table.
        equal: whether losses should be equal to five decimals.
    """
    lines, wrong = [HEAD], []
    print(HEAD)
    for consumer, call, run in rows:
        with tempfile.TemporaryDirectory() as folder:
            losses = [f"{step.loss:.5f}" for step in run(Path(folder))]
        lines.append(f"| {consumer} | {call} | {losses[0]} | {losses[1]} |")
        print(lines[-1], flush=True)
        if (losses[0] == losses[1]) != equal:
            wrong.append(consumer)
    print()
    return "\n".join(lines), wrong


NOTES = """\
Each line is a model or a trainer that is given packed rows, and the call that gives them to it: the
loss is that of the sequences one at a time, to five decimals. How each is set up is in
`docs/pages/training_frameworks.md`. `to_transformers` and `to_attention_mask` are functions of
`packpipe.loading.exports`.

`python benchmarks/consumers.py` prints both tables in 2 to 3 minutes on 2 cores, and writes them
into this page (`--results FOLDER` writes elsewhere). It packs 40 random sequences of 2 to 16 tokens
into 23 rows of 16, for tiny random models in float64, which compute their losses in float32. The
loss is the mean over all labels; "alone" is the same model, given one sequence at a time. Trainers
take one step on a Llama, in 3 or 4 micro-batches, DDP in 4 on each rank. Their gradients, too, are
those of the sequences alone, to 1e-6 of the largest gradient of each weight
(`tests/loading/test_consumers.py`, `tests/loading/test_frameworks.py`). FlexAttention is called
without its compiler.
"""

CONTROLS = """\
## Ways that mix sequences

Each of these calls looks right, and ends without an error. But the losses differ, because
sequences that share a row see each other, or predict each other's first tokens:
"""

if __name__ == "__main__":
    main()
