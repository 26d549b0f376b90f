"""The plan is made again from what a folder says, and every row that is not its own is found."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import crashing
import harming
import pictures
import pyarrow as pa
import pytest
import windowed
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, keys, size_lists

import packpipe
from packpipe.planning.image_config import PackConfig
from packpipe.planning.token_config import TokenConfig

FIRST = "data-00000.arrow"


def said(folder: Path, *given: Any, **options: Any) -> list[str]:
    return [str(problem) for problem in packpipe.verify(folder, *given, **options)]


def turned(folder: Path) -> bool:
    """Put the rows of a folder in the reverse order; return whether they are others then."""
    table = harming.read(folder / FIRST)
    other = table.take(pa.array(range(table.num_rows)[::-1], pa.int64()))
    harming.write(folder / FIRST, other)
    harming.agree(folder)
    return other.column("example_index") != table.column("example_index")


@settings(max_examples=12)
@given(sizes=size_lists(max_size=25), config=configs(), key=keys())
def test_rows_of_images_are_those_of_the_plan_and_no_others(tmp_path_factory, sizes, config, key):
    # With columns of sizes no image is opened, and without pixels none is decoded.
    columns = {"image": [{"bytes": b"", "path": None}] * len(sizes)}
    columns |= {"height": [h for h, _ in sizes], "width": [w for _, w in sizes]}
    features = {"image": Image(), "height": Value("int32"), "width": Value("int32")}
    dataset = Dataset.from_dict(columns, features=Features(features))
    folder = tmp_path_factory.mktemp("a") / "a"
    options = {field.name: getattr(config, field.name) for field in fields(PackConfig)}
    options |= {"size_columns": ("height", "width"), "materialize": False, "progress": False}
    packpipe.pack(dataset, output=folder, seed=key[0], epoch=key[1], **options)
    assert said(folder) == said(folder, dataset) == []
    if turned(folder):
        assert any("not what the plan puts there" in problem for problem in said(folder))


@settings(max_examples=12)
@given(
    lens=st.lists(st.integers(0, 30), min_size=1, max_size=25),
    overflow=st.sampled_from(["split", "truncate", "drop"]),
    layout=st.sampled_from(["fixed", "ragged"]),
    limits=st.tuples(st.integers(1, 16), st.none() | st.integers(1, 3), st.integers(1, 30)),
    key=keys(),
)
def test_rows_of_tokens_are_those_of_the_plan_and_no_others(
    tmp_path_factory, lens, overflow, layout, limits, key
):
    dataset = Dataset.from_dict(
        {"input_ids": [list(range(1, size + 1)) for size in lens]},
        features=Features({"input_ids": List(Value("int32"))}),
    )
    folder, (seq_len, most, window) = tmp_path_factory.mktemp("a") / "a", limits
    config = TokenConfig(
        seq_len=seq_len, overflow=overflow, layout=layout, max_segments=most, window=window
    )
    options = {**asdict(config), "max_bad_fraction": 1.0, "max_consecutive_bad": 99}
    packpipe.pack(dataset, output=folder, seed=key[0], epoch=key[1], progress=False, **options)
    assert said(folder) == said(folder, dataset) == []
    if turned(folder):
        assert any("not what the plan puts there" in problem for problem in said(folder))


@pytest.fixture
def packed(tmp_path):
    crashing.build(crashing.source(), tmp_path / "packed")
    return tmp_path / "packed"


def harm(folder: Path, how: str) -> None:
    """Do the first harm to rows or rejects that is described so."""
    stages = [("decode", "undecodable", "OSError: cannot load this image")]
    every = [*harming.row_harm(folder, {}), *harming.reject_harm(folder, stages, {})]
    next(one for one in every if re.fullmatch(how, one.how)).do(folder)


def test_rows_and_files_that_changed_places_are_named(packed):
    first, second = harming.read(packed / FIRST)["example_index"].to_pylist()[:2]
    harm(packed, r"rows \(0, 0\) and \(0, 1\) exchanged")
    ours, theirs = (f"[{', '.join(map(str, some))}]" for some in (second, first))
    what = f"not what the plan puts there (the first examples {ours}, expected {theirs})"
    assert said(packed) == [f"{FIRST}, rows 0, 1: {what}"]
    harm(packed, r"rows \(0, 0\) and \(0, 1\) exchanged")
    assert said(packed) == []
    harm(packed, "files exchanged")
    found = said(packed)
    assert [problem[: len(FIRST)] for problem in found] == [FIRST, "data-00001.arrow"]


def test_a_row_in_two_pieces_is_found(packed):
    rows = harming.load(packed / "manifest.json")["counts"]["packs"]
    harm(packed, r"row .* split")
    found = said(packed)
    what = f"gives a plan of {rows} rows, expected the {rows + 1} of the files"
    assert found[0] == f"manifest.json: {what}"
    assert "not what the plan puts there" in found[1]


def test_a_good_image_among_the_rejects_is_found_beside_the_source(packed):
    before = set(harming.read(packed / "rejects.arrow")["example_index"].to_pylist())
    harm(packed, r"segment \(0, 0\) moved there .*")
    (good,) = set(harming.read(packed / "rejects.arrow")["example_index"].to_pylist()) - before
    # Its size is noted with those of the others, so the plan is the same.
    assert said(packed) == []
    assert said(packed, crashing.source(), sample=0) == [
        f"example {good}: is among the rejects, but good"
    ]


def test_a_folder_without_the_sizes_of_what_was_lost_is_compared_with_the_rest(packed):
    manifest = harming.load(packed / "manifest.json")
    assert len(manifest.pop("undecoded")) == manifest["counts"]["rejected"] == 4
    (packed / "manifest.json").write_text(json.dumps(manifest))
    assert said(packed) == said(packed, crashing.source(), sample=None) == []


def test_windows_of_more_rows_than_64_bits_count_are_a_problem(tmp_path):
    windowed.write(tmp_path / "train")
    assert not windowed.built(windowed.build_of(tmp_path / "train", tmp_path / "rows"))
    before = harming.load(tmp_path / "rows" / "manifest.json")
    for blocks, what in (
        ([[2**70, 2]], ""),  # what NumPy says
        ([[2**62, 4]], f"windows are of {2**64} examples, expected 60"),
        ([[2**62, 4], [5, 12]], f"windows are of {2**64 + 60} examples, expected 60"),
    ):
        changed = {**before, "windows": {**before["windows"], "blocks": blocks}}
        (tmp_path / "rows" / "manifest.json").write_text(json.dumps(changed))
        found = "\n".join(said(tmp_path / "rows"))
        assert f"manifest.json: gives no plan: {what}" in found


@pytest.fixture
def pairs(tmp_path):
    images = [{"bytes": pictures.encoded_image(8, 16, seed), "path": None} for seed in range(9)]
    images[3] = {"bytes": b"no image", "path": None}
    jpeg = pictures.encoded_image(8, 8, 5, "JPEG")
    images[5] = {"bytes": crashing.header_of(jpeg), "path": None}
    columns = {"image": images, "input_ids": [[row] * (1 + row % 3) for row in range(9)]}
    features = Features({"image": Image(), "input_ids": List(Value("int32"))})
    dataset = Dataset.from_dict(columns, features=features)
    options = {"max_text": 2, "overflow": "truncate", "max_bad_fraction": 1.0, "patch_size": 8}
    packpipe.pack_pairs(
        dataset, 4, 3, output=tmp_path / "a", progress=False, num_workers=0, **options
    )
    return dataset, tmp_path / "a"


def test_nothing_is_wrong_with_pairs(pairs):
    dataset, folder = pairs
    assert said(folder) == said(folder, dataset, sample=None) == []
    for part in ("images", "texts"):
        assert said(folder / part) == said(folder / part, dataset, sample=None) == []


@pytest.mark.parametrize("part", ["images", "texts"])
def test_rows_of_pairs_that_changed_places_are_found(pairs, part):
    dataset, folder = pairs
    assert turned(folder / part)
    assert said(folder / part) == []
    (problem,) = said(folder)
    assert problem.startswith(f"{part}/{FIRST}, rows 0, 1, 2 and")
    # The source has the texts that the plan of images depends on, but not that plan.
    assert len(said(folder / part, dataset)) == (part == "images")


def test_folders_that_are_not_of_one_call_are_no_pair(pairs, tmp_path):
    dataset, folder = pairs
    options = {"max_text": 2, "overflow": "truncate", "max_bad_fraction": 1.0, "patch_size": 8}
    other = tmp_path / "other"
    packpipe.pack_pairs(dataset, 4, 3, seed=1, output=other, progress=False, **options)
    (folder / "texts").rename(tmp_path / "texts")
    (other / "texts").rename(folder / "texts")
    found = said(folder)
    assert "images/manifest.json: beside names other texts than those beside it" in found
    assert any(problem.startswith("texts/manifest.json: beside is '") for problem in found)


def test_folders_of_a_pair_that_changed_places_or_are_broken_are_a_list_of_problems(pairs):
    dataset, folder = pairs
    (folder / "images").rename(folder / "other")
    (folder / "texts").rename(folder / "images")
    (folder / "other").rename(folder / "texts")
    assert said(folder, dataset) == ["images: holds no rows of images"]
    (folder / "images").rename(folder / "other")
    (folder / "texts").rename(folder / "images")
    (folder / "other").rename(folder / "texts")
    (folder / "texts" / FIRST).write_bytes(b"")
    found = said(folder, dataset)
    assert len(found) == 1
    assert re.fullmatch(rf"texts/{FIRST}: holds 0 bytes, expected \d+", found[0])
    (folder / "images" / "manifest.json").unlink()
    assert said(folder)[0].startswith("images/manifest.json: is missing")
