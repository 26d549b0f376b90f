"""A training's folder as a model: what is saved comes back, the best weights, a new head."""

import json
import re
import shutil
from dataclasses import replace

import learning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import packpipe
from packpipe import Choice, PackConfig, Side, Square
from packpipe.planning.distributions import Constant
from packpipe.training import run_folder
from packpipe.training.checkpoints import checkpoints, model_of
from packpipe.training.log import read_log
from packpipe.training.loop import train
from packpipe.training.run_folder import (
    RunOptions,
    load_model,
    read_options,
    validation_figures,
    write_options,
)

PACKING = PackConfig(seq_len=16, patch_size=2, resolution="budget", max_tokens=9)
NAMES = ("ant", "bee", "cat", "dog", "elk")
OPTIONS = RunOptions(class_names=NAMES, label_column="kind", loss="softmax", packing=PACKING)


def trained(folder, options=OPTIONS, **config):
    """A validated training whose loss is not least at its last step."""
    every = {"val_every": 2, "learning_rate": 1.0, "warm_up": 0, "cool_down": 0, **config}
    run = train(
        learning.model_of(),
        learning.loader_of(),
        learning.config_of(**every),
        folder=folder,
        validate=learning.validation_of(),
        run_options=options,
    )
    return list(run)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trained(folder)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def weights_of(checkpoint):
    """The weights of a checkpoint, read by nothing of packpipe."""
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


def same(model, weights):
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[n], weights[n]) for n in own)


names = st.none() | st.lists(st.text(max_size=5), unique=True, max_size=4).map(tuple)
laws = st.sampled_from(["native", "budget", Side(Choice((32, 64))), Square(Constant(224))])


@given(names, st.none() | st.text(max_size=5), laws, st.sampled_from(["sigmoid", "softmax"]))
def test_options_come_back_from_json(class_names, label_column, law, loss):
    packing = PackConfig(seq_len=300, resolution=law, background=(1, 2, 3), profiles="ignore")
    options = RunOptions(
        class_names=class_names, label_column=label_column, loss=loss, packing=packing
    )
    assert RunOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_a_run_is_a_model_with_the_best_weights_and_its_options(run, caplog):
    model, options = packpipe.load_model(run)
    assert options == OPTIONS
    best = min((line["val_loss"], line["step"]) for line in read_log(run) if line["val_loss"])[1]
    last = checkpoints(run)[-1]
    assert last.name != f"step-{best:08d}"
    assert same(model, weights_of(run / f"step-{best:08d}"))
    assert same(model_of(run), weights_of(last))
    assert caplog.messages == []


def test_if_the_best_is_damaged_the_last_is_loaded_with_a_warning(copy, caplog):
    best = min((line["val_loss"], line["step"]) for line in read_log(copy) if line["val_loss"])[1]
    (copy / f"step-{best:08d}" / "model.safetensors").write_bytes(b"")
    model, _ = load_model(copy)
    assert same(model, weights_of(checkpoints(copy)[-1]))
    assert f"step-{best:08d} is damaged (model.safetensors does not match" in caplog.text


def test_a_run_knows_what_its_best_weights_were_measured_as(run, copy):
    best = min((line["val_loss"], line["step"]) for line in read_log(run) if line["val_loss"])
    found = validation_figures(run)
    (line,) = (line for line in read_log(run) if line["step"] == best[1])
    assert found == {
        "step": best[1],
        "images": sum(int(batch.present.sum()) for batch in learning.validation_of()),
        "loss": best[0],
        "accuracy": line["val_accuracy"],
        "ece": line["val_ece"],
    }
    # Measured on the very weights that are loaded; without those there is nothing to tell.
    shutil.rmtree(copy / f"step-{best[1]:08d}")
    assert validation_figures(copy) is None
    assert validation_figures(copy / "nowhere") is None


def test_a_new_head_is_on_the_old_trunk(run):
    old, _ = load_model(run)
    torch.manual_seed(3)
    model, options = load_model(run, num_classes=3)
    assert model.config.num_classes == 3
    assert (options.class_names, options.label_column) == (None, None)
    assert options.packing == PACKING
    weights = old.state_dict()
    assert model.head.weight.shape == (3, 16)
    trunk = {name: value for name, value in model.state_dict().items() if name != "head.weight"}
    assert trunk.keys() == weights.keys() - {"head.weight"}
    assert all(torch.equal(value, weights[name]) for name, value in trunk.items())
    # Of as many classes, too, it is a new one, drawn by torch's generator.
    heads = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        heads.append(load_model(run, num_classes=5)[0].head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], old.head.weight)


def test_a_folder_from_before_is_a_model_with_a_warning(copy, caplog):
    (copy / "model.json").unlink()
    model, options = load_model(copy)
    assert model.config.num_classes == 5
    assert options.class_names is None
    assert options.packing == PackConfig(patch_size=2, resolution="budget", max_tokens=256)
    assert f"{copy} has no model.json: classes have no names, images get 256 tokens" in caplog.text


def test_what_a_later_packpipe_wrote_is_refused_by_name(copy):
    path = copy / "model.json"
    told = json.loads(path.read_text())
    law = {"Square": {"pixels": {"Later": {}}}}
    for options, name in (({"later": 1}, "later"), ({"resolution": law}, "Later")):
        path.write_text(json.dumps({**told, "packing": {**told["packing"], **options}}))
        message = f"an option in {path} is {name!r}, expected one of "
        with pytest.raises(ValueError, match=re.escape(message)):
            load_model(copy)
    path.write_text(json.dumps(told))
    checkpoint = checkpoints(copy)[-1]
    (checkpoint / "checksums.xxh128").unlink()  # as the first version wrote it
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "version": 1, "model": {**state["model"], "later": 1}}))
    message = f"an option in {path} is 'later', expected one of 'num_classes', "
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(copy)


def test_a_training_goes_on_with_the_same_loss(copy):
    before = (copy / "model.json").read_bytes()
    message = "loss is 'sigmoid', expected 'softmax' as in model.json; pass it, or another folder"
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(copy, replace(OPTIONS, loss="sigmoid"), steps=12)
    assert (copy / "model.json").read_bytes() == before
    # Of a run from before there was model.json nobody knows it.
    (copy / "model.json").unlink()
    run_folder.check_options(copy, replace(OPTIONS, loss="sigmoid"))


def test_a_training_with_classes_of_other_names_does_not_go_on(copy):
    before = (copy / "model.json").read_bytes()
    other = replace(OPTIONS, class_names=NAMES[::-1])
    message = "class_names is ('elk', 'dog', 'cat', 'bee', 'ant'), expected ('ant', 'bee', 'cat', "
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(copy, other)
    assert (copy / "model.json").read_bytes() == before
    assert trained(copy) == []


def test_a_training_that_is_refused_leaves_the_options_as_they_were(copy):
    before = (copy / "model.json").read_bytes()
    other = RunOptions(class_names=NAMES, loss="softmax", packing=PackConfig())
    loader = learning.loader_of(3)
    run = train(
        learning.model_of(),
        loader,
        learning.config_of(),
        folder=copy,
        validate=learning.validation_of(),
        run_options=other,
    )
    with pytest.raises(ValueError, match=r"state\['global_batch'\] is 2, expected 3"):
        next(run)
    assert (copy / "model.json").read_bytes() == before


def test_a_damaged_or_later_file_is_named(copy):
    path = copy / "model.json"
    path.write_text('{"version": 2}')
    with pytest.raises(ValueError, match=r"model.json version is 2, expected 1; use the packpipe"):
        load_model(copy)
    path.write_text('{"version": 1, "cla')
    with pytest.raises(ValueError, match=r"model.json is '.*', expected JSON; restore it; without"):
        load_model(copy)
    (copy / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; train with this folder"):
        load_model(copy / "nothing")
    for other in ("dinov2", path):
        message = f"run is '{other}', expected a folder that packpipe train wrote (packpipe train "
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            load_model(other)


def test_options_are_written_whole_and_only_when_they_change(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(run_folder, "write_json", lambda path, value: written.append((path, value)))
    write_options(tmp_path, OPTIONS)
    assert written == [(tmp_path / "model.json", OPTIONS.to_dict())]
    monkeypatch.undo()
    write_options(tmp_path, OPTIONS)
    assert read_options(tmp_path) == OPTIONS
    before = (tmp_path / "model.json").stat().st_mtime_ns
    write_options(tmp_path, OPTIONS)
    assert (tmp_path / "model.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("law", ["native", "budget", Square(Constant(64))])
def test_another_budget_is_of_as_many_tokens(law):
    options = RunOptions(packing=PackConfig(seq_len=64, resolution=law))
    asked = options.at(100)
    assert asked.max_tokens == 100
    assert asked.packing.seq_len == 100
    if isinstance(law, Square):
        assert asked.packing.resolution == Square(Constant(160))
        assert options.max_tokens == 16
    else:
        assert (asked.packing.resolution, options.max_tokens) == ("budget", 64)
    with pytest.raises(ValueError, match=r"max_tokens is 0, expected an integer in 1\.\.32767"):
        options.at(0)
