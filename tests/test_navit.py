"""Laws 4, 5 and 8 on every attention backend, in float64 and float32."""

import re

import packed
import pytest
import torch
from hypothesis import assume, example, given

from packpipe.attention import BACKENDS, segment_mask
from packpipe.batch import PackedBatch
from packpipe.losses import segment_cross_entropy
from packpipe.navit import NaViTConfig, segment_softmax

backends = pytest.mark.parametrize("attention", BACKENDS)
tolerances = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)]
)
MANY = packed.RowSet(lens=[[1] * 6, [20, 1, 7, 3, 2], [33]], seq_len=33, max_segments=6)
LONG = packed.RowSet(lens=[[100, 57, 43], [200], [150, 1]], seq_len=200, max_segments=3)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def close(found, wanted, tolerance):
    scale = max(1.0, wanted.abs().max().item())
    return (found - wanted).abs().max().item() <= tolerance * scale


@backends
@tolerances
@given(case=packed.row_sets())
@example(case=MANY)
@example(case=LONG)
def test_packed_outputs_equal_those_of_each_image_alone(attention, dtype, tolerance, case):
    batch, model = packed.batch_of(case), packed.model_of(attention, dtype)
    together = model(batch)
    for row, number, one in packed.alone(batch):
        assert close(together[row, number], model(one)[0, 0], tolerance)


@backends
@tolerances
@given(case=packed.row_sets())
@example(case=MANY)
@example(case=LONG)
def test_packed_loss_and_gradients_equal_those_of_each_image_alone(
    attention, dtype, tolerance, case
):
    batch, model = packed.batch_of(case), packed.model_of(attention, dtype)
    loss = segment_cross_entropy(model(batch), batch.labels)
    loss.backward()
    together = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    losses = [segment_cross_entropy(model(one), one.labels) for _, _, one in packed.alone(batch)]
    mean = torch.stack(losses).mean()
    mean.backward()
    assert close(loss.detach(), mean.detach(), tolerance)
    assert all(close(together[name], grad, tolerance) for name, grad in gradients(model).items())


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(case=packed.row_sets())
@example(case=MANY)
@example(case=LONG)
def test_changing_one_segment_leaves_every_other_bit_untouched(attention, dtype, case):
    batch, model = packed.batch_of(case), packed.model_of(attention, dtype)
    row = max(range(len(case.lens)), key=lambda r: len(case.lens[r]))
    assume(len(case.lens[row]) > 1)
    changed_pixels = batch.patches.clone()
    in_first = batch.segment_ids[row] == 1
    changed_pixels[row, in_first] = 255 - changed_pixels[row, in_first]
    changed = PackedBatch(**{**vars(batch), "patches": changed_pixels})
    before, after = model(batch), model(changed)
    others = batch.present.clone()
    others[row, 0] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[row, 0], after[row, 0])


@backends
@given(case=packed.row_sets())
@example(case=MANY)
@example(case=LONG)
def test_the_gradient_across_segments_is_exactly_zero(attention, case):
    batch, model = packed.batch_of(case), packed.model_of(attention)
    row = max(range(len(case.lens)), key=lambda r: len(case.lens[r]))
    assume(len(case.lens[row]) > 1)
    last = len(case.lens[row])
    pixels = batch.patches.double().requires_grad_()
    model(PackedBatch(**{**vars(batch), "patches": pixels}))[row, last - 1].sum().backward()
    reached = pixels.grad.abs().sum(-1) > 0
    own = torch.zeros_like(reached)
    own[row] = batch.segment_ids[row] == last
    assert torch.equal(reached, own)


@tolerances
@given(case=packed.row_sets())
@example(case=MANY)
@example(case=LONG)
def test_the_backends_agree(dtype, tolerance, case):
    batch = packed.batch_of(case)
    outputs = [packed.model_of(attention, dtype)(batch)[batch.present] for attention in BACKENDS]
    assert close(outputs[0], outputs[1], tolerance)


@backends
@given(case=packed.row_sets())
@example(case=MANY)
def test_every_parameter_learns(attention, case):
    assume(any(length > 1 for lens in case.lens for length in lens))  # one token has no softmax
    batch, model = packed.batch_of(case), packed.model_of(attention)
    segment_cross_entropy(model(batch), batch.labels).backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name


@backends
def test_a_row_of_padding_alone_changes_nothing(attention):
    case = packed.RowSet(lens=[[3, 2], []], seq_len=6, max_segments=6)
    without = packed.RowSet(lens=[[3, 2]], seq_len=6, max_segments=6)
    model = packed.model_of(attention)
    outputs = []
    for rows in (case, without):
        batch = packed.batch_of(rows)
        model.zero_grad()
        segment_cross_entropy(model(batch), batch.labels).backward()
        outputs.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(gradient.isfinite().all() for gradient in outputs[0])
    assert all(close(a, b, 1e-12) for a, b in zip(*outputs, strict=True))


@backends
def test_one_graph_serves_every_batch(attention):
    torch._dynamo.reset()
    model = packed.model_of(attention, torch.float32)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for seed, lens in enumerate([[[5, 3], [16]], [[1] * 6, [2]], [[16], []], [[7], [8, 8]]]):
        batch = packed.batch_of(packed.RowSet(lens, seq_len=16, max_segments=6, seed=seed))
        assert close(compiled(batch)[batch.present], model(batch)[batch.present], 1e-5)
    assert len(graphs) == 1


@given(case=packed.row_sets())
def test_pooling_weights_sum_to_one_in_every_segment(case):
    batch = packed.batch_of(case)
    logits = torch.randn(*batch.segment_ids.shape, 3, dtype=torch.float64) * 30
    weights = segment_softmax(logits, batch.segment_ids, case.max_segments)
    assert (weights[batch.segment_ids == 0] == 0).all()
    for row, lens in enumerate(case.lens):
        for number in range(len(lens)):
            mine = batch.segment_ids[row] == number + 1
            alone = logits[row, mine].softmax(0)
            assert close(weights[row, mine], alone, 1e-12)


def test_the_mask_of_a_small_row_is_as_drawn():
    mask = segment_mask(torch.tensor([[1, 1, 2, 0]]))[0, 0]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_positions_come_from_coordinates_not_from_row_order():
    batch, model = packed.batch_of(MANY), packed.model_of("segments")
    order = torch.arange(33)
    order[:20] = order[:20].flip(0)  # the tokens of row 1's first image, backwards
    shuffled = PackedBatch(
        **{
            **vars(batch),
            "patches": batch.patches[:, order],
            "coords": batch.coords[:, order],
            "segment_ids": batch.segment_ids[:, order],
        }
    )
    assert close(model(shuffled)[1, 0], model(batch)[1, 0], 1e-10)
    moved = PackedBatch(**{**vars(batch), "coords": batch.coords.flip(-1)})
    assert not close(model(moved)[1, 0], model(batch)[1, 0], 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 15, "heads": 2}, "dim is 15, expected a multiple of 2 (heads); change dim or"),
        ({"attention": "flash"}, "attention is 'flash', expected one of 'segments', 'reference';"),
        ({"num_classes": 0}, "num_classes is 0, expected an integer in 1..2147483647; choose"),
        ({"patch_size": 200}, "patch_size is 200, expected an integer in 1..128; choose a usual"),
    ],
)
def test_wrong_model_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NaViTConfig(**{"num_classes": 3, **options})


def test_patches_of_another_size_are_refused():
    batch, model = packed.batch_of(MANY), packed.model_of("segments")
    message = (
        "batch.patches.shape[-1] is 27, expected 12 (patch_size² × 3); "
        "give the model the patch_size the rows were packed with"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model(PackedBatch(**{**vars(batch), "patches": torch.zeros(3, 33, 27)}))


def test_an_image_wider_than_the_position_table_is_refused():
    case = packed.RowSet(lens=[[67]], seq_len=70, max_segments=1)
    message = (
        "batch.grid_hw is 67, expected at most 65 patches an axis (max_side); "
        "raise max_side, or pack with fewer max_tokens"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        packed.model_of("segments")(packed.batch_of(case))
