"""Training: the rate, the decays, the figures; stopped anywhere, the same to the bit."""

import json
import logging
import math
import re
import shutil
from itertools import islice
from pathlib import Path

import broken
import disagreeing
import learning
import packed
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from two_ranks import run_on_two_ranks

from packpipe import Augment, PackConfig, PackedLoader, plan_epoch
from packpipe.loading.steps import TAILS
from packpipe.training import loop
from packpipe.training.checkpoints import KEPT, checkpoints, model_of, save_checkpoint
from packpipe.training.loop import TrainConfig, read_log, train
from packpipe.training.losses import LOSSES
from packpipe.training.optimizer import optimizer_of


def trained(folder=None, *, stop=None, validate=None, **options):
    """The records of a training, or of its first steps, and its model."""
    model, config = learning.model_of(), learning.config_of(**options)
    run = train(model, learning.loader_of(), config, folder=folder, validate=validate)
    return list(islice(run, stop)), model


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def bytes_of(folder):
    last = checkpoints(folder)[-1]
    return {path.name: path.read_bytes() for path in sorted(last.iterdir())}


def losses_of(folder):
    return [line["loss"] for line in read_log(folder)]


def test_the_rate_rises_falls_by_the_root_and_ends_near_zero():
    config = TrainConfig(steps=1000, learning_rate=8e-4, warm_up=100, cool_down=200, timescale=300)
    assert config.rate(0) == pytest.approx(8e-4 / 101)
    assert config.rate(100) == pytest.approx(8e-4)
    assert config.rate(400) == pytest.approx(8e-4 * math.sqrt(0.5))
    assert config.rate(700) == pytest.approx(8e-4 * math.sqrt(1 / 3))
    assert config.rate(900) == pytest.approx(8e-4 * math.sqrt(300 / 1100) * 100 / 201)
    assert 0 < config.rate(999) < 8e-4 / 300
    assert TrainConfig(steps=40).warm_up == TrainConfig(steps=40).cool_down == 4
    assert TrainConfig(steps=1).rate(0) == 8e-4


def test_a_schedule_says_the_rate_of_each_step_and_is_held_to_it():
    config = TrainConfig(steps=10, schedule=lambda step: 0.1 / (1 + step))
    assert [config.rate(0), config.rate(9)] == [0.1, 0.01]
    (record,) = train(learning.model_of(), learning.loader_of(), learning.config_of(steps=1))
    assert record.learning_rate == learning.config_of(steps=1).rate(0)
    asked = []
    every = {"steps": 3, "layer_decay": 0.5, "schedule": lambda step: asked.append(step) or 1e-3}
    list(train(learning.model_of(), learning.loader_of(), learning.config_of(**every)))
    assert sorted(asked) == [0, 0, 1, 1, 2, 2]  # once a step; before the first one, for all ranks
    # Ranks compare what it says, since functions have no other value.
    same = TrainConfig(steps=10, schedule=lambda step: 0.1 / (step + 1))
    other = TrainConfig(steps=10, schedule=lambda step: 0.1 / (2 + step))
    assert config.must_agree() == same.must_agree() != other.must_agree()
    for value, message in [
        (math.nan, "schedule(3) is nan, expected a finite number; return the rate of the step"),
        (-1.0, "schedule(3) is -1.0, expected 0 or more; return the rate of the step"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            TrainConfig(steps=10, schedule=lambda _, value=value: value).rate(3)
    with pytest.raises(TypeError, match=r"schedule is 0.1, expected a function of the step, or N"):
        TrainConfig(steps=10, schedule=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_decay": 0.5},
        {"freeze": 1},
        {"freeze": 2, "layer_decay": 0.9},
        {"clip": None},
        {"schedule": lambda step: 1e-2 * 0.9**step},
    ],
    ids=["as it comes", "layer_decay", "freeze", "both", "no clip", "schedule"],
)
def test_each_step_is_that_of_a_plain_loop(options):
    config = learning.config_of(steps=6, **options)
    model = learning.model_of(torch.float64)
    records = list(train(model, learning.loader_of(), config))
    loader = learning.loader_of()
    batches = [[batch] for _ in range(2) for batch in loader][:6]
    losses, plain = learning.plainly_trained(batches, config, torch.float64)
    assert [r.loss for r in records] == pytest.approx(losses, rel=1e-12)
    assert learning.largest_difference(model, plain) < 1e-9
    if options:
        usual = learning.plainly_trained(batches, learning.config_of(steps=6), torch.float64)[1]
        assert learning.largest_difference(usual, plain) > 1e-3


@pytest.mark.parametrize(
    ("blocks", "frozen"), [(1, {"embed", "position", "blocks.0"}), (2, {"blocks.1"})]
)
def test_what_is_frozen_keeps_every_bit_and_has_no_gradient(blocks, frozen, tmp_path):
    start = {name: value.clone() for name, value in learning.model_of().state_dict().items()}
    _, model = trained(tmp_path, freeze=blocks, ema=0.9)
    saved = model_of(tmp_path).state_dict()
    found = set()
    for name, parameter in model.named_parameters():
        kept = torch.equal(parameter, start[name])
        assert kept == torch.equal(saved[name], start[name]) == (parameter.grad is None), name
        if kept:
            found |= {name.split(".")[0], ".".join(name.split(".")[:2])}
    assert found >= frozen
    assert {"embed", "position", "blocks.0", "blocks.1", "pool", "head", "norm"} & found == (
        {"embed", "position", "blocks.0", *frozen}
    )
    # Where it goes on, other blocks may be.
    records, model = trained(tmp_path, freeze=0, steps=14)
    assert len(records) == 2
    assert not torch.equal(model.embed.weight, start["embed.weight"])


def test_what_stays_frozen_is_named(caplog):
    model = learning.model_of()
    list(train(model, learning.loader_of(), learning.config_of(steps=1, freeze=1)))
    assert not caplog.records
    list(train(model, learning.loader_of(), learning.config_of(steps=1)))
    (record,) = caplog.records
    assert re.match(
        r"what is not trained is '\d+ parameters, among them embed.weight', expected what freeze=0 "
        r"says; .*call model.requires_grad_\(True\) before",
        record.getMessage(),
    )


def test_what_is_frozen_later_loses_its_moments(tmp_path):
    trained(tmp_path, steps=2)
    _, model = trained(tmp_path, steps=3, freeze=1)
    moments = load_file(checkpoints(tmp_path)[-1] / "optimizer.safetensors")
    learned = {name for name, one in model.named_parameters() if one.requires_grad}
    assert 0 < len(learned) < len(list(model.parameters()))
    assert {name.rpartition(".")[0] for name in moments} == learned


def test_more_frozen_blocks_than_there_are_are_refused():
    message = "freeze is 3, expected at most 2 (depth); freeze fewer blocks"
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(freeze=3)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"accumulate": 0}, ValueError, "accumulate is 0, expected an integer in 1.."),
        ({"accumulate": None}, TypeError, "accumulate is None, expected an integer"),
        ({"freeze": -1}, ValueError, "freeze is -1, expected an integer in 0.."),
        ({"layer_decay": 0}, ValueError, "layer_decay is 0, expected in (0, 1]; 0.75 is usual, 1"),
        ({"layer_decay": 1.5}, ValueError, "layer_decay is 1.5, expected in (0, 1]; 0.75 is usua"),
        ({"clip": 0}, ValueError, "clip is 0, expected a number above 0; 1 is usual, None is non"),
        ({"drop_path": 1}, ValueError, "drop_path is 1, expected in [0, 1); 0.1 is usual, 0 is n"),
    ],
)
def test_wrong_options_of_a_step_are_refused(option, error, message):
    with pytest.raises(error, match=re.escape(message)):
        learning.config_of(**option)


def test_weight_decay_is_of_matrices_and_the_heads_its_own():
    model = learning.model_of()
    groups = optimizer_of(model, TrainConfig(steps=1)).param_groups
    names = {id(value): name for name, value in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decays) == len(names)
    assert decays.pop("head.weight") == 3.0
    matrices = {name for name, decay in decays.items() if decay == 0.03}
    assert {"embed.weight", "blocks.1.narrow.weight", "pool.project.weight"} <= matrices
    assert all(decay in (0.0, 0.03) for decay in decays.values())
    assert not any("norm" in name or "position" in name or "query" in name for name in matrices)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_training_lowers_the_loss(loss):
    records, _ = trained(steps=60, loss=loss, head_weight_decay=0.0)
    assert records[-1].loss < 0.7 * records[0].loss
    assert records[-1].accuracy > records[0].accuracy


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_of_mixed_images_both_labels_are_trained_on_and_their_own_is_counted(loss):
    augment = Augment(mixup=1, cutmix=1)
    config = learning.config_of(steps=1, loss=loss)
    (record,) = train(learning.model_of(), learning.loader_of(augment=augment), config)
    batch = next(iter(learning.loader_of(augment=augment)))
    assert (batch.label_weights[batch.present] < 1).any()
    with torch.no_grad():
        logits = learning.model_of()(batch)
    labels = batch.labels
    wanted = LOSSES[loss](logits, labels, partners=batch.partners)
    assert record.loss == pytest.approx(float(wanted), rel=1e-5)
    assert record.loss != pytest.approx(float(LOSSES[loss](logits, labels)), rel=1e-3)
    right = (logits.argmax(-1) == labels)[batch.present].float().mean()
    assert record.accuracy == pytest.approx(float(right))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_four_small_batches_are_one_of_four_times_the_rows(dtype, tolerance):
    options = {"num_rows": 16, "augment": Augment(cutmix=1)}
    config = learning.config_of(steps=4, accumulate=4)
    model = learning.model_of(dtype)
    records = list(train(model, learning.loader_of(2, **options), config))
    whole = learning.model_of(dtype)
    one = list(train(whole, learning.loader_of(8, **options), learning.config_of(steps=4)))
    assert [r.loss for r in records] == pytest.approx([r.loss for r in one], abs=tolerance)
    assert [r.accuracy for r in records] == [r.accuracy for r in one]
    # Adam divides by the size of a gradient, and so makes much of the last bit of a small one.
    assert learning.largest_difference(model, whole) < 100 * tolerance
    small = learning.loader_of(2, **options)
    two_epochs = [*small, *small]
    batches = [two_epochs[first : first + 4] for first in range(0, 16, 4)]
    losses, plain = learning.plainly_trained(batches, config, dtype)
    assert [r.loss for r in records] == pytest.approx(losses, abs=tolerance)
    assert learning.largest_difference(model, plain) < 100 * tolerance


class Noting(PackedLoader):
    """A loader that notes which examples it has given."""

    def __iter__(self):
        for batch in super().__iter__():
            self.given.append(sorted(batch.example_index[batch.present].tolist()))
            yield batch


def test_a_step_goes_on_over_the_end_of_an_epoch_and_leaves_no_image_out(tmp_path):
    def run(folder, stop=None):
        model, loader = learning.model_of(), Noting(learning.table(), 2, seed=3, max_segments=4)
        loader.given = []
        config = learning.config_of(steps=10, accumulate=3, save_every=1)
        list(islice(train(model, loader, config, folder=folder), stop))
        return model, loader.given

    model, given = run(tmp_path / "whole")
    assert len(given) == 30
    for epoch in range(6):  # of five batches
        found = sorted(number for batch in given[5 * epoch : 5 * epoch + 5] for number in batch)
        assert found == list(range(len(found)))
    for stop in (3, 6):  # it goes on after a step within which an epoch ends, or with which
        run(tmp_path / str(stop), stop)
        again, rest = run(tmp_path / str(stop))
        assert len(rest) == 3 * (11 - stop)
        assert rest == given[len(given) - len(rest) :]
        assert same_weights(model, again)
        assert losses_of(tmp_path / str(stop)) == losses_of(tmp_path / "whole")


def test_mixing_it_stops_and_goes_on_to_the_same_bits(tmp_path):
    def run(folder, stop=None):
        model, loader = learning.model_of(), learning.loader_of(augment=Augment(cutmix=1))
        records = train(model, loader, learning.config_of(), folder=folder)
        return list(islice(records, stop)), model

    _, whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=5)
    _, rest = run(tmp_path / "parts")
    assert same_weights(whole, rest)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


def test_a_record_says_what_the_steps_were_like():
    records, _ = trained(log_every=5)
    assert [record.step for record in records] == [5, 10, 12]
    each, _ = trained()
    assert len(each) == learning.STEPS
    assert records[0].loss == pytest.approx(sum(record.loss for record in each[:5]) / 5)
    lens = learning.table()["seq_lens"].to_pylist()
    fills = {sum(map(sum, pair)) / 32 for pair in zip(lens, lens, strict=True)}
    assert min(fills) * 0.5 <= each[0].fill <= 1
    assert all(0 <= r.accuracy <= 1 and 0 <= r.data_wait <= 1 and r.mfu is None for r in each)
    assert all(r.tokens_per_s > r.images_per_s > 0 for r in each)
    assert each[0].learning_rate == learning.config_of().rate(0)
    (first, last) = train(learning.model_of(), learning.loader_of(), TrainConfig(steps=12))
    assert (first.step, last.step) == (10, 12)


class Reads(TorchDispatchMode):
    """Counts the numbers that are read out of floating tensors."""

    count = 0

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("captured", [False, True])
def test_no_step_reads_what_it_computes(captured):
    model, loader = learning.model_of(), learning.loader_of()
    config = learning.config_of(steps=6, accumulate=2, ema=0.9, captured=captured, log_every=4)
    with Reads() as reads:
        assert [record.step for record in train(model, loader, config)] == [4, 6]
    assert reads.count == 1  # how far attention is from reference attention, before the first step


@pytest.mark.parametrize(
    ("trim", "compiled", "validates", "warned"),
    [
        (1, True, False, "2 or more, for 8"),
        (1, False, False, None),
        (None, True, False, None),
        (2, True, False, None),
        (2, True, True, "3 or more, for 7"),
        (3, True, True, None),
    ],
)
def test_more_lengths_than_graphs_are_warned_of_once(
    trim, compiled, validates, warned, caplog, monkeypatch
):
    monkeypatch.setattr(loop, "compile_parts", lambda model: model)
    with caplog.at_level(logging.WARNING, logger="packpipe.training.loop"):
        validate = learning.validation_of() if validates else None
        trained(steps=2, trim=trim, compiled=compiled, validate=validate)
    message = (
        f"trim is {trim}, expected {warned} lengths of 16 tokens; raise it, or "
        "torch._dynamo.config.recompile_limit: further lengths have no graph"
    )
    found = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert found == ([message] if warned else [])


def test_the_backend_is_stated_once(caplog):
    with caplog.at_level(logging.INFO, logger="packpipe.training.loop"):
        trained()
    (message,) = [r.getMessage() for r in caplog.records if r.name == "packpipe.training.loop"]
    assert re.fullmatch(r"attention: segments in torch.float32 on cpu, \S+ from reference", message)


@pytest.mark.parametrize("stop", [1, 2, 5, 6, 11])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(stop, tmp_path):
    _, whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", stop=stop)
    records, rest = trained(tmp_path / "parts")
    # The generator is left at a record, before that step's checkpoint.
    assert records[0].step == (stop - 1) // 2 * 2 + 1
    assert same_weights(whole, rest)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "parts")
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    assert len(losses_of(tmp_path / "parts")) == learning.STEPS


def test_the_records_after_a_kill_are_those_of_a_training_that_was_not(tmp_path):
    config = learning.config_of(save_every=3, log_every=5)
    asked = iter([False] * 4)

    def run(folder, stop):
        list(train(learning.model_of(), learning.loader_of(), config, folder=folder, stop=stop))

    def killed():
        if next(asked, None) is None:  # at the fifth step, before its record
            raise KeyboardInterrupt
        return False

    run(tmp_path / "whole", lambda: False)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", killed)
    assert [line["step"] for line in read_log(tmp_path / "killed")] == [3]
    run(tmp_path / "killed", lambda: False)
    found, wanted = (
        [(line["step"], line["loss"], line["accuracy"], line["fill"]) for line in read_log(folder)]
        for folder in (tmp_path / "killed", tmp_path / "whole")
    )
    assert found == wanted
    assert [step for step, *_ in found] == [3, 5, 6, 9, 10, 12]


def test_the_last_checkpoints_are_kept_and_a_half_written_one_is_none(tmp_path):
    trained(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000012"]
    assert len(checkpoints(tmp_path)) == KEPT
    (tmp_path / "step-00000099.partial").mkdir()
    assert checkpoints(tmp_path)[-1].name == "step-00000012"
    records, _ = trained(tmp_path)
    assert records == []


@pytest.mark.parametrize("steps", [[1, 2, 3], [1, 2, 2]], ids=["the oldest", "the same"])
def test_a_checkpoint_that_is_half_removed_is_none(steps, tmp_path, monkeypatch):
    model, loader = learning.model_of(), learning.loader_of()
    optimizer = optimizer_of(model, learning.config_of())

    def save(step):
        save_checkpoint(tmp_path, model, optimizer, loader, step)

    def killed(folder, **_):
        if folder.exists():
            folder.joinpath("state.json").unlink()
            raise KeyboardInterrupt

    save(steps[0])
    save(steps[1])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(steps[2])
    whole = checkpoints(tmp_path)
    assert whole
    assert all(path.joinpath("state.json").exists() for path in whole)
    assert same_weights(model, model_of(tmp_path))
    save(4)
    assert sorted(tmp_path.iterdir()) == [whole[-1], tmp_path / "step-00000004"]


def test_a_trained_model_is_loaded_with_its_shape(tmp_path):
    _, model = trained(tmp_path)
    again = model_of(tmp_path, attention="reference")
    assert same_weights(model, again)
    assert again.config.attention == "reference"
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; train with this folder"):
        model_of(tmp_path / "nothing")


def test_another_model_or_loader_cannot_go_on(tmp_path):
    trained(tmp_path, stop=4)
    other = packed.model_of("auto", torch.float32, dim=32)
    message = "step-00000002 is of a training of another model: dim is 32, expected 16; give the "
    message += "model of the checkpoint, or another folder"
    with pytest.raises(ValueError, match=re.escape(message)):
        next(train(other, learning.loader_of(), learning.config_of(), folder=tmp_path))
    with pytest.raises(ValueError, match=r"state\['global_batch'\] is 2, expected 3"):
        next(
            train(learning.model_of(), learning.loader_of(3), learning.config_of(), folder=tmp_path)
        )


@pytest.fixture(scope="module")
def two_ranks_in(tmp_path_factory):
    """The folder in which two ranks have trained, and have disagreed: one start for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_two_ranks(disagreeing.__file__, folder)
    return folder


def by_rank(folder, name):
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_train_as_one(two_ranks_in):
    model = learning.model_of(torch.float64)
    records = list(train(model, learning.loader_of(2), learning.config_of()))
    wanted = torch.cat([p.detach().flatten() for p in model.parameters()])
    ranks = by_rank(two_ranks_in, "rank")
    for step, record in enumerate(records):
        assert (ranks[0][0][step] + ranks[1][0][step]) / 2 == pytest.approx(record.loss)
    for _, weights, _ in ranks:
        assert (torch.tensor(weights, dtype=torch.float64) - wanted).abs().max() < 1e-9
    assert ranks[0][0] != ranks[1][0]
    assert checkpoints(two_ranks_in)[-1].name == f"step-{learning.STEPS:08d}"


@pytest.mark.slow
def test_two_ranks_validate_as_one(two_ranks_in):
    model = learning.model_of(torch.float64)
    options = learning.config_of(val_every=5, freeze=1, **learning.EVERYTHING)
    loader = learning.loader_of(2, augment=learning.AUGMENT)
    run = train(model, loader, options, validate=learning.validation_of())
    wanted = [[r.val_loss, r.val_accuracy, r.val_ece] for r in run if r.val_loss is not None]
    ranks = by_rank(two_ranks_in / "validated", "rank")
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    for _, found, _ in ranks:
        assert (torch.tensor(found, dtype=torch.float64) - weights).abs().max() < 1e-9
    assert ranks[0][2] == ranks[1][2]  # to the bit: they stop and keep checkpoints together
    found = [value for value in ranks[0][2] if value is not None]
    assert len(found) == 9
    assert found == pytest.approx([value for three in wanted for value in three], abs=1e-9)
    kept = [path.name for path in checkpoints(two_ranks_in / "validated")]
    best = min(range(3), key=lambda number: wanted[number][0])
    assert f"step-{[5, 10, 12][best]:08d}" in kept


@pytest.mark.slow
def test_ranks_without_a_token_train_as_one(two_ranks_in):
    """One broken image in every tenth pack, every tail; `benchmarks/two_ranks.py` runs longer."""
    found = list(broken.compared(two_ranks_in, disagreeing.BROKEN_STEPS))
    assert {name for name, *_ in found} == {*TAILS, "one pack"}
    for name, empty, of_losses, of_weights in found:
        assert empty >= 4, name
        assert max(of_losses, of_weights) < 1e-12, name


@pytest.mark.slow
def test_one_of_two_ranks_reads_the_headers_that_both_plan_from(two_ranks_in):
    config = PackConfig(seq_len=disagreeing.PLANNED_SEQ_LEN)
    wanted = plan_epoch(disagreeing.SIZES, config).fingerprint
    ranks = by_rank(two_ranks_in, "planned")
    assert [rank["fingerprint"] for rank in ranks] == [wanted, wanted]
    assert sorted(rank["probed"] for rank in ranks) == [0, len(disagreeing.SIZES)]


SAME = "the same on every rank; give all ranks the same data, options and checkpoint"
NONE = "None on every rank; mend what failed, since ranks go on together or not at all"
# In place of each * stands something.
TOLD = {
    "a missing file": "num_packs is 30 (rank 0), 29 (rank 1) and fingerprint is '*' (rank 0), '*' "
    f"(rank 1) and *, expected {SAME}",
    "bad images": "rejected is 2 of 2 examples (100.00%), expected at most 1.00% "
    "(max_bad_fraction); *. First: example 0 *",
    "seed": f"seed is 3 (rank 0), 4 (rank 1), expected {SAME}",
    "batch size": f"global_batch is 2 (rank 0), 4 (rank 1), expected {SAME}",
    "several": "epoch is 2 (rank 0), 0 (rank 1) and balance is False (rank 0), True (rank 1), "
    f"expected {SAME}",
    "tail": f"tail is 'pad' (rank 0), 'error' (rank 1), expected {SAME}",
    "segments": f"max_segments is 4 (rank 0), 5 (rank 1), expected {SAME}",
    "augment": f"augment is missing (rank 0), {{'flip': 0.5, *}} (rank 1), expected {SAME}",
    "state": f"packs taken is 4 (rank 0), 0 (rank 1), expected {SAME}",
    "a stream": "packs taken is 4 (rank 0), 0 (rank 1) and stream is {'num_packs': 2, * (rank 0), "
    f"{{'num_packs': 0, 'num_examples': 0, 'source': None, *}} (rank 1), expected {SAME}",
    "one rank twice": "error is None (rank 0), 'ValueError: rank is 0, expected 1, as "
    f"torch.distributed counts; leave rank and world_size out' (rank 1), expected {NONE}",
    "a later epoch": f"epoch is 1 (rank 0), 2 (rank 1), expected {SAME}",
    "no plan": "error is None (rank 0), 'OSError: the sizes of epoch 0 are gone' (rank 1), "
    f"expected {NONE}",
    "a refused state": 'error is None (rank 0), "ValueError: step-* is of a training on '
    "other batches: state['fingerprint'] is '*', "
    f"expected '*'; the packs are others: *; or give another folder\" (rank 1), expected {NONE}",
    "a lacking checkpoint": f"step is 2 (rank 0), 0 (rank 1), expected {SAME}",
    "a damaged checkpoint": f"error is None (rank 0), * (rank 1), expected {NONE}",
    "validation": f"validates is True (rank 0), False (rank 1), expected {SAME}",
    "validation images": "validation fingerprint is '*' (rank 0), '*' (rank 1) and *, expected "
    f"{SAME}",
    "steps": f"steps is 4 (rank 0), 5 (rank 1), expected {SAME}",
    "too many frozen blocks": "error is None (rank 0), 'ValueError: freeze is 3, expected at "
    f"most 2 (depth); freeze fewer blocks' (rank 1), expected {NONE}",
    "schedules": f"schedule is '*' (rank 0), '*' (rank 1), expected {SAME}",
    "no checkpoint written": 'error is "*Error: *step-00000001.partial*" (rank 0), None (rank 1), '
    f"expected {NONE}",
    "no log": f'error is "*Error: *log.jsonl*" (rank 0), None (rank 1), expected {NONE}',
    "a label of a stream": "after 6 steps: error is None (rank 0), 'ValueError: a label is 99, "
    f"expected 0..4, or -100 for a segment that does not count; *' (rank 1), expected {NONE}",
    "an image": "after 2 steps: error is None (rank 0), 'TooManyRejects: rejected is 2 of 9 "
    f"examples (22.22%), expected at most 1.00%' (rank 1), expected {NONE}",
    "an error at the end of a pass": "after 5 steps: error is None (rank 0), 'OSError: the last "
    f"file is gone' (rank 1), expected {NONE}",
    "a pass that ends early": "after 4 steps: the pass is 'under way' (rank 0), 'over' (rank 1), "
    f"expected {SAME}",
    # What fails everywhere in the same way is said as it is.
    "too large a batch": "num_packs is 10, expected 22 (batch_size times world_size) or more; "
    "choose a smaller batch, or tail='pad'",
    "nothing": None,
    "ranks that are told": None,
    "one alone": None,
}


@pytest.mark.slow
def test_ranks_that_disagree_are_all_told_in_what(two_ranks_in):
    first, second = by_rank(two_ranks_in, "told")
    assert first == second
    assert first.keys() == TOLD.keys()
    for name, message in TOLD.items():
        if message is None:
            assert first[name] is None, name
        else:
            assert re.fullmatch(re.escape(message).replace(r"\*", ".+"), first[name]), first[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, expected an integer in 1..9223372036854775808; choose a"),
        ({"warm_up": 13}, "warm_up is 13, expected an integer in 0..12; steps is 12"),
        ({"learning_rate": 0}, "learning_rate is 0, expected a number above 0; choose a usual"),
        ({"weight_decay": -1}, "weight_decay is -1, expected 0 or more; 0 is none"),
        (
            {"loss": "hinge"},
            "loss is 'hinge', expected one of 'softmax', 'sigmoid', 'mse', 'l1'; ch",
        ),
        (
            {"label_smoothing": 1.0},
            "label_smoothing is 1.0, expected in [0, 1); 0.1 is usual, 0 is",
        ),
        (
            {"label_smoothing": 0.1, "loss": "sigmoid"},
            "label_smoothing is 0.1, expected 0 with loss='sigmoid'; pass loss='softmax', whose",
        ),
        ({"precision": "fp8"}, "precision is 'fp8', expected one of 'auto', 'float32', 'bfloat16'"),
        ({"save_every": 0}, "save_every is 0, expected an integer in 1..9223372036854775808; "),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        learning.config_of(**options)


def test_rows_without_labels_cannot_be_trained_on():
    loader = PackedLoader(learning.table().drop_columns("labels"), 2, max_segments=4)
    message = "batch.labels is None, expected integer labels; pack with label_column"
    with pytest.raises(ValueError, match=re.escape(message)):
        next(train(learning.model_of(), loader, learning.config_of()))


def test_epochs_without_a_batch_cannot_be_trained_on():
    loader = PackedLoader(learning.table().slice(0, 0), 2, max_segments=4)
    message = "batches of the loader is 0, expected one or more an epoch; look for what filters or "
    with pytest.raises(ValueError, match=re.escape(message)):
        next(train(learning.model_of(), loader, learning.config_of()))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_labels_that_are_no_class_cannot_be_trained_on(loss):
    model = packed.model_of("auto", torch.float32, num_classes=2)
    with pytest.raises(ValueError, match=r"^a label is \d, expected 0\.\.1, or -100 for"):
        list(train(model, learning.loader_of(), learning.config_of(loss=loss)))


def test_bfloat16_trains_alike():
    plain, _ = trained(head_weight_decay=0.0)
    half, _ = trained(precision="bfloat16", head_weight_decay=0.0)
    assert [r.loss for r in half] == pytest.approx([r.loss for r in plain], rel=0.05)
    assert [r.loss for r in half] != [r.loss for r in plain]


def test_a_folder_behind_a_scheme_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder is 's3://run', expected a path without a scheme"):
        trained("s3://run")
    model = learning.model_of()
    optimizer, loader = optimizer_of(model, learning.config_of()), learning.loader_of()
    with pytest.raises(ValueError, match="folder is 's3:/run', expected a path without a scheme"):
        save_checkpoint(Path("s3://run"), model, optimizer, loader, 1)
    assert list(tmp_path.iterdir()) == []
