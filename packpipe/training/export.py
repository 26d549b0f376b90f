"""A trained model as an ONNX file, whose rows have one shape.

(``torch.export`` takes the model as it is, and a batch as its argument: see `NaViT`.)

The graph takes packed rows of uint8 patches, whatever images they hold: attention is masked by
`segment_ids`, and everything else goes by segments, so no image sees another. What says how images
become such rows is in the file's metadata, so that `OnnxModel` needs the file alone.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packpipe import checks
from packpipe._version import __version__
from packpipe.durable import write_bytes
from packpipe.loading.batch import PackedBatch
from packpipe.loading.image_packs import check_whole, image_packs
from packpipe.model.navit import NaViT
from packpipe.model.onnx_model import INPUTS, METADATA, VERSION, OnnxModel
from packpipe.model.positions import is_indexed
from packpipe.planning.image_config import PackConfig
from packpipe.training.run_folder import RunOptions

# The first that has the exact GELU as one operator; onnxruntime reads it since its version 1.17.
_OPSET = 20
# A file of protobuf holds less than 2 GiB, of which the graph itself takes a few MB.
_MOST_WEIGHT_BYTES = 2**31 - 2**26
# Largest difference from the model ÷ its largest output; rounding explains some 1e-6.
_TOLERANCE = 1e-4


def export_onnx(
    model: NaViT,
    options: RunOptions,
    output: Path | str,
    *,
    batch_size: int = 1,
    seq_len: int | None = None,
) -> float:
    """Write a model as an ONNX file, once onnxruntime has given the model's own outputs with it.

    ::

        model, options = packpipe.load_model("run")
        packpipe.export_onnx(model, options, "model.onnx")
        logits = packpipe.OnnxModel("model.onnx").predict(files)  # needs no torch

    Inputs are the columns of a `PackedBatch`, of fixed shapes: ``patches``, ``segment_ids``,
    ``coords``, ``seq_lens`` and ``grid_hw``. Outputs are float32: ``outputs``, what the model
    gives, and ``features``, what enters its head; [rows, segments, ...], meaningless where a
    segment is absent, or without pooling [rows, tokens, ...].

    Args:
        model: on any device, in any precision; the file's is float32. It is not changed.
        options: how it is asked; ``options.at(128)`` for images of at most 128 tokens.
        output: the file.
        batch_size: rows a call.
        seq_len: tokens a row, no fewer than those of an image; None is that of the options.
            Attention costs seq_len² a row.

    Returns:
        the largest difference between onnxruntime and the model on some rows ÷ the largest output.

    Raises:
        FileExistsError: the file is there already.
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.
        RuntimeError: onnxruntime gives other outputs than the model; no file is written.
        TypeError: the model is no NaViT.
        ValueError: the options drop tokens, show several views of an image or are of another
            patch_size; an argument is out of range; or the weights do not fit into one file.
    """
    output = checks.local_path("output", output)
    if output.exists():
        expected, remedy = "a file that is not there yet", "remove it, or give another name"
        raise FileExistsError(checks.sentence("output", str(output), expected, remedy))
    rows = checks.whole_number("batch_size", batch_size, 1, 2**15 - 1, "1 is usual")
    packing = options.packing
    if seq_len is not None:
        packing = replace(packing, seq_len=seq_len)
        _check_seq_len(packing.seq_len, options)
    _check_exportable(model, packing)
    plain = _plain(model)
    max_side = model.config.side if is_indexed(model.config.position) else None
    batch = _example(packing, rows, max_side)
    about = {
        "version": VERSION,
        "packpipe": __version__,
        "batch_size": rows,
        "pooling": model.config.pooling,
        "max_side": max_side,
        "run": replace(options, packing=packing).to_dict(),
    }
    encoded = _encoded(plain, batch, json.dumps(about))
    difference = _difference(plain, batch, OnnxModel(encoded))
    if not difference <= _TOLERANCE:  # so that NaN fails, too
        expected = f"at most {_TOLERANCE} from the model"
        remedy = "use other versions of torch, onnxscript and onnxruntime, and report these"
        name = "difference of onnxruntime's outputs"
        raise RuntimeError(checks.sentence(name, difference, expected, remedy))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, encoded)
    return difference


class _OfArrays(nn.Module):
    """The model as a function of arrays; it returns what enters its head as well."""

    def __init__(self, model: NaViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        columns = dict(zip(INPUTS, arrays, strict=True))
        # Which example a segment is, no model asks.
        batch = PackedBatch(example_index=columns["seq_lens"], **columns)
        head, entering = self.model.head, []
        if head is None:
            outputs = self.model(batch)
            return outputs, outputs
        hook = head.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
        outputs = self.model(batch)
        hook.remove()
        return outputs, entering[0].unflatten(0, (len(batch.segment_ids), -1))


def _plain(model: NaViT) -> _OfArrays:
    """Return a copy of the model in float32 on the CPU, with attention that can be exported."""
    copy = NaViT(replace(model.config, attention="reference"))
    copy.load_state_dict(model.state_dict())
    return _OfArrays(copy).eval()


def _example(packing: PackConfig, batch_size: int, max_side: int | None) -> dict[str, Any]:
    """Return rows of noise, of images of several shapes, by the options."""
    draw = np.random.default_rng(0)
    sides = np.array([(1, 1), (2, 3), (3, 2), (5, 1), (1, 6)]) * packing.patch_size
    noise = [draw.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides.tolist()]
    grids = image_packs(noise, packing).plan.grid_hw.max(1)
    # The model takes no longer ones; the square is left where it takes any.
    fit = [one for one, side in zip(noise, grids, strict=True) if side <= (max_side or side)]
    columns = next(image_packs(fit or noise[:1], packing).batches(batch_size))
    return {name: columns[name] for name in INPUTS}


def _encoded(model: _OfArrays, batch: dict[str, Any], about: str) -> bytes:
    """Return the bytes of the ONNX file."""
    # onnxruntime is asked for here, too: nothing is traced in vain where it is missing.
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    arrays = tuple(torch.from_numpy(array) for array in batch.values())
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            model,
            arrays,
            input_names=list(INPUTS),
            output_names=["outputs", "features"],
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # noqa: S101 (for the type checker: None is of a file it wrote)
    program.model.metadata_props[METADATA] = about
    # They hold paths of this machine's files, from which each operator comes.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    encoded: bytes = program.model_proto.SerializeToString()
    return encoded


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what torch's exporter says of itself and of packages that are not there."""
    exporter = logging.getLogger("torch.onnx")
    before = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(before)


def _difference(model: _OfArrays, batch: dict[str, Any], exported: OnnxModel) -> float:
    """Return the largest difference of both outputs ÷ the largest value, of what is not padding."""
    with torch.no_grad():
        wanted = model(*(torch.from_numpy(array) for array in batch.values()))
    found = exported.run(batch)
    real = batch["segment_ids" if exported.is_dense else "seq_lens"] > 0
    pairs = [(a[real], b.numpy()[real]) for a, b in zip(found, wanted, strict=True)]
    return max(float(np.abs(a - b).max() / max(1e-30, np.abs(b).max())) for a, b in pairs)


def _check_seq_len(seq_len: int, options: RunOptions) -> None:
    """Raise ValueError if images would be made smaller to fit, and be answered otherwise."""
    least = options.max_tokens + options.packing.prefix_tokens
    if seq_len < least:
        expected = f"at least {least}, the tokens of an image"
        remedy = "leave it out, or give images of fewer max_tokens"
        raise ValueError(checks.sentence("seq_len", seq_len, expected, remedy))


def _check_exportable(model: NaViT, packing: PackConfig) -> None:
    if not isinstance(model, NaViT):
        expected, remedy = "'NaViT'", "export other models with torch.onnx.export"
        raise TypeError(checks.sentence("type(model)", type(model).__name__, expected, remedy))
    check_whole(packing)
    for name in ("patch_size", "prefix_tokens"):
        own, expected = getattr(packing, name), f"{getattr(model.config, name)} (the model's)"
        if own != getattr(model.config, name):
            what = f"{name} of the options"
            raise ValueError(checks.sentence(what, own, expected, "give its own"))
    size = sum(4 * weight.numel() for weight in model.parameters())
    if size > _MOST_WEIGHT_BYTES:
        expected = f"at most {_MOST_WEIGHT_BYTES}, since one ONNX file holds less than 2 GiB"
        remedy = "use torch.export, which has no such limit"
        raise ValueError(checks.sentence("bytes of the weights", size, expected, remedy))
