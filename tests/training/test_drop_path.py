"""Drop path: drawn by address, the same in any pack and batch; the model with it is its twin."""

import re

import laws
import learning
import naive_attention
import naive_navit
import numpy as np
import packed
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import MANY, Setting, close

from packpipe.loading.batch import PackedBatch
from packpipe.model.attention import BACKENDS
from packpipe.model.navit import compile_parts
from packpipe.philox import DROP_PATH, Key
from packpipe.training.drop_path import drawn_paths
from packpipe.training.loop import train

KEY = Key(3, 1)


@pytest.fixture(autouse=True, scope="module")
def plain_kernels():
    with naive_attention.in_place_of_kernels():
        yield


def plain_path(key, example, view, rate, depth):
    """What is drawn for one image, by NumPy's own generator."""
    counter = np.array([0, DROP_PATH, example, view], np.uint64)
    drawn = np.random.Philox(key=np.array(key, np.uint64), counter=counter).random_raw(2 * depth)
    path = []
    for block in range(depth):
        p = rate * (block + 1) / depth
        own = [int(word) / 2**64 for word in drawn[2 * block : 2 * block + 2]]
        path.append([0.0 if u < p else 1 / (1 - p) for u in own])
    return path


@given(
    case=packed.row_sets(),
    rate=st.floats(0, 0.99),
    depth=st.integers(1, 5),
    key=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 9)),
    view=st.integers(0, 3),
    data=st.data(),
)
def test_an_image_draws_the_same_wherever_it_lies(case, rate, depth, key, view, data):
    number = sum(map(len, case.lens))
    examples = data.draw(st.permutations(range(100, 100 + number)))
    batch = packed.batch_of(case, example_index=examples)
    if view:
        batch.view = torch.where(batch.present, view, -1).int()
    paths = drawn_paths(batch, Key(*key), rate, depth)
    assert paths.shape == (*batch.seq_lens.shape, depth, 2)
    assert paths.dtype == torch.float32
    for place in batch.present.nonzero().tolist():
        wanted = plain_path(key, int(batch.example_index[tuple(place)]), view, rate, depth)
        assert torch.allclose(paths[tuple(place)], torch.tensor(wanted), rtol=1e-6)
    assert not paths[~batch.present].any()


def test_as_many_go_around_as_the_rate_of_the_block_says():
    case = packed.RowSet([[1] * 50] * 100, seq_len=50, max_segments=50)
    paths = drawn_paths(packed.batch_of(case), KEY, 0.6, 3).flatten(0, 1)
    for block, rate in enumerate([0.2, 0.4, 0.6]):
        for part in paths[:, block].T:
            assert float((part == 0).double().mean()) == pytest.approx(rate, abs=0.03)
            assert float(part.mean()) == pytest.approx(1, abs=0.08)
    both = (paths[:, 2] == 0).double()
    assert float((both[:, 0] * both[:, 1]).mean()) == pytest.approx(0.36, abs=0.03)
    other = drawn_paths(packed.batch_of(case), Key(3, 2), 0.6, 3).flatten(0, 1)
    assert not torch.equal(paths, other)
    assert (drawn_paths(packed.batch_of(case), KEY, 0.0, 3) == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", ["attention", "none"])
def test_the_model_with_it_is_its_plain_twin_and_packed_equals_alone(backend, pooling):
    batch = packed.batch_of(MANY)
    setting = Setting(backend, pooling=pooling)
    model, alone = setting.model(), setting.alone()
    paths = drawn_paths(batch, KEY, 0.5, 2).double()
    assert {0.0, 2.0} < set(paths[batch.present].flatten().tolist())
    outputs, loss, gradients = laws.results_of(setting, model, lambda m, b: m(b, paths), batch)
    laws.every_gradient_learns(gradients, MANY)

    def one_at_a_time(model, batch):
        found = torch.full((*laws.present(model, batch).shape, packed.NUM_CLASSES), torch.nan)
        found = found.double()
        for row, number, one in packed.alone(batch):
            own = paths[row : row + 1, number : number + 1]
            image = {
                "patches": one.patches[0],
                "coords": one.coords[0].tolist(),
                "grid_hw": one.grid_hw[0, 0].tolist(),
            }
            out = model(one, own)[0]
            twin = naive_navit.forward(model, image, own[0, 0].tolist())
            assert close(out, twin.reshape(out.shape), 1e-10)
            place = batch.segment_ids[row] == number + 1
            place = place.nonzero()[:, 0] if pooling == "none" else torch.tensor([number])
            found = found.index_put((torch.full_like(place, row), place), out)
        return found

    wanted, wanted_loss, wanted_gradients = laws.results_of(setting, alone, one_at_a_time, batch)
    assert close(outputs, wanted, 1e-10)
    assert close(loss, wanted_loss, 1e-10)
    for name, gradient in gradients.items():
        assert close(gradient, wanted_gradients[name], 1e-10), name
    plain = setting.model()(batch)[laws.present(model, batch)]
    assert not close(outputs, plain, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_or_in_half_precision_it_is_the_same(dtype):
    batch = packed.batch_of(MANY)
    paths = drawn_paths(batch, KEY, 0.5, 2)
    for position in ("rotary", "factorised_absolute_sum"):
        model = packed.model_of("reference", torch.float32, position=position)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            wanted = model(batch, paths)
            compile_parts(model, backend="eager", fullgraph=True)
            found = model(batch, paths)
        assert found.dtype == wanted.dtype == dtype
        assert torch.allclose(found[batch.present], wanted[batch.present], rtol=1e-3, atol=1e-3)


def test_training_with_it_is_a_plain_loop():
    config = learning.config_of(steps=8, drop_path=0.5)
    model = learning.model_of(torch.float64)
    records = list(train(model, learning.loader_of(), config))
    loader = learning.loader_of()
    epochs = [list(loader) for _ in range(2)]
    keys = {id(batch): (3, epoch) for epoch in range(2) for batch in epochs[epoch]}

    def paths_of(batch):
        paths = torch.zeros(*batch.seq_lens.shape, 2, 2)
        for row, number in batch.present.nonzero().tolist():
            example = int(batch.example_index[row, number])
            paths[row, number] = torch.tensor(plain_path(keys[id(batch)], example, 0, 0.5, 2))
        return paths

    batches = [[batch] for epoch in epochs for batch in epoch][:8]
    losses, plain = learning.plainly_trained(batches, config, torch.float64, paths_of)
    assert [r.loss for r in records] == pytest.approx(losses, rel=1e-9)
    assert learning.largest_difference(model, plain) < 1e-7
    without = learning.plainly_trained(batches, config, torch.float64)[1]
    assert learning.largest_difference(plain, without) > 1e-3


def test_rows_that_do_not_say_which_example_is_which_are_refused():
    batch = packed.batch_of(MANY)
    unknown = PackedBatch({**batch, "example_index": torch.full_like(batch.example_index, -1)})
    message = "example_index is -1, expected rows that say which example is which, for drop_path; "
    with pytest.raises(ValueError, match=re.escape(message)):
        drawn_paths(unknown, KEY, 0.1, 2)
