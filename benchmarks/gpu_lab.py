"""Where a NaViT step on a card can be cut: every lead measured in one run of some 7 minutes.

    pip install -e '.[torch]'
    python benchmarks/gpu_lab.py --out benchmarks/results
    python benchmarks/gpu_lab.py --device cpu --tiny   # walks what a CPU can; figures mean nothing

Parts, the most telling first: ``ceilings`` (the card's matrix and copy rates, the rates of the
models' own shapes), ``attention`` (each kernel against float32, forward and backward), ``norms``,
``loader`` (rows a second, by threads), ``train`` (a step at Ti, S, B and L: as it is, and with each
change), ``whole``, ``clip``, ``autotune``. Each is tried by itself, for a time of its own, and none
beyond ``--seconds``; what fails or takes longer is said, and the next goes on. Writes one JSON
object a line to gpu_lab.jsonl, heading first, and what is measured beside what was expected of an
H100 to gpu_lab.md.

Changes of a training step:

* ``bound``: the attention kernel is told the longest segment, not the row's length;
* ``bf16``: the residual stream stays in bf16 under autocast, as the model has it; without, float32;
* ``own``: attention and query-key normalisation by ``attention="fused"``;
* a graph: the whole step captured once and replayed (`packpipe.training.captured`).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import platform
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import arms
import feeding
import gpu
import pyarrow as pa
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn import functional as F

from packpipe.loading.batch import PackedBatch
from packpipe.model import attention, navit
from packpipe.model.attention import FlatTokens
from packpipe.model.config import NaViTConfig
from packpipe.model.flops import TRAINING, matrix_rate
from packpipe.training.captured import EAGER, CapturedStep
from packpipe.training.losses import segment_cross_entropy

HALF = torch.bfloat16
MULTIPLE = 128  # the flash kernel's block: bounds are rounded up to it
# Seconds that a part may take, one step of those that train; all that begins ends by --seconds.
PARTS = {
    "ceilings": 20,
    "attention": 75,
    "norms": 20,
    "loader": 30,
    "train": 40,
    "whole": 60,
    "clip": 40,
    "autotune": 90,
}
# Shapes of each model's matrix products: tokens of a step, channels.
MATRICES = (("Ti", 65536, 192), ("S", 65536, 384), ("B", 32768, 768), ("L", 16384, 1024))


@dataclass(frozen=True)
class Trained:
    """A training step to be timed: which model, how many rows, what is changed, how it is run."""

    size: str
    rows: int
    changes: tuple[str, ...] = ()
    graph: bool = False
    mode: str | None = None
    whole: bool = False
    clip: bool = False
    profile: bool = False


NOW, BOUND, STREAM, OWN = (), ("bound",), ("bound", "bf16"), ("bf16", "own")
STEPS = [  # the most telling first
    Trained("B", 32, NOW),
    Trained("B", 32, BOUND),
    Trained("B", 32, BOUND, graph=True),
    Trained("B", 32, STREAM, graph=True),
    Trained("B", 32, OWN, graph=True, profile=True),
    Trained("B", 32, OWN),
    Trained("S", 64, NOW),
    Trained("S", 64, STREAM, graph=True),
    Trained("S", 64, OWN, graph=True, profile=True),
    Trained("L", 16, NOW),
    Trained("L", 16, OWN, graph=True),
    Trained("L", 32, OWN, graph=True),
    Trained("Ti", 64, NOW),
    Trained("Ti", 64, OWN, graph=True),
    Trained("Ti", 64, STREAM, graph=True),
    Trained("Ti", 128, OWN, graph=True),
    Trained("B", 64, OWN, graph=True),
    Trained("S", 128, OWN, graph=True),
    Trained("L", 16, STREAM, graph=True),
]
AUTOTUNE = "max-autotune-no-cudagraphs"
MORE = {
    "whole": [
        Trained("B", 32, OWN, graph=True, whole=True),
        Trained("S", 64, OWN, graph=True, whole=True),
    ],
    "clip": [Trained("B", 32, OWN, graph=True, clip=True)],
    "autotune": [
        Trained("B", 32, OWN, graph=True, mode=AUTOTUNE, profile=True),
        Trained("S", 64, OWN, graph=True, mode=AUTOTUNE),
        Trained("Ti", 64, OWN, graph=True, mode=AUTOTUNE),
        Trained("L", 16, OWN, graph=True, mode=AUTOTUNE),
    ],
}
# What accounts of bytes and launches say of an H100: milliseconds a step and useful MFU of 797
# TFLOP/s. None was measured there before; the step as it was, first, was.
HEADS = ("as it was", "bound, bf16 stream, graph", "own kernel, graph", "own kernel, autotuned")
EXPECTED = {
    ("B", 32): ((55.4, 0.395), (44.5, 0.49), (38.4, 0.57), (36.5, 0.60)),
    ("L", 16): ((85.7, 0.446), (70.5, 0.54), (62.0, 0.615), (58.0, 0.66)),
    ("S", 64): ((45.3, 0.251), (34.0, 0.335), (26.7, 0.425), (24.7, 0.46)),
    ("Ti", 64): ((None, 0.035), (16.5, 0.185), (13.1, 0.235), (12.1, 0.25)),
}
# Of the own kernel, forward and backward of a layer of B. Below, it replaces the others.
WANTED_MS, SUFFICIENT_MS = 0.55, 0.8


@dataclass
class Lab:
    """What a run has to go by, and what it has found."""

    device: torch.device
    tiny: bool
    seconds: float
    path: Path
    rate: float = 1.0  # of matrix products, FLOP/s
    began: float = field(default_factory=time.perf_counter)
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether there is a card."""
        return self.device.type == "cuda"

    def say(self, **record: Any) -> None:
        """Keep a record: in the file at once, since the next part may end the process."""
        self.records.append(record)
        line = json.dumps(record)
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def attempt(self, part: str, run: Callable[[], None]) -> None:
        """Run a part if there is time for it; say so if there is not, or if it fails.

        What is no part of `PARTS` is a piece of one, and shares its time.
        """
        left = self.seconds - (time.perf_counter() - self.began)
        if left <= 0:
            self.say(part=part, left_out="no time")
            return
        try:
            with at_most(min(left, PARTS[part])) if self.is_timed(part) else nullcontext():
                run()
        except Exception as error:
            traceback.print_exc(limit=4)
            self.say(part=part, failed=f"{type(error).__name__}: {str(error)[:300]}")
            if isinstance(error, TimeoutError) and part not in PARTS:
                raise  # the time was that of the part
        with suppress(RuntimeError):  # of a card that the part has left in disorder
            torch._dynamo.reset()
            gc.collect()  # compiled models are cycles, and hold their memory
            if self.on_gpu:
                torch.cuda.empty_cache()

    def is_timed(self, part: str) -> bool:
        """Return whether a part has a time of its own; small shapes show paths, not times."""
        return part in PARTS and not self.tiny

    def wait(self) -> None:
        """Wait until the card has done what it was asked."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def time_of(self, call: Callable[[], Any], repeats: int = 20) -> float:
        """Return the median milliseconds of a call on the card; of one call on a CPU."""
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - began)
        for _ in range(3):
            call()
        times = []
        for _ in range(repeats):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            call()
            after.record()
            torch.cuda.synchronize()
            times.append(before.elapsed_time(after))
        return statistics.median(times)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer, again and again if it is caught within."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def images_of(rows: int, tiny: bool) -> arms.Images:
    """Return images enough for four batches of so many rows; planned once a number of rows."""
    if tiny:
        return arms.drawn_images(rows * 40, 256, (64, 128))
    return arms.drawn_images(max(6000, rows * 40), 1024, (64, 256))


def main() -> None:
    """Run the parts that are asked for, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does every path run?")
    parser.add_argument("--seconds", type=float, default=400, help="what goes on then is ended")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma separated")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only names {sorted(unknown)}, expected some of {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu_lab.jsonl"
    path.unlink(missing_ok=True)
    lab = Lab(torch.device(options.device), options.tiny, options.seconds, path)
    torch.set_float32_matmul_precision("high")
    lab.rate = matrix_rate(lab.device, HALF, size=256 if lab.tiny else None)
    lab.say(
        part="heading",
        date=f"{datetime.date.today()}",
        command=" ".join(sys.argv),
        machine=machine_of(lab.device),
    )
    alone = {"ceilings": ceilings, "attention": attentions, "norms": norms, "loader": loader}
    for part, run in alone.items():
        if part in chosen:
            # Compiled code may else give buffers away that timing a backward pass twice needs.
            with torch._functorch.config.patch(donated_buffer=False):
                lab.attempt(part, lambda run=run: run(lab))
    for part, steps in {"train": STEPS, **MORE}.items():
        for step in steps_here(lab, steps) if part in chosen else []:
            lab.attempt(part, lambda step=step, part=part: train(lab, part, step))
    print_table(lab)
    text = f"{heading(lab)}\n{expectations(lab.records)}"
    print(text)
    (options.out / "gpu_lab.md").write_text(text)


def steps_here(lab: Lab, steps: list[Trained]) -> list[Trained]:
    """Return the steps that the device can do: a CPU has no flash kernel and no Triton."""
    if lab.on_gpu:
        return steps
    plain = [
        replace(step, rows=2, changes=tuple(c for c in step.changes if c != "own"))
        for step in steps
    ]
    return list({(step.changes, step.clip, step.whole, step.mode): step for step in plain}.values())


def machine_of(device: torch.device) -> str:
    """Return what this runs on, and with which versions."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found = [f"{name} {version(name)}" for name in ("torch", "triton") if find_spec(name)]
    return ", ".join([card, *found, f"Python {platform.python_version()}"])


def ceilings(lab: Lab) -> None:
    """What the card can do at most: a large matrix product, a copy, the models' own products."""
    size = 2**20 if lab.tiny else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    copied = 2 * size / lab.time_of(lambda: target.copy_(source)) * 1e3
    lab.say(part="ceilings", tflops=lab.rate / 1e12, copy_tb_s=copied / 1e12)
    for name, tokens, dim in MATRICES:
        rates = {}
        t, c = (64, 32) if lab.tiny else (tokens, dim)
        for m, n, k in ((t, 3 * c, c), (t, c, c), (t, 4 * c, c), (t, c, 4 * c), (4 * c, c, t)):
            a, b = (torch.randn(s, device=lab.device).to(HALF) for s in ((m, k), (k, n)))
            took = lab.time_of(lambda a=a, b=b: a @ b, 10)
            rates[f"{m}x{n}x{k}"] = round(2 * m * n * k / took / 1e9)
        lab.say(part="matmuls", size=name, tflops=rates)


def attentions(lab: Lab) -> None:
    """Attention at B's shape, each kernel forward and backward, beside float32 as the truth."""
    rows, length, heads, head_dim = (2, 256, 2, 64) if lab.tiny else (32, 1024, 12, 64)
    images = images_of(rows, lab.tiny)
    most = max(map(len, images.packs))
    batch = next(arms.packed_steps(images, rows, 1, most)).inputs.to(lab.device)
    torch.manual_seed(0)
    qkv = torch.randn(rows * length, 3, heads, head_dim, device=lab.device).to(HALF)
    gains = [torch.rand(head_dim, device=lab.device) + 0.5 for _ in range(2)]
    real = (batch.segment_ids > 0).flatten()[:, None, None]
    dout = torch.randn(rows * length, heads, head_dim, device=lab.device).to(HALF) * real

    def normed(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unbind(1)
        q, k = (
            F.rms_norm(x.float(), (head_dim,), gain, 1e-6).to(qkv.dtype)
            for x, gain in zip((q, k), gains, strict=True)
        )
        return q, k, v

    wide = qkv.float().requires_grad_()
    torch.set_float32_matmul_precision("highest")
    truth = attention._masked(batch)(*normed(wide))
    (wide_grad,) = torch.autograd.grad(truth, wide, dout.float())
    torch.set_float32_matmul_precision("high")
    truth = truth.detach() * real

    def error(found: Tensor, wanted: Tensor) -> float:
        mask = real if found.ndim == 3 else real[..., None]
        return round(float((found.float() * mask - wanted).norm() / wanted.norm()), 5)

    def measure(name: str, attend: Callable[..., Tensor], *, normalises: bool = False) -> None:
        """Say how long a kernel takes and how far it is from the truth."""
        leaf = qkv.clone().requires_grad_()
        inputs = [leaf] if normalises else [x.detach().requires_grad_() for x in normed(qkv)]
        out = attend(*inputs)
        forward = lab.time_of(lambda: attend(*inputs))
        backward = lab.time_of(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True))
        seen = attend(leaf) if normalises else attend(*normed(leaf))
        (grad,) = torch.autograd.grad(seen, leaf, dout)
        lab.say(
            part="attention",
            name=name,
            forward_ms=round(forward, 4),
            backward_ms=round(backward, 4),
            out_error=error(out.detach(), truth),
            grad_error=error(grad, wide_grad),
        )

    measure("masked", attention._masked(batch))
    if not lab.on_gpu:
        return
    # cuDNN is left out: torch 2.11's varlen backward reads head_dim as max_seqlen (pytorch PR
    # 186142) and writes out of bounds, which would end this process.
    lens = segments_and_padding(batch)
    flat = lens.flatten()
    longest = bound_of(images)
    measure(f"flash, told {length} (now)", attention._varlen(flat, length))
    measure(f"flash, told {longest}", attention._varlen(cut_padding(lens, longest), longest))
    lab.attempt("flex", lambda: measure("flex (now)", attention._flex(batch)))
    lab.attempt("own", lambda: own_kernels(lab, measure, qkv, gains, lens))


def own_kernels(
    lab: Lab, measure: Callable[..., None], qkv: Tensor, gains: list[Tensor], lens: Tensor
) -> None:
    """Attention by `packpipe.model.fused`, in blocks of several sizes, each tried by itself."""
    from packpipe.model.fused import attend as fused

    for block in (64, 128):
        blocks = attention.blocks_of(lens[:, :-1], len(qkv) // len(lens), block)
        for shape in ((64, 4, 1), (64, 4, 2), (32, 4, 2), (64, 8, 1)):
            name = "own, {} x {}, {} warps, {} stages".format(block, *shape)

            def attend(
                x: Tensor, blocks: Tensor = blocks, how: Any = (block, block, *shape)
            ) -> Any:
                return fused(x, *gains, None, None, blocks, *how)[0]

            lab.attempt(
                "own", lambda name=name, attend=attend: measure(name, attend, normalises=True)
            )


def norms(lab: Lab) -> None:
    """What query-key normalisation costs by itself today; the own kernel has it within."""
    rows, dim, heads = (64, 64, 2) if lab.tiny else (32768, 768, 12)
    x = torch.randn(rows, 3 * dim, device=lab.device).to(HALF).requires_grad_()
    normed = [nn.RMSNorm(dim // heads, eps=1e-6, device=lab.device) for _ in range(2)]

    def apply(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in x.chunk(3, -1))
        return normed[0](q.float()).to(HALF), normed[1](k.float()).to(HALF), v

    compiled = torch.compile(apply, dynamic=False, backend="inductor" if lab.on_gpu else "eager")
    outputs = compiled(x)
    gradients = [torch.randn_like(one) for one in outputs]
    inputs = [x, *(norm.weight for norm in normed)]
    lab.say(
        part="norms",
        forward_ms=lab.time_of(lambda: compiled(x)),
        backward_ms=lab.time_of(
            lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)
        ),
    )


def loader(lab: Lab) -> None:
    """How many rows of S the loader hands out a second, beside what memory can be copied."""
    rows, batches = (2, 2) if lab.tiny else (64, 4)
    images = images_of(rows, lab.tiny)
    most = max(map(len, images.packs))
    steps = list(arms.packed_steps(images, rows, batches, most))
    patches = steps[0].inputs.patches.numpy()
    copied, _ = feeding.copied(patches)
    with tempfile.TemporaryDirectory() as folder:
        table = gpu.stored(steps, images.seq_len, Path(folder) / "rows.arrow")
        table = pa.concat_tables([table] * (2 if lab.tiny else 8))  # of one file
        for workers in (1, 2) if lab.tiny else (1, 2, 4, 8, 16):
            packed = feeding.loader_of(table, rows, most, workers)
            took, _ = feeding.handed_out(packed, 2 * len(packed))
            lab.say(
                part="loader",
                workers=workers,
                rows_s=round(rows / took),
                images_s=round(rows / took * len(images.lens) / len(images.packs)),
                gb_s=round(patches.nbytes / took / 1e9, 2),
                copied_gb_s=round(patches.nbytes / copied / 1e9, 2),
            )


def segments_and_padding(batch: PackedBatch) -> Tensor:
    """Return int64[B, S + 1]: the lengths of each row's segments, and of its padding."""
    lens = batch.seq_lens.long()
    padding = batch.segment_ids.shape[1] - lens.sum(1, keepdim=True)
    return torch.cat([lens, padding], 1)


def bound_of(images: arms.Images) -> int:
    """Return the tokens of the largest image, rounded up."""
    return -(-int(images.lens.max()) // MULTIPLE) * MULTIPLE


def cut_padding(lens: Tensor, most: int) -> Tensor:
    """Return the lengths, flat, with each row's padding in pieces of at most `most` tokens."""
    pieces = torch.arange(-(-int(lens[0].sum()) // most), device=lens.device)
    cut = (lens[:, -1:] - most * pieces).clamp(0, most)
    return torch.cat([lens[:, :-1], cut], 1).flatten()


@contextmanager
def stream_of(dtype: torch.dtype | None) -> Iterator[None]:
    """Let blocks add up in a precision, afterwards as before; None leaves it to the model."""
    read = navit.NaViT.read

    def read_as(self: navit.NaViT, batch: PackedBatch, tokens: FlatTokens) -> tuple[Tensor, Any]:
        x, turn = read(self, batch, tokens)
        return x.to(dtype), turn

    try:
        if dtype is not None:
            navit.NaViT.read = read_as
        yield
    finally:
        navit.NaViT.read = read


def train(lab: Lab, part: str, how: Trained) -> None:
    """Say what a step takes: milliseconds, useful MFU, memory; and its loss, which must agree."""
    images = images_of(how.rows, lab.tiny)
    with stream_of(None if "bf16" in how.changes else torch.float32):
        _train(lab, part, how, images)


def _train(lab: Lab, part: str, how: Trained, images: arms.Images) -> None:
    backend = ("fused" if "own" in how.changes else "varlen") if lab.on_gpu else "reference"
    shape: dict[str, Any] = {"num_classes": 1000, "max_side": 1024, "attention": backend}
    config = (
        NaViTConfig(dim=32, depth=1, heads=1, **shape)
        if lab.tiny
        else NaViTConfig.preset(f"{how.size}/16", **shape)
    )
    torch.manual_seed(0)
    most = max(map(len, images.packs))
    batches = [
        arms.moved(step, lab.device) for step in arms.packed_steps(images, how.rows, 4, most)
    ]
    model = navit.NaViT(config).to(lab.device).train()
    options = {"mode": how.mode} if lab.on_gpu else {"backend": "eager"}
    if how.whole:
        model.keep_padding = True
        model.compile(dynamic=False, **options)
    else:
        navit.compile_parts(model, **options)
    graph = how.graph and lab.on_gpu
    rate = torch.tensor(1e-4, device=lab.device) if graph else 1e-4
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True, capturable=graph)
    longest = int(images.lens.max()) if "bound" in how.changes else None

    def update(taken: tuple[PackedBatch, Tensor]) -> Tensor:
        batch, labels = taken
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(lab.device.type, HALF, enabled=lab.on_gpu, cache_enabled=not how.graph):
            loss = segment_cross_entropy(model(batch, longest=longest).float(), labels)
        loss.backward()
        if how.clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    def step(batch: arms.Step) -> Tensor:
        return run((batch.inputs, batch.labels))

    run: Callable[[Any], Tensor] = update
    began = time.perf_counter()
    first = float(step(batches[0]))
    for batch in batches[1:]:
        step(batch)
    lab.wait()
    start = time.perf_counter() - began
    if lab.on_gpu:
        torch.cuda.reset_peak_memory_stats()  # before the capture, which takes a graph's memory
    if how.graph:
        run = CapturedStep(update, lab.device)
    for _ in range(EAGER + 1):  # the last one is the first of a graph; without one, losses agree
        step(batches[0])
    times = []
    for _ in range(1 if lab.tiny else 5):
        lab.wait()
        began = time.perf_counter()
        losses = [step(batch).clone() for batch in batches]
        lab.wait()
        times.append((time.perf_counter() - began) / len(batches))
    seconds = statistics.median(times)
    flops = TRAINING * arms.useful_flops(config, batches) / len(batches)
    lab.say(
        part=part,
        size=how.size,
        rows=how.rows,
        changes=named(how),
        graph=how.graph,
        mode="whole" if how.whole else how.mode,
        clip=how.clip,
        ms=round(1e3 * seconds, 2),
        best_ms=round(1e3 * min(times), 2),
        mfu=round(flops / seconds / lab.rate, 4),
        images_s=round(sum(batch.images for batch in batches) / len(batches) / seconds),
        peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1) if lab.on_gpu else 0,
        s_to_start=round(start, 1),
        first_loss=round(first, 5),
        losses=[round(float(loss), 4) for loss in losses],
    )
    if how.profile and lab.on_gpu:
        profile(lab, how, lambda: [step(batch) for batch in batches], len(batches))


def profile(lab: Lab, how: Trained, run: Callable[[], Any], steps: int) -> None:
    """Say which kernels a step consists of, and how long each takes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CUDA]) as found:
        run()
        lab.wait()
    kernels = [
        (one.self_device_time_total / 1e3 / steps, one.count // steps, one.key)
        for one in found.key_averages()
    ]
    lab.say(
        part="profile",
        size=how.size,
        changes="+".join(how.changes),
        kernels=sum(count for _, count, _ in kernels),
        top=[[round(ms, 3), n, name[:90]] for ms, n, name in sorted(kernels, reverse=True)[:28]],
    )


def heading(lab: Lab) -> str:
    """Return what ran where."""
    said = lab.records[0]
    return (
        f"# A step on a card, and what was expected\n\n`python {said['command']}`, {said['date']}: "
        f"{said['machine']}; matrix products {lab.rate / 1e12:.0f} TFLOP/s. Expectations are of an "
        "H100.\n"
    )


def expectations(records: list[dict[str, Any]]) -> str:
    """Return a table of what was expected, in brackets what was measured; and what follows."""
    lines = [
        "| ms a step, useful MFU | " + " | ".join(HEADS) + " |",
        "| --- " + "| ---: " * len(HEADS) + "|",
    ]
    for (size, rows), cells in EXPECTED.items():
        kinds = [
            Trained(size, rows, NOW),
            Trained(size, rows, STREAM, graph=True),
            Trained(size, rows, OWN, graph=True),
            Trained(size, rows, OWN, graph=True, mode=AUTOTUNE),
        ]
        shown = [
            f"{ms or '–'}, {mfu} ({found_of(records, kind)})"
            for (ms, mfu), kind in zip(cells, kinds, strict=True)
        ]
        lines.append(f"| {size}/16, {rows} rows | {' | '.join(shown)} |")
    return "\n".join(lines) + f"\n\n{verdict(records)}\n"


def found_of(records: list[dict[str, Any]], kind: Trained) -> str:
    """Return what was measured of a kind of step."""
    for one in records:
        same = [one.get(name) == getattr(kind, name) for name in ("size", "rows", "graph", "mode")]
        if "ms" in one and all(same) and one["changes"] == named(kind) and not one["clip"]:
            return f"{one['ms']:.1f}, {one['mfu']:.3f}"
    return "not measured"


def verdict(records: list[dict[str, Any]]) -> str:
    """Return what the time of the own kernel says should be done."""
    times = {
        one["name"]: one["forward_ms"] + one["backward_ms"]
        for one in records
        if one["part"] == "attention" and "name" in one and one["name"].startswith("own")
    }
    if not times:
        return "The own kernel was not measured."
    name, ms = min(times.items(), key=lambda item: item[1])
    if ms < WANTED_MS:
        follows = "it replaces flash attention and FlexAttention"
    elif ms < SUFFICIENT_MS:
        follows = "it is chosen, since the norms are within; its blocks want work"
    else:
        follows = "flash attention stays, told the longest image"
    return f"A layer of B, forward and backward: {ms:.2f} ms ({name}); {follows}."


def named(how: Trained) -> str:
    """Return the changes of a step as they are called."""
    return "+".join(how.changes) or "now"


def print_table(lab: Lab) -> None:
    """Print the training steps, one a line."""
    head = ("model", "rows", "changes", "graph", "ms", "MFU", "images/s", "GB")
    print("\n{:6}{:>5} {:26}{:>6}{:>9}{:>8}{:>10}{:>6}".format(*head))
    for one in lab.records:
        if "ms" in one:
            changes = " ".join(filter(None, (one["changes"], one["mode"])))
            print(
                f"{one['size']:6}{one['rows']:5} {changes[:25]:26}{one['graph']!s:>6}"
                f"{one['ms']:9.2f}{one['mfu']:8.3f}{one['images_s']:10,}{one['peak_gb']:6.1f}"
            )
    print(f"{time.perf_counter() - lab.began:.0f} s")


if __name__ == "__main__":
    main()
