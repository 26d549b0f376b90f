"""Averaged weights: those of a plain loop; validated, kept, loaded; trained on without a trace."""

import json
import re
from itertools import islice

import learning
import pytest
import torch
from safetensors.torch import load_file

import packpipe
from packpipe.model.navit import compile_parts
from packpipe.training.averages import average, copy_of, kept_share
from packpipe.training.checkpoints import checkpoints, model_of
from packpipe.training.evaluation import measure
from packpipe.training.log import read_log
from packpipe.training.loop import train
from packpipe.training.losses import LOSSES

EMA = 0.4  # above what the first steps keep, and below what later ones would


def trained(folder, *, stop=None, ema=EMA, **options):
    model = learning.model_of()
    config = learning.config_of(**{"ema": ema, "save_every": 1, "keep_last": 20, **options})
    run = train(
        model, learning.loader_of(), config, folder=folder, validate=learning.validation_of()
    )
    return list(islice(run, stop)), model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training of twelve steps, with the checkpoints of all of them."""
    folder = tmp_path_factory.mktemp("averaged")
    _, model = trained(folder)
    assert len(checkpoints(folder)) == learning.STEPS
    return folder, model


def weights_in(checkpoint):
    """(averaged, trained) weights of a checkpoint, read by nothing of packpipe."""
    moments = load_file(checkpoint / "optimizer.safetensors")
    own = {
        name.removesuffix(".trained"): value
        for name, value in moments.items()
        if name.endswith(".trained")
    }
    return load_file(checkpoint / "model.safetensors"), own


def same(one, other):
    assert one.keys() == other.keys() != set()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_average_is_that_of_a_plain_loop(folder):
    mean = {name: w.double() for name, w in learning.model_of().state_dict().items()}
    for step, checkpoint in enumerate(checkpoints(folder[0])):
        averaged, own = weights_in(checkpoint)
        kept = min(EMA, (1 + step) / (10 + step))
        for name, value in own.items():
            mean[name] = kept * mean[name] + (1 - kept) * value.double()
            assert (averaged[name] - mean[name]).abs().max() < 1e-6
    assert {kept_share(EMA, step) for step in range(12)} > {0.1, EMA}
    assert same(own, folder[1].state_dict())


def test_what_is_validated_and_loaded_is_the_average(folder):
    path, model = folder
    averaged, own = weights_in(checkpoints(path)[-1])
    found = model_of(path)
    assert same(found.state_dict(), averaged)
    assert not same(own, averaged)
    loss = LOSSES["sigmoid"]
    last = read_log(path)[-1]["val_loss"]
    assert last == measure(found, learning.validation_of(), loss).loss
    assert last != measure(model, learning.validation_of(), loss).loss
    assert same(packpipe.load_model(path)[0].state_dict(), averaged)


def test_the_weights_that_are_trained_know_nothing_of_their_average(folder, tmp_path):
    _, plain = trained(tmp_path, ema=None)
    assert same(plain.state_dict(), folder[1].state_dict())
    # A packpipe that knew of no averages would go on from them.
    versions = [
        json.loads((checkpoints(one)[-1] / "state.json").read_text())["version"]
        for one in (tmp_path, folder[0])
    ]
    assert versions == [2, 3]


@pytest.mark.parametrize("stop", [1, 6, 11])
def test_with_averages_it_goes_on_to_the_same_bits(stop, folder, tmp_path):
    trained(tmp_path, stop=stop)
    _, model = trained(tmp_path)
    assert same(model.state_dict(), folder[1].state_dict())
    for one, other in zip(checkpoints(tmp_path), checkpoints(folder[0]), strict=True):
        assert {f.name: f.read_bytes() for f in one.iterdir()} == {
            f.name: f.read_bytes() for f in other.iterdir()
        }


def test_averages_may_begin_and_end_where_a_training_goes_on(folder, tmp_path):
    trained(tmp_path, stop=5, ema=None)
    _, before = weights_in(checkpoints(tmp_path)[-1])
    assert before == {}
    before = load_file(checkpoints(tmp_path)[-1] / "model.safetensors")
    assert checkpoints(tmp_path)[-1].name == "step-00000004"
    trained(tmp_path, stop=2)
    averaged, own = weights_in(checkpoints(tmp_path)[-1])
    assert checkpoints(tmp_path)[-1].name == "step-00000005"
    for name, value in averaged.items():
        kept = 5 / 14  # of step 4, 0 being the first
        wanted = kept * before[name].double() + (1 - kept) * own[name].double()
        assert (value - wanted).abs().max() < 1e-6
    _, model = trained(tmp_path, ema=None)
    assert same(model.state_dict(), folder[1].state_dict())
    assert same(model_of(tmp_path).state_dict(), model.state_dict())


def test_a_copy_shares_nothing_with_a_compiled_model_and_draws_nothing():
    model = compile_parts(learning.model_of(), backend="eager")
    before = torch.get_rng_state()
    copy = copy_of(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(copy.state_dict(), model.state_dict())
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    batch = next(iter(learning.loader_of()))
    wanted = learning.model_of()(batch)
    assert torch.allclose(copy(batch)[batch.present], wanted[batch.present])
    assert not any(weight.requires_grad for weight in copy.parameters())
    average(copy, model, 0.0)
    assert same(copy.state_dict(), model.state_dict())


@pytest.mark.parametrize("ema", [0, 1.0, -0.5])
def test_a_wrong_share_is_refused(ema):
    message = f"ema is {ema}, expected in (0, 1); 0.999 is usual, None is none"
    with pytest.raises(ValueError, match=re.escape(message)):
        learning.config_of(ema=ema)
