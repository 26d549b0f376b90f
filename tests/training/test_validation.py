"""Validation: its figures are those of the answers; it changes no weight, and goes on as it was."""

import math
import re
import signal
from itertools import islice

import learning
import packed
import pytest
import torch
from forked import Forked
from hypothesis import given
from hypothesis import strategies as st
from processes import wait_until

from packpipe import Augment, PackedLoader
from packpipe.model.predict import predict_packs
from packpipe.training.checkpoints import checkpoints, model_of
from packpipe.training.evaluation import accuracy, calibration_error, measure
from packpipe.training.log import read_log
from packpipe.training.loop import LOSSES, train
from packpipe.training.validation import Standing

FIGURES = ("loss", "val_loss", "val_accuracy", "val_ece")


def trained(folder=None, *, stop=None, validate=None, ends=lambda: False, **options):
    """The records of a validated training, or of its first steps, and its model."""
    model = learning.model_of()
    validate = validate or learning.validation_of()
    config = learning.config_of(**{"val_every": 3, **options})
    run = train(model, learning.loader_of(), config, folder=folder, validate=validate, stop=ends)
    return list(islice(run, stop)), model


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def steps_in(folder):
    return [int(path.name.removeprefix("step-")) for path in checkpoints(folder)]


def bytes_of(folder):
    return {
        f"{path.name}/{file.name}": file.read_bytes()
        for path in checkpoints(folder)
        for file in path.iterdir()
    }


def figures_of(folder):
    return [[line["step"], *(line[name] for name in FIGURES)] for line in read_log(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a training that is not stopped, and its model."""
    folder = tmp_path_factory.mktemp("whole")
    records, model = trained(folder, keep_best=2)
    assert [r.step for r in records if r.val_loss is not None] == [3, 6, 9, 12]
    return folder, model


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_figures_are_those_of_the_answers(name, batch_size):
    loader, model = learning.validation_of(batch_size=batch_size), learning.model_of()
    found = measure(model, loader, LOSSES[name])
    assert model.training
    answers = predict_packs(model, loader.packs)
    assert found.num_images == len(answers.labels) > 10
    assert found.accuracy == pytest.approx(accuracy(answers), abs=1e-12)
    assert found.ece == pytest.approx(calibration_error(answers), abs=1e-6)
    losses = []
    for logits, label in zip(answers.outputs.tolist(), answers.labels.tolist(), strict=True):
        if name == "softmax":
            losses.append(math.log(sum(map(math.exp, logits))) - logits[label])
        else:
            signed = [-z if k == label else z for k, z in enumerate(logits)]
            losses.append(sum(math.log1p(math.exp(z)) for z in signed))
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_a_model_that_gives_nan_is_told_as_such():
    model = learning.model_of()
    torch.nn.init.constant_(model.head.weight, math.nan)
    found = measure(model, learning.validation_of(), LOSSES["softmax"])
    assert math.isnan(found.loss)
    assert math.isnan(found.ece)
    assert Standing().after(4, found.loss, keep=1) == Standing((), 1)


@pytest.mark.parametrize(
    ("loader", "model", "message"),
    [
        ({"tail": "drop"}, {}, "tail of the loader is 'drop', expected 'pad', since 'drop' leaves"),
        (
            {"augment": Augment(cutmix=1)},
            {},
            "augment of the loader is Augment(*mix_prob=1.0), expected None, or one that mixes no",
        ),
        ({}, {"pooling": "none"}, "(num_classes, pooling) is (5, 'none'), expected classes, and"),
        ({}, {"num_classes": None}, "(num_classes, pooling) is (None, 'attention'), expected cl"),
        ({}, {"num_classes": 2}, "a label is 3, expected 0..1, or -100"),
    ],
)
def test_what_cannot_be_measured_is_refused(loader, model, message):
    model = packed.model_of("auto", torch.float32, **model)
    # In place of each * stands something.
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\*", ".*")):
        measure(model, learning.validation_of(**loader), LOSSES["softmax"])


def test_images_without_a_label_are_not_measured():
    table = learning.table().drop_columns(["labels"])
    loader = PackedLoader(table, 2, max_segments=4, tail="pad")
    with pytest.raises(ValueError, match=r"batch.labels is None, expected integer labels; pack w"):
        measure(learning.model_of(), loader, LOSSES["softmax"])
    empty = PackedLoader(learning.table().slice(0, 0), 2, max_segments=4, tail="pad")
    with pytest.raises(ValueError, match="labels is 'none', expected one label at least"):
        measure(learning.model_of(), empty, LOSSES["softmax"])


@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.5, math.nan, math.inf]), max_size=20),
    st.integers(0, 4),
)
def test_the_standing_is_that_of_all_losses_sorted(losses, keep):
    standing = Standing()
    for step, loss in enumerate(losses, 1):
        standing = standing.after(step, loss, keep=keep)
    finite = [(loss, step) for step, loss in enumerate(losses, 1) if loss < math.inf]
    assert list(standing.best) == sorted(finite)[: max(1, keep)]
    first = losses.index(min(finite)[0]) + 1 if finite else 0
    assert standing.waited == len(losses) - first


def test_to_be_validated_changes_no_weight(whole):
    plain = learning.model_of()
    list(train(plain, learning.loader_of(), learning.config_of()))
    assert same_weights(plain, whole[1])


def test_a_record_speaks_of_the_weights_after_its_step(whole):
    folder, model = whole
    last = read_log(folder)[-1]
    found = measure(model, learning.validation_of(), LOSSES["sigmoid"])
    assert [last[f"val_{name}"] for name in ("loss", "accuracy", "ece")] == list(found[:3])
    assert [line["step"] for line in read_log(folder) if line["val_loss"] is None] != []


def test_the_best_checkpoints_are_kept_beside_the_last(whole):
    folder, _ = whole
    measured = sorted((x[2], x[0]) for x in figures_of(folder) if x[2] is not None)
    best = [step for _, step in measured[:2]]
    assert steps_in(folder) == sorted({10, 12, *best})


def test_more_of_the_last_can_be_kept(tmp_path):
    trained(tmp_path, keep_last=4, keep_best=0, steps=10)
    assert steps_in(tmp_path) == [4, 6, 8, 10]


@pytest.mark.parametrize(
    ("asks", "stop"),
    [(False, 4), (False, 7), (True, 1), (True, 11)],
    ids=["left", "left", "asks", "asks"],
)
def test_stopped_anywhere_it_goes_on_to_the_same_figures(stop, asks, whole, tmp_path):
    if asks:
        answers = iter([False] * (stop - 1) + [True])
        records, _ = trained(tmp_path, keep_best=2, ends=lambda: next(answers))
        assert records[-1].step == stop == steps_in(tmp_path)[-1]
    else:
        trained(tmp_path, keep_best=2, stop=stop)
    trained(tmp_path, keep_best=2)
    assert figures_of(tmp_path) == figures_of(whole[0])
    found, wanted = bytes_of(tmp_path), bytes_of(whole[0])
    if asks and stop == 11:  # the last two, then, are 11 and 12
        found, wanted = ({k: v for k, v in x.items() if k in found} for x in (found, wanted))
    assert found.items() >= wanted.items()


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_bits(tmp_path):
    _, model = trained(tmp_path / "whole")
    folder, seen = tmp_path / "killed", []
    for wait in (1, 4, 3, 0):  # lines to wait for before each kill
        most = wait + 2 if wait else 0  # every other step has a checkpoint, or is validated
        process = Forked(learning.__file__, folder, 2, most, 3)
        if wait:
            wait_until(lambda process=process, wait=wait: process.said.count("\n") >= wait)
            process.kill()
        seen.append(process.wait())
        lines = [int(line) for line in process.said.split()]
        assert all(path.joinpath("state.json").exists() for path in checkpoints(folder))
    assert seen == [-signal.SIGKILL] * 3 + [0]
    assert lines[0] > 1
    assert figures_of(folder) == figures_of(tmp_path / "whole")
    assert bytes_of(folder) == bytes_of(tmp_path / "whole")
    assert same_weights(model, model_of(folder))


def never_better(**options):
    """Options of a training whose validation loss is least at step 2."""
    return {"val_every": 2, "patience": 2, "learning_rate": 10.0, "save_every": None, **options}


def test_without_a_better_step_it_ends_and_stays_ended(tmp_path):
    records, _ = trained(tmp_path, **never_better())
    losses = [r.val_loss for r in records if r.val_loss is not None]
    assert len(losses) < 6
    assert min(losses) == losses[-3]
    assert losses[-3] < min(losses[-2:])
    last = records[-1].step
    assert set(steps_in(tmp_path)) == {last - 4, last}
    again, _ = trained(tmp_path, **never_better())
    assert again == []
    more, _ = trained(tmp_path, **never_better(patience=3))
    assert [r.step for r in more] == [last + 1, last + 2]


def test_other_validation_images_are_refused_by_name(tmp_path):
    trained(tmp_path, stop=4)
    message = r"fingerprint of the validation images is '\w+', expected '\w+'; they are others, or"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, validate=learning.validation_of(6))
    with pytest.raises(ValueError, match="validate is None, expected the images that the checkpo"):
        next(
            train(learning.model_of(), learning.loader_of(), learning.config_of(), folder=tmp_path)
        )
    # At another batch size it is the same images.
    records, _ = trained(tmp_path, validate=learning.validation_of(batch_size=3))
    assert records[-1].step == 12


def test_a_checkpoint_from_before_validation_goes_on_with_it(tmp_path):
    run = train(learning.model_of(), learning.loader_of(), learning.config_of(), folder=tmp_path)
    assert len(list(islice(run, 5))) == 5
    records, _ = trained(tmp_path)
    assert [r.step for r in records if r.val_loss is not None] == [6, 9, 12]
    assert model_of(tmp_path).config.num_classes == packed.NUM_CLASSES


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"keep_last": 1}, "keep_last is 1, expected an integer in 2.."),
        ({"keep_best": -1}, "keep_best is -1, expected an integer in 0.."),
        ({"patience": 0}, "patience is 0, expected an integer in 1.."),
        ({"val_every": 0}, "val_every is 0, expected an integer in 1.."),
    ],
)
def test_wrong_options_are_refused(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        learning.config_of(**option)
