"""`Training`: what `packpipe train` runs, on one device or on the ranks that torchrun starts."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets.utils import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from packpipe import checks
from packpipe.augmenting.augment import Augment
from packpipe.building.shards import alone_in
from packpipe.cli.starting import Start
from packpipe.cli.trained_images import TrainedImages
from packpipe.cli.trained_rows import TrainedRows
from packpipe.durable import write_bytes
from packpipe.loading.loader import PackedLoader
from packpipe.loading.ranks import process_group, rank_of_world
from packpipe.model.config import NaViTConfig
from packpipe.model.navit import NaViT
from packpipe.plots import plot_training
from packpipe.training.checkpoints import checkpoints
from packpipe.training.figures import Record
from packpipe.training.log import json_line, read_log
from packpipe.training.loop import train
from packpipe.training.objective import objective_of
from packpipe.training.run_folder import RunOptions
from packpipe.training.trackers import Track, to_tensorboard, to_wandb
from packpipe.training.train_config import TrainConfig

_TRIM = 64  # bucketed rows are cut to a multiple of so many tokens, or of a multiple of it
_LENGTHS = 8  # for which torch.compile keeps graphs; beyond, it would compute without one


@dataclass(frozen=True)
class Training:
    """A training, made from the options of the command line.

    Attributes:
        data: what is trained on, and validated on.
        model: a preset's name, of a training that starts from drawn weights.
        shape: further options of `NaViTConfig`, ``attention`` among them.
        batch_size: rows a step of each rank.
        options: those of `TrainConfig`.
        num_workers: threads that decode ahead.
        seed: of weights, order, resolutions and augmentation.
        augment: a preset of `Augment`; None for none.
        mixing: options of `Augment` besides.
        start: the trained model that it begins with, whose shape it takes; None draws all weights.
    """

    data: TrainedImages | TrainedRows
    model: str
    shape: dict[str, Any]
    batch_size: int
    options: dict[str, Any]
    num_workers: int
    seed: int = 0
    augment: str | None = None
    mixing: dict[str, Any] = field(default_factory=dict)
    start: Start | None = None

    @cached_property
    def config(self) -> NaViTConfig:
        """The model's shape."""
        shape, outputs = self.shape, self.data.labelled.num_outputs
        if self.start is not None:
            attention = shape["attention"]
            return self.start.config(outputs, attention, **self.data.labelled.compared.shape)
        if self.data.layout_name in ("padded", "bucketed") and shape["attention"] == "auto":
            # Other backends may skip padding, which a padded ViT computes.
            shape = {**shape, "attention": "reference"}
        shape = {**shape, **self.data.labelled.compared.shape}
        return NaViTConfig.preset(self.model, num_classes=outputs, **shape)

    @cached_property
    def train_config(self) -> TrainConfig:
        """The options of the training loop."""
        bucketed = self.data.layout_name == "bucketed"
        return TrainConfig(
            **self.options,
            trim=trim_of(self.data.seq_len, validates=self.data.val is not None)
            if bucketed
            else None,
        )

    @cached_property
    def drawn(self) -> Augment | None:
        """What is drawn for each image of an epoch."""
        if self.augment is None and not any(self.mixing.values()):
            return None
        # An Augment by itself flips: whoever asks for mixing alone did not ask for that.
        named = Augment(flip=0) if self.augment is None else Augment.preset(self.augment)
        drawn = replace(named, **self.mixing)
        if drawn.mixes and self.data.layout_name != "packed":
            expected, remedy = "'packed' with mixup and cutmix", "others put one image into a row"
            raise ValueError(checks.sentence("layout", self.data.layout_name, expected, remedy))
        return drawn

    @property
    def run_options(self) -> RunOptions:
        """What is asked of the model later on."""
        classes = self.data.labelled.classes
        return RunOptions(
            class_names=None if classes is None else tuple(classes.names),
            label_column=self.data.label_column,
            loss=self.train_config.loss,
            packing=self.data.evaluation,
            init=None if self.start is None else self.start.init,
        )

    def _check_outputs(self) -> None:
        """Raise ValueError if there is nothing to tell apart, or the model gives no answers."""
        classes = self.data.labelled.classes
        if classes is not None and len(classes.names) < 2:
            remedy = "add images of another class, or pass another --label-column"
            raise ValueError(checks.sentence("classes", classes.names, "two or more", remedy))
        if self.config.pooling == "none" and not self.data.labelled.compared.shape:
            expected = "one that gives an output an image, since labels are of images"
            remedy = "pass --mask-column to train on masks"
            raise ValueError(checks.sentence("--pooling", "none", expected, remedy))

    def _check_rows(self, rows: int) -> None:
        """Raise ValueError if the rows of an epoch do not fill a step."""
        # Of torchrun, since there is no process group yet.
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if rows < self.batch_size * ranks:
            expected = f"at least {self.batch_size * ranks}, those of a step (--batch-size x ranks)"
            remedy = "pass a smaller --batch-size, or more images"
            raise ValueError(checks.sentence("rows an epoch", rows, expected, remedy))

    def described(self) -> dict[str, int]:
        """Return the figures of the training without running it; checks every option."""
        self._check_outputs()
        _ = self.drawn, self.data.validation_packs
        counts, epoch = self.data.counts(), self.data.epoch(self.seed)
        self._check_rows(epoch["rows an epoch"])
        # Refuses what a training refuses once it runs: weights of classes, labels for the loss.
        objective_of(self.train_config, self.data.packs, self.config, torch.device("cpu"))
        with torch.device("meta"):  # counts weights without making them
            parameters = sum(p.numel() for p in NaViT(self.config).parameters())
        return {
            **counts,
            "classes": int(self.config.num_classes or 0),
            "parameters": parameters,
            "steps": self.train_config.steps,
            "rows a step": self.batch_size,
            **epoch,
        }

    def run(
        self,
        output: Path,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        as_json: bool = False,
    ) -> bool:
        """Train; return False if Ctrl-C stopped it, in which case that step is saved.

        Args:
            output: folder of checkpoints, log.jsonl, model.json and training.png.
            tensorboard: whether to log for TensorBoard, too.
            wandb: project of Weights & Biases to log to, too; None logs to none.
            as_json: whether records are printed as JSON.

        Raises:
            FileExistsError: another process is training into the folder.
            TypeError, ValueError: an option is wrong.
        """
        # A wrong option is an error before there is a process group.
        self._check_outputs()
        _ = self.config, self.train_config, self.drawn
        _ = self.data.packs, self.data.validation_packs
        self._check_rows(self.data.epoch(self.seed)["rows an epoch"])
        if "RANK" not in os.environ:
            return self._run(output, tensorboard, wandb, as_json)
        # In a function of its own: its model and loader must be gone when the group ends.
        with process_group("nccl" if torch.cuda.is_available() else "gloo"):
            return self._run(output, tensorboard, wandb, as_json)

    def _run(self, output: Path, tensorboard: bool, wandb: str | None, as_json: bool) -> bool:
        device = device_of_this_rank()
        is_first = rank_of_world()[0] == 0
        options = self.train_config
        torch.manual_seed(self.seed)
        navit = NaViT(self.config)
        if self.start is not None:
            self.start.load_into(navit)
        navit = navit.to(device)
        loader, validate = self._loaders(pin_memory=device.type == "cuda")
        with ExitStack() as stack, _interrupted() as stopped:
            if is_first:
                stack.enter_context(alone_in(output, wait=False))
            trackers = self._trackers(stack, output, tensorboard, wandb) if is_first else []
            bar = stack.enter_context(bar_of(options, output)) if is_first else None

            def stop() -> bool:
                if bar is not None:
                    bar.step()
                # Signals reach ranks at different steps, and a rank that stops alone leaves the
                # others waiting. So ranks do not stop by themselves, and resume from the last
                # checkpoint.
                return "RANK" not in os.environ and stopped.is_set()

            run = train(
                navit,
                loader,
                options,
                folder=output,
                stop=stop,
                validate=validate,
                run_options=self.run_options,
            )
            goes_on = False
            for record in run:
                goes_on = True
                if bar is not None:
                    bar.record(record)
                    # Above the bar, if there is one.
                    tqdm.write(_line(record, as_json), file=sys.stdout, end="")
                    sys.stdout.flush()
                for track in trackers:
                    track(record)
        if is_first and (log := read_log(output)):
            picture = BytesIO()
            plot_training(log).savefig(picture, dpi=100)
            write_bytes(output / "training.png", picture.getvalue())
            if not as_json:
                last = log[-1]["step"]
                if last < options.steps and not stopped.is_set():
                    times = f"{options.patience} times"
                    said = f"ended after step {last}: no lower loss in validation {times}\n"
                    sys.stdout.write(said)
                elif not goes_on and not stopped.is_set():
                    said = f"step {last} was reached before; a larger --steps trains on\n"
                    sys.stdout.write(said)
                sys.stdout.write(f"checkpoints, log and plot are in {output}\n")
        return not stopped.is_set()

    def _loaders(self, *, pin_memory: bool) -> tuple[PackedLoader, PackedLoader | None]:
        """Return what is trained on, and what it is validated on; None without any."""
        workers: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": pin_memory}
        loader = PackedLoader(
            self.data.packs,
            self.batch_size,
            seed=self.seed,
            balance=self.data.layout_name == "bucketed",
            augment=self.drawn,
            **workers,
        )
        measured = self.data.validation_packs
        if measured is None:
            return loader, None
        return loader, PackedLoader(measured, self.batch_size, tail="pad", **workers)

    def _trackers(
        self, stack: ExitStack, output: Path, tensorboard: bool, wandb: str | None
    ) -> list[Track]:
        """Return the functions that each record is passed to; they end with the stack."""
        trackers: list[Track] = []
        if tensorboard:
            trackers.append(stack.enter_context(to_tensorboard(output / "tensorboard")))
        if wandb:
            name = self.model if self.start is None else self.start.init
            asked = {"model": name, **asdict(self.train_config)}
            trackers.append(stack.enter_context(to_wandb(output, wandb, config=asked)))
        return trackers


def trim_of(seq_len: int, *, validates: bool = False) -> int:
    """Return what lengths of bucketed rows are multiples of, so that there are 8 of them at most.

    With validation 7, since its rows are a graph, too.

    >>> trim_of(256), trim_of(1024), trim_of(4096), trim_of(4096, validates=True)
    (64, 128, 512, 640)
    """
    return -(-seq_len // (_TRIM * (_LENGTHS - validates))) * _TRIM


@contextmanager
def bar_of(options: TrainConfig, output: Path) -> Iterator[StepBar]:
    """Yield the bar of a training, which a terminal shows meanwhile.

    Args:
        options: of the training.
        output: its folder; if it holds checkpoints, the bar begins at the newest.
    """
    before = [int(path.name.removeprefix("step-")) for path in checkpoints(output)]
    # disable=None: where stderr is no terminal, nothing is shown. Without miniters=1 steps that
    # become slower would be shown late.
    first, shown = max(before, default=0), {"unit": "step", "miniters": 1, "disable": None}
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=options.steps, initial=first, **shown))
        if not bar.disable:  # or else a warning is written into the bar
            stack.enter_context(logging_redirect_tqdm(tqdm_class=tqdm))
        yield StepBar(bar, options)


@dataclass(frozen=True)
class StepBar:
    """Shows the steps of a training, their rate, the time that is left and the loss known last.

    It moves with every step, ten times a second at most; the loss is read from the device with a
    record alone, since no step waits for the device.

    Attributes:
        bar: of tqdm.
        options: of the training.
    """

    bar: tqdm
    options: TrainConfig

    def step(self) -> None:
        """Count a step."""
        self.bar.update()
        if self.options.val_every is not None and self.options.validates(self.bar.n):
            self.bar.set_postfix_str("validating")

    def record(self, record: Record) -> None:
        """Show what a record says."""
        self.bar.set_postfix(loss=f"{record.loss:.4f}", refresh=False)
        self.bar.update(record.step - self.bar.n)  # of a damaged checkpoint it began too late


def _line(record: Record, as_json: bool) -> str:
    if as_json:
        return json_line(asdict(record))
    figures = {"val loss": record.val_loss, "val accuracy": record.val_accuracy}
    figures |= {"val ECE": record.val_ece, "val error": record.val_error, "val IoU": record.val_iou}
    figures |= {"val mAP": record.val_mean_ap}
    measured = "".join(
        f"  {name} {value:.{4 if name == 'val loss' else 3}f}"
        for name, value in figures.items()
        if value is not None
    )
    figure = (
        f"error {record.error:.3f}"
        if record.accuracy is None
        else f"accuracy {record.accuracy:.3f}"
    )
    return (
        f"step {record.step}  loss {record.loss:.4f}  {figure}  "
        f"{record.images_per_s:,.0f} images/s  padding {1 - record.fill:.1%}  "
        f"waited {record.data_wait:.0%}{measured}\n"
    )


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets; a second Ctrl-C stops at once. Not under torchrun."""
    asked = threading.Event()
    # Python lets the main thread alone set signal handlers.
    alone = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
    if not alone:
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        del number, frame
        asked.set()
        signal.signal(signal.SIGINT, before)  # for a second Ctrl-C

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def device_of_this_rank() -> torch.device:
    """Return the device of this rank: a GPU of its own, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # lets float32 products run in TF32
    # torchrun numbers the processes of one machine; each takes the GPU of that number.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device
