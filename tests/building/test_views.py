"""Several views of each image, on every way from a source to batches."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import product

import harming
import loading
import numpy as np
import pictures
import pyarrow as pa
import pytest
import torch
from laws import EVERYTHING

import packpipe
from packpipe import (
    Augment,
    Crop,
    EpochPacks,
    NaViT,
    NaViTConfig,
    PackedBatch,
    PackedLoader,
    PackedStream,
    Packer,
    Side,
    Uniform,
    View,
)
from packpipe.images.fill import Failure, fill_row
from packpipe.model.predict import predict_packs
from packpipe.philox import Key
from packpipe.planning.crops import crop_boxes
from packpipe.rows import fill_images
from packpipe.rows.from_arrow import table_rows
from packpipe.rows.to_arrow import rows_table
from packpipe.verification import image_comparison

CROP = Crop(Uniform(0.1, 0.9))
OPTIONS = {
    "patch_size": 4,
    "crop": CROP,
    "resolution": Side(Uniform(10, 20)),
    "drop_rate": 0.3,
    "reducing_gap": None,
    "views": 3,
}
TOGETHER = {**OPTIONS, "max_tokens": 13, "views_together": True}
SEQ_LEN, KEY = 40, {"seed": 3, "epoch": 2}
EVERY = sorted(product(range(9), range(3)))


@pytest.fixture(scope="module")
def dataset():
    return pictures.dataset_of(pictures.encoded_images())


def pack(dataset, folder, options=OPTIONS, **more):
    more = {"num_workers": 0, "progress": False, **KEY, **more}
    return packpipe.pack(dataset, SEQ_LEN, output=folder, **options, **more)


@pytest.fixture(scope="module")
def packed(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("views") / "packed"
    return folder, pack(dataset, folder)


@pytest.fixture(scope="module")
def together(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("views") / "together"
    return folder, pack(dataset, folder, TOGETHER)


def pairs_of(rows):
    return list(zip(rows.example_index.tolist(), rows.view.tolist(), strict=True))


def bytes_of(rows):
    return [*pictures.row_bytes(rows), rows.box.tolist(), rows.view.tolist()]


def by_segment(rows):
    """Everything of each segment, by example and view."""
    found = {}
    for row in range(len(rows)):
        end = 0
        for at in range(*rows.offsets[row : row + 2].tolist()):
            start, end = end, end + int(rows.seq_lens[at])
            tokens = rows.patches[row, start:end].tobytes(), rows.coords[row, start:end].tolist()
            view = int(rows.view[at]) if "view" in rows.segments else 0
            box, grid = rows.box[at].tolist(), rows.grid_hw[at].tolist()
            found[int(rows.example_index[at]), view] = (*tokens, box, grid)
    return found


def test_each_view_is_in_one_row_with_a_box_and_pixels_of_its_own(dataset, packed, tmp_path):
    rows = packpipe.read_rows(packed[1])
    assert rows.view.dtype == np.int32
    assert sorted(pairs_of(rows)) == EVERY
    assert packed[1].features.arrow_schema.field("view").type == pa.list_(pa.int32())
    index, view = rows.example_index, rows.view
    boxes = crop_boxes(CROP, rows.image_hw, Key(3, 2), index=index, view=view)
    assert rows.box.tolist() == boxes.tolist()
    assert (rows.labels.to_numpy() == index % 3).all()
    found = by_segment(rows)
    assert len({tokens for tokens, *_ in found.values()}) >= 25  # images of one pixel aside
    one = packpipe.read_rows(pack(dataset, tmp_path / "one", {**OPTIONS, "views": 1}))
    assert "view" not in one.segments
    alone = by_segment(one)
    assert alone == {pair: found[pair] for pair in EVERY if pair[1] == 0}
    rows_of_image = {pair[0]: set() for pair in EVERY}
    for row in range(len(rows)):
        for example in index[rows.offsets[row] : rows.offsets[row + 1]].tolist():
            rows_of_image[example].add(row)
    assert any(len(some) > 1 for some in rows_of_image.values())


def test_views_kept_together_share_a_row(together):
    rows = packpipe.read_rows(together[1])
    assert sorted(pairs_of(rows)) == EVERY
    for row in range(len(rows)):
        held = rows.example_index[rows.offsets[row] : rows.offsets[row + 1]].tolist()
        assert set(Counter(held).values()) == {3}
    assert rows.seq_lens.max() <= 13


def test_processes_and_rows_computed_when_read_give_the_same_bytes(dataset, packed, tmp_path):
    wanted = bytes_of(packpipe.read_rows(packed[1]))
    for name, options in (("process", {"num_workers": 1}), ("computed", {"materialize": False})):
        found = pack(dataset, tmp_path / name, **options)
        assert bytes_of(packpipe.read_rows(found)) == wanted, name
    assert packpipe.verify(tmp_path / "computed", dataset) == []
    packs = EpochPacks(dataset, SEQ_LEN, **OPTIONS)
    key = Key(3, 2)
    assert bytes_of(packs.rows(key, np.arange(packs.num_packs(key)))) == wanted
    table = packed[1].data.table.combine_chunks()
    again = table_rows(rows_table(table_rows(table), table.schema))
    assert bytes_of(again) == wanted


@pytest.mark.parametrize("kind", ["packed", "together"])
def test_nothing_is_wrong_with_views_compared_with_their_source(dataset, kind, request):
    folder, found = request.getfixturevalue(kind)
    assert packpipe.verify(folder) == []
    assert packpipe.verify(folder, dataset, sample=None) == []
    counts = packpipe.manifest(found)["counts"]
    assert (counts["packed"], counts["read"], counts["segments"]) == (9, 9, 27)
    summary = packpipe.summarize(folder)
    assert ("images", "9 of 9") in summary.rows()
    assert ("views", "3 of each image, 27 segments") in summary.rows()


def test_views_of_several_laws_are_packed_and_verified(dataset, tmp_path):
    laws = (
        View(count=2, crop=Crop(Uniform(0.4, 1)), resolution=Side(24), max_tokens=16),
        View(resolution=Side(12), max_tokens=4),
    )
    options = {"patch_size": 4, "views": laws, "views_together": True, "reducing_gap": None}
    found = pack(dataset, tmp_path / "packed", options)
    rows = packpipe.read_rows(found)
    assert sorted(pairs_of(rows)) == EVERY
    whole = rows.view == 2
    assert (rows.box[whole, 2:] == rows.image_hw[whole]).all()
    assert (rows.box[~whole, 2:] != rows.image_hw[~whole]).any(axis=1).sum() > 12
    assert packpipe.verify(tmp_path / "packed", dataset, sample=None) == []
    assert ("views", "3 of each image, 27 segments") in packpipe.summarize(
        tmp_path / "packed"
    ).rows()
    packs = EpochPacks(dataset, SEQ_LEN, **options)
    key = Key(3, 2)
    assert bytes_of(packs.rows(key, np.arange(packs.num_packs(key)))) == bytes_of(rows)


def harmed(folder, target, change):
    folder = shutil.copytree(folder, target)
    name = next(iter(harming.data(folder)))
    table = harming.read(folder / name)
    rows = table_rows(table)
    harming.write(folder / name, rows_table(change(rows), table.schema))
    harming.agree(folder)
    return [str(problem) for problem in packpipe.verify(folder)]


def test_a_view_that_is_none_is_twice_or_is_missing_is_found(packed, tmp_path):
    rows = packpipe.read_rows(packed[1])
    example, view = pairs_of(rows)[0]

    def with_view(number):
        def change(found):
            views = found.view.copy()
            views[0] = number
            return replace(found, segments={**found.segments, "view": views})

        return change

    said = harmed(packed[0], tmp_path / "none", with_view(3))
    assert any("a view that is none of 3" in one and "row 0" in one for one in said), said
    other = (view + 1) % 3
    said = harmed(packed[0], tmp_path / "twice", with_view(other))
    twice = f"example {example}, view {other}: is in more than one row"
    missing = f"example {example}, view {view}: is in no row and not in the rejects"
    assert any(one.startswith(twice) for one in said), said
    assert missing in said, "\n".join(said)


def test_an_image_of_which_a_view_cannot_be_decoded_is_one_reject(dataset, tmp_path, monkeypatch):
    """As a JPEG may be whose damage shows at some sizes only."""
    boxes = crop_boxes(
        CROP, np.array([(90, 33)] * 3), Key(3, 2), index=np.full(3, 2), view=np.arange(3)
    )
    bad = {tuple(boxes[view].tolist()): view for view in (1, 2)}

    def fails(images, out, rules, *change):
        tasks = [
            task._replace(data=Failure("truncated", f"cut, view {bad[task.box]}"))
            if task.example == 2 and task.box in bad
            else task
            for task in images
        ]
        return fill_row(tasks, out, rules, *change)

    monkeypatch.setattr(fill_images, "fill_row", fails)
    monkeypatch.setattr(image_comparison, "fill_row", fails)
    folder = tmp_path / "packed"
    found = pack(dataset, folder, max_bad_fraction=0.12)
    assert packpipe.rejects(found).to_list() == [
        {
            "example_index": 2,
            "stage": "decode",
            "reason": "truncated",
            "exception": "cut, view 1",
        }
    ]
    rows = packpipe.read_rows(found)
    assert sorted(pairs_of(rows)) == [pair for pair in EVERY if pair not in [(2, 1), (2, 2)]]
    manifest = packpipe.manifest(found)
    counts = manifest["counts"]
    assert (counts["packed"], counts["rejected"], counts["segments"]) == (8, 1, 25)
    assert counts["tokens"] == rows.seq_lens.sum()
    assert manifest["undecoded"] == [[2, 90, 33]]
    assert packpipe.verify(folder) == []
    assert packpipe.verify(folder, dataset, sample=None) == []
    loader = PackedLoader(found, 1, tail="pad")
    kept = [batch.by_view(batch.seq_lens[..., None], 3)[0].tolist() for batch in loader]
    assert 2 not in {example for some in kept for example in some}


def test_batches_of_map_need_indices_and_hold_each_view(dataset, packed):
    options = {"batched": True, "batch_size": 9, "remove_columns": dataset.column_names}
    packer = Packer(SEQ_LEN, **KEY, **OPTIONS)
    rows = packpipe.read_rows(dataset.map(packer, with_indices=True, **options))
    assert by_segment(rows) == by_segment(packpipe.read_rows(packed[1]))
    plain = Packer(SEQ_LEN, patch_size=4, max_tokens=9, views=2)
    with pytest.raises(ValueError, match=r"^with_indices is False, expected True"):
        plain(dataset.data.table[:3])


def test_where_views_make_no_sense_they_are_refused_by_name(dataset):
    message = "views is 3, expected 1, of a stream; pass a Dataset to EpochPacks"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PackedStream(dataset.to_iterable_dataset(), SEQ_LEN, **OPTIONS)
    texts = dataset.add_column("input_ids", [[1]] * 9)
    message = (
        "views is 3, expected 1, of pairs; a text is beside one segment; pack the images alone"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        packpipe.pack_pairs(texts, SEQ_LEN, text_seq_len=8, max_text=8, **OPTIONS)
    model = NaViT(NaViTConfig(patch_size=4, dim=16, depth=1, heads=1, num_classes=3))
    message = "views is 2, expected 1, an output an image; pass rows of several to predict_packs"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        packpipe.predict(model, pictures.encoded_images(), views=2)


def test_a_batch_tells_views_and_brings_those_of_an_example_together(together, packed):
    loader = PackedLoader(together[1], 2, tail="pad", seed=1)
    seen = []
    for batch in loader:
        assert batch.view.dtype == torch.int32
        assert torch.equal(batch.view == -1, ~batch.present)
        numbers = batch.example_index * 10 + batch.view
        examples, values = batch.by_view(torch.stack([numbers, -numbers], -1), 3)
        assert values[..., 0].tolist() == [[10 * e + v for v in range(3)] for e in examples]
        assert torch.equal(values[..., 1], -values[..., 0])
        assert examples.tolist() == sorted(set(batch.example_index[batch.present].tolist()))
        seen += examples.tolist()
        assert PackedBatch(dict(batch)).view is batch.view
    assert sorted(seen) == list(range(9))
    (arrays,) = [next(iter(PackedLoader(together[1], 2, seed=1, as_numpy=True)))]
    assert sorted(set(arrays["view"].ravel().tolist())) == [-1, 0, 1, 2]
    # Apart, those examples are told all of whose views happen to be there.
    (whole,) = PackedLoader(packed[1], 40, tail="pad")
    assert whole.by_view(whole.view, 3)[1].tolist() == [[0, 1, 2]] * 9
    one = next(iter(PackedLoader(packed[1], 1)))
    assert len(one.by_view(one.view, 3)[0]) < len(one.example_index[one.present].unique())


def test_a_batch_of_one_view_or_of_unknown_examples_has_none_to_bring_together(together):
    rows = packpipe.read_rows(together[1], slice(0, 1))
    batch = PackedBatch.from_rows(rows)
    message = "batch.view is None, expected views of examples; pack with views=2"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(batch, view=None).by_view(batch.seq_lens, 3)
    unknown = replace(batch, example_index=torch.full_like(batch.example_index, -1))
    with pytest.raises(ValueError, match=r"^example_index is -1, expected rows that say which"):
        unknown.by_view(batch.seq_lens, 3)
    message = "num_views is 2, expected 3 or more; pass that of the rows"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        batch.by_view(batch.seq_lens, 2)


@pytest.mark.parametrize("kind", ["planned", "stored"])
def test_batches_of_views_resume_at_any_step_and_world_size(dataset, packed, kind):
    packs = packed[1] if kind == "stored" else EpochPacks(dataset, SEQ_LEN, **OPTIONS)

    def loaders(world_size=1):
        options = {"seed": 3, "tail": "pad", "augment": EVERYTHING, "world_size": world_size}
        return [
            PackedLoader(packs, 2 // world_size, rank=rank, **options) for rank in range(world_size)
        ]

    (loader,) = loaders()
    states, whole = [loader.state_dict()], []
    for _ in range(2):
        for batch in loader:
            whole.append(loading.digest(batch))
            states.append(loader.state_dict())
    assert len(set(whole)) == len(whole) > 4
    first = len(whole) // 2
    for step, state in enumerate(states[:first]):
        ranks = loaders(1 + step % 2)
        for rank in ranks:
            rank.load_state_dict(state)
        assert loading.steps_of(ranks) == whole[step:first]


def test_flips_and_colours_are_drawn_for_each_view(together):
    augment = Augment(flip=0.5, brightness=0.4)
    loader = PackedLoader(together[1], 40, tail="pad", seed=3, augment=augment)
    (batch,) = loader
    drawn = {}
    for row, at in batch.present.nonzero().tolist():
        example, view = int(batch.example_index[row, at]), int(batch.view[row, at])
        drawn[example, view] = augment.draws(3, 0, example, view)
        brightness = float(batch.colours[row, at, 0, 0])
        assert brightness == pytest.approx(drawn[example, view]["brightness"])
    assert len({one["brightness"] for one in drawn.values()}) == 27
    assert augment.draws(3, 0, 5, 0) == augment.draws(3, 0, 5)
    flips = [{drawn[example, view]["flip"] for view in range(3)} for example in range(9)]
    assert any(len(some) == 2 for some in flips)


def test_a_view_gives_the_same_output_packed_and_alone(packed):
    torch.manual_seed(0)
    config = NaViTConfig(patch_size=4, dim=16, depth=1, heads=2, num_classes=3)
    model = NaViT(config).double()
    rows = packpipe.read_rows(packed[1])
    (whole,) = PackedLoader(packed[1], 40, tail="pad", shuffle=False)
    answers = predict_packs(model, packed[1])
    assert answers.example_index.tolist() == [example for example, _ in EVERY]
    for number, (example, view) in enumerate(EVERY):
        kept = (rows.example_index == example) & (rows.view == view)
        alone = PackedBatch.from_rows(rows.keep(kept))
        with torch.inference_mode():
            out = model(alone)[alone.present]
        assert torch.allclose(answers.outputs[number].double(), out[0].double(), atol=1e-5)
    assert whole.present.sum() == 27
