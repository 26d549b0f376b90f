"""The laws on a GPU: every backend with its own kernels, in float64, float32 and bfloat16.

Skipped where there is none. By hand: ``python -m pytest tests/on_gpu.py``.
"""

import os

import laws
import learning
import numpy as np
import packed
import pytest
import torch
from laws import LONG, MANY, Setting, close

from packpipe.model.attention import BACKENDS, backends_of, check_backend, choose_backend
from packpipe.model.navit import compile_parts
from packpipe.model.pooling import POOLINGS
from packpipe.model.positions import POSITIONS
from packpipe.training.captured import EAGER, CapturedStep
from packpipe.training.loop import train
from packpipe.training.losses import segment_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

# cuBLAS reads it when it starts; it lets sums be the same each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
RUNS = [
    (backend, dtype)
    for dtype in TOLERANCES
    for backend in BACKENDS
    if backend != "varlen" or dtype == torch.bfloat16
    if backend not in ("flex", "fused") or dtype != torch.float64
]
every_run = pytest.mark.parametrize(("backend", "dtype"), RUNS)


def setting_of(backend, dtype, **options):
    return Setting(backend, dtype=dtype, device="cuda", dim=64, max_side=512, **options)


@every_run
def test_the_backend_runs_here_and_passes_its_check(backend, dtype):
    device = torch.device("cuda")
    assert backend in backends_of(device, dtype)
    check_backend(backend, device, dtype, 64)


@every_run
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("position", POSITIONS)
def test_packed_equals_alone_and_every_parameter_learns(backend, dtype, position, pooling):
    setting = setting_of(backend, dtype, position=position, pooling=pooling)
    laws.packed_equals_alone(setting, MANY, TOLERANCES[dtype])
    laws.every_parameter_learns(setting, MANY)


@every_run
@pytest.mark.parametrize("switch", packed.SWITCHES)
def test_packed_equals_alone_with_every_switch(backend, dtype, switch):
    pooling = packed.SWITCHES[switch].get("pooling", "attention")
    setting = setting_of(backend, dtype, pooling=pooling, switch=switch)
    laws.packed_equals_alone(setting, MANY, TOLERANCES[dtype])
    laws.every_parameter_learns(setting, MANY)


@every_run
def test_packed_equals_alone_with_augmentation(backend, dtype):
    setting = laws.Augmented(backend, dtype=dtype, device="cuda", dim=64)
    assert setting.batch(MANY).colours is not None
    laws.packed_equals_alone(setting, MANY, TOLERANCES[dtype])


@every_run
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("case", [MANY, LONG], ids=["many", "long"])
def test_no_image_reaches_another(backend, dtype, pooling, case):
    setting = setting_of(backend, dtype, pooling=pooling)
    torch.use_deterministic_algorithms(True)  # else sums over tokens differ from run to run
    try:
        laws.others_keep_every_bit(setting, case)
    finally:
        torch.use_deterministic_algorithms(False)
    laws.no_gradient_crosses(setting, case)


def random_rows(draws, rows, seq_len, most):
    """Lengths of some rows: at most `most` segments in at most seq_len tokens each."""
    lens = []
    for _ in range(rows):
        cuts = np.sort(draws.choice(seq_len, draws.integers(1, most + 1), replace=False)) + 1
        lens.append(np.diff(cuts, prepend=0).tolist())
    return lens


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_batches_of_training_need_no_new_graph(backend):
    torch._dynamo.reset()
    make = setting_of(backend, torch.float32)
    compiled, plain = compile_parts(make.model(), fullgraph=True), make.model()
    draws = np.random.default_rng(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(100):
            lens = random_rows(draws, 2, 300, 6)
            batch = make.batch(packed.RowSet(lens, seq_len=300, max_segments=6, seed=seed))
            with torch.autocast("cuda", torch.bfloat16):
                loss = segment_cross_entropy(compiled(batch).float(), batch.labels)
            loss.backward()
            if seed % 10 == 0:
                with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                    wanted = segment_cross_entropy(plain(batch).float(), batch.labels)
                assert close(loss.detach(), wanted, 2e-2)
    assert all(parameter.grad.isfinite().all() for parameter in compiled.parameters())


def test_a_captured_training_is_that_of_a_loop():
    losses = {}
    for captured in (False, True):
        torch._dynamo.reset()
        model = learning.model_of().cuda()
        config = learning.config_of(steps=12, captured=captured, precision="float32", ema=0.9)
        losses[captured] = [record.loss for record in train(model, learning.loader_of(), config)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert losses[True][-1] < losses[True][0]


def test_a_step_is_captured_as_one_graph():
    weight, seen = torch.ones(4, device="cuda"), []

    def step(batch):
        seen.append(None)
        weight.mul_(0.5)
        return (weight * batch).sum()

    captured = CapturedStep(step, torch.device("cuda"))
    found = [float(captured(torch.full((4,), float(n)).pin_memory())) for n in range(8)]
    assert found == [4 * n * 0.5 ** (n + 1) for n in range(8)]
    assert len(seen) == EAGER + 1


def test_batches_in_page_locked_memory_keep_their_bytes_while_they_are_copied():
    plain = list(learning.loader_of())
    loader = learning.loader_of(num_workers=2, pin_memory=True)
    for _ in range(20):  # memory is used again
        loader.set_epoch(0)
        moved = []
        for batch in loader:
            assert all(tensor.is_pinned() for tensor in batch.values())
            moved.append(batch.to("cuda", non_blocking=True))
        for found, wanted in zip(moved, plain, strict=True):
            assert all(torch.equal(found[name].cpu(), wanted[name]) for name in wanted)


def test_a_model_of_several_blocks_learns_with_compiled_kernels():
    torch._dynamo.reset()
    make = setting_of("fused", torch.float32)
    compiled, plain = compile_parts(make.model(), fullgraph=True), make.model()
    assert len(compiled.blocks) > 1  # which share one list of blocks of queries
    batch = make.batch(MANY)
    for model in (compiled, plain):
        segment_cross_entropy(model(batch), batch.labels).backward()
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert close(one.grad, other.grad, 1e-4)


def test_the_fastest_backend_is_chosen():
    assert choose_backend(torch.device("cuda"), torch.float32) == "flex"
    assert choose_backend(torch.device("cuda"), torch.bfloat16) == "varlen"
    model = packed.model_of("auto", torch.float32).cuda()
    assert model.backend() == "flex"
    with torch.autocast("cuda", torch.bfloat16):
        assert model.backend() == "varlen"
