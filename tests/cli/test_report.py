"""Pictures of results, and the report: what they show, and that a browser shows it."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

import packpipe
from packpipe import plots
from packpipe.cli.report import draw_rows, report, write_report
from packpipe.rows.picture import colours, png, row_picture
from packpipe.samples import images_folder

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All bundled images, packed, and one that is none."""
    images = datasets.load_dataset("imagefolder", data_dir=str(images_folder()), split="train")
    images = images.cast_column("image", datasets.Image(decode=False))
    images = images.select_columns(["image", "label"])
    bad = Dataset.from_dict(
        {"image": [{"bytes": b"<b>no image</b>", "path": None}], "label": ["none"]},
        features=images.features,
    )
    where = tmp_path_factory.mktemp("packed") / "rows & <columns>"
    both = datasets.concatenate_datasets([images, bad])
    packpipe.pack(both, 1024, label_column="label", output=where, num_workers=2, progress=False)
    return where


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    where = tmp_path_factory.mktemp("tokens") / "rows"
    rows = {"input_ids": [list(range(1, length)) for length in (5, 9, 17, 3)]}
    packpipe.pack(Dataset.from_dict(rows), 16, output=where, progress=False)
    return where


def test_a_summary_is_of_what_the_rows_hold(folder):
    found = packpipe.summarize(folder)
    rows = packpipe.read_rows(datasets.load_from_disk(folder))
    assert found.unit == "image"
    assert found.tokens.tolist() == (rows.segment_ids > 0).sum(axis=1).tolist()
    assert found.segments.tolist() == rows.segment_ids.max(axis=1).tolist()
    assert found.quality.fill == json.loads((folder / "manifest.json").read_text())["fill"]
    alone = 1 - found.seq_lens.sum() / (len(found.seq_lens) * 1024)
    assert found.padding_alone == pytest.approx(alone)
    assert "1 (1 unknown format)" in str(found) or "rejected  1" in str(found)
    assert "<svg" in found._repr_html_()
    assert len(found.rejects) == 1


@pytest.mark.parametrize("wrong", [5, None])
def test_a_summary_of_no_path_is_refused(wrong):
    with pytest.raises(TypeError, match=r"^folder is .*, expected a path; pass the folder"):
        packpipe.summarize(wrong)


def test_a_summary_of_a_build_that_is_not_complete_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "rows")
    found = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**found, "complete": False}))
    with pytest.raises(ValueError, match="expected a complete build; call pack again, and it cont"):
        packpipe.summarize(copy)


def test_a_row_s_picture_has_each_segment_in_its_place():
    side, seq_len = 8, 130
    patches = np.full((seq_len, side * side * 3), 255, np.uint8)
    ids = np.repeat([1, 2, 0], [70, 50, 10]).astype(np.int32)
    picture = row_picture(patches, ids)
    assert picture.shape == (3 * side, 64 * side, 3)
    within = np.rint((0.8 + 0.2 * colours(2)) * 255).astype(np.uint8)
    edge = np.rint(colours(2) * 255).astype(np.uint8)
    cells = picture.reshape(3, side, 64, side, 3).transpose(0, 2, 1, 3, 4).reshape(192, -1, 3)
    for number, tokens in enumerate((slice(70), slice(70, 120))):
        found = {tuple(pixel) for pixel in cells[tokens].reshape(-1, 3)}
        assert found == {tuple(within[number]), tuple(edge[number])}
    # Token 10 lies at the picture's top, and below it a token of the next segment.
    lines = cells[10].reshape(side, side, 3)
    assert (lines[2:-2] == within[0]).all()
    assert (lines[[0, 1, -2, -1]] == edge[0]).all()
    assert len(np.unique(cells[120:130])) == 2  # hatched
    assert (cells[130:] == 255).all()


def test_rows_plans_and_summaries_have_a_picture_in_a_notebook(folder, tokens):
    rows = packpipe.read_rows(datasets.load_from_disk(folder), range(3))
    assert Image.open(io.BytesIO(rows._repr_png_())).size[0] == 64 * 16
    assert Image.open(io.BytesIO(png(rows.patches[:0], rows.segment_ids[:0]))).size == (1, 1)
    plan = packpipe.plan_epoch([[32, 32]] * 5, packpipe.PackConfig(seq_len=8), seed=0, epoch=0)
    from packpipe.planning.token_plan import plan_tokens

    of_tokens = plan_tokens([3, 4, 5], packpipe.TokenConfig(seq_len=8))
    packs = packpipe.pack_lengths([3, 4, 5], 8)
    drawn = [(plan, "pack", 5), (of_tokens, "pack", 3), (packs, "pack", 3)]
    for found, called, segments in (*drawn, (packpipe.summarize(tokens), "row", 4)):
        picture = found._repr_html_()
        assert picture.count(f"<title>{called} ") == picture.count("<title>") == segments
        assert "padding" in picture


@pytest.mark.parametrize(
    "draw",
    [
        lambda _, rows: plots.plot_rows(rows),
        lambda _, rows: plots.plot_mask(rows.segment_ids[0]),
        lambda found, _: plots.plot_fill(found.tokens, found.quality),
        lambda found, _: plots.plot_segments(found.segments, found.unit),
        lambda found, _: plots.plot_lengths(found.seq_lens, 1024, found.unit),
        lambda found, _: plots.plot_sizes(found.image_hw),
    ],
    ids=["rows", "mask", "fill", "segments", "lengths", "sizes"],
)
def test_a_figure_shows_something(folder, draw):
    found = packpipe.summarize(folder)
    rows = packpipe.read_rows(datasets.load_from_disk(folder), range(3))
    out = io.BytesIO()
    draw(found, rows).savefig(out, format="png")
    assert len(Image.open(out).convert("RGB").getcolors(2**24)) > 20


def test_captions_of_narrow_images_are_whole_and_lie_beside_each_other(folder):
    packed = datasets.load_from_disk(folder)
    rows = packpipe.read_rows(packed, [int(packpipe.read_rows(packed).num_segments.argmax())])
    labels = np.arange(int(rows.offsets[1])) % 3
    rows = dataclasses.replace(rows, segments={**rows.segments, "labels": labels})
    names = ["b", "household", "golden retriever"]
    figure = plots.plot_rows(rows, class_names=names)
    figure.draw_without_rendering()
    (*captions, more), axes = figure.axes[1].texts, figure.axes[1]
    assert len(captions) == 8
    assert more.get_text() == f"+ {len(labels) - 8}"
    whole = [caption.get_text().replace("\n", " ") for caption in captions]
    assert whole == [names[label] for label in labels[:8]]
    boxes = [text.get_window_extent() for text in (*captions, more)]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert boxes[-1].x1 < axes.figure.bbox.x1
    frames = [image.get_window_extent() for image in axes.images]
    assert all(box.y0 > frame.y1 for box, frame in zip(boxes[:-1], frames, strict=True))
    without = plots.plot_rows(rows).axes[1].texts
    assert [text.get_text() for text in without] == [more.get_text()]


def test_very_many_images_of_a_row_have_room_too():
    patches = np.zeros((1, 100, 12), np.uint8)
    ids = np.arange(1, 101, dtype=np.int32)[None]
    ones, grids = np.ones(100, np.int32), np.ones((100, 2), np.int16)
    segments = {"seq_lens": ones, "grid_hw": grids, "labels": np.arange(100) % 2}
    tokens = {"patches": patches, "segment_ids": ids, "coords": np.zeros((1, 100, 2), np.int16)}
    rows = packpipe.rows.rows.Rows(np.array([0, 100]), segments, tokens)
    figure = plots.plot_rows(rows, max_thumbnails=100, class_names=["a", "household"])
    assert len(figure.axes[1].images) == 100
    assert figure.axes[1].images[-1].get_extent()[1] <= figure.axes[1].get_xlim()[1]


def test_a_caption_that_fits_in_no_three_lines_ends_in_dots():
    assert plots._caption(40 * "long ", 0.8).count("\n") == 2
    assert plots._caption(40 * "long ", 0.8).endswith("…")
    assert plots._caption("golden retriever", 9) == "golden retriever"


def test_rows_that_are_drawn_unasked_hold_many_images_first(folder):
    segments = packpipe.summarize(folder).segments
    chosen = plots.rows_of_many(segments)
    assert len(set(chosen)) == 4
    assert segments[chosen[0]] == segments.max()
    assert segments[chosen].tolist() == sorted(segments[chosen], reverse=True)
    assert segments[chosen].min() > 1 == segments[0]
    assert sorted(plots.rows_of_many(segments[:3])) == [0, 1, 2]
    titles = [axes.get_title(loc="left") for axes in draw_rows(folder).axes[::2]]
    assert [title.partition(":")[0] for title in titles] == [f"row {row}" for row in chosen]
    assert plots.rows_of_many(segments[:0]) == []


def test_names_of_classes_are_no_formulas(folder):
    rows = packpipe.read_rows(datasets.load_from_disk(folder), [0])
    labels = np.zeros_like(rows.segments["labels"])
    rows = dataclasses.replace(rows, segments={**rows.segments, "labels": labels})
    figure = plots.plot_rows(rows, max_thumbnails=1, class_names=["$_$"])
    assert figure.axes[1].texts[0].get_text() == "$_$"
    figure.savefig(io.BytesIO(), format="png")  # where a formula that is none would be an error


def test_a_mask_says_who_sees_whom():
    figure = plots.plot_mask(np.array([1, 1, 2, 0], np.int32))
    (axes,) = figure.axes
    seen = (axes.images[0].get_array() < 1).any(axis=-1)
    assert seen.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, False],
    ]


def test_what_cannot_be_drawn_is_refused(folder, tmp_path):
    with pytest.raises(IndexError, match=r"rows\[0\] is 500, expected -101..100"):
        draw_rows(folder, [500])
    images = datasets.load_dataset("imagefolder", data_dir=str(images_folder()), split="train")
    options = {"materialize": False, "label_column": None, "progress": False}
    packpipe.pack(images, 1024, output=tmp_path / "plan", **options)
    with pytest.raises(ValueError, match="expected rows with their tokens; pack with materialize"):
        draw_rows(tmp_path / "plan", [0])
    assert "Fill and lengths" in report(packpipe.summarize(tmp_path / "plan"))


def test_a_report_is_one_small_page_that_needs_no_other(folder, tokens, tmp_path):
    for where in (folder, tokens):
        write_report(packpipe.summarize(where), tmp_path / "a.html")
        page = (tmp_path / "a.html").read_text(encoding="utf-8")
        assert len(page) < 3_000_000
        assert not re.search(r"(src|href)=[\"'](?!data:)", page)
        assert "<columns>" not in page
    assert "1.7" in page or "padding" in page
    assert page.count("<img") == 3


def test_a_report_of_no_rows_says_so(tmp_path):
    images = datasets.load_dataset("imagefolder", data_dir=str(images_folder()), split="train")
    none = images.select([]).remove_columns("label")
    packpipe.pack(none, 1024, output=tmp_path / "a", progress=False)
    assert "0 packed rows" in report(packpipe.summarize(tmp_path / "a"))


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desk"])
def test_a_browser_shows_the_whole_report(folder, tmp_path, width):
    page = tmp_path / "report.html"
    write_report(packpipe.summarize(folder), page)
    asked = """<script>onload = () => document.body.dataset.found = JSON.stringify({
      wide: document.documentElement.scrollWidth, seen: innerWidth,
      images: [...document.images].map(image => image.naturalWidth && image.clientWidth)
    })</script>"""
    page.write_text(page.read_text().replace("</body>", asked + "</body>"))
    browse(page, tmp_path, width, f"--screenshot={tmp_path / 'page.png'}")
    dom = browse(page, tmp_path, width, "--dump-dom")
    found = json.loads(re.search(r'data-found="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert found["wide"] <= max(found["seen"], width)
    assert len(found["images"]) == 5
    assert min(found["images"]) > 0.6 * min(found["seen"], 560)
    with Image.open(tmp_path / "page.png") as found:
        shown = found.convert("RGB")
    assert shown.size == (width, 2600)
    assert len(shown.getcolors(2**24)) > 5000


def browse(page: Path, folder: Path, width: int, *arguments: str) -> str:
    """Open a page without a network and without a window; return what the browser printed."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", "--hide-scrollbars", "--disable-dev-shm-usage"]
    # A profile of its own: the browser before this one may not have let go of its own yet.
    command += [f"--user-data-dir={tempfile.mkdtemp(dir=folder)}"]
    command += [f"--window-size={width},2600", *arguments, page.as_uri()]
    home = {**os.environ, "HOME": str(folder)}  # it leaves things there
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True, env=home
    )
    return done.stdout
