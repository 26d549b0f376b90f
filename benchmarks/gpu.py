"""Training on a GPU: packed, padded and bucketed, and the peers, at equal trunk and images.

    pip install -e '.[torch]' timm vit-pytorch
    python benchmarks/gpu.py                    # one GPU, under 8 minutes, no network
    python benchmarks/gpu.py --device cpu --tiny  # walks every path; its figures mean nothing

bf16 autocast, float32 weights, fused AdamW, every model compiled by its parts (peers by their
blocks where they can be). Images are those of real pictures, drawn in NaViT's way. Useful MFU
counts real tokens alone, attention as Σ l², against the card's measured matrix rate. What does
not fit the time is left out and said so. Writes benchmarks/results/gpu.md and gpu.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import arms
import numpy as np
import pyarrow as pa
import torch
from arms import Arm, Images, Step
from torch import nn

from packpipe import PackConfig, PackedLoader
from packpipe.model.attention import backends_of
from packpipe.model.config import NaViTConfig
from packpipe.model.flops import TRAINING, matrix_rate
from packpipe.model.navit import NaViT, compile_parts
from packpipe.rows import schema
from packpipe.rows.files import write_table
from packpipe.rows.rows import Rows
from packpipe.rows.to_arrow import rows_table

RESULTS = Path(__file__).parent / "results"
# Sides in pixels that images are drawn from: NaViT's, and larger ones for longer rows.
SIDES = {1024: (64, 256), 4096: (64, 1024)}
# Real tokens of a step, about as many as memory allows the padded arms.
TOKENS = {"S": 65_536, "B": 32_768, "L": 16_384}
ORDER = [("B", 1024), ("L", 1024), ("S", 1024), ("B", 4096), ("L", 4096), ("S", 4096)]
BATCHES = 4
PASS = 32  # batches of a pass of the loader
SIDE = 1024


def main() -> None:
    """Measure what the time allows, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does every path run?")
    parser.add_argument("--seconds", type=float, default=450, help="stop after about that")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of an arm")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--arms", default="", help="comma separated; all of them if empty")
    options = parser.parse_args()
    started = time.perf_counter()
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    rate = matrix_rate(device, torch.bfloat16) if device.type == "cuda" else float("nan")
    records: list[dict[str, Any]] = []
    heading = describe(device, rate)
    print(heading, flush=True)
    for size, seq_len in ORDER:
        images, config, tokens = setting(size, seq_len, options.tiny)
        chosen = [
            arm
            for arm in arms_of(config, images, tokens, device)
            if not options.arms or arm.name in options.arms.split(",")
        ]
        for arm in chosen:
            place = {"model": size, "seq_len": images.seq_len, "arm": arm.name}
            if time.perf_counter() - started > options.seconds:
                records.append({**place, "left out": "no time"})
                continue
            try:
                figures = measure(arm, config, device, options.steps, rate)
            except Exception as error:  # noqa: BLE001 (a peer that fails is a result too)
                traceback.print_exc(limit=3, file=sys.stderr)
                figures = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            records.append({**place, **figures})
            print(records[-1], flush=True)
            write(options.results, heading, records, time.perf_counter() - started)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    write(options.results, heading, records, time.perf_counter() - started)
    print((options.results / "gpu.md").read_text())


def write(folder: Path, heading: str, records: list[dict[str, Any]], seconds: float) -> None:
    """Write what has been measured so far."""
    folder.mkdir(exist_ok=True, parents=True)
    text = f"{heading}\n{table(records)}\nAll of it took {seconds:.0f} s.\n"
    (folder / "gpu.md").write_text(text)
    (folder / "gpu.json").write_text(json.dumps(records, indent=1) + "\n")


def setting(size: str, seq_len: int, tiny: bool) -> tuple[Images, NaViTConfig, int]:
    """Return the images, the model's shape and the real tokens of a step."""
    tokens = TOKENS[size]
    shape: dict[str, Any] = {"num_classes": arms.NUM_CLASSES, "max_side": SIDE}
    config = NaViTConfig.preset(f"{size}/16", **shape)
    sides = SIDES[seq_len]
    if tiny:
        config = NaViTConfig(dim=32, depth=2, heads=2, **shape)
        seq_len, sides, tokens = seq_len // 16, (16, sides[1] // 4), 512
    num_images = 40 if tiny else 6000 if seq_len == 1024 else 1500
    return arms.drawn_images(max(num_images, 300), seq_len, sides), config, tokens


def arms_of(config: NaViTConfig, images: Images, tokens: int, device: torch.device) -> list[Arm]:
    """Return the arms, the most telling first."""
    rows = max(1, tokens // images.seq_len)
    longest, mean = int(images.lens.max()), float(images.lens.mean())
    padded_rows = max(1, round(rows * images.seq_len / mean))
    most = max(len(pack) for pack in images.packs)
    autocast = torch.bfloat16 if device.type == "cuda" else torch.float32

    def model(attention: str) -> nn.Module:
        shape = {**vars(config), "attention": attention}
        return compile_parts(NaViT(NaViTConfig(**shape)), **compile_options(device))

    def packed() -> list[Step]:
        return list(arms.packed_steps(images, rows, BATCHES, most))

    def padded() -> list[Step]:
        return list(arms.padded_steps(images, padded_rows, BATCHES))

    def bucketed() -> list[Step]:
        return list(arms.bucketed_steps(images, padded_rows * longest // 2, 2))

    def peer(made: nn.Module) -> nn.Module:
        for block in getattr(made, "blocks", ()):
            block.compile(**compile_options(device))
        return made

    attention = {"packed, varlen": "varlen", "packed, flex": "flex", "packed, dense": "reference"}
    runs = backends_of(device, autocast)
    ours = [
        Arm(name, lambda backend=backend: model(backend), arms.ours, packed)
        for name, backend in attention.items()
        if backend in runs or device.type == "cuda"
    ]
    return [
        ours[0],
        Arm("padded", lambda: model("reference"), arms.ours, padded),
        *ours[1:],
        Arm(
            "lucidrains na_vit",
            lambda: arms.lucidrains_model(config, SIDE),
            arms.lucidrains,
            lambda: [arms.lucidrains_step(step) for step in packed()],
        ),
        Arm(
            "timm NaFlexViT, padded",
            lambda: peer(arms.timm_model(config, 16)),
            arms.timm,
            lambda: [arms.timm_step(step) for step in padded()],
        ),
        Arm("bucketed", lambda: model("reference"), arms.ours, bucketed),
    ]


def compile_options(device: torch.device) -> dict[str, Any]:
    """Return options of torch.compile: on a CPU the graphs are made but not lowered."""
    return {} if device.type == "cuda" else {"backend": "eager"}


def measure(
    arm: Arm, config: NaViTConfig, device: torch.device, steps: int, rate: float
) -> dict[str, Any]:
    """Return the figures of training steps of an arm."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    batches = [arms.moved(step, device) for step in arm.steps()]
    model = arm.make().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    cuda = device.type == "cuda"

    def step(batch: Step) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = arm.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    for batch in batches:  # every shape is compiled
        loss = step(batch)
    synchronize(device)
    compiling = time.perf_counter() - began
    times = []
    rounds = max(2, steps // len(batches))
    for _ in range(rounds):
        began = time.perf_counter()
        for batch in batches:
            loss = step(batch)
        synchronize(device)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    flops = TRAINING * arms.useful_flops(config, batches)
    real = sum(batch.tokens for batch in batches)
    figures = {
        "images/s": sum(batch.images for batch in batches) / seconds,
        "tokens/s": real / seconds,
        "real tokens": real / sum(batch.slots for batch in batches),
        "ms a step": 1e3 * seconds / len(batches),
        "useful MFU": flops / seconds / rate,
        "peak GB": torch.cuda.max_memory_allocated(device) / 1e9 if cuda else float("nan"),
        "s to start": compiling,
        "loss": loss.item(),
    }
    if arm.name == "packed, varlen" or (not cuda and arm.name == "packed, dense"):
        figures["data wait"] = data_wait(batches, step, device)
    return figures


def data_wait(batches: list[Step], step: Any, device: torch.device) -> float:
    """Return the share of time that a step waits for the real loader: rows mapped from disk."""
    first = batches[0].inputs
    rows, seq_len = first.segment_ids.shape
    with tempfile.TemporaryDirectory() as folder:
        table = stored(batches, seq_len, Path(folder) / "rows.arrow")
        # The same rows again and again: they lie on the disk once.
        table = pa.concat_tables([table] * -(-PASS // len(batches)))
        loader = PackedLoader(
            table,
            rows,
            rank=0,
            world_size=1,
            num_workers=4,
            pin_memory=True,
            max_segments=first.seq_lens.shape[1],
        )
        waited = 0.0
        synchronize(device)
        began = time.perf_counter()
        passes = loader.passes()
        for _ in range(2 * len(loader)):
            asked = time.perf_counter()
            batch, _ = next(passes)
            waited += time.perf_counter() - asked
            on_device = batch.to(device, non_blocking=True)
            loss = step(Step(on_device, on_device.labels, batch.seq_lens, 0))
        loss.item()
        passes.close()
        return waited / (time.perf_counter() - began)


def stored(batches: list[Step], seq_len: int, path: Path) -> pa.Table:
    """Return the batches as a packed table, mapped from a file."""
    config = PackConfig(seq_len=seq_len, patch_size=arms.PATCH)
    columns = schema.row_schema(config, pa.int64())

    def tables() -> Any:
        for step in batches:
            batch = step.inputs.to("cpu")
            there = batch.present
            segments = {
                "seq_lens": batch.seq_lens[there].numpy(),
                "grid_hw": batch.grid_hw[there].numpy(),
                "image_hw": batch.grid_hw[there].int().numpy() * arms.PATCH,
                "example_index": batch.example_index[there].numpy(),
                "labels": pa.array(batch.labels[there].numpy()),
            }
            tokens = {
                "patches": batch.patches.numpy(),
                "segment_ids": batch.segment_ids.numpy(),
                "coords": batch.coords.numpy(),
            }
            offsets = np.concatenate([[0], there.sum(1).cumsum(0).numpy()])
            yield rows_table(Rows(offsets, segments, tokens), columns)

    write_table(path, columns, tables())
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    columns = "images/s | of padded | tokens/s | real tokens | useful MFU | peak GB | data wait"
    lines = [f"| model, seq_len | arm | {columns} |", "| --- | --- " + "| ---: " * 7 + "|"]
    padded = {
        (record["model"], record["seq_len"]): record["tokens/s"]
        for record in records
        if record["arm"] == "padded" and "images/s" in record
    }
    for record in records:
        key = record["model"], record["seq_len"]
        name = f"| {record['model']}/16, {record['seq_len']} | {record['arm']} |"
        if "failed" in record:
            lines.append(f"{name} failed: {record['failed']} |" + " |" * 6)
        if "images/s" not in record:
            continue
        ratio = record["tokens/s"] / padded[key] if key in padded else float("nan")
        cells = [
            f"{record['images/s']:,.0f}",
            f"{ratio:.2f}",
            f"{record['tokens/s']:,.0f}",
            f"{record['real tokens']:.1%}",
            f"{record['useful MFU']:.3f}",
            f"{record['peak GB']:.1f}",
            f"{record['data wait']:.1%}" if "data wait" in record else "",
        ]
        lines.append(f"{name} " + " | ".join(cells) + " |")
    missing = sorted({f"{r['model']}/16, {r['seq_len']}" for r in records if "left out" in r})
    if missing:
        lines += ["", f"No time was left for all arms of {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def describe(device: torch.device, rate: float) -> str:
    """Return what ran where."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or "CPU"
    versions = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    for package in ("timm", "vit-pytorch"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    measured = f" Matrix products of 8192³ in bf16: {rate / 1e12:.0f} TFLOP/s." if cuda else ""
    return (
        f"# Training on one GPU\n\n`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`, "
        f"{datetime.date.today()}: {name}, {', '.join(versions)}.{measured}\n"
    )


if __name__ == "__main__":
    main()
