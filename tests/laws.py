"""Laws 4 and 5 as functions of a setting, for the CPU's tests and for the GPU's."""

from dataclasses import dataclass, replace

import packed
import torch
from torch.nn import functional as F

from packpipe.augmenting.augment import Augment
from packpipe.loading.batch import PackedBatch
from packpipe.rows.rows import NO_LABEL
from packpipe.training.contrastive import sigmoid_contrastive, softmax_contrastive
from packpipe.training.losses import (
    segment_cross_entropy,
    segment_sigmoid_cross_entropy,
    segment_squared_error,
)

MANY = packed.RowSet(lens=[[1] * 6, [20, 1, 7, 3, 2], [33]], seq_len=33, max_segments=6)
LONG = packed.RowSet(lens=[[100, 57, 43], [200], [150, 1]], seq_len=200, max_segments=3)
EVERYTHING = replace(Augment.preset("three"), vertical_flip=0.5, turns=True, erase=0.5)
# As many columns of logits as classes, whatever is pooled; texts of a contrastive loss.
TEXTS = torch.randn(256, packed.NUM_CLASSES, generator=torch.Generator().manual_seed(9))


@dataclass(frozen=True)
class Setting:
    """What the laws must not depend on."""

    attention: str
    position: str = "factorised_absolute_sum"
    pooling: str = "attention"
    loss: str = "softmax"
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    dim: int = 16
    switch: str | None = None
    max_side: int = 65  # a table of two axes holds its square

    def model(self):
        options = {"position": self.position, "pooling": self.pooling, "max_side": self.max_side}
        options |= packed.SWITCHES[self.switch] if self.switch else {}
        model = packed.model_of(self.attention, self.dtype, dim=self.dim, **options)
        return model.to(self.device)

    def alone(self):
        """The same model for images alone, where no backend has anything to keep apart."""
        return replace(self, attention="reference").model()

    def batch(self, case):
        return packed.batch_of(case, prefix_tokens=self.prefix_tokens).to(self.device)

    @property
    def prefix_tokens(self):
        switches = packed.SWITCHES[self.switch] if self.switch else {}
        return switches.get("prefix_tokens", 0)


@dataclass(frozen=True)
class Augmented(Setting):
    """The same with batches that are flipped, turned, erased and coloured."""

    augment: Augment = EVERYTHING

    def batch(self, case):
        options = {"augment": self.augment, "prefix_tokens": self.prefix_tokens}
        return packed.batch_of(case, **options).to(self.device)


def targets(outputs, batch):
    """int64[B, S], the labels of outputs; of outputs a token each has its image's."""
    if outputs.shape[:2] == batch.labels.shape:
        return batch.labels
    labels = F.pad(batch.labels, (1, 0), value=NO_LABEL)
    return labels.gather(1, batch.segment_ids.long())


def regression(outputs, labels):
    slope = torch.linspace(-1, 1, outputs.shape[-1]).to(outputs)
    wanted = labels[..., None].to(outputs.dtype) * slope
    return segment_squared_error(outputs, wanted, present=labels != NO_LABEL)


def contrast(loss):
    def of(outputs, labels):
        vectors = F.normalize(outputs.flatten(0, 1), dim=-1)
        # A text a label and place, of those a table has.
        place = torch.arange(len(vectors), device=vectors.device)
        texts = TEXTS.to(vectors)[place % len(TEXTS)]
        numbers = [torch.tensor(value).to(vectors) for value in (4.0, -2.0)]
        present = labels.flatten() != NO_LABEL
        return loss(vectors, F.normalize(texts, dim=-1), *numbers, present=present, chunk=5)

    return of


def clip(images, texts, scale, _, **options):
    return softmax_contrastive(images, texts, scale, **options)


LOSSES = {
    "softmax": segment_cross_entropy,
    "sigmoid": segment_sigmoid_cross_entropy,
    "regression": regression,
    "contrastive softmax": contrast(clip),
    "contrastive sigmoid": contrast(sigmoid_contrastive),
}


def loss_of(setting, outputs, batch):
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return LOSSES[setting.loss](outputs, targets(outputs, batch))


def one_at_a_time(model, batch):
    """Return what the model gives a batch if it sees each image alone; NaN where nothing is."""
    outputs = None
    shape = batch.segment_ids.shape if model.config.pooling == "none" else batch.seq_lens.shape
    for row, number, one in packed.alone(batch):
        out = model(one)[0]
        if outputs is None:
            outputs = out.new_full((*shape, out.shape[-1]), torch.nan)
        if model.config.pooling == "none":
            place = (batch.segment_ids[row] == number + 1).nonzero()[:, 0]
        else:
            place = torch.tensor([number], device=out.device)
        row = torch.full_like(place, row)
        outputs = outputs.index_put((row, place), out)
    return outputs


def present(model, batch):
    """bool[B, S] or, without pooling, bool[B, L]: which outputs are of an image."""
    return batch.segment_ids > 0 if model.config.pooling == "none" else batch.present


def close(found, wanted, tolerance):
    """Whether all are equal but for tolerance of the largest, or of 1 if that is larger."""
    scale = max(1.0, wanted.abs().max().item())
    return (found - wanted).abs().max().item() <= tolerance * scale


def results_of(setting, model, forward, batch):
    """Return (outputs of images, loss, gradient of each parameter)."""
    outputs = forward(model, batch)
    loss = loss_of(setting, outputs, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return outputs.detach()[present(model, batch)], loss.detach(), gradients


# Images alone have the same results for every backend, and take most of the time.
_ALONE = {}


def alone_results(setting, case):
    key = repr((replace(setting, attention="reference"), case))
    if key not in _ALONE:
        if len(_ALONE) >= 512:
            _ALONE.clear()
        batch = setting.batch(case)
        _ALONE[key] = results_of(setting, setting.alone(), one_at_a_time, batch)
    return _ALONE[key]


def packed_equals_alone(setting, case, tolerance):
    """Outputs, loss and gradients, which are returned."""
    batch, model = setting.batch(case), setting.model()
    outputs, loss, gradients = results_of(setting, model, lambda m, b: m(b), batch)
    alone, alone_loss, alone_gradients = alone_results(setting, case)
    assert close(outputs, alone, tolerance), (outputs - alone).abs().max()
    assert close(loss, alone_loss, tolerance), (loss, alone_loss)
    assert gradients.keys() == alone_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert close(gradient, alone_gradients[name], tolerance), name
    return gradients


def busiest(case):
    """Return the row with most segments."""
    return max(range(len(case.lens)), key=lambda row: len(case.lens[row]))


def others_keep_every_bit(setting, case):
    """Changing the first segment of a row changes that one's output and no other bit."""
    batch, model, row = setting.batch(case), setting.model(), busiest(case)
    assert len(case.lens[row]) > 1
    pixels = batch.patches.clone()
    first = batch.segment_ids[row] == 1
    pixels[row, first] = 255 - pixels[row, first]
    with torch.no_grad():
        before, after = model(batch), model(replace_patches(batch, pixels))
    others = present(model, batch).clone()
    own = first if setting.pooling == "none" else torch.arange(others.shape[1]) == 0
    others[row] &= ~own.to(others.device)
    assert others.any()
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[row][own], after[row][own])


def no_gradient_crosses(setting, case):
    """The output of one segment has a gradient by its own pixels, and by no other's."""
    batch, model, row = setting.batch(case), setting.model(), busiest(case)
    last = len(case.lens[row])
    assert last > 1
    own = torch.zeros_like(batch.segment_ids, dtype=torch.bool)
    own[row] = batch.segment_ids[row] == last
    pixels = batch.patches.to(setting.dtype).requires_grad_()
    outputs = model(replace_patches(batch, pixels))
    outputs = outputs[own] if setting.pooling == "none" else outputs[row, last - 1]
    (outputs * torch.arange(1, packed.NUM_CLASSES + 1, device=outputs.device)).sum().backward()
    own &= batch.coords[..., 0] >= 0  # the model looks at no pixels of prefix tokens
    assert torch.equal(pixels.grad.abs().sum(-1) > 0, own)


def every_parameter_learns(setting, case):
    """One backward pass gives every parameter a finite gradient that is not all zero."""
    batch, model = setting.batch(case), setting.model()
    _, _, gradients = results_of(setting, model, lambda m, b: m(b), batch)
    every_gradient_learns(gradients, case)


def every_gradient_learns(gradients, case):
    """As `every_parameter_learns`, of gradients that are there already."""
    assert any(length > 1 for lens in case.lens for length in lens)  # one token has no softmax
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name


def replace_patches(batch, patches):
    """Return the batch with other pixels."""
    return replace(batch, patches=patches)


def without_padding_rows(batch):
    """Return the batch without its rows of padding alone."""
    kept = batch.present.any(1)
    return PackedBatch(**{name: value[kept] for name, value in batch.items()})
