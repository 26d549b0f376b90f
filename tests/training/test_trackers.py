"""TensorBoard and W&B get every figure of every record, by functions that these have."""

import importlib.util
import sys
from dataclasses import asdict
from types import ModuleType

import learning
import pytest

from packpipe.training.loop import Record, train
from packpipe.training.trackers import to_tensorboard, to_wandb

STEPS = 4


def records(folder, steps=STEPS):
    config = learning.config_of(steps=steps, val_every=2, warm_up=0, cool_down=0)
    yield from train(
        learning.model_of(),
        learning.loader_of(),
        config,
        folder=folder,
        validate=learning.validation_of(),
    )


def figures_of(record):
    assert isinstance(record, Record)
    return {name: v for name, v in asdict(record).items() if name != "step" and v is not None}


class Writer:
    """`SummaryWriter`, as far as it is used: its arguments have the names that torch gives them."""

    made = ()

    def __init__(
        self,
        log_dir=None,
        comment="",
        purge_step=None,
        max_queue=10,
        flush_secs=120,
        filename_suffix="",
    ):
        del comment, max_queue, flush_secs, filename_suffix
        self.log_dir, self.purge_step, self.scalars, self.closed = log_dir, purge_step, {}, False
        Writer.made = (*Writer.made, self)

    def add_scalar(
        self,
        tag,
        scalar_value,
        global_step=None,
        walltime=None,
        new_style=False,
        double_precision=False,
    ):
        del walltime, new_style, double_precision
        assert not self.closed
        self.scalars.setdefault(global_step, {})[tag] = scalar_value

    def close(self):
        self.closed = True


class Run:
    """A run of W&B: `log`, and a block that ends it."""

    def __init__(self, asked):
        self.asked, self.logged, self.ended = asked, {}, None

    def log(self, data, step=None, commit=None):
        del commit
        assert self.ended is None
        assert step > max(self.logged, default=0)  # it drops what goes back
        self.logged[step] = data

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.ended = "failed" if kind else "finished"


class Wandb(ModuleType):
    """The module, whose `init` takes some of the names that W&B's takes."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **asked):
        assert asked.keys() <= {"project", "id", "resume", "dir", "config", "allow_val_change"}
        self.runs.append(Run(asked))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_tensorboard_gets_every_record_and_hides_what_is_repeated(tmp_path, monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", ())
    wanted = {}
    for _ in range(2):
        with to_tensorboard(tmp_path / "board") as track:
            for number, record in enumerate(records(tmp_path / "run"), 1):
                track(record)
                wanted.setdefault(len(Writer.made), {})[record.step] = figures_of(record)
                if number == 3 and len(Writer.made) == 1:
                    break  # its step has no checkpoint yet
    first, second = Writer.made
    assert (first.log_dir, first.purge_step, second.purge_step) == (str(tmp_path / "board"), 1, 3)
    assert {1: first.scalars, 2: second.scalars} == wanted
    assert first.closed
    assert second.closed
    assert {"loss", "val_loss", "learning_rate"} <= set(second.scalars[4])
    assert "val_loss" not in second.scalars[3]


def test_wandb_gets_every_record_and_goes_on_in_the_same_run(tmp_path, wandb):
    found = []
    for steps in (2, STEPS):
        with to_wandb(tmp_path, "photos", config={"steps": steps}) as track:
            for record in records(tmp_path, steps):
                track(record)
                found.append((record.step, figures_of(record)))
    first, second = wandb.runs
    assert found == [*first.logged.items(), *second.logged.items()]
    assert len(found) == STEPS
    assert first.asked["id"] == second.asked["id"] == (tmp_path / "wandb-id").read_text()
    assert len(first.asked["id"]) == 32
    assert first.asked == {
        "project": "photos",
        "dir": str(tmp_path),
        "id": first.asked["id"],
        "resume": "allow",
        "allow_val_change": True,
        "config": {"steps": 2},
    }
    assert (first.ended, second.ended) == ("finished", "finished")
    with pytest.raises(KeyError), to_wandb(tmp_path, "photos"):
        raise KeyError
    assert wandb.runs[-1].ended == "failed"


def test_what_is_not_installed_is_said_before_a_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = r"^tensorboard is not installed; pip install 'packpipe\[tensorboard\]'$"
    with pytest.raises(ValueError, match=message), to_tensorboard(tmp_path):
        pass
    with pytest.raises(ValueError, match=r"^wandb is not installed; pip install wandb$"):
        to_wandb(tmp_path, "photos").__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="not installed")
def test_tensorboard_itself_writes_events(tmp_path):
    with to_tensorboard(tmp_path / "board") as track:
        for record in records(None):
            track(record)
    (path,) = (tmp_path / "board").iterdir()
    assert b"val_accuracy" in path.read_bytes()
