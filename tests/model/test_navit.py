"""Laws 4, 5 and 8: every attention backend × position × pooling × loss, and plain twins of all.

The kernels of the three backends that need a GPU are replaced by plain ones; everything around them
is what runs there. on_gpu.py runs the laws with the real ones.
"""

import io
import itertools
import re
import warnings
from copy import deepcopy
from dataclasses import replace

import laws
import naive_attention
import naive_navit
import numpy as np
import packed
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from laws import LONG, LOSSES, MANY, Setting, close
from packed import SWITCHES

from packpipe.model import attention
from packpipe.model.attention import (
    BACKENDS,
    block_mask,
    check_backend,
    choose_backend,
    segment_mask,
)
from packpipe.model.config import NaViTConfig
from packpipe.model.maps import token_maps
from packpipe.model.navit import NaViT, compile_parts
from packpipe.model.pooling import POOLINGS, segment_softmax
from packpipe.model.positions import POSITIONS, ROTARY

PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_position = pytest.mark.parametrize("position", POSITIONS)
every_pooling = pytest.mark.parametrize("pooling", POOLINGS)
precisions = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)


@pytest.fixture(autouse=True, scope="module")
def plain_kernels():
    with naive_attention.in_place_of_kernels():
        yield


@st.composite
def settings(draw):
    """Any backend, position, pooling, loss and switch of the model."""
    return Setting(
        draw(st.sampled_from(BACKENDS)),
        draw(st.sampled_from(POSITIONS)),
        draw(st.sampled_from(POOLINGS)),
        draw(st.sampled_from(list(LOSSES))),
        switch=draw(
            st.sampled_from([None, *(s for s in SWITCHES if "pooling" not in SWITCHES[s])])
        ),
    )


def switched(switch, backend=None):
    """A setting with a switch of the model on, the backends in turn."""
    pooling = SWITCHES[switch].get("pooling", "attention")
    backend = backend or BACKENDS[list(SWITCHES).index(switch) % len(BACKENDS)]
    return Setting(backend, pooling=pooling, switch=switch)


def fit_for(case):
    """Whether a case has what the laws speak of: a row of several, an image of several tokens."""
    return any(len(lens) > 1 for lens in case.lens) and any(
        length > 1 for lens in case.lens for length in lens
    )


@every_backend
@every_position
@every_pooling
def test_packed_equals_alone_and_every_parameter_learns(backend, position, pooling):
    # Each loss in its turn; the next test has all of them.
    turn = POSITIONS.index(position) + POOLINGS.index(pooling)
    setting = Setting(backend, position, pooling, list(LOSSES)[turn % len(LOSSES)])
    laws.every_gradient_learns(laws.packed_equals_alone(setting, MANY, 1e-10), MANY)


@every_backend
@every_pooling
@pytest.mark.parametrize("loss", LOSSES)
def test_packed_equals_alone_with_every_loss(backend, pooling, loss):
    setting = Setting(backend, pooling=pooling, loss=loss)
    laws.every_gradient_learns(laws.packed_equals_alone(setting, MANY, 1e-10), MANY)


@pytest.mark.parametrize("switch", SWITCHES)
def test_images_stay_apart_and_every_parameter_learns_with_every_switch(switch):
    setting = switched(switch)
    laws.every_gradient_learns(laws.packed_equals_alone(setting, MANY, 1e-10), MANY)
    laws.others_keep_every_bit(setting, MANY)
    laws.no_gradient_crosses(setting, MANY)


@precisions
@given(setting=settings(), case=packed.row_sets())
@example(setting=Setting("varlen"), case=LONG)
@example(setting=Setting("flex"), case=LONG)
def test_packed_equals_alone_in_any_rows(dtype, tolerance, setting, case):
    laws.packed_equals_alone(replace(setting, dtype=dtype), case, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(setting=settings(), case=packed.row_sets())
@example(setting=Setting("segments"), case=MANY)
@example(setting=Setting("flex"), case=LONG)
def test_changing_one_image_leaves_every_other_bit_untouched(dtype, setting, case):
    assume(any(len(lens) > 1 for lens in case.lens))
    laws.others_keep_every_bit(replace(setting, dtype=dtype), case)


@given(setting=settings(), case=packed.row_sets())
@example(setting=Setting("segments"), case=MANY)
@example(setting=Setting("varlen"), case=LONG)
def test_the_gradient_between_images_is_exactly_zero(setting, case):
    assume(any(len(lens) > 1 for lens in case.lens))
    laws.no_gradient_crosses(setting, case)


@given(setting=settings(), case=packed.row_sets())
def test_every_parameter_learns_in_any_rows(setting, case):
    assume(fit_for(case))
    laws.every_parameter_learns(setting, case)


@every_position
@every_pooling
def test_the_model_is_its_plain_twin(position, pooling):
    # Each head in its turn: with every position, and with every pooling.
    head = ("linear", "unit")[(POSITIONS.index(position) + POOLINGS.index(pooling)) % 2]
    is_its_plain_twin(packed.model_of("segments", position=position, pooling=pooling, head=head))


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_model_is_its_plain_twin_with_every_switch(switch):
    is_its_plain_twin(packed.model_of("segments", **SWITCHES[switch]))


def is_its_plain_twin(model):
    batch = packed.batch_of(MANY, prefix_tokens=model.config.prefix_tokens)
    outputs = model(batch)
    for row, number, one in packed.alone(batch):
        image = {
            "patches": one.patches[0],
            "coords": one.coords[0].tolist(),
            "grid_hw": one.grid_hw[0, 0].tolist(),
        }
        own = (
            batch.segment_ids[row] == number + 1
            if model.config.pooling == "none"
            else torch.arange(6) == number
        )
        wanted = naive_navit.forward(model, image)
        assert close(outputs[row][own], wanted.reshape(int(own.sum()), -1), 1e-10)


@pytest.mark.parametrize("keeps_padding", [False, True])
def test_the_kernel_is_told_the_longest_image_and_padding_is_no_longer(monkeypatch, keeps_padding):
    told = []

    def kernel(q, k, v, bounds, longest):
        assert bounds[-1] == len(q)
        told.append((longest, int(bounds.diff().max()), len(bounds)))
        return naive_attention.varlen_kernel(q, k, v, bounds, longest)

    monkeypatch.setattr(attention, "varlen_kernel", kernel)
    model = packed.model_of("varlen", torch.float64, depth=1, max_side=150)
    model.keep_padding = keeps_padding
    for lens in ([[100, 1, 129], [40]], [[], [3, 2]]):
        batch = packed.batch_of(packed.RowSet(lens, seq_len=600, max_segments=3))
        found, wanted = (model(batch, longest=some)[batch.present] for some in (130, None))
        assert close(found, wanted, 1e-12)
    assert [longest for longest, _, _ in told] == [256, 600] * 2
    assert all(most <= longest for longest, most, _ in told)
    # As many segments, whatever the batch: three images, and padding in three pieces or in one.
    if keeps_padding:
        assert [count for _, _, count in told] == [13, 9] * 2


def test_an_image_longer_than_said_is_refused():
    message = "longest is 32, expected 33 or more (tokens of an image); pass None"
    with pytest.raises(ValueError, match=re.escape(message)):
        packed.model_of("varlen")(packed.batch_of(MANY), longest=32)


@pytest.mark.parametrize("switch", [None, *SWITCHES])
def test_blocks_add_up_in_half_precision_under_autocast_alone(switch):
    pooling = SWITCHES[switch or "all"].get("pooling", "attention")
    setting = Setting("segments", pooling=pooling, switch=switch, dtype=torch.float32, dim=32)
    model = setting.model()
    exact = deepcopy(model).double()
    entering = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: entering.append(given[0].dtype))
    batch = setting.batch(MANY)
    outputs = [model(batch)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs.append(model(batch))
    depth = len(model.blocks)
    assert entering == [torch.float32] * depth + [torch.bfloat16] * depth
    real = laws.present(model, batch)
    wanted = exact(batch)[real]
    for found, tolerance in zip(outputs, (1e-5, 3e-2), strict=True):
        assert close(found[real].double(), wanted, tolerance)


@given(case=packed.row_sets())
@example(case=MANY)
@example(case=LONG)
def test_the_backends_agree(case):
    batch = packed.batch_of(case)
    first, *others = (packed.model_of(name)(batch)[batch.present] for name in BACKENDS)
    assert len(others) == 4
    assert all(close(found, first, 1e-10) for found in others)


@every_backend
@every_pooling
def test_a_row_of_padding_alone_changes_nothing(backend, pooling):
    setting = Setting(backend, pooling=pooling)
    batch = setting.batch(packed.RowSet(lens=[[3, 2], []], seq_len=6, max_segments=6))
    model = setting.model()
    results = []
    for rows in (batch, laws.without_padding_rows(batch)):
        model.zero_grad()
        laws.loss_of(setting, model(rows), rows).backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(gradient.isfinite().all() for gradient in results[0])
    assert all(close(a, b, 1e-12) for a, b in zip(*results, strict=True))


@every_backend
@every_pooling
def test_a_batch_of_padding_alone_is_finite(backend, pooling):
    setting = Setting(backend, pooling=pooling)
    batch = setting.batch(packed.RowSet(lens=[[], []], seq_len=6, max_segments=6))
    outputs = setting.model()(batch)
    assert outputs.isfinite().all()
    assert outputs.shape == (2, 6, packed.NUM_CLASSES)


@every_backend
@every_pooling
@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_padding_alone_gives_every_parameter_a_gradient_of_zeros(backend, pooling, loss):
    # DDP waits for ever, or raises, where a parameter of one rank has none. Each position in turn.
    turn = BACKENDS.index(backend) + 5 * (POOLINGS.index(pooling) + 5 * list(LOSSES).index(loss))
    setting = Setting(backend, POSITIONS[turn % len(POSITIONS)], pooling, loss)
    batch = setting.batch(packed.RowSet(lens=[[], []], seq_len=6, max_segments=6))
    model = setting.model()
    laws.loss_of(setting, model(batch), batch).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_batch_of_padding_alone_gives_every_switchs_parameters_zeros(switch):
    setting = switched(switch)
    batch = setting.batch(packed.RowSet(lens=[[], []], seq_len=6, max_segments=6))
    model = setting.model()
    laws.loss_of(setting, model(batch), batch).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert not any(gradient.any() for gradient in gradients.values())


def random_lens(draws, seq_len, most):
    """Return lengths of one row: at most `most` segments in at most seq_len tokens."""
    cuts = sorted(draws.choice(seq_len + 1, size=draws.integers(1, most + 1), replace=False))
    return [int(b - a) for a, b in itertools.pairwise([0, *cuts]) if b > a]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "fused"])  # below
@pytest.mark.parametrize(
    "options", [{}, {**SWITCHES["all"], "pooling": "max"}], ids=["attention", "max, switches"]
)
def test_one_graph_serves_a_hundred_batches(backend, options):
    torch._dynamo.reset()
    model = packed.model_of(backend, torch.float32, **options)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    draws = np.random.default_rng(0)
    for seed in range(100):
        lens = [random_lens(draws, 16, 6) for _ in range(2)]
        case = packed.RowSet(lens, seq_len=16, max_segments=6, seed=seed)
        batch = packed.batch_of(case, prefix_tokens=options.get("prefix_tokens", 0))
        with torch.no_grad():
            found = compiled(batch)[batch.present]
            if seed % 10 == 0:
                assert close(found, model(batch)[batch.present], 1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["varlen", "fused"])
def test_compiled_parts_are_three_whole_graphs_for_a_hundred_batches(backend):
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    model = packed.model_of(backend, torch.float32)
    assert len(model.blocks) > 1
    compile_parts(model, backend=count, fullgraph=True)
    draws = np.random.default_rng(1)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for seed in range(100):
            lens = [random_lens(draws, 16, 6) for _ in range(2)]
            batch = packed.batch_of(packed.RowSet(lens, seq_len=16, max_segments=6, seed=seed))
            assert model(batch, longest=16).isfinite().all()
    assert len(graphs) == 3


def test_trimmed_rows_have_a_graph_for_each_length_up_to_torchs_limit_and_none_beyond():
    torch._dynamo.reset()
    parts = []

    def count(graph, _):
        parts.append(graph)
        return graph.forward

    model = packed.model_of("reference", torch.float32)
    compiled = compile_parts(packed.model_of("reference", torch.float32), backend=count)
    batches = [
        packed.batch_of(packed.RowSet([[n], [n]], seq_len=4, max_segments=1)).trim(1)
        for n in (1, 2, 3, 4)
    ]
    limit = {"recompile_limit": 3, "fail_on_recompile_limit_hit": True}
    with torch.no_grad(), torch._dynamo.config.patch(**limit):
        for number, batch in enumerate(batches[:3], 1):
            assert batch.segment_ids.shape[1] == number
            assert close(compiled(batch)[batch.present], model(batch)[batch.present], 1e-5)
            assert len(parts) == 3 * number  # what is before the blocks, all blocks, what is after
        for batch in batches[:3]:
            compiled(batch)
        assert len(parts) == 3 * 3
        with pytest.raises(Exception, match="recompile_limit"):
            compiled(batches[3])
    torch._dynamo.reset()


@given(case=packed.row_sets())
@example(case=LONG)
@example(case=packed.RowSet([[128, 128, 1], [257], [], [100, 157]], seq_len=257, max_segments=3))
@example(case=packed.RowSet(lens=[[256], [128, 64, 64], [300]], seq_len=384, max_segments=3))
def test_the_block_mask_is_the_segment_mask(case):
    batch = packed.batch_of(case)
    mask = block_mask(batch.segment_ids, batch.seq_lens)
    real = batch.segment_ids > 0
    wanted = segment_mask(batch.segment_ids)[:, 0]
    assert torch.equal(naive_attention.dense(mask)[real], wanted[real])
    full = naive_attention.listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial = naive_attention.listed(mask.kv_num_blocks, mask.kv_indices)
    assert not (full & partial).any()
    # A block is visited only if some query of it sees some key of it; padding counts as an image.
    ids = batch.segment_ids
    same = ids[:, :, None] == ids[:, None, :]
    for i, j in itertools.product(range(full.shape[1]), repeat=2):
        piece = same[:, i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        assert torch.equal(piece.flatten(1).any(1), (full | partial)[:, i, j])


def test_some_blocks_are_full_and_most_are_skipped():
    case = packed.RowSet(lens=[[300, 212, 512]], seq_len=1024, max_segments=3)
    batch = packed.batch_of(case)
    mask = block_mask(batch.segment_ids, batch.seq_lens)
    # Blocks 0 and 1 are of the first image, 2 of two images, 3 of the second, 4 to 7 of the third.
    assert mask.full_kv_num_blocks[0, 0].tolist() == [2, 2, 0, 1, 4, 4, 4, 4]
    assert mask.kv_num_blocks[0, 0].tolist() == [1, 1, 4, 1, 0, 0, 0, 0]


@given(case=packed.row_sets())
def test_pooling_weights_sum_to_one_in_every_segment(case):
    batch = packed.batch_of(case)
    rows, most = batch.seq_lens.shape
    ids = batch.segment_ids.long()
    numbers = torch.where(ids > 0, torch.arange(rows)[:, None] * most + ids - 1, rows * most)
    seeded = torch.Generator().manual_seed(0)
    logits = torch.randn(ids.numel(), 3, dtype=torch.float64, generator=seeded) * 30
    weights = segment_softmax(logits, numbers.flatten(), rows * most)
    for number in numbers.unique().tolist():
        mine = numbers.flatten() == number
        assert close(weights[mine], logits[mine].softmax(0), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "segments"])
@given(case=packed.row_sets())
def test_what_the_pool_looks_at_is_shared_out_over_an_image(backend, case):
    batch = packed.batch_of(case)
    model = packed.model_of(backend, pooling="attention")
    model.requires_grad_(False)
    weights = model.pool_weights(batch)
    assert weights.shape == (*batch.segment_ids.shape, model.config.heads)
    assert (weights[batch.segment_ids == 0] == 0).all()
    for row in range(len(batch.seq_lens)):
        for number in range(1, int((batch.seq_lens[row] > 0).sum()) + 1):
            sums = weights[row, batch.segment_ids[row] == number].sum(0)
            assert close(sums, torch.ones_like(sums), 1e-6)


def test_what_no_pool_looks_at_is_refused():
    model = packed.model_of("reference", pooling="mean")
    with pytest.raises(ValueError, match="pooling is 'mean', expected attention; make the model"):
        model.pool_weights(packed.batch_of(packed.RowSet(lens=[[3]], seq_len=3, max_segments=1)))


def test_the_mask_of_a_small_row_is_as_drawn():
    mask = segment_mask(torch.tensor([[1, 1, 2, 0]]))[0, 0]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


@every_position
@every_backend
def test_positions_come_from_coordinates_not_from_row_order(position, backend):
    batch, model = packed.batch_of(MANY), packed.model_of(backend, position=position)
    order = torch.arange(33)
    order[:20] = order[:20].flip(0)  # the tokens of row 1's first image, backwards
    shuffled = replace(batch, patches=batch.patches[:, order], coords=batch.coords[:, order])
    assert close(model(shuffled)[1, 0], model(batch)[1, 0], 1e-10)
    moved = replace(batch, coords=batch.coords.flip(1))
    if position != "none":
        assert not close(model(moved)[1, 0], model(batch)[1, 0], 1e-6)


@pytest.mark.parametrize(
    "position", [name for name in POSITIONS if "fractional" in name and name not in ROTARY]
)
def test_fractional_positions_do_not_see_the_size(position):
    model = packed.model_of(position=position)
    corners = torch.tensor([[0, 0], [8, 2], [4, 1]])
    larger = torch.tensor([[0, 0], [16, 8], [8, 4]])
    grid = torch.tensor([9, 3]).expand(3, 2)
    found = model.position(corners, grid, torch.float64)
    grown = model.position(larger, torch.tensor([17, 9]).expand(3, 2), torch.float64)
    assert close(found, grown, 1e-12)
    assert not close(found[0], found[1], 1e-3)


def test_dense_outputs_go_back_to_each_grid():
    batch = packed.batch_of(packed.RowSet(lens=[[6, 2], [4]], seq_len=9, max_segments=2))
    values = (batch.coords[..., 0] * 100 + batch.coords[..., 1])[..., None]
    maps = token_maps(batch, values)
    assert [index for index, _ in maps] == [0, 1, 2]
    assert maps[0][1][..., 0].tolist() == [[0, 1, 2], [100, 101, 102]]
    assert maps[1][1][..., 0].tolist() == [[0, 1]]
    assert maps[2][1].shape == (2, 2, 1)


def test_tokens_that_were_dropped_are_zero_in_their_map():
    batch = packed.batch_of(packed.RowSet(lens=[[3]], seq_len=3, max_segments=1))
    batch = replace(batch, grid_hw=torch.tensor([[[2, 3]]], dtype=torch.int16))
    ((_, values),) = token_maps(batch, torch.tensor([[[7.0], [8.0], [9.0]]]))
    assert values[..., 0].tolist() == [[7, 8, 9], [0, 0, 0]]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_right_backend_passes_its_check(backend, dtype):
    assert check_backend(backend, torch.device("cpu"), dtype, 8) < 1e-5


def test_a_wrong_backend_fails_its_check(monkeypatch):
    monkeypatch.setattr(
        attention,
        "varlen_kernel",
        lambda q, k, v, bounds, longest: naive_attention.varlen_kernel(
            q, k, v, bounds.clamp(max=300), longest
        ),
    )
    message = r"attention 'varlen' \(torch.float32 on cpu\) is [\d.]+, expected at most 0.0001 from"
    with pytest.raises(RuntimeError, match=message):
        check_backend("varlen", torch.device("cpu"), torch.float32, 8)


def test_an_exported_program_answers_other_rows_as_the_model():
    # It may not depend on what the rows hold: here are more images, fewer, and none.
    cases = [
        MANY,
        replace(MANY, lens=[[33], [5, 4], [2] * 6], seed=1),
        replace(MANY, lens=[[1, 32], [], [9, 9, 9]], seed=2),
    ]
    batches = [packed.batch_of(case, labels=None, prefix_tokens=2) for case in cases]
    model = packed.model_of("auto", torch.float32, depth=1, prefix_tokens=2).eval()
    saved = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own
        torch.export.save(torch.export.export(model, (batches[0],)), saved)
        program = torch.export.load(io.BytesIO(saved.getvalue())).module()
    for batch in batches:
        with torch.no_grad():
            found, wanted = program(batch), model(batch)
        assert found.shape == wanted.shape
        assert close(found[batch.present], wanted[batch.present], 1e-6)


def test_the_backend_follows_the_device():
    assert choose_backend(torch.device("cpu"), torch.bfloat16) == "segments"
    assert choose_backend(torch.device("meta"), torch.float32) == "reference"
    assert packed.model_of("auto").backend() == "segments"
    assert packed.model_of("flex").backend() == "flex"


def test_presets_are_the_published_shapes():
    sizes = {}
    for name in ("Ti/16", "S/16", "B/16", "L/14", "So400m/14"):
        with torch.device("meta"):
            model = NaViT(NaViTConfig.preset(name, num_classes=1000))
        sizes[name] = sum(p.numel() for p in model.blocks.parameters()) / 1e6
    assert {name: round(size, 1) for name, size in sizes.items()} == {
        "Ti/16": 5.3,
        "S/16": 21.2,
        "B/16": 85.0,
        "L/14": 302.0,
        "So400m/14": 411.1,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 15, "heads": 2}, "dim is 15, expected a multiple of 2 (heads); change dim or"),
        (
            {"attention": "flash"},
            "attention is 'flash', expected one of 'auto', 'reference', 'segments', 'varlen', 'f",
        ),
        ({"num_classes": 0}, "num_classes is 0, expected an integer in 1..2147483647; choose"),
        ({"patch_size": 200}, "patch_size is 200, expected an integer in 1..128; choose a usual"),
        ({"position": "absolute"}, "position is 'absolute', expected one of 'factorised_absolut"),
        ({"pooling": "cls"}, "pooling is 'cls', expected one of 'attention', 'mean', 'max', 'fi"),
        ({"head": "mlp"}, "head is 'mlp', expected one of 'linear', 'unit'; choose a head"),
        (
            {"dim": 6, "heads": 3, "position": "sinusoidal_absolute"},
            "dim is 6, expected a multiple of 4 with position='sinusoidal_absolute'; change dim",
        ),
        (
            {"dim": 18, "heads": 3, "position": "rotary"},
            "dim ÷ heads is 6, expected a multiple of 4 with position='rotary'; change dim or",
        ),
        ({"activation": "relu"}, "activation is 'relu', expected one of 'gelu', 'gelu_tanh', 'qui"),
        ({"resize": "area"}, "resize is 'area', expected one of 'bilinear', 'bicubic'; choose an"),
        ({"norm_eps": 0}, "norm_eps is 0, expected a number above 0; 1e-6 is usual"),
        ({"layer_scale": -1}, "layer_scale is -1, expected a number above 0; 1e-6 is usual"),
        (
            {"norm_pooled": True},
            "norm_pooled is True, expected False with pooling='attention'; choose pooling='mean'",
        ),
    ],
)
def test_wrong_model_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NaViTConfig(**{"num_classes": 3, **options})


@pytest.mark.parametrize("name", ["H/14", "B", "B/x", "", "siglip-base-patch16-naflex"])
def test_an_unknown_preset_is_refused(name):
    message = f"name is {name!r}, expected one of Ti, S, B, L, So400m and a patch size, such as"
    with pytest.raises(ValueError, match=re.escape(message)):
        NaViTConfig.preset(name, num_classes=3)


@pytest.mark.parametrize("name", ["siglip-base-patch32-16", "siglip2-large-patch0-256"])
def test_a_preset_without_a_whole_patch_is_refused(name):
    message = f"name is {name!r}, expected a patch size of 1 or more, and images no smaller than a"
    with pytest.raises(ValueError, match=message):
        NaViTConfig.preset(name, num_classes=3)


def test_patches_of_another_size_are_refused():
    batch, model = packed.batch_of(MANY), packed.model_of("segments")
    message = (
        "batch.patches.shape[-1] is 27, expected 12 (patch_size² × 3); "
        "give the model the patch_size the rows were packed with"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model(replace(batch, patches=torch.zeros(3, 33, 27)))


@pytest.mark.parametrize("position", ["factorised_absolute_stack", "learned_2d"])
def test_an_image_wider_than_the_position_table_is_refused(position):
    case = packed.RowSet(lens=[[67]], seq_len=70, max_segments=1)
    message = (
        "batch.grid_hw is 67, expected at most 65 patches an axis (max_side); "
        "raise max_side, or pack with fewer max_tokens"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        packed.model_of("segments", position=position)(packed.batch_of(case))
