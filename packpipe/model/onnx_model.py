"""`OnnxModel`: a model in an ONNX file that answers images of any size. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.loading.image_packs import image_packs
from packpipe.planning.image_config import PackConfig

# What the file takes of a batch, and the name of what it says of itself.
INPUTS = ("patches", "segment_ids", "coords", "seq_lens", "grid_hw")
METADATA = "packpipe"
VERSION = 1

Outputs: TypeAlias = "NDArray[np.float32] | list[NDArray[np.float32]]"


class OnnxModel:
    """A model that `export_onnx` wrote, run by onnxruntime.

    Images are packed by the options in the file; each is answered as if it were alone.

    Args:
        file: its path, or its bytes.
        providers: of onnxruntime, the first that has an operator runs it; such as
            ``["CUDAExecutionProvider", "CPUExecutionProvider"]``.

    Attributes:
        class_names: by the number of their output; None if nobody knows them.
        packing: how images become rows.
        batch_size: rows a call.
        is_dense: whether there is an output a token, not an image.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: onnxruntime is not installed.
        ValueError: the file is not one of packpipe's, or of a later version of it.
    """

    def __init__(
        self, file: Path | str | bytes, *, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, InvalidProtobuf

        if not isinstance(file, bytes) and not Path(file).is_file():
            raise FileNotFoundError(f"{file} is no file; write one with packpipe export")
        source = file if isinstance(file, bytes) else str(file)
        try:
            self._session = onnxruntime.InferenceSession(source, providers=list(providers))
        except (InvalidArgument, InvalidProtobuf) as error:
            what = f"{len(file)} bytes" if isinstance(file, bytes) else str(file)
            expected, remedy = "an ONNX model", "write one with packpipe export"
            raise ValueError(checks.sentence("file", what, expected, remedy)) from error
        told = self._session.get_modelmeta().custom_metadata_map.get(METADATA)
        about = json.loads(told) if told else {}
        if about.get("version") != VERSION:
            found = about.get("version", "missing")
            expected = f"{VERSION}, as packpipe export writes it"
            remedy = "export the model again, with this version"
            raise ValueError(
                checks.sentence("version of packpipe's metadata", found, expected, remedy)
            )
        self.packing = PackConfig.from_dict(about["run"]["packing"])
        names = about["run"]["class_names"]
        self.class_names = None if names is None else tuple(names)
        self.batch_size: int = about["batch_size"]
        self.is_dense = about["pooling"] == "none"
        self._loss, self._max_side = about["run"]["loss"], about["max_side"]
        self._inputs = [taken.name for taken in self._session.get_inputs()]

    def predict(self, images: Iterable[Any]) -> Outputs:
        """Return the model's output for each image, in their order: its logits.

        Args:
            images: encoded bytes, open files, paths (also with a scheme, such as ``s3://``), arrays
                or `PIL` images; or one of these alone, but for an array.

        Returns:
            float32[images, classes]; without pooling a list of maps, [rows, columns, classes] or,
            with ``target_stride``, [rows, columns, cells, classes].

        Raises:
            ValueError: an image cannot be read, and the message has its number; or it has more
                patches on an axis than the model's position table has places.
        """
        return self._answers(images, 0)

    def embed(self, images: Iterable[Any]) -> Outputs:
        """Return what enters the model's head for each image: its pooled features.

        Arguments, order and errors are those of `predict`.
        """
        return self._answers(images, 1)

    def probabilities(self, images: Iterable[Any]) -> Outputs:
        """Return the probabilities of the classes for each image, as the model was trained.

        Those of a sigmoid need not add up to 1. Arguments, order and errors are those of `predict`.

        Raises:
            ValueError: the model was trained with a loss that gives no probabilities, such as that
                of a regression.
        """
        if self._loss not in ("sigmoid", "softmax"):
            expected = "'sigmoid' or 'softmax', for a regression has no probabilities"
            remedy = "use predict"
            raise ValueError(checks.sentence("loss", self._loss, expected, remedy))
        found = self.predict(images)
        to_shares = _sigmoid if self._loss == "sigmoid" else _softmax
        return [to_shares(one) for one in found] if self.is_dense else to_shares(found)

    def run(self, columns: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Return both outputs for a batch of rows, by `predict` and by `embed`.

        Args:
            columns: of a batch, such as `PackedLoader` gives with ``as_numpy=True``.
        """
        found: list[NDArray[np.float32]] = self._session.run(
            ["outputs", "features"], {name: columns[name] for name in self._inputs}
        )
        return found

    def _answers(self, images: Iterable[Any], output: int) -> Outputs:
        packs = image_packs(images, self.packing)
        side = int(packs.plan.grid_hw.max(initial=0))
        if self._max_side is not None and side > self._max_side:
            expected = f"at most {self._max_side} patches an axis (max_side)"
            remedy = "export with fewer max_tokens"
            raise ValueError(checks.sentence("grid_hw", side, expected, remedy))
        answers: dict[int, NDArray[np.float32]] = {}
        for batch in packs.batches(self.batch_size):
            values = self.run(batch)[output]
            for row, number in zip(*np.nonzero(batch["seq_lens"]), strict=True):
                one = values[row, number]
                if self.is_dense:
                    # All tokens of an image are there, row by row of its grid.
                    tokens = batch["segment_ids"][row] == number + 1
                    grid = batch["grid_hw"][row, number]
                    one = values[row, tokens].reshape(*grid, *values.shape[2:])
                answers[int(batch["example_index"][row, number])] = one
        found = [answers[number] for number in range(len(answers))]
        if self.is_dense:
            return found
        width = self._session.get_outputs()[output].shape[-1]
        return np.stack(found) if found else np.empty((0, width), np.float32)


def _sigmoid(logits: Any) -> Any:
    # Of the half that does not overflow.
    raised = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, raised) / (1 + raised)


def _softmax(logits: Any) -> Any:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)
