"""The kernels of ``attention="fused"``, in Triton's interpreter, beside plain attention in float64.

The interpreter runs them without a GPU, in a process of its own, since it is chosen when a kernel
is made. on_gpu.py runs them compiled. All but the last test need Triton.
"""

import importlib.util
import re
import subprocess
import sys
from types import SimpleNamespace

import loading
import packed
import pytest
import torch
from laws import MANY

from packpipe.model.attention import fused_kernel

needs_triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="no Triton; pip install triton, on Linux"
)

# Segments of several blocks, of one token and of less than a block, padding, and a row of it alone.
IN_THE_INTERPRETER = """
import laws, naive_attention, packed, torch
from packpipe.model.attention import blocks_of
from packpipe.model.fused import fused_kernel
from packpipe.model.positions import rotation

lens = torch.tensor([[70, 1, 9], [0, 0, 0]])
blocks, tokens = blocks_of(lens, 81), 2 * 81
real = torch.cat([torch.arange(81) < some.sum() for some in lens])
assert 0 < real.sum() < tokens

def compare(head_dim, heads, dtype, normed, turned, tolerance):
    torch.manual_seed(head_dim)
    projected = torch.randn(tokens, 3, heads, head_dim).to(dtype)
    gains = [torch.rand(head_dim) + 0.5 for _ in range(2)] if normed else []
    coords = torch.randint(0, 20, (tokens, 2))
    turn = rotation(coords, None, head_dim, torch.float32) if turned else None
    dout = torch.randn(tokens, heads, head_dim).to(dtype)
    results = []
    for kernel, exact in ((fused_kernel, None), (naive_attention.fused_kernel, torch.float64)):
        leaves = [x.to(exact or x.dtype).requires_grad_() for x in (projected, *gains)]
        turning = tuple(x.to(exact or x.dtype) for x in turn) if turned else None
        seen = kernel(leaves[0], tuple(leaves[1:]) or None, turning, blocks)
        results.append([seen.detach(), *torch.autograd.grad(seen, leaves, dout.to(seen.dtype))])
    found, wanted = results
    assert not found[0][~real].any() and not found[1][~real].any()
    for one, other in zip(found, wanted, strict=True):
        assert laws.close(one.double(), other, tolerance), (head_dim, dtype, normed, turned)

compare(16, 2, torch.float32, False, True, 1e-5)
compare(64, 1, torch.float32, True, False, 1e-5)
compare(72, 1, torch.float32, True, True, 1e-5)
compare(128, 1, torch.float16, True, False, 2e-3)
compare(32, 1, torch.float16, True, True, 2e-3)

# The whole model, with biases.
case = packed.RowSet([[5, 3], [9]], seq_len=10, max_segments=2)
fused, plain = (
    laws.Setting(name, "rotary", switch="all", dtype=torch.float32)
    for name in ("fused", "reference")
)
found, wanted = (
    laws.results_of(one, one.model(), lambda m, b: m(b), one.batch(case)) for one in (fused, plain)
)
assert laws.close(found[0], wanted[0], 1e-5)
laws.every_gradient_learns(found[2], case)
for name, gradient in wanted[2].items():
    assert laws.close(found[2][name], gradient, 1e-5), name
"""


@needs_triton
def test_the_kernels_are_plain_attention_in_the_interpreter():
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_THE_INTERPRETER],
        env={**loading.environment(), "TRITON_INTERPRET": "1"},
        check=True,
        timeout=600,
    )


@needs_triton
def test_torch_takes_nothing_for_written_but_what_the_kernels_write(monkeypatch):
    # What else it took for written, compiled code would copy at every call, and autograd refuse.
    import triton
    from torch._higher_order_ops import triton_kernel_wrap
    from triton.backends.compiler import GPUTarget

    if not hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
        pytest.skip("another torch asks in another way")
    from packpipe.model import fused

    card = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", card)
    names = ("E", "EP", "BLOCK", "BM", "BN", "EPS", "NORMED", "TURNED")
    sizes = dict(zip(names, fused._constants(64, 64, 64, 64, True, True), strict=True))
    floats = ("qkv", "gain_q", "gain_k", "cos", "sin", "out", "log_sums", "dout", "dqkv", "dgain")
    given = dict.fromkeys(floats, torch.zeros(4)) | {"blocks": torch.zeros(4, dtype=torch.int32)}
    given |= {"tokens": 8, "scale": 0.1, "H": 1, **sizes}
    for kernel, wanted in (
        (fused._forward, ["log_sums", "out"]),
        (fused._backward, ["dgain", "dqkv"]),
    ):
        own = {name: given[name] for name in kernel.arg_names}
        found = triton_kernel_wrap.identify_accessed_tensors(kernel, own, {})
        assert sorted(one.name for one in found.read_writes.writes) == wanted


@needs_triton
@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", torch.float32, "attention is 'fused', expected not on cpu; choose 'auto', 'ref"),
        ("meta", torch.float64, "attention is 'fused', expected float32 or less; choose 'refer"),
    ],
)
def test_what_the_kernels_cannot_run_on_is_refused(device, dtype, message):
    projected = torch.zeros(1, 3, 1, 16, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=re.escape(message)):
        fused_kernel(projected, None, None, torch.zeros(1, 3, dtype=torch.int32, device=device))


def test_without_triton_the_backend_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "packpipe.model.fused", raising=False)
    model = packed.model_of("fused", torch.float32)
    message = (
        "triton is 'missing', expected installed for attention='fused'; pip install triton, on"
    )
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
        model(packed.batch_of(MANY))
