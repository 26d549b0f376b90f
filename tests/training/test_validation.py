"""Validation: its figures are those of the answers; it changes no weight, and goes on as it was."""

import math
import re
import signal
from itertools import islice

import learning
import packed
import pictures
import pytest
import torch
from forked import Forked
from hypothesis import given
from hypothesis import strategies as st
from processes import wait_until

from packpipe import Augment, EpochPacks, PackedLoader, PackedStream
from packpipe.loading.stored import StoredPacks
from packpipe.model.predict import predict_packs
from packpipe.rows.rejects import TooManyRejects
from packpipe.training.checkpoints import checkpoints, model_of
from packpipe.training.evaluation import accuracy, calibration_error, measure
from packpipe.training.log import read_log
from packpipe.training.loop import train
from packpipe.training.losses import LOSSES
from packpipe.training.validation import Standing, Validator

FIGURES = ("loss", "val_loss", "val_accuracy", "val_ece")


def trained(folder=None, *, stop=None, validate=None, ends=lambda: False, **options):
    """The records of a validated training, or of its first steps, and its model.

    It augments, accumulates, averages and drops paths, too.
    """
    model, loader = learning.model_of(), learning.loader_of(augment=learning.AUGMENT)
    validate = validate or learning.validation_of()
    config = learning.config_of(**{"val_every": 3, **learning.EVERYTHING, **options})
    run = train(model, loader, config, folder=folder, validate=validate, stop=ends)
    return list(islice(run, stop)), model


def validator_of(loader, model=None):
    model = model or learning.model_of()
    return Validator(model, loader, LOSSES["softmax"], half=False, keep_best=1, patience=None)


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


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
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
        (
            {"tail": "drop"},
            {},
            "tail of the loader is 'drop', expected 'pad', which leaves no imag",
        ),
        (
            {"tail": "error"},
            {},
            "tail of the loader is 'error', expected 'pad', which leaves no im",
        ),
        (
            {"augment": Augment(flip=0.5)},
            {},
            "augment of the loader is Augment(*flip=0.5*), expected None; measure images as they a",
        ),
        ({"as_numpy": True}, {}, "as_numpy of the loader is True, expected False; make one whose"),
        ({}, {"pooling": "none"}, "(num_classes, pooling) is (5, 'none'), expected classes, and"),
        ({}, {"num_classes": None}, "(num_classes, pooling) is (None, 'attention'), expected cl"),
        ({}, {"num_classes": 2}, "a label is 4, expected 0..1, or -100"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_step(loader, model, message):
    model = packed.model_of("auto", torch.float32, **model)
    # In place of each * stands something.
    message = re.escape(message).replace(r"\*", ".*")
    with pytest.raises(ValueError, match=message):
        measure(model, learning.validation_of(**loader), LOSSES["softmax"])
    with pytest.raises(ValueError, match=message):
        validator_of(learning.validation_of(**loader), model)


def test_images_that_are_not_known_to_have_labels_are_refused_before_a_step():
    table = learning.table().drop_columns(["labels"])
    images = pictures.dataset_of([pictures.encoded_image(64, 64)])
    for packs, message in [
        (table, "labels of the loader is None, expected integer labels; pack with label_column"),
        (
            EpochPacks(images.remove_columns("label"), 16),
            "labels of the loader is None, expected integer labels; pack wi",
        ),
        (learning.table().slice(0, 0), "labels is 'none', expected one label at least"),
        (
            PackedStream(images.to_iterable_dataset(), 16),
            "validate is 'a stream', expected packs that are known before they are read; use Epo",
        ),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            validator_of(PackedLoader(packs, 2, tail="pad"))


def test_labels_that_packs_of_a_callers_own_lack_are_missed_when_they_are_measured():
    class Own(StoredPacks):
        @property
        def labels(self):
            raise AttributeError

    packs = Own(learning.table().drop_columns(["labels"]))
    loader = PackedLoader(packs, 2, max_segments=4, tail="pad")
    with pytest.raises(ValueError, match=r"batch.labels is None, expected integer labels; pack w"):
        measure(learning.model_of(), loader, LOSSES["softmax"])


class Broken(StoredPacks):
    """Packs that cannot be read at one of the measurements, the first being 1."""

    at, asked = 0, 0

    def rows(self, key, packs):
        self.asked += 1
        if self.at and self.asked > 4 * (self.at - 1):  # of two rows each
            raise TooManyRejects("rejected is 3 of 9 examples", [])
        return super().rows(key, packs)


@pytest.mark.parametrize("at", [1, 4])
def test_a_validation_that_fails_loses_no_step_and_is_made_up_for(at, whole, tmp_path):
    packs = Broken(learning.table(7))
    packs.at = at
    broken = PackedLoader(packs, 2, seed=5, max_segments=4, tail="pad")
    options = {"keep_best": 2, "log_every": 5 if at == 1 else 1, "validate": broken}
    message = "^of the validation images, rejected is 3 of 9 examples$"
    for _ in range(2):  # it fails again where it goes on
        with pytest.raises(TooManyRejects, match=message):
            trained(tmp_path, **options)
        assert steps_in(tmp_path)[-1] == 3 * at
        packs.asked = 4 * (at - 1)
    records, model = trained(tmp_path, keep_best=2)
    assert [r.step for r in records] == list(range(3 * at, learning.STEPS + 1))
    assert same_weights(model, whole[1])
    wanted, found = figures_of(whole[0]), figures_of(tmp_path)
    assert found[-9:] == wanted[-9:]
    assert [x[2:] for x in found if x[2]] == [x[2:] for x in wanted if x[2]]
    assert bytes_of(tmp_path).items() >= bytes_of(whole[0]).items()
    assert trained(tmp_path, keep_best=2)[0] == []


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
    plain, loader = learning.model_of(), learning.loader_of(augment=learning.AUGMENT)
    list(train(plain, loader, learning.config_of(**learning.EVERYTHING)))
    assert same_weights(plain, whole[1])


def test_a_record_speaks_of_the_weights_after_its_step(whole):
    folder, model = whole
    last = read_log(folder)[-1]
    averaged = model_of(folder)
    assert not same_weights(averaged, model)
    found = measure(averaged, learning.validation_of(), LOSSES["sigmoid"])
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
    for wait in (1, 3, 2, 0):  # lines to wait for before each kill
        # Every other step has a checkpoint, or is validated, so the third line is written after the
        # first one. However late, no kill comes too late: 3 + 5 + 4 steps are all of them at most,
        # and behind the last of each run there is no end, but a sleep.
        most = wait + 2 if wait else 0
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
    found = bytes_of(folder)
    assert found == bytes_of(tmp_path / "whole")
    assert not same_weights(model, model_of(folder))  # those are the averaged ones


def never_better(**options):
    """Options of a training whose validation loss is least at step 2."""
    plain = {"accumulate": 1, "ema": None, "drop_path": 0.0, "layer_decay": 1.0}
    every = {"val_every": 2, "patience": 2, "learning_rate": 10.0, "save_every": None}
    return {**plain, **every, **options}


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
    loader = learning.loader_of(augment=learning.AUGMENT)
    run = train(learning.model_of(), loader, learning.config_of(), folder=tmp_path)
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
        ({"patience": 2}, "patience is 2, expected None without val_every; pass val_every=100, or"),
        ({"val_every": 0}, "val_every is 0, expected an integer in 1.."),
    ],
)
def test_wrong_options_are_refused(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        learning.config_of(**option)


@pytest.mark.parametrize("options", [{"val_every": 3}, {"val_every": 3, "patience": 2}])
def test_options_of_validation_are_refused_without_images_to_validate_on(options):
    message = "val_every is 3, expected None without validate; pass a loader of the images to"
    with pytest.raises(ValueError, match=message):
        next(train(learning.model_of(), learning.loader_of(), learning.config_of(**options)))
