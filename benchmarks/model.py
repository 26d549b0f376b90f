"""The model on a CPU: training steps and inference, beside the peers, at equal trunk and images.

    pip install -e '.[torch]' timm vit-pytorch
    python benchmarks/model.py

ViT-Ti/16 in float32, images of real pictures' sizes, r ~ U(64, 224), packed into rows of 1024 and
of 2048 tokens. *Limit* is the same trunk with one SDPA call a segment and no padding anywhere. All
arms take turns. Figures are of processor time, which other work on the machine moves less than
seconds: medians of the rounds, and of the ratios to the limit in the same round, with their range.
Peers that are not installed are left out; so is bfloat16 where the CPU has no instructions for it.
Writes model.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import arms
import torch
from arms import Arm, Step
from torch import Tensor

from packpipe.model.config import NaViTConfig
from packpipe.model.navit import NaViT
from packpipe.model.precision import has_instructions

RESULTS = Path(__file__).parent / "results"
SEQ_LENS = (1024, 2048)
PEERS = {"lucidrains": "vit_pytorch", "timm": "timm"}
HALF = "packed, segments, bf16 autocast"
SIDE = 256


def main() -> None:
    """Measure, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=4096, help="a step, about")
    parser.add_argument("--steps", type=int, default=1, help="batches of an arm, each round")
    parser.add_argument("--seq-lens", type=int, nargs="+", default=SEQ_LENS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = NaViTConfig.preset("Ti/16", num_classes=arms.NUM_CLASSES, max_side=SIDE)
    text = heading(options) + "\n"
    for seq_len in options.seq_lens:
        chosen = [
            arm
            for arm in arms_of(config, seq_len, options.tokens // seq_len, options.steps)
            if all(find_spec(module) for name, module in PEERS.items() if arm.name.startswith(name))
            and (arm.name != HALF or has_instructions())
        ]
        for training in (True, False):
            figures = measured(chosen, options.rounds, training)
            text += f"\n{table(figures, seq_len, training)}"
    print(text)
    options.results.mkdir(exist_ok=True, parents=True)
    (options.results / "model.md").write_text(text)


def arms_of(config: NaViTConfig, seq_len: int, rows: int, steps: int) -> list[Arm]:
    """Return the arms, the limit first."""
    images = arms.drawn_images(1500, seq_len, (64, 224))
    longest, mean = int(images.lens.max()), float(images.lens.mean())
    padded_rows = round(rows * seq_len / mean)
    most = max(len(pack) for pack in images.packs)

    def model(attention: str) -> NaViT:
        torch.manual_seed(0)
        return NaViT(NaViTConfig(**{**vars(config), "attention": attention}))

    def packed() -> list[Step]:
        return list(arms.packed_steps(images, rows, steps, most))

    def padded() -> list[Step]:
        return list(arms.padded_steps(images, padded_rows, steps))

    def bucketed() -> list[Step]:
        return list(arms.bucketed_steps(images, padded_rows * longest // 2, 1))

    def timm_steps(found: list[Step]) -> list[Step]:
        return [arms.timm_step(step) for step in found]

    return [
        Arm("limit: one SDPA call a segment", lambda: model("segments"), arms.limit, packed),
        Arm("packed, segments", lambda: model("segments"), arms.ours, packed),
        Arm(HALF, lambda: model("segments"), in_half, packed),
        Arm("packed, dense mask", lambda: model("reference"), arms.ours, packed),
        Arm("bucketed", lambda: model("reference"), arms.ours, bucketed),
        Arm("padded", lambda: model("reference"), arms.ours, padded),
        Arm(
            "lucidrains na_vit",
            lambda: arms.lucidrains_model(config, SIDE),
            arms.lucidrains,
            lambda: [arms.lucidrains_step(step) for step in packed()],
        ),
        Arm(
            "timm NaFlexViT, padded",
            lambda: arms.timm_model(config, 16),
            arms.timm,
            lambda: timm_steps(padded()),
        ),
        Arm(
            "timm NaFlexViT, bucketed",
            lambda: arms.timm_model(config, 16),
            arms.timm,
            lambda: timm_steps(bucketed()),
        ),
    ]


def in_half(model: NaViT, step: Step) -> Tensor:
    """Return the loss under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return arms.ours(model, step)


@dataclass(frozen=True)
class Figure:
    """What an arm does.

    Attributes:
        rate: real tokens a second of a processor.
        ratios: of the limit's rate, in each round.
        real: share of real tokens.
    """

    rate: float
    ratios: list[float]
    real: float


def measured(chosen: list[Arm], rounds: int, training: bool) -> dict[str, Figure]:
    """Return the figures of each arm, the limit first; all take turns."""
    prepared = []
    for arm in chosen:
        model = arm.make().train(training)
        prepared.append(
            (arm, model, arm.steps(), torch.optim.AdamW(model.parameters(), fused=True))
        )
    times: dict[str, list[float]] = {arm.name: [] for arm in chosen}
    for _ in range(rounds + 1):
        for arm, model, steps, optimizer in prepared:
            began = time.process_time()
            for step in steps:
                if training:
                    arm.loss(model, step).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                else:
                    with torch.inference_mode():
                        arm.loss(model, step)
            times[arm.name].append(time.process_time() - began)
    figures: dict[str, Figure] = {}
    limit: list[float] = []
    for arm, _, steps, _ in prepared:
        tokens = sum(step.tokens for step in steps)
        rates = [tokens / seconds for seconds in times[arm.name][1:]]  # the first warms up
        limit = limit or rates
        figures[arm.name] = Figure(
            statistics.median(rates),
            [rate / best for rate, best in zip(rates, limit, strict=True)],
            tokens / sum(step.slots for step in steps),
        )
    return figures


def table(figures: dict[str, Figure], seq_len: int, training: bool) -> str:
    """Return a Markdown table."""
    title = f"{'training step' if training else 'inference'}, rows of {seq_len}"
    head = "tokens/s of a processor | of the limit | range | real tokens"
    lines = [f"| {title} | {head} |", "| --- " + "| ---: " * 4 + "|"]
    for name, one in figures.items():
        lines.append(
            f"| {name} | {one.rate:,.0f} | {statistics.median(one.ratios):.2f} "
            f"| {min(one.ratios):.2f} to {max(one.ratios):.2f} | {one.real:.1%} |"
        )
    return "\n".join(lines) + "\n"


def heading(options: argparse.Namespace) -> str:
    """Return what ran where."""
    versions = ", ".join(
        f"{name} {version(name)}" if find_spec(module) else f"no {name}"
        for name, module in (("timm", "timm"), ("vit-pytorch", "vit_pytorch"))
    )
    half = "" if has_instructions() else " The CPU has no instructions for bfloat16."
    return (
        f"# The model on a CPU\n\n`python benchmarks/model.py`, {datetime.date.today()}: "
        f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.0f}, torch {torch.__version__}, {versions}. ViT-Ti/16, float32, "
        f"about {options.tokens} real tokens a step; {options.rounds} rounds.{half}\n"
    )


if __name__ == "__main__":
    main()
