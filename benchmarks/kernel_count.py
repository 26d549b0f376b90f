"""Kernels of a block of NaViT, forward and backward, as Inductor makes them for a card: counted.

    pip install -e '.[torch]' triton      # and a C++ compiler, g++
    python benchmarks/kernel_count.py     # no GPU; some two minutes

A block of B/16 is compiled as `compile_parts` does, under bf16 autocast, for a card that is not
there: tensors have shapes and no memory, what would run is written and counted, not run. It has to
be one whole graph, so that nothing in it depends on what a batch holds. Writes kernel_count.md.

torch for CPUs knows no other device; a small library, made and loaded first, answers for one.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
LIBRARY = "PACKPIPE_NO_CARD"
# Devices are changed without effect, and autograd finds no streams to wait for.
SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <optional>
namespace {
c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, &guard);
}
namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return std::nullopt; }
bool isAccelerator(c10::DeviceType) { return false; }
}
"""
# What Inductor asks of a card: an H100's answers.
CARD = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=85 * 10**9,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=52428800,
    gcnArchName="",
    is_integrated=0,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
)


@dataclass(frozen=True)
class Variant:
    """A block: what it is called, its attention, the precision that it adds up in."""

    name: str
    attention: str
    stream: torch.dtype = torch.bfloat16
    position: str = "factorised_absolute_sum"


VARIANTS = (
    Variant("before: flash, float32 stream", "varlen", torch.float32),
    Variant("now: flash, bf16 stream", "varlen"),
    Variant("own kernel, bf16 stream", "fused"),
    Variant("now, rotary positions", "varlen", position="rotary"),
    Variant("own kernel, rotary positions", "fused", position="rotary"),
    Variant("FlexAttention, bf16 stream", "flex"),
)


def main() -> None:
    """Count, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="variants whose name has this")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if LIBRARY not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            library = made_in(Path(folder))
            own = {**os.environ, "LD_PRELOAD": str(library), LIBRARY: str(library)}
            # Caches would give back what was made before, and nothing would be counted.
            own |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
            own["TORCHINDUCTOR_CACHE_DIR"] = folder
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=own).returncode)  # noqa: S603
    pretend()
    found: dict[str, list[Counter[str]]] = {}
    for variant in (one for one in VARIANTS if options.only in one.name):
        found[variant.name] = counted(variant)
        print(variant.name, *map(dict, found[variant.name]), flush=True)
    text = heading() + "\n" + table(found)
    print(text)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "kernel_count.md").write_text(text)


def made_in(folder: Path) -> Path:
    """Return the library that answers for a card, compiled."""
    home = Path(torch.__file__).parent
    source, library = folder / "no_card.cpp", folder / "no_card.so"
    source.write_text(SOURCE)
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", str(source)]
    command += ["-o", str(library), f"-L{home / 'lib'}", "-lc10", f"-Wl,-rpath,{home / 'lib'}"]
    subprocess.run(command, check=True)  # noqa: S603
    return library


def pretend() -> None:
    """Let torch, Inductor and Triton believe that there is a card."""
    import torch._inductor.config as inductor
    import torch._subclasses.fake_tensor as fake
    import triton
    from torch._dynamo import device_interface
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from triton.backends.compiler import GPUTarget

    stream = SimpleNamespace(
        cuda_stream=0, stream_id=0, device=torch.device("cuda", 0), device_index=0, device_type=1
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_capability": (9, 0),
        "get_device_properties": CARD,
        "get_device_name": CARD.name,
        "is_bf16_supported": True,
        "current_stream": stream,
        "_lazy_init": None,
        "synchronize": None,
        "set_device": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, always(answer))
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    torch._C._cuda_getCurrentRawStream = always(0)
    torch._C._cuda_getDevice = always(0)
    of_dynamo = {
        **{name: answers[name] for name in ("is_available", "current_device", "device_count")},
        "get_device_properties": CARD,
        "get_compute_capability": 90,
        "is_triton_capable": True,
        "is_bf16_supported": True,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        **dict.fromkeys(("set_device", "synchronize", "raise_if_triton_unavailable")),
    }
    for name, answer in of_dynamo.items():
        setattr(device_interface.CudaInterface, name, staticmethod(always(answer)))
    device_interface.caching_worker_device_properties["cuda"] = [CARD]
    fake.init_gpu_context = always(None)
    inductor.compile_threads = 1
    # Patterns are traced with real tensors.
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = misc_patterns._misc_patterns_init = always(
        None
    )
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=always(GPUTarget("cuda", 90, 32)),
            get_current_device=always(0),
            get_current_stream=always(0),
            get_device_interface=always(torch.cuda),
            get_active_torch_device=always(torch.device("cuda", 0)),
            map_python_to_cpp_type=lambda kind: kind,
            get_empty_cache_for_benchmark=always(None),
            utils=SimpleNamespace(
                get_device_properties=always(
                    {
                        "max_shared_mem": CARD.shared_memory_per_block_optin,
                        "multiprocessor_count": CARD.multi_processor_count,
                        "warpSize": 32,
                        "max_num_regs": CARD.regs_per_multiprocessor,
                    }
                )
            ),
        )
    )


def always(answer: Any) -> Any:
    """Return a function of anything that gives one answer."""
    return lambda *_, **__: answer


def counted(variant: Variant) -> list[Counter[str]]:
    """Return the kernels of a block by kind: those of its forward pass, those of its backward."""
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    from packpipe.model import navit
    from packpipe.model.attention import flatten
    from packpipe.model.config import NaViTConfig

    codes: list[str] = []

    def write(graph: GraphLowering) -> Any:
        code, _ = graph.codegen()
        codes.append(getattr(code, "value", code))
        return SimpleNamespace(
            call=lambda args: tuple(graph.module(*args)),
            __file__="none.py",
            key="none",
            recursively_apply_fns=None,
        )

    torch._dynamo.reset()
    GraphLowering.compile_to_module = write
    config = NaViTConfig.preset(
        "B/16", num_classes=1000, attention=variant.attention, position=variant.position
    )
    torch.nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = navit.NaViT(replace(config, depth=2))
            batch = batch_of(rows=32, seq_len=1024, max_segments=26)
        tokens = flatten(batch, variant.attention, keep_padding=True, longest=272)
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16):
            x, turn = model.read(batch, tokens)
            x = x.to(variant.stream).detach().requires_grad_()
            for block in model.blocks:  # which one graph each way serves
                x = block(x, tokens.attend, turn)
        x.sum().backward()
    if len(codes) != 2:
        raise RuntimeError(f"{variant.name}: {len(codes)} graphs, expected 2")
    return [kinds(code) for code in codes]


def batch_of(*, rows: int, seq_len: int, max_segments: int) -> Any:
    """Return a batch that has shapes alone."""
    from packpipe.loading.batch import PackedBatch

    tokens, segments = (rows, seq_len), (rows, max_segments)
    return PackedBatch(
        patches=torch.empty(*tokens, 768, dtype=torch.uint8),
        segment_ids=torch.empty(*tokens, dtype=torch.int32),
        coords=torch.empty(*tokens, 2, dtype=torch.int16),
        seq_lens=torch.empty(*segments, dtype=torch.int32),
        grid_hw=torch.empty(*segments, 2, dtype=torch.int16),
        example_index=torch.empty(*segments, dtype=torch.int64),
    )


def kinds(code: str) -> Counter[str]:
    """Return the launches that generated code makes, by kind."""
    found: Counter[str] = Counter()
    for line in code.split("def call(", 1)[1].splitlines():
        if launched := re.search(r"(extern_kernels\.\w+|torch\.ops\.[\w.]+|\w+\.run)\(", line):
            name = launched[1]
            is_product = re.search(r"extern_kernels\.\w*mm", name)
            # Of this package and of FlexAttention's template; what is fused begins with triton_.
            of_attention = re.search(r"^_forward|^_backward|flex_attention|torch\.ops", name)
            kind = "products" if is_product else "attention" if of_attention else "generated"
            found[kind] += 1
    return found


def table(found: dict[str, list[Counter[str]]]) -> str:
    """Return a Markdown table."""
    names = ("products", "attention", "generated")
    lines = [
        f"| block | {' | '.join(f'{name}, forward + backward' for name in names)} | all |",
        "| --- " + "| ---: " * 4 + "|",
    ]
    for name, passes in found.items():
        cells = [" + ".join(f"{one[kind]}" for one in passes) for kind in names]
        total = sum(one.total() for one in passes)
        lines.append(f"| {name} | {' | '.join(cells)} | {total} |")
    return "\n".join(lines) + "\n"


def heading() -> str:
    """Return what was counted, and by what."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton"))
    return (
        f"# Kernels of a block\n\n`python benchmarks/kernel_count.py`, {datetime.date.today()}: "
        f"{versions}, made for an {CARD.name} without one. A block of B/16, 32 rows of 1024 "
        "tokens, bf16 autocast; each is one graph whole. Flash attention is one call here, and "
        "several kernels on a card: one forward, three backward.\n"
    )


if __name__ == "__main__":
    main()
