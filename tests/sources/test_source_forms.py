"""Every form that a dataset may hold images in, and every path that it may lead to."""

from __future__ import annotations

import os
import re
import socket
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import datasets
import fsspec
import naive_colours
import numpy as np
import pictures
import pytest
from datasets import Array2D, Array3D, Dataset, Features, IterableDataset, LargeList, List, Value
from datasets import Image as ImageFeature
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin, TiffImagePlugin
from strategies import encode
from test_kinds import EVERY, photo, pictures_of, row_or_reject, turned

import packpipe
from packpipe.loading.batch import PackedBatch

HIGH, WIDE = 8, 12
PATCH = 4  # so that nothing is resized
SMALL = {"seq_len": 20, "patch_size": PATCH}
QUIET = {"progress": False, "max_bad_fraction": 1.0}
# Kinds of pictures: their arrays, and the mode of their files.
DTYPES = {"RGB": "uint8", "RGBA": "uint8", "L": "uint8", "1": "bool", "I;16": "uint16"}
CHANNELS = {"RGB": (3,), "RGBA": (4,)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """No sizes that another run has found: datasets of the same values share them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def arrays(kind: str) -> list[np.ndarray]:
    """The pixels of five pictures of a kind."""
    dtype = np.dtype(DTYPES[kind])
    top = {"bool": 2, "uint8": 2**8, "uint16": 2**16}[dtype.name]
    shape = (5, HIGH, WIDE, *CHANNELS.get(kind, ()))
    return list(np.random.default_rng(len(kind)).integers(0, top, shape).astype(dtype))


def images(kind: str) -> list[Image.Image]:
    found = [Image.fromarray(pixels) for pixels in arrays(kind)]
    assert {image.mode for image in found} == {kind}
    return found


def files(kind: str) -> list[bytes]:
    return [encode(image, "PNG") for image in images(kind)]


def wanted(kind: str) -> list[np.ndarray]:
    """What the pictures of a kind look like."""
    return [
        naive_colours.rgb_of(kind, pixels.reshape(HIGH, WIDE, -1), background=(255, 255, 255))
        for pixels in arrays(kind)
    ]


def column(values: Iterable[Any], feature: Any) -> Dataset:
    return Dataset.from_dict({"image": list(values)}, features=Features({"image": feature}))


def written(kind: str, folder: Path) -> list[str]:
    paths = [str(folder / f"{number} é.png") for number in range(5)]
    for path, file in zip(paths, files(kind), strict=True):
        Path(path).write_bytes(file)
    return paths


def of_lists(kind: str, nested: Callable[[Any, int], Any]) -> Dataset:
    """Arrays as lists in lists: nested gives the feature of one level, from within."""
    feature: Any = Value(DTYPES[kind])
    for length in reversed(arrays(kind)[0].shape):
        feature = nested(feature, length)
    return column([pixels.tolist() for pixels in arrays(kind)], feature)


def of_arrays(kind: str, *, fixed: bool) -> Dataset:
    shape = arrays(kind)[0].shape
    found = Array2D if len(shape) == 2 else Array3D
    return column(arrays(kind), found((HIGH if fixed else None, *shape[1:]), DTYPES[kind]))


def structs(with_bytes: bool, with_path: bool, kind: str, folder: Path) -> list[dict[str, Any]]:
    rows = zip(files(kind), written(kind, folder), strict=True)
    return [
        {"bytes": file if with_bytes else None, "path": path if with_path else None}
        for file, path in rows
    ]


FORMS: dict[str, Callable[[str, Path], Dataset]] = {
    "bytes": lambda kind, folder: column(structs(True, False, kind, folder), ImageFeature()),
    "path": lambda kind, folder: column(structs(False, True, kind, folder), ImageFeature()),
    "bytes and path": lambda kind, folder: column(
        structs(True, True, kind, folder), ImageFeature()
    ),
    "undecoded": lambda kind, folder: column(
        structs(True, False, kind, folder), ImageFeature(decode=False)
    ),
    "binary": lambda kind, _: column(files(kind), Value("binary")),
    "large binary": lambda kind, _: column(files(kind), Value("large_binary")),
    "Pillow's, from_dict": lambda kind, _: Dataset.from_dict({"image": images(kind)}),
    "Pillow's, from_list": lambda kind, _: Dataset.from_list(
        [{"image": image} for image in images(kind)]
    ),
    "Pillow's, Image()": lambda kind, _: column(images(kind), ImageFeature()),
    "array": lambda kind, _: of_arrays(kind, fixed=True),
    "array of any height": lambda kind, _: of_arrays(kind, fixed=False),
    "lists": lambda kind, _: of_lists(kind, lambda inner, _: List(inner)),
    "lists of one length": lambda kind, _: of_lists(
        kind, lambda inner, length: List(inner, length=length)
    ),
    "large lists": lambda kind, _: of_lists(kind, lambda inner, _: LargeList(inner)),
    "sequences": lambda kind, _: of_lists(kind, lambda inner, _: datasets.Sequence(inner)),
    "chunks and an order": lambda kind, folder: datasets.concatenate_datasets(
        [FORMS["lists"](kind, folder).select([number]) for number in (4, 3, 2, 1, 0)]
    ).select([4, 3, 2, 1, 0]),
}


def packed_by(source: Dataset, folder: Path, **options: Any) -> Dataset:
    options = {"num_workers": 0, **QUIET, **SMALL, **options}
    return packpipe.pack(source, output=folder, **options)


def mapped_by(source: Dataset, **options: Any) -> Dataset:
    return source.map(
        packpipe.Packer(**SMALL, **options),
        batched=True,
        with_indices=True,
        remove_columns=source.column_names,
        load_from_cache_file=False,
    )


def streamed(source: IterableDataset, **options: Any) -> Iterator[dict[str, Any]]:
    """The rows of a stream, as those of a packed dataset."""
    options = {"label_column": None, "max_bad_fraction": 1.0, **options}
    stream = packpipe.PackedStream(source, **SMALL, **options)
    for batch in packpipe.PackedLoader(stream, 2, tail="pad"):
        yield from rows_of(batch)


def rows_of(batch: PackedBatch) -> Iterator[dict[str, Any]]:
    for row, present in enumerate(batch.present):
        yield {
            "patches": batch.patches[row].numpy(),
            "coords": batch.coords[row].numpy(),
            "segment_ids": batch.segment_ids[row].numpy(),
            "grid_hw": batch.grid_hw[row, present].tolist(),
            "example_index": batch.example_index[row, present].tolist(),
        }


def are_the_pictures(rows: Iterable[dict[str, Any]], kind: str, within: float = 0.51) -> bool:
    found = pictures_of(rows, PATCH)
    assert sorted(found) == list(range(5))
    return all(
        np.abs(found[number] - pixels).max() <= within for number, pixels in enumerate(wanted(kind))
    )


@pytest.fixture(scope="module")
def rows_by_bytes(tmp_path_factory):
    """The rows that pack makes of the files of each kind."""
    folder = tmp_path_factory.mktemp("by bytes")
    sources = {kind: FORMS["bytes"](kind, folder) for kind in DTYPES}
    packed = {kind: packed_by(source, folder / kind) for kind, source in sources.items()}
    return {kind: pictures.row_bytes(packpipe.read_rows(rows)) for kind, rows in packed.items()}


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_pictures_gives_the_same_rows(form, kind, rows_by_bytes, tmp_path):
    packed = packed_by(FORMS[form](kind, tmp_path), tmp_path / form)
    assert are_the_pictures(packed, kind)
    assert any(len(row["seq_lens"]) > 1 for row in packed)
    assert pictures.row_bytes(packpipe.read_rows(packed)) == rows_by_bytes[kind]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_mapped_to_the_rows_that_pack_makes(form, kind, rows_by_bytes, tmp_path):
    mapped = mapped_by(FORMS[form](kind, tmp_path))
    assert are_the_pictures(mapped, kind)
    # What pack makes of this form: see the test before.
    assert pictures.row_bytes(packpipe.read_rows(mapped)) == rows_by_bytes[kind]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_streams(form, kind, tmp_path):
    source = FORMS[form](kind, tmp_path).to_iterable_dataset()
    assert are_the_pictures(streamed(source), kind)


@pytest.mark.parametrize("kind", DTYPES)
def test_arrays_of_the_other_byte_order_are_mapped_as_the_pictures_they_are(kind):
    packer = packpipe.Packer(**SMALL)
    native = packer({"image": arrays(kind)}, list(range(5)))
    turned_round = [pixels.astype(pixels.dtype.newbyteorder()) for pixels in arrays(kind)]
    assert packer({"image": turned_round}, list(range(5))).equals(native)
    assert native.num_rows > 1


@pytest.mark.parametrize("kind", ["RGBA", "1", "I;16"])
@pytest.mark.parametrize("form", ["path", "large binary", "array", "lists of one length"])
def test_forms_travel_to_other_processes(form, kind, tmp_path):
    source = FORMS[form](kind, tmp_path)
    assert are_the_pictures(packed_by(source, tmp_path / "out", num_workers=2), kind)


@pytest.mark.parametrize("depth", [1, 2])
def test_lists_of_arrays_are_no_pictures(depth):
    feature, values = Array2D((WIDE, 3), "uint8"), [pixels.tolist() for pixels in arrays("RGB")]
    for number in range(depth):
        feature = List(feature)
        values = [[value] for value in values] if number else values
    source = column(values, feature)
    with pytest.raises(ValueError, match=r"^features\['image'\] is List\((List\()?Array2D"):
        packpipe.pack(source, 16, image_column="image")


@pytest.mark.parametrize("asked", ["auto", "image"])
def test_a_mode_that_datasets_would_convert_to_is_refused(asked):
    source = column([pictures.encoded_image(8, 8)], ImageFeature(mode="L"))
    message = "features['image'].mode is 'L', expected None or 'RGB'; cast_column it to Image()"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        packpipe.pack(source, 16, image_column=asked)


def opened(path: str) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def test_an_image_that_pillow_opened_is_stored_as_its_path(tmp_path):
    paths = written("RGB", tmp_path)
    source = column([opened(path) for path in paths], ImageFeature())
    assert source.with_format("arrow")[:]["image"].to_pylist() == [
        {"bytes": None, "path": path} for path in paths
    ]
    assert are_the_pictures(packed_by(source, tmp_path / "out"), "RGB")


def read(file: BytesIO) -> BytesIO:
    file.read()
    return file


YIELDED: dict[str, Callable[[str, Path], list[Any]]] = {
    "Pillow's": lambda kind, _: images(kind),
    "array": lambda kind, _: arrays(kind),
    "bytes": lambda kind, _: files(kind),
    "path": written,
    "Path": lambda kind, folder: list(map(Path, written(kind, folder))),
    "bytearray": lambda kind, _: list(map(bytearray, files(kind))),
    "BytesIO": lambda kind, _: list(map(BytesIO, files(kind))),
    "BytesIO at its end": lambda kind, _: [read(BytesIO(file)) for file in files(kind)],
    "array of the other byte order": lambda kind, _: [
        pixels.astype(pixels.dtype.newbyteorder()) for pixels in arrays(kind)
    ],
    "dict of a bytearray": lambda kind, _: [{"bytes": bytearray(file)} for file in files(kind)],
    "dict of bytes": partial(structs, True, False),
    "dict of a path": partial(structs, False, True),
    "dict of both": partial(structs, True, True),
}


def yielding(values: list[Any]) -> IterableDataset:
    def rows() -> Iterator[dict[str, Any]]:
        for value in values:
            yield {"image": value}

    return IterableDataset.from_generator(rows)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("form", YIELDED)
def test_a_stream_without_features_may_yield_any_form(form, kind, tmp_path):
    source = yielding(YIELDED[form](kind, tmp_path))
    assert are_the_pictures(streamed(source, image_column="image"), kind)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_images_that_datasets_decoded_and_turned_are_not_turned_again(format):  # noqa: A002
    encoded = [turned(format, orientation, photo(8, 12)) for orientation in range(1, 9)]
    source = column([{"bytes": file, "path": None} for file in encoded], ImageFeature())
    decoded = source.to_iterable_dataset().filter(lambda _: True)
    assert isinstance(next(iter(decoded))["image"], Image.Image)
    ours, theirs = (
        pictures_of(streamed(stream), PATCH) for stream in (source.to_iterable_dataset(), decoded)
    )
    assert {number: pixels.shape for number, pixels in ours.items()} == {
        number: (8, 12, 3) if number < 4 else (12, 8, 3) for number in range(8)
    }
    assert all((ours[number] == theirs[number]).all() for number in range(8))


NULLS = {
    "null": (None, ImageFeature()),
    "neither": ({"bytes": None, "path": None}, ImageFeature()),
    "binary": (None, Value("binary")),
    "large binary": (None, Value("large_binary")),
    "lists": (None, List(List(Value("uint8")))),
    "array": (None, Array2D((None, WIDE), "uint8")),
}


@pytest.mark.parametrize("form", NULLS)
def test_an_image_that_is_null_is_missing_and_no_other_is(form, tmp_path, caplog):
    null, feature = NULLS[form]
    grey = arrays("L")[0]
    encoded = encode(Image.fromarray(grey), "PNG")
    by_bytes = {"bytes": encoded, "path": None}
    sound = {"null": by_bytes, "neither": by_bytes, "lists": grey.tolist(), "array": grey.tolist()}
    rows = [sound.get(form, encoded), null, sound.get(form, encoded)]
    source = Dataset.from_dict({"image": rows}).cast(Features({"image": feature}))
    packed = packed_by(source, tmp_path / "out")
    (reject,) = packpipe.rejects(packed)
    assert (reject["example_index"], reject["stage"], reject["reason"]) == (1, "probe", "missing")
    assert reject["exception"].startswith("BadImage: the image ")
    assert sorted(pictures_of(packed, PATCH)) == [0, 2]
    assert sorted(pictures_of(mapped_by(source, on_error="drop"), PATCH)) == [0, 2]
    caplog.clear()
    assert sorted(pictures_of(streamed(source.to_iterable_dataset()), PATCH)) == [0, 2]
    assert [message.split(":")[0] for message in caplog.messages] == ["example 1 left out"]


ODD = {
    "no rows": ([], "empty"),
    "no columns": ([[], []], "empty"),
    "ragged": ([[1, 2], [3]], "unreadable"),
    "a null row": ([[1, 2], None], "unreadable"),
    "a null pixel": ([[1, 2], [3, None]], "unreadable"),
}


@pytest.mark.parametrize("name", ODD)
def test_lists_that_are_no_array_are_rejects(name, tmp_path):
    odd, reason = ODD[name]
    source = column([[[1, 2], [3, 4]], odd], List(List(Value("uint8"))))
    packed = packed_by(source, tmp_path / "out")
    (reject,) = packpipe.rejects(packed)
    assert (reject["example_index"], reject["reason"]) == (1, reason)
    assert list(pictures_of(streamed(source.to_iterable_dataset()), PATCH)) == [0]


FILE = pictures.encoded_image(HIGH, WIDE)
OUTSIDE = "outside image_root"
# Path: what becomes of it with image_root, and without; None is a row.
PATHS: dict[str, tuple[str | None, str | None]] = {
    "in.png": (None, None),
    "{root}/in.png": (None, None),
    "./sub/in.png": (None, None),
    "sub/../in.png": (None, None),
    "../root/in.png": (None, None),
    "{folder}/link to root/in.png": (None, None),
    "link to in.png": (None, None),
    "é ü.png": (None, None),
    "../root2/in.png": (OUTSIDE, None),
    "{folder}/root2/in.png": (OUTSIDE, None),
    "sub/../../root2/in.png": (OUTSIDE, None),
    "link out": (OUTSIDE, None),
    "folder out/in.png": (OUTSIDE, None),
    "{folder}": (OUTSIDE, "unreadable"),
    "/dev/zero": (OUTSIDE, "unreadable"),
    "/dev/null": (OUTSIDE, "unreadable"),
    "/proc/self/mem": (OUTSIDE, "unreadable"),
    "no.png": ("missing", "missing"),
    "~/in.png": ("missing", "missing"),
    "link to nothing": ("missing", "missing"),
    "link to itself": ("unreadable", "unreadable"),
    "in.png/in.png": ("unreadable", "unreadable"),
    "sub": ("unreadable", "unreadable"),
    ".": ("unreadable", "unreadable"),
    "": ("unreadable", "missing"),
    "pipe": ("unreadable", "unreadable"),
    "socket": ("unreadable", "unreadable"),
    "link to a pipe": ("unreadable", "unreadable"),
    "empty": ("empty", "empty"),
    "file://{root}/in.png": (OUTSIDE, None),
    "zip://in.png::{root}/in.zip": (OUTSIDE, None),
    "zip://no.png::{root}/in.zip": (OUTSIDE, "missing"),
    "zip://in.png::{root}/no.zip": (OUTSIDE, "missing"),
    "zip://in.png::{root}/in.png": (OUTSIDE, "unreadable"),
    "memory://packpipe-no.png": (OUTSIDE, "missing"),
    "here://in.png": (None, None),  # no scheme that is known: a folder of that name
}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder to keep to, where this process is; what else there is lies beside it."""
    root = tmp_path / "root"
    for folder in (root / "sub", root / "here:", tmp_path / "root2"):
        folder.mkdir(parents=True)
        (folder / "in.png").write_bytes(FILE)
    for name in ("in.png", "é ü.png"):
        (root / name).write_bytes(FILE)
    (root / "empty").touch()
    with ZipFile(root / "in.zip", "w") as archive:
        archive.write(root / "in.png", "in.png")
    (tmp_path / "link to root").symlink_to(root)
    for name, place in [
        ("link to in.png", root / "in.png"),
        ("link to nothing", root / "nothing"),
        ("link to itself", root / "link to itself"),
        ("link to a pipe", root / "pipe"),
        ("link out", tmp_path / "root2" / "in.png"),
        ("folder out", tmp_path / "root2"),
    ]:
        (root / name).symlink_to(place)
    os.mkfifo(root / "pipe")
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        yield root


def placed(path: str, root: Path) -> str:
    return path.format(root=root, folder=root.parent)


def by_path(paths: Iterable[str], root: Path) -> Dataset:
    source = column([{"bytes": None, "path": placed(path, root)} for path in paths], ImageFeature())
    return source.add_column("height", [HIGH] * len(source)).add_column(
        "width", [WIDE] * len(source)
    )


def in_time(work: Callable[[], Any], seconds: float = 300) -> Any:
    """What some work returns; fail if it does not come to an end."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits for ever"
    return found[0]


def outcomes_of(packed: Dataset, paths: Iterable[str]) -> dict[str, str | None]:
    """What became of each path: a row of the right pixels, or the reason of its reject."""
    found = pictures_of(packed, PATCH)
    pixels = np.asarray(Image.open(Path("in.png").absolute()))
    assert all((picture == pixels).all() for picture in found.values())
    reasons = {reject["example_index"]: reject["reason"] for reject in packpipe.rejects(packed)}
    return {path: None if number in found else reasons[number] for number, path in enumerate(paths)}


@pytest.mark.parametrize("confined", [True, False])
@pytest.mark.parametrize("sized", [False, True], ids=["probed", "sizes known"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_path_is_a_regular_file_or_a_reject(
    root, tmp_path, monkeypatch, confined, sized, num_workers
):
    def no_network(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    options = {
        "image_root": root if confined else None,
        "size_columns": ("height", "width") if sized else None,
        "num_workers": num_workers,
        "label_column": None,
    }
    source = by_path(PATHS, root)
    packed = in_time(partial(packed_by, source, tmp_path / "out", **options))
    assert outcomes_of(packed, PATHS) == {
        path: reasons[0 if confined else 1] for path, reasons in PATHS.items()
    }


@pytest.mark.parametrize("given_as", ["a link", "a string", "a relative path"])
def test_a_root_may_be_given_in_any_way(root, tmp_path, given_as):
    image_root = {
        "a link": tmp_path / "link to root",
        "a string": str(root),
        "a relative path": Path("../root"),
    }[given_as]
    packed = packed_by(by_path(PATHS, root), tmp_path / "out", image_root=image_root)
    wanted = {path: reason for path, (reason, _) in PATHS.items()}
    assert outcomes_of(packed, PATHS) == wanted


@pytest.mark.parametrize("confined", [True, False])
@pytest.mark.parametrize("way", ["map", "stream"])
def test_maps_and_streams_follow_the_same_paths(root, way, confined):
    source = by_path(PATHS, root).select_columns(["image"])
    image_root = root if confined else None
    if way == "map":
        packer = partial(mapped_by, source, on_error="drop", image_root=image_root)
        found = pictures_of(in_time(packer), PATCH)
    else:
        found = pictures_of(streamed(source.to_iterable_dataset(), image_root=image_root), PATCH)
    good = [
        number
        for number, reasons in enumerate(PATHS.values())
        if reasons[0 if confined else 1] is None
    ]
    assert sorted(found) == good


SCHEMES = ["s3://bucket/in.png", "hf://datasets/some/in.png", "https://127.0.0.1:9/in.png"]
SCHEMES += [
    "memory://in.png",
    "file:///in.png",
    "zip://in.png::in.zip",
    "zip://in.png::s3://b/c.zip",
]


@pytest.mark.parametrize("path", SCHEMES)
def test_with_a_root_a_path_with_a_scheme_is_refused_by_name(root, tmp_path, path):
    source = by_path(["in.png", path], root).select_columns(["image"])
    packed = packed_by(source, tmp_path / "out", image_root=root, num_workers=1)
    (reject,) = packpipe.rejects(packed)
    assert (reject["example_index"], reject["stage"], reject["reason"]) == (1, "probe", OUTSIDE)
    what = f"the path {path!r} has a scheme, expected one that stays in image_root"
    assert reject["exception"] == f"BadImage: {what}"
    message = re.escape(what)
    with pytest.raises(ValueError, match=message):
        mapped_by(source, image_root=root)
    epochs = packpipe.EpochPacks(source, **SMALL, image_root=root, max_bad_fraction=1.0)
    assert [one.exception for one in epochs.rejects] == [reject["exception"]]
    with pytest.raises(ValueError, match=message):
        list(streamed(source.to_iterable_dataset(), image_root=root, on_error="raise"))


@pytest.fixture
def far(root) -> Iterator[list[str]]:
    """Paths with a scheme of the same image: in memory, in archives there and here, on the web."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/packpipe/in.png", FILE)
    memory.pipe("/packpipe/in.zip", (root / "in.zip").read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield [
            *("memory://packpipe/in.png", f"file://{root}/in.png"),
            *("zip://in.png::in.zip", "zip://in.png::memory://packpipe/in.zip"),
            f"http://127.0.0.1:{server.server_port}/in.png",
        ]
        server.shutdown()
    memory.rm("/packpipe", recursive=True)


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_path_with_a_scheme_is_read_where_datasets_reads_it(root, tmp_path, far, num_workers):
    paths = ["in.png", *far]
    source = by_path(paths, root).select_columns(["image"])
    own = [number for number, path in enumerate(paths) if "file://" not in path]
    for row in source.select(own):  # what `datasets` itself makes of it
        assert (np.asarray(row["image"]) == np.asarray(Image.open("in.png"))).all()
    packed = packed_by(source, tmp_path / "out", num_workers=num_workers)
    assert outcomes_of(packed, paths) == dict.fromkeys(paths)
    epochs = packpipe.EpochPacks(source, **SMALL)
    for rows in (
        mapped_by(source),
        streamed(source.to_iterable_dataset()),
        (row for batch in packpipe.PackedLoader(epochs, 2, tail="pad") for row in rows_of(batch)),
        packed_by(source, tmp_path / "lazy", materialize=False),
    ):
        found = pictures_of(rows, PATCH)
        assert sorted(found) == list(range(len(paths)))
        assert all((picture == found[0]).all() for picture in found.values())
    assert packpipe.verify(tmp_path / "out", source) == []


def test_processes_of_a_loader_read_paths_with_a_scheme(root, far):
    paths = [path for path in far if "memory://" not in path]  # those that are forked know it, too
    source = by_path(paths, root).select_columns(["image"])
    epochs = packpipe.EpochPacks(source, **SMALL)
    loader = packpipe.PackedLoader(epochs, 2, tail="pad", num_workers=2, workers="processes")
    found = pictures_of((row for batch in loader for row in rows_of(batch)), PATCH)
    assert sorted(found) == list(range(len(paths)))
    assert all((picture == found[0]).all() for picture in found.values())


def test_a_file_of_memory_that_changed_is_read_anew(root, tmp_path, far):
    source = by_path(far[:1], root).select_columns(["image"])
    packed_by(source, tmp_path / "one")
    fsspec.filesystem("memory").pipe("/packpipe/in.png", pictures.encoded_image(WIDE, HIGH))
    packed = packed_by(source, tmp_path / "other")
    assert packed[0]["image_hw"] == [[WIDE, HIGH]]
    with pytest.raises(FileExistsError):
        packed_by(source, tmp_path / "one")


def test_an_archive_that_changed_is_read_anew(root, tmp_path):
    source = by_path(["zip://in.png::in.zip"], root).select_columns(["image"])
    packed_by(source, tmp_path / "one")
    with ZipFile("in.zip", "w") as archive:
        archive.writestr("in.png", pictures.encoded_image(WIDE, HIGH))
    assert packed_by(source, tmp_path / "other")[0]["image_hw"] == [[WIDE, HIGH]]


STRANGE = {"NUL": "in.png\0", "NUL within": "a\0b", "long": "x" * 300, "deep": "d/" * 3000}
WAYS: dict[str, Callable[..., Iterable[dict[str, Any]]]] = {
    "pack": packed_by,
    "map": lambda source, _, **options: mapped_by(source, on_error="drop", **options),
    "stream": lambda source, _, **options: streamed(source.to_iterable_dataset(), **options),
}


@pytest.mark.parametrize("confined", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STRANGE)
def test_a_path_that_no_file_can_have_is_a_reject(root, tmp_path, name, way, confined):
    source = by_path(["in.png", STRANGE[name], "in.png"], root).select_columns(["image"])
    rows = WAYS[way](source, tmp_path / "out", image_root=root if confined else None)
    assert sorted(pictures_of(rows, PATCH)) == [0, 2]


AFTERWARDS = {
    "larger": (pictures.encoded_image(16, 12), None),
    "turned": (pictures.encoded_image(WIDE, HIGH), None),
    "gone": (None, "missing"),
    "no image": (b"<html>", "unreadable"),
    "cut": (FILE[:-60], "undecodable"),
    "nothing": (b"", "empty"),
}
PLANS = {
    "pack": "packpipe.building.image_job.plan_epoch",
    "map": "packpipe.building.packer.plan_images",
    "stream": "packpipe.loading.decoding.fill_rows",
}


def changing(monkeypatch, way: str, path: Path, content: bytes | None) -> None:
    """Change a file once it has been probed."""
    module, name = PLANS[way].rsplit(".", 1)
    plan = getattr(__import__(module, fromlist=[name]), name)

    def change_and_plan(*arguments: Any, **options: Any) -> Any:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        return plan(*arguments, **options)

    monkeypatch.setattr(PLANS[way], change_and_plan)


def three_files(folder: Path) -> tuple[Dataset, Path]:
    paths = [folder / f"{number}.png" for number in range(3)]
    for path in paths:
        path.write_bytes(FILE)
    source = column([{"bytes": None, "path": str(path)} for path in paths], ImageFeature())
    return source, paths[1]


@pytest.mark.parametrize("way", PLANS)
@pytest.mark.parametrize("change", ["larger", "turned"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_size_that_changed_since_the_plan_names_the_example_and_both_sizes(
    tmp_path, monkeypatch, way, change, num_workers
):
    source, path = three_files(tmp_path)
    changing(monkeypatch, way, path, AFTERWARDS[change][0])
    found = {"larger": (16, 12), "turned": (12, 8)}[change]
    message = (
        f"example 1: image_hw is {found}, expected (8, 12) as planned; "
        "plan again (stored rows: into another folder), the source has changed"
    )
    options = {"num_workers": num_workers} if way == "pack" else {}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        list(WAYS[way](source, tmp_path / "out", **options))
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("way", PLANS)
@pytest.mark.parametrize("change", [name for name, (_, reason) in AFTERWARDS.items() if reason])
def test_a_file_that_went_bad_since_the_plan_is_a_reject(tmp_path, monkeypatch, way, change):
    source, path = three_files(tmp_path)
    content, reason = AFTERWARDS[change]
    changing(monkeypatch, way, path, content)
    rows = WAYS[way](source, tmp_path / "out")
    assert sorted(pictures_of(rows, PATCH)) == [0, 2]
    if way == "pack":
        (reject,) = packpipe.rejects(rows)
        assert (reject["example_index"], reject["stage"]) == (1, "decode")
        assert reject["reason"] == reason


def settings() -> list[Any]:
    """What Pillow does differently for everybody when it is changed."""
    return [
        *(Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK),
        *(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY),
        *(GifImagePlugin.LOADING_STRATEGY, TiffImagePlugin.READ_LIBTIFF),
    ]


def same(one: np.ndarray | str, other: np.ndarray | str) -> bool:
    return isinstance(one, str) == isinstance(other, str) and np.array_equal(one, other)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_threads_and_builds_at_once_change_no_setting_and_no_pixel(tmp_path, num_workers):
    encoded = [case.encoded for case in EVERY.values()]
    alone = [row_or_reject(file) for file in encoded]
    source = column(encoded, Value("binary"))
    before = settings()

    def pack(number: int) -> Dataset:
        options = {"num_workers": num_workers, "max_consecutive_bad": 10**6}
        return packed_by(source, tmp_path / str(number), **options)

    pack(0)  # compiles kernels, which puts back the filters that there were when it began
    filters = list(warnings.filters)
    with ThreadPoolExecutor(6) as threads:
        builds = [threads.submit(pack, number) for number in (1, 2)]
        runs = [threads.submit(lambda: [row_or_reject(file) for file in encoded]) for _ in range(4)]
        for run in runs:
            assert all(map(same, run.result(), alone))
        one, other = (pictures.row_bytes(packpipe.read_rows(run.result())) for run in builds)
    assert one == other
    assert settings() == before
    assert warnings.filters == filters


def test_a_filter_that_somebody_adds_meanwhile_stays():
    encoded = [case.encoded for case in EVERY.values()]
    with warnings.catch_warnings():
        before = list(warnings.filters)
        with ThreadPoolExecutor(2) as threads:
            runs = [threads.submit(lambda: list(map(row_or_reject, encoded))) for _ in range(2)]
            warnings.filterwarnings("ignore", message="mine")
            mine = next(one for one in warnings.filters if "mine" in str(one[1]))
            for run in runs:
                run.result()
        assert warnings.filters == [mine, *before]


# What scripts set, often when they are imported.
SETTINGS = {
    "PIL.ImageFile.LOAD_TRUNCATED_IMAGES": (ImageFile, True, "False"),
    "PIL.PngImagePlugin.MAX_TEXT_CHUNK": (PngImagePlugin, 100 * 2**20, "1048576"),
    "PIL.PngImagePlugin.MAX_TEXT_MEMORY": (PngImagePlugin, 2**30, "67108864"),
}
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("long", "x" * 2**21, zip=True)
GOOD = {
    "PNG": pictures.encoded_image(HIGH, WIDE),
    "BMP": pictures.encoded_image(HIGH, WIDE, image_format="BMP"),
    "array": np.zeros((HIGH, WIDE, 3), np.uint8),
}
# Files that Pillow reads with such a setting, and not without.
BAD = {
    "cut TIFF": pictures.encoded_image(HIGH, WIDE, image_format="TIFF")[:-100],
    "cut PNG": pictures.encoded_image(HIGH, WIDE)[:-60],
    "wrong checksum": pictures.encoded_image(HIGH, WIDE, pnginfo=TEXT).replace(
        b"zTXtlong", b"zTXtlung"
    ),
    "cut icon": pictures.encoded_image(16, 16, image_format="ICO")[:-100],
    "long text": pictures.encoded_image(HIGH, WIDE, pnginfo=TEXT),
}


@pytest.fixture(params=SETTINGS)
def setting(request, monkeypatch) -> str:
    """A setting of the caller's, and the message that refuses it where this process decodes."""
    where, value, usual = SETTINGS[request.param]
    monkeypatch.setattr(where, request.param.rpartition(".")[2], value)
    remedy = "set it back before images are decoded in this process, or call packpipe.pack with num"
    return f"{request.param} is {value}, expected {usual}; {remedy}"


@pytest.mark.usefixtures("setting")
def test_a_setting_of_the_callers_changes_no_row_that_processes_decode(tmp_path):
    good = [GOOD["PNG"], GOOD["BMP"]]
    source = column([*good, *BAD.values(), *good], Value("binary"))
    packed = packed_by(source, tmp_path / "out", num_workers=1)
    assert sorted(pictures_of(packed, PATCH)) == [0, 1, 7, 8]
    assert [row["example_index"] for row in packpipe.rejects(packed)] == [2, 3, 4, 5, 6]
    again = packed_by(column(good, Value("binary")), tmp_path / "good", num_workers=1)
    with pytest.MonkeyPatch.context() as usual:
        usual.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
        usual.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2**20)
        usual.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2**26)
        wanted = packed_by(column(good, Value("binary")), tmp_path / "wanted")
        # Sizes that were found with the setting are not those that are kept without it.
        other = packed_by(source, tmp_path / "other", num_workers=1)
        assert {row["stage"] for row in packpipe.rejects(other)} <= {"probe", "decode"}
        assert sorted(pictures_of(other, PATCH)) == [0, 1, 7, 8]
        assert packpipe.verify(tmp_path / "out", source) == []
    found = pictures.row_bytes(packpipe.read_rows(again))
    assert found == pictures.row_bytes(packpipe.read_rows(wanted))


def test_a_setting_of_the_callers_is_refused_where_this_process_decodes(tmp_path, setting):
    source = column([GOOD["PNG"]], Value("binary"))
    message = re.escape(setting)
    lazy = packed_by(source, tmp_path / "lazy", num_workers=1, materialize=False)
    for work in (
        lambda: packed_by(source, tmp_path / "out"),
        lambda: lazy[0],
        lambda: packpipe.Packer(**SMALL)({"image": [GOOD["PNG"]]}, [0]),
        lambda: packpipe.EpochPacks(source, **SMALL),
        lambda: packpipe.PackedStream(source.to_iterable_dataset(), **SMALL),
    ):
        with pytest.raises(ValueError, match=message):
            work()


def test_a_limit_of_the_callers_rejects_no_image_in_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    source = column([encode(photo(12, 20), "TIFF")], Value("binary"))
    message = "PIL.Image.MAX_IMAGE_PIXELS is 100, expected 89478485 or more; lower max_pixels"
    with pytest.raises(ValueError, match=re.escape(message)):
        packed_by(source, tmp_path / "out", num_workers=0)
    packed = packed_by(source, tmp_path / "out", num_workers=0, max_pixels=200)
    assert list(packpipe.rejects(packed)["reason"]) == ["too many pixels"]
