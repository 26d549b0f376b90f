"""Columns that are not what packing needs: each case is named, in every way in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pictures
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from typer.testing import CliRunner

import packpipe
from packpipe.cli.main import app

SMALL = {"seq_len": 16, "patch_size": 4}
PNG = pictures.encoded_image(8, 12)


def of_command(source: Dataset, folder: Path) -> None:
    source.to_parquet(folder / "source.parquet")
    command = ["pack", folder / "source.parquet", folder / "out", "--seq-len", 16]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 2, result.output
    raise ValueError(result.stderr)


WAYS: dict[str, Callable[[Dataset, Path], Any]] = {
    "pack": lambda source, folder: packpipe.pack(source, output=folder / "out", **SMALL),
    "map": lambda source, _: source.map(packpipe.Packer(**SMALL), batched=True),
    "batch": lambda source, _: packpipe.Packer(**SMALL)(source.data.table),
    "epochs": lambda source, _: packpipe.EpochPacks(source, **SMALL),
    "stream": lambda source, _: packpipe.PackedStream(source.to_iterable_dataset(), **SMALL),
    "command": of_command,
}

SEVERAL = {"bytes": PNG, "path": None}
NESTED = (
    "features['pages'] is List(Image(mode=None, decode=True)), expected one image an example; "
    "make each image a row of its own, with dataset.map(..., batched=True)"
)
TEXTS = (
    "columns of text is ['text'], expected images, or lists of tokens; tokenize texts first, "
    "with dataset.map; cast_column paths to Image()"
)
BYTES = (
    "columns of bytes is ['id'], expected named, since bytes beside input_ids may be images or "
    "not; packpipe.pack(token_columns='input_ids') packs the tokens, image_column the images"
)
CASES = {
    "several images a row": (
        Features({"pages": List(ImageFeature()), "n": Value("int32")}),
        {"pages": [[SEVERAL, SEVERAL]], "n": [1]},
        NESTED,
    ),
    "images in structs": (
        Features({"page": {"image": ImageFeature(), "n": Value("int32")}}),
        {"page": [{"image": SEVERAL, "n": 1}]},
        "expected a column of images; call dataset.flatten() first",
    ),
    "texts alone": (
        Features({"text": Value("string"), "n": Value("int32")}),
        {"text": ["one", "two"], "n": [1, 2]},
        TEXTS,
    ),
    "bytes beside tokens": (
        Features({"id": Value("binary"), "input_ids": List(Value("int32"))}),
        {"id": [b"a", b"b"], "input_ids": [[1, 2], [3]]},
        BYTES,
    ),
}
# Arrow's own batches do not say that structs of bytes and paths are images.
NAMED = [(case, way) for case in CASES for way in WAYS if way != "batch" or "images" not in case]


@pytest.mark.parametrize(("case", "way"), NAMED)
def test_a_column_that_cannot_be_packed_is_named_with_its_remedy(tmp_path, case, way):
    features, columns, message = CASES[case]
    source = Dataset.from_dict(columns, features=features)
    with pytest.raises(ValueError, match=re.escape(message)):
        WAYS[way](source, tmp_path)


def test_several_images_a_row_are_no_column_to_ask_for():
    features, columns, message = CASES["several images a row"]
    source = Dataset.from_dict(columns, features=features)
    with pytest.raises(ValueError, match=re.escape(message)):
        packpipe.pack(source, image_column="pages")


def test_texts_are_no_tokens_to_ask_for():
    source = Dataset.from_dict({"text": ["one"], "input_ids": [[1]]})
    message = "token_columns[0] is 'text', expected different ones of ['input_ids']; tokenize texts"
    with pytest.raises(ValueError, match=re.escape(message)):
        packpipe.pack(source, token_columns="text")


def test_bytes_beside_tokens_are_packed_as_what_is_asked_for(tmp_path):
    features = CASES["bytes beside tokens"][0]
    source = Dataset.from_dict({"id": [b"a", PNG], "input_ids": [[1, 2], [3]]}, features=features)
    tokens = packpipe.pack(source, 4, token_columns="input_ids", output=tmp_path / "tokens")
    assert tokens[0]["id"] in ([b"a", PNG], [PNG, b"a"])
    options = {"image_column": "id", "max_bad_fraction": 0.5, **SMALL}
    images = packpipe.pack(source, output=tmp_path / "images", **options)
    assert images[0]["example_index"] == [1]
    assert packpipe.pack_pairs(source.select([1]), 16, 32, patch_size=4)[0].num_rows


def blank(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"image": [pictures.encoded_image(4, 4)] * len(rows["image"])}


def transformed(in_place: bool) -> Dataset:
    source = pictures.dataset_of([PNG, PNG])
    if not in_place:
        return source.with_transform(blank)
    source.set_transform(blank)
    return source


@pytest.mark.parametrize("in_place", [True, False], ids=["set_transform", "with_transform"])
def test_a_transform_is_refused_and_not_ignored(tmp_path, in_place):
    source = transformed(in_place)
    packed = packpipe.pack(source.with_format(None), output=tmp_path / "packed", **SMALL)
    message = (
        "dataset.format is 'the transform blank', expected no transform, which would be ignored; "
        "take it off with dataset.with_format(None), and apply it with map, or pass a function of "
        "pixels as transform= to EpochPacks or PackedStream"
    )
    for work in (
        lambda: packpipe.pack(source, output=tmp_path / "out", **SMALL),
        lambda: packpipe.pack_pairs(source, 16, 8),
        lambda: packpipe.EpochPacks(source, **SMALL),
        lambda: packpipe.verify(tmp_path / "packed", source),
        lambda: packpipe.read_rows(packed.with_transform(blank)),
        lambda: packpipe.PackedLoader(packed.with_transform(blank), 1),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            work()
    with pytest.raises(NotImplementedError, match="formatted dataset"):  # `datasets` refuses
        packpipe.PackedStream(source.to_iterable_dataset(), **SMALL)


def test_map_gives_a_transforms_rows_to_a_packer():
    rows = transformed(False).map(
        packpipe.Packer(**SMALL, label_column=None),
        batched=True,
        remove_columns=["image", "label", "n"],
    )
    # The mapped dataset keeps the transform, which is meant for the columns before.
    assert rows.with_format(None)[0]["image_hw"] == [[4, 4], [4, 4]]


def test_rows_computed_when_read_are_no_transform_of_the_callers(tmp_path):
    source = pictures.dataset_of([PNG, PNG])
    lazy = packpipe.pack(source, output=tmp_path / "lazy", materialize=False, **SMALL)
    assert len(packpipe.read_rows(lazy).example_index) == 2
