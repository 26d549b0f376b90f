"""What `packpipe embed` writes: a vector for each image of a dataset, in one Parquet file.

The examples are taken in parts of part_size, each planned alone and written to a file of its own in
the folder OUTPUT.parts. A part is complete or not there, so a run that was killed goes on after the
last one. When all are there they become OUTPUT, one row group each, and the folder is removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from datasets import Dataset, Features, List, Value

from packpipe import __version__, checks
from packpipe.building.shards import alone_in
from packpipe.cli.asking import ALL_MAY_BE_BAD, in_rejects_alone, loaded
from packpipe.cli.layouts import packs_of
from packpipe.durable import commit, partial_of, write_json
from packpipe.model.navit import NaViT
from packpipe.model.predict import predict_packs
from packpipe.planning.image_config import PackConfig
from packpipe.rows.rejects import Reject, Tolerance
from packpipe.rows.schema import REJECTS, rejects_table
from packpipe.sources.columns import holds_images

DTYPES = ("float32", "float16")
_OWN = ("example_index", "embedding", "num_tokens")
_RECORD = "record.json"


def embed(
    run: Path,
    dataset: Dataset,
    output: Path,
    *,
    columns: list[str] | None = None,
    dtype: str = "float32",
    part_size: int = 4096,
    batch_size: int = 8,
    num_workers: int = 0,
    max_bad_fraction: float = 0.01,
) -> list[Reject]:
    """Write the pooled features of a trained model for each image; return the rejects.

    The file has a row for each image that can be read, in the order of the dataset: its
    example_index, the columns kept of the dataset, ``embedding``
    (fixed_size_list<dtype>[channels]) and num_tokens. The rejects are in a table beside it.

    Args:
        run: a training's folder.
        dataset: images; labels are not asked for.
        output: the file.
        columns: of the dataset, that are kept; None keeps all but images.
        dtype: ``"float32"`` or ``"float16"``.
        part_size: examples a part: what a kill may cost.
        batch_size: rows a step.
        num_workers: threads that decode ahead.
        max_bad_fraction: a larger share of images that cannot be read is an error.

    Raises:
        FileExistsError: the file is there already, or other vectors are in its parts, or another
            process is writing them.
        TooManyRejects: too many images cannot be read.
    """
    output = checks.local_path("OUTPUT", output)
    checks.choice("dtype", dtype, DTYPES, "choose a type of the vectors")
    parts = output.with_name(f"{output.name}.parts")
    if output.exists():
        if parts.exists():  # killed when all else was done
            shutil.rmtree(parts)
            return _rejects(rejects_path(output))
        expected, remedy = "a file that is not there yet", "remove it, or give another name"
        raise FileExistsError(checks.sentence("OUTPUT", str(output), expected, remedy))
    model, options = loaded(run)
    trunk = _without_head(model)
    schema = _schema(dataset, columns, dtype, trunk.config.dim)
    record = {
        "packpipe": __version__,
        "weights": _digest(trunk),
        "packing": options.packing.to_dict(),
        "dataset": dataset._fingerprint,
        "columns": schema.names,
        "dtype": dtype,
        "part_size": part_size,
        "batch_size": batch_size,
    }
    tolerance = Tolerance(len(dataset), max_bad_fraction, 2**62)
    output.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(parts, wait=False):
        _begin(parts, record)
        rejects: list[Reject] = []
        names = []
        for first in range(0, len(dataset), part_size):
            name = parts / f"{first:012d}.parquet"
            rejected = rejects_path(name)
            if not name.exists():
                last = min(first + part_size, len(dataset))
                found = _part(
                    trunk, dataset, (first, last), schema, options.packing, batch_size, num_workers
                )
                _write(rejected, [found[1]], REJECTS)
                _write(name, [found[0]], schema)
            rejects += _rejects(rejected)
            tolerance.check(rejects)
            names.append(name)
        _write(rejects_path(output), [rejects_table(rejects)], REJECTS)
        _write(output, map(pq.read_table, names), schema)
    shutil.rmtree(parts)
    return rejects


def rejects_path(output: Path) -> Path:
    """Return where the rejects of a file of vectors are."""
    return output.with_name(f"{output.stem}.rejects.parquet")


def _rejects(path: Path) -> list[Reject]:
    return [Reject(**row) for row in pq.read_table(path).to_pylist()]


def _part(
    trunk: NaViT,
    dataset: Dataset,
    span: tuple[int, int],
    schema: pa.Schema,
    packing: PackConfig,
    batch_size: int,
    num_workers: int,
) -> tuple[pa.Table, pa.Table]:
    """Return the rows of some neighbouring examples, and their rejects."""
    first, last = span
    images = dataset.select(range(first, last))
    packs = packs_of(images, packing, num_workers, label_column=None, **ALL_MAY_BE_BAD)
    kind = next(trunk.parameters()).device.type
    with in_rejects_alone(), torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        answers = predict_packs(trunk, packs, batch_size=batch_size, num_workers=num_workers)
    index = answers.example_index.numpy()
    vectors = schema.field("embedding").type
    values = answers.outputs.float().flatten().numpy()
    values = values.astype(vectors.value_type.to_pandas_dtype())
    own = {
        "example_index": pa.array(first + index),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values), vectors.list_size),
        "num_tokens": pa.array(answers.seq_lens.numpy()),
    }
    kept = images.with_format("arrow")[:]
    every = [own[n] if n in own else kept.column(n).take(pa.array(index)) for n in schema.names]
    rows = pa.table(every, schema.names).cast(schema)
    rejects = [r._replace(example_index=first + r.example_index) for r in packs.rejects]
    rejects += [r._replace(example_index=first + r.example_index) for r in packs.undecodable]
    return rows, rejects_table(rejects)


def _schema(dataset: Dataset, columns: list[str] | None, dtype: str, dim: int) -> pa.Schema:
    features = dataset.features
    chosen = columns
    if chosen is None:
        chosen = [name for name, feature in features.items() if not holds_images(feature)]
    for name in chosen:
        if name not in features or name in _OWN:
            expected = f"one of {list(features)}, and none of {', '.join(_OWN)}"
            raise ValueError(checks.sentence("columns", name, expected, "rename or leave it out"))
    return Features(
        {
            "example_index": Value("int64"),
            **{name: features[name] for name in chosen},
            "embedding": List(Value(dtype), length=dim),
            "num_tokens": Value("int32"),
        }
    ).arrow_schema


def _without_head(model: NaViT) -> NaViT:
    """Return the model, which now gives an image's pooled features."""
    if model.config.pooling == "none":
        expected, remedy = "one vector an image", "train with another pooling"
        raise ValueError(checks.sentence("pooling", model.config.pooling, expected, remedy))
    model.head, model.config = None, replace(model.config, num_classes=None)
    return model


def _digest(model: NaViT) -> str:
    """Return a digest of the weights."""
    digest = xxhash.xxh3_128()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _begin(parts: Path, record: dict[str, Any]) -> None:
    """Write what the parts are of; if there are some, check that they are of the same."""
    path = parts / _RECORD
    if not path.exists():
        write_json(path, record)
        return
    found = json.loads(path.read_bytes())
    for name, value in record.items():
        if found.get(name) != value:
            expected = f"{found.get(name)!r} as in {parts.name}"
            remedy = "use it again, or remove the folder"
            raise FileExistsError(checks.sentence(name, value, expected, remedy))


def _write(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables as one Parquet file, a row group each, whole or not at all."""
    with pq.ParquetWriter(partial_of(path), schema) as writer:
        for table in tables:
            writer.write_table(table)
    commit(path)
