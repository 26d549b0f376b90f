"""Sizes once: kept beside the data, or taken from columns."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import datasets
import numpy as np
import pictures
import PIL
import pyarrow as pa
import pytest
import strategies
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFile

import packpipe
from packpipe.images.pillow_settings import check_settings
from packpipe.planning.image_options import MAX_PIXELS
from packpipe.rows.files import write_table
from packpipe.rows.rejects import Reject
from packpipe.sources import sizes
from packpipe.sources.image_source import ImageSource
from packpipe.sources.sizes import column_sizes, kept_sizes
from packpipe.sources.survey import Sizes, probe_sizes

BAD = [b"", b"<html>not found</html>", pictures.encoded_image(9, 9)[:20]]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, where sizes of datasets in memory are kept."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packpipe"


def broken_exif(height, width):
    return pictures.encoded_image(height, width, image_format="JPEG", exif=b"Exif\x00\x00broken")


def images_of(values) -> Dataset:
    """A dataset of encoded images; None is null."""
    stored = [None if value is None else {"bytes": value, "path": None} for value in values]
    return Dataset.from_dict({"image": stored}, features=Features({"image": Image()}))


def by_path(paths) -> Dataset:
    return Dataset.from_dict({"image": list(map(str, paths))}).cast_column("image", Image())


def source_of(dataset) -> ImageSource:
    return ImageSource(dataset.select_columns(["image"]).with_format("arrow"))


def kept(dataset, max_pixels=MAX_PIXELS) -> Sizes:
    return kept_sizes(source_of(dataset), max_pixels=max_pixels)


def plain(found: Sizes) -> tuple:
    assert found.image_hw.dtype == np.int32
    assert found.image_hw.shape == (len(found.broken_exif), 2)
    assert found.broken_exif.dtype == np.bool_
    return found.image_hw.tolist(), found.broken_exif.tolist(), found.rejects


def no_probe(*_, **__):
    raise AssertionError("probed again")


class Counted:
    """Probes as before, and counts of how many images each time."""

    def __init__(self, monkeypatch):
        self.asked = []
        monkeypatch.setattr(sizes, "probe_sizes", self)

    def __call__(self, read_image, num_examples, **options):
        self.asked.append(num_examples)
        return probe_sizes(read_image, num_examples, **options)


@given(
    st.lists(
        strategies.encoded_images(max_side=20).map(lambda image: image.encoded)
        | st.sampled_from([*BAD, None, broken_exif(5, 7)]),
        max_size=6,
    )
)
@settings(max_examples=15)
def test_kept_sizes_are_the_probed_ones(drawn):
    dataset = images_of([*drawn, broken_exif(30, 4), BAD[1], pictures.encoded_image(3, 8)])
    with pytest.MonkeyPatch.context() as patch:
        first = kept(dataset)
        counted = Counted(patch)
        second = kept(dataset)
    assert counted.asked == [len(first.rejects)], "only what has no size is probed again"
    wanted = plain(probe_sizes(source_of(dataset), len(dataset), max_pixels=MAX_PIXELS))
    assert plain(first) == plain(second) == wanted
    image_hw, broken, rejects = wanted
    assert image_hw[-3:] == [[30, 4], [0, 0], [3, 8]]
    assert broken[-3:] == [True, False, False]
    message = "UnidentifiedImageError: no known image format"
    assert rejects[-1] == Reject(len(dataset) - 2, "probe", "unreadable", message)


def test_no_images_at_all():
    for dataset in (images_of([]), images_of([BAD[0]]).select([])):
        for _ in range(2):
            assert plain(kept(dataset)) == ([], [], [])


def test_sizes_are_kept_beside_the_data(tmp_path, cache, monkeypatch):
    images_of(pictures.encoded_images()).save_to_disk(tmp_path / "data")
    dataset = datasets.load_from_disk(tmp_path / "data")
    before = {path.name for path in (tmp_path / "data").iterdir()}
    first = kept(dataset)
    (name,) = {path.name for path in (tmp_path / "data").iterdir()} - before
    assert re.fullmatch(r"packpipe-sizes-[0-9a-f]{32}\.arrow", name)
    assert not cache.exists()
    monkeypatch.setattr(sizes, "probe_sizes", no_probe)
    assert plain(kept(datasets.load_from_disk(tmp_path / "data"))) == plain(first)
    assert first.image_hw.tolist() == [list(size) for size in pictures.SIZES]


def test_sizes_of_data_that_cannot_be_written_beside_are_kept_in_the_cache(
    tmp_path, cache, monkeypatch
):
    images_of(pictures.encoded_images()).save_to_disk(tmp_path / "data")
    dataset = datasets.load_from_disk(tmp_path / "data")
    before = sorted((tmp_path / "data").iterdir())
    access = os.access

    def read_only(path, mode):
        return not (mode & os.W_OK and Path(path) == tmp_path / "data") and access(path, mode)

    monkeypatch.setattr(os, "access", read_only)
    first = kept(dataset)
    assert sorted((tmp_path / "data").iterdir()) == before
    assert [path.suffix for path in cache.iterdir()] == [".arrow"]
    monkeypatch.setattr(sizes, "probe_sizes", no_probe)
    assert plain(kept(dataset)) == plain(first)


@pytest.mark.parametrize("change", ["rewritten", "touched", "removed", "added"])
def test_a_changed_file_is_probed_again(tmp_path, monkeypatch, change):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths[: 2 if change == "added" else 3]):
        path.write_bytes(pictures.encoded_image(10 + number, 20))
    dataset = by_path(paths)
    counted = Counted(monkeypatch)
    before = [kept(dataset).image_hw.tolist() for _ in range(2)]
    assert before[0] == before[1] != []
    missing = [1] * (change == "added")
    assert counted.asked == [3, *missing]
    if change == "rewritten":
        paths[1].write_bytes(pictures.encoded_image(33, 44))
    elif change == "touched":
        os.utime(paths[1], ns=(1, 1))
    elif change == "removed":
        paths[1].unlink()
    else:
        paths[2].write_bytes(pictures.encoded_image(12, 20))
    after = [kept(dataset) for _ in range(2)]
    assert counted.asked[1 + len(missing) :] == [3, *[1] * (change == "removed")]
    wanted = {
        "rewritten": [[10, 20], [33, 44], [12, 20]],
        "touched": before[0],
        "removed": [[10, 20], [0, 0], [12, 20]],
        "added": [[10, 20], [11, 20], [12, 20]],
    }
    assert [found.image_hw.tolist() for found in after] == [wanted[change]] * 2
    assert [reject.example_index for reject in after[1].rejects] == [1] * (change == "removed")


def test_a_file_that_stores_nothing_may_change(tmp_path, monkeypatch):
    path = tmp_path / "name.png"
    stored = [{"bytes": pictures.encoded_image(5, 6), "path": str(path)}]
    dataset = Dataset.from_dict({"image": stored}, features=Features({"image": Image()}))
    first = kept(dataset)
    path.write_bytes(b"something else")
    monkeypatch.setattr(sizes, "probe_sizes", no_probe)
    assert plain(kept(dataset)) == plain(first) == ([[5, 6]], [False], [])


def test_another_limit_on_pixels_has_sizes_of_its_own(monkeypatch):
    dataset = images_of([pictures.encoded_image(10, 10), pictures.encoded_image(3, 3)])
    assert plain(kept(dataset))[0] == [[10, 10], [3, 3]]
    limited = kept(dataset, max_pixels=99)
    counted = Counted(monkeypatch)
    for found in (limited, kept(dataset, max_pixels=99)):
        message = "BadImage: 10x10 pixels, expected at most 99"
        reject = Reject(0, "probe", "too many pixels", message)
        assert plain(found) == ([[0, 0], [3, 3]], [False, False], [reject])
    assert plain(kept(dataset))[0] == [[10, 10], [3, 3]]
    assert counted.asked == [1]


@pytest.mark.parametrize("module", [sizes, PIL])
def test_another_version_has_sizes_of_its_own(monkeypatch, module):
    dataset = images_of(pictures.encoded_images())
    counted = Counted(monkeypatch)
    kept(dataset)
    monkeypatch.setattr(module, "__version__", "999")
    kept(dataset)
    assert counted.asked == [9, 9]
    kept(dataset)
    assert counted.asked == [9, 9]


def test_other_rows_have_sizes_of_their_own():
    dataset = images_of(pictures.encoded_images())
    assert kept(dataset).image_hw.tolist() == [list(size) for size in pictures.SIZES]
    picked = dataset.select([4, 1])
    wanted = [list(pictures.SIZES[4]), list(pictures.SIZES[1])]
    assert [kept(picked).image_hw.tolist() for _ in range(2)] == [wanted] * 2


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def overwritten(path):
    path.write_bytes(b"no Arrow stream" * 100)


def of_fewer_rows(path):
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
    write_table(path, table.schema, [table.slice(1)])


def of_other_columns(path):
    table = pa.table({"height": [1] * 9})
    write_table(path, table.schema, [table])


def of_another_source(path):
    other = kept(images_of([None, *pictures.encoded_images()[:8]]))
    assert [reject.example_index for reject in other.rejects] == [0]
    (foreign,) = set(path.parent.iterdir()) - {path}
    foreign.replace(path)


@pytest.mark.parametrize(
    "damage", [of_another_source, halved, emptied, overwritten, of_fewer_rows, of_other_columns]
)
def test_a_kept_file_that_is_broken_is_made_anew(cache, damage):
    dataset = images_of(pictures.encoded_images())
    wanted = plain(kept(dataset))
    (path,) = cache.iterdir()
    damage(path)
    assert plain(kept(dataset)) == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "probe_sizes", no_probe)
        assert plain(kept(dataset)) == wanted
    assert list(cache.iterdir()) == [path]


def test_sizes_in_which_a_bit_has_flipped_are_not_those_that_are_used(cache):
    dataset = images_of(pictures.encoded_images())
    wanted = plain(kept(dataset))
    (path,) = cache.iterdir()
    data = path.read_bytes()
    places = np.random.default_rng(0).integers(0, 8 * len(data), 100).tolist()
    for place in places:
        harmed = bytearray(data)
        harmed[place // 8] ^= 1 << place % 8
        path.write_bytes(harmed)
        assert plain(kept(dataset)) == wanted


def refusing(monkeypatch, path, number):
    """Have the system refuse to open one file, whoever asks; returns how to end that."""
    real, access = os.open, os.access

    def refused(name, *arguments, **options):
        if name == str(path):
            raise OSError(number, os.strerror(number), name)
        return real(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        if number == errno.EACCES:
            patch.setattr(os, "access", lambda name, mode: name != str(path) and access(name, mode))
        yield


@pytest.fixture
def three(tmp_path):
    """Three images in files."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(pictures.encoded_image(16 + number, 16, number))
    return paths


@pytest.mark.parametrize("number", [errno.EACCES, errno.ELOOP])
def test_an_image_that_can_be_read_again_is_no_reject_any_more(three, monkeypatch, number):
    dataset = by_path(three)
    for _ in refusing(monkeypatch, three[1], number):
        found = kept(dataset)
        assert found.image_hw.tolist() == [[16, 16], [0, 0], [18, 16]]
        assert [reject.example_index for reject in found.rejects] == [1]
    for _ in range(2):
        assert plain(kept(dataset)) == ([[16, 16], [17, 16], [18, 16]], [False] * 3, [])
    monkeypatch.setattr(sizes, "probe_sizes", no_probe)
    kept(dataset)


def test_rows_made_while_an_image_could_not_be_read_are_not_those_made_when_it_can(
    three, tmp_path, monkeypatch
):
    dataset, options = by_path(three), {"max_bad_fraction": 0.5, "progress": False}
    for _ in refusing(monkeypatch, three[1], errno.EACCES):
        before = packpipe.pack(dataset, 16, output=tmp_path / "out", num_workers=0, **options)
        assert packpipe.rejects(before)["example_index"][:] == [1]
    message = "expected rows made with the same source_files; choose another output, or remove it"
    with pytest.raises(FileExistsError, match=re.escape(message)):
        packpipe.pack(dataset, 16, output=tmp_path / "out", num_workers=0, **options)
    after = packpipe.pack(dataset, 16, output=tmp_path / "again", num_workers=0, **options)
    assert len(packpipe.rejects(after)) == 0


def replaced(path, image):
    """Replace a file by another of equal length and time of change."""
    before = path.stat()
    path.write_bytes(image + bytes(before.st_size - len(image)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


WAYS = {
    "epochs": lambda dataset, _: packpipe.EpochPacks(dataset, 16).rows((0, 0), np.arange(3)),
    "rows": lambda dataset, folder: packpipe.read_rows(
        packpipe.pack(dataset, 16, output=folder, num_workers=0, progress=False)
    ),
    "processes": lambda dataset, folder: packpipe.read_rows(
        packpipe.pack(dataset, 16, output=folder, num_workers=1, progress=False)
    ),
    "rows when read": lambda dataset, folder: packpipe.read_rows(
        packpipe.pack(dataset, 16, output=folder, materialize=False, progress=False)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_size_that_turns_out_to_be_wrong_is_forgotten(tmp_path, way):
    paths = [tmp_path / f"{number}.bmp" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(pictures.encoded_image(64, 64, number, "BMP"))
    dataset = by_path(paths)
    assert kept(dataset).image_hw.tolist() == [[64, 64]] * 3
    replaced(paths[1], pictures.encoded_image(32, 64, 1, "BMP"))
    message = (
        "example 1: image_hw is (32, 64), expected (64, 64) as planned; "
        "plan again (stored rows: into another folder), the source has changed"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        WAYS[way](dataset, tmp_path / "out")
    rows = WAYS[way](dataset, tmp_path / "another")
    at = rows.example_index.tolist().index(1)
    assert rows.image_hw[at].tolist() == [32, 64]
    assert sorted(rows.example_index.tolist()) == [0, 1, 2]


def test_sizes_are_kept_where_another_error_stops_the_work(tmp_path, monkeypatch):
    path = tmp_path / "0.bmp"
    path.write_bytes(pictures.encoded_image(64, 64, 0, "BMP"))
    dataset = by_path([path])
    kept(dataset)
    with monkeypatch.context() as patched:
        patched.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with (
            pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES"),
            sizes.forgetting_wrong_sizes(source_of(dataset), MAX_PIXELS),
        ):
            check_settings()
    monkeypatch.setattr(sizes, "probe_sizes", no_probe)
    assert kept(dataset).image_hw.tolist() == [[64, 64]]


def test_what_killed_probes_have_left_is_removed(tmp_path):
    images_of(pictures.encoded_images()).save_to_disk(tmp_path / "data")
    dataset = datasets.load_from_disk(tmp_path / "data")
    own = {path.name for path in (tmp_path / "data").iterdir()}
    for probed in (False, True):
        for end in (".partial", ""):
            left = f"packpipe-sizes-{'ab' * 16}.arrow.{'cd' * 16}{end}"
            (tmp_path / "data" / left).write_bytes(b"half")
        kept(dataset)
        (name,) = {path.name for path in (tmp_path / "data").iterdir()} - own
        assert name.endswith(".arrow"), probed


def test_without_locks_several_may_probe_at_once(cache, monkeypatch):
    dataset = images_of(pictures.encoded_images())
    together = Barrier(3)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    def probe(*arguments, **options):
        together.wait(300)
        found = probe_sizes(*arguments, **options)
        together.wait(300)
        return found

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(sizes, "probe_sizes", probe)
    with ThreadPoolExecutor(3) as threads:
        found = [plain(one) for one in threads.map(kept, [dataset] * 3)]
    assert found[0] == found[1] == found[2]
    assert found[0][0] == [list(size) for size in pictures.SIZES]
    assert [path.suffix for path in cache.iterdir()] == [".arrow"]
    monkeypatch.setattr(sizes, "probe_sizes", no_probe)
    assert plain(kept(dataset)) == found[0]


class FirstWaits(Counted):
    """The first probes once so many others wait for it; it may fail then."""

    def __init__(self, monkeypatch, others, error=None):
        super().__init__(monkeypatch)
        self._waiting, self._error, flock = Barrier(others + 1), error, fcntl.flock

        def noted(file, how):
            if how == fcntl.LOCK_SH:
                self._waiting.wait(300)
            flock(file, how)

        monkeypatch.setattr(fcntl, "flock", noted)

    def __call__(self, *arguments, **options):
        is_first = not self.asked
        found = super().__call__(*arguments, **options)
        if is_first:
            self._waiting.wait(300)
            if self._error:
                raise self._error
        return found


def test_of_several_at_once_one_probes_and_the_others_read_what_it_has_kept(cache, monkeypatch):
    dataset = images_of([*pictures.encoded_images(), BAD[1]])
    counted = FirstWaits(monkeypatch, others=3)
    with ThreadPoolExecutor(4) as threads:
        found = [plain(one) for one in threads.map(kept, [dataset] * 4)]
    assert [one == found[0] for one in found] == [True] * 4
    assert found[0][0] == [*map(list, pictures.SIZES), [0, 0]]
    assert counted.asked == [10, 1, 1, 1], "an image without a size is probed by each"
    assert [path.suffix for path in cache.iterdir()] == [".arrow"]


def test_if_the_one_that_probes_fails_the_others_probe_themselves(cache, monkeypatch):
    dataset = images_of(pictures.encoded_images())
    counted = FirstWaits(monkeypatch, others=2, error=OSError("the disk is gone"))
    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(kept, dataset) for _ in range(3)]
        errors = [str(one.exception()) for one in running if one.exception()]
        found = [one.result().image_hw.tolist() for one in running if not one.exception()]
    assert errors == ["the disk is gone"]
    assert found == [[list(size) for size in pictures.SIZES]] * 2
    assert counted.asked[0] == 9
    assert [path.suffix for path in cache.iterdir()] == [".arrow"]


ANOTHER_PROCESS = """
import sys, datasets
from packpipe.sources.sizes import kept_sizes
from packpipe.sources.image_source import ImageSource
dataset = datasets.load_from_disk(sys.argv[1])
source = ImageSource(dataset.select_columns(["image"]).with_format("arrow"))
print("ready", flush=True)
sys.stdin.readline()
print(kept_sizes(source, max_pixels=10**6).image_hw.tolist())
"""


def test_two_processes_may_probe_at_once(tmp_path):
    images = [pictures.encoded_image(1 + number, 7) for number in range(200)]
    images_of(images).save_to_disk(tmp_path / "data")
    before = set((tmp_path / "data").iterdir())
    command = [sys.executable, "-c", ANOTHER_PROCESS, str(tmp_path / "data")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        here = kept(datasets.load_from_disk(tmp_path / "data"), max_pixels=10**6)
        there = process.communicate()[0].strip()
    assert process.returncode == 0
    wanted = [[1 + number, 7] for number in range(200)]
    assert there == str(wanted)
    assert here.image_hw.tolist() == wanted
    (kept_file,) = set((tmp_path / "data").iterdir()) - before
    assert kept_file.suffix == ".arrow"


INTEGER_TYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def sized(heights, widths, height_type="int64", width_type="int64") -> Dataset:
    # `Dataset.from_dict` takes no integers beyond int64.
    columns = {"h": pa.array(heights, height_type), "w": pa.array(widths, width_type)}
    return Dataset(pa.table(columns))


@given(
    st.lists(st.tuples(st.integers(1, 127), st.integers(1, 127)), min_size=1, max_size=9),
    st.sampled_from(INTEGER_TYPES),
    st.sampled_from(INTEGER_TYPES),
    st.randoms(),
)
@settings(max_examples=20)
def test_columns_of_any_integer_type_are_the_sizes(image_hw, height_type, width_type, random):
    dataset = sized(*zip(*image_hw, strict=True), height_type, width_type)
    order = random.sample(range(len(image_hw)), len(image_hw))
    found = column_sizes(dataset.select(order), ("h", "w"), max_pixels=2**62)
    wanted = [list(image_hw[row]) for row in order]
    assert plain(found) == (wanted, [False] * len(wanted), [])
    turned = column_sizes(dataset, ["w", "h"], max_pixels=2**62)
    assert turned.image_hw.tolist() == [list(size[::-1]) for size in image_hw]


def test_columns_in_several_chunks_and_of_no_rows():
    parts = [sized([height], [2 * height]) for height in (3, 1, 2)]
    found = column_sizes(datasets.concatenate_datasets(parts), ("h", "w"), max_pixels=2**62)
    assert plain(found) == ([[3, 6], [1, 2], [2, 4]], [False] * 3, [])
    for none in (sized([], []), parts[0].select([])):
        assert plain(column_sizes(none, ("h", "w"), max_pixels=2**62)) == ([], [], [])


@pytest.mark.parametrize(
    ("height", "width", "kind"),
    [
        (0, 5, "int32"),
        (7, -1, "int32"),
        (2**31, 5, "int64"),
        (5, -(2**63), "int64"),
        (2**63 + 5, 5, "uint64"),
        (2**64 - 1, 5, "uint64"),
        (None, 5, "int32"),
        (5, None, "uint64"),
        (None, None, "int64"),
    ],
)
def test_sizes_that_are_none_are_rejects(height, width, kind):
    dataset = sized([3, height, 2**20], [4, width, 1], kind, kind)
    found = column_sizes(dataset, ("h", "w"), max_pixels=2**62)
    message = (
        f"(height, width) is ({height}, {width}), expected 1..2147483647; "
        "mend it, or pass size_columns=None to read headers"
    )
    reject = Reject(1, "size", "bad size", message)
    assert plain(found) == ([[3, 4], [0, 0], [2**20, 1]], [False] * 3, [reject])


@pytest.mark.parametrize("side", [1, 2**31 - 1])
def test_the_least_and_the_largest_side_are_sizes(side):
    found = column_sizes(sized([side, 1], [1, side]), ("h", "w"), max_pixels=2**62)
    assert plain(found) == ([[side, 1], [1, side]], [False, False], [])


REMEDY = "pass the names of the columns of heights and widths, or None to read headers"
WRONG_COLUMNS = [
    (5, ValueError, f"size_columns is 5, expected (height column, width column); {REMEDY}"),
    ("hw", ValueError, f"size_columns is 'hw', expected (height column, width column); {REMEDY}"),
    (
        ("h",),
        ValueError,
        f"size_columns is ('h',), expected (height column, width column); {REMEDY}",
    ),
    (
        ("h", "w", "h"),
        ValueError,
        f"size_columns is ('h', 'w', 'h'), expected (height column, width column); {REMEDY}",
    ),
    (
        ("h", "height"),
        ValueError,
        f"size_columns is 'height', expected one of ['image', 'h', 'w', 'f', 's']; {REMEDY}",
    ),
    (
        (0, 1),
        ValueError,
        f"size_columns is 0, expected one of ['image', 'h', 'w', 'f', 's']; {REMEDY}",
    ),
    (
        ("f", "w"),
        TypeError,
        f"features['f'] is 'float', expected an integer type; {REMEDY}",
    ),
    (
        ("h", "s"),
        TypeError,
        f"features['s'] is 'string', expected an integer type; {REMEDY}",
    ),
]


@pytest.fixture
def source():
    """Images with their sizes in columns."""
    heights, widths = zip(*pictures.SIZES, strict=True)
    features = {"image": Image(), "h": Value("int32"), "w": Value("int64")}
    features |= {"f": Value("float32"), "s": Value("string")}
    columns = {
        "image": [{"bytes": image, "path": None} for image in pictures.encoded_images()],
        "h": heights,
        "w": widths,
        "f": widths,
        "s": list(map(str, widths)),
    }
    return Dataset.from_dict(columns, features=Features(features))


@pytest.mark.parametrize(("columns", "error", "message"), WRONG_COLUMNS)
def test_wrong_columns_are_refused(source, columns, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        column_sizes(source, columns, max_pixels=2**62)


@pytest.mark.parametrize("output", [None, "out"])
@pytest.mark.parametrize(("columns", "error", "message"), WRONG_COLUMNS)
def test_pack_refuses_wrong_columns(source, tmp_path, columns, error, message, output):
    output = None if output is None else tmp_path / output
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        packpipe.pack(source, 32, size_columns=columns, output=output, progress=False)
    assert output is None or not output.exists()


@pytest.mark.parametrize("materialize", [True, False])
def test_sizes_from_columns_give_the_rows_that_probing_gives(
    source, tmp_path, monkeypatch, materialize
):
    options = {"progress": False, "materialize": materialize, "drop_rate": 0.3}
    probed = packpipe.pack(source, 32, output=tmp_path / "probed", **options)
    for module in ("sizes", "survey"):
        monkeypatch.setattr(f"packpipe.sources.{module}.probe_sizes", no_probe)
    given_hw = packpipe.pack(
        source, 32, output=tmp_path / "given", size_columns=("h", "w"), **options
    )
    assert len(probed) > 1
    assert pictures.row_bytes(packpipe.read_rows(given_hw)) == pictures.row_bytes(
        packpipe.read_rows(probed)
    )


def test_a_wrong_size_in_a_column_names_the_example_and_both_sizes(source, tmp_path):
    widths = [width + (row == 3) for row, (_, width) in enumerate(pictures.SIZES)]
    wrong = source.remove_columns("w").add_column("w", widths)
    message = (
        "example 3: image_hw is (8, 120), expected (8, 121) as planned; "
        "plan again (stored rows: into another folder), the source has changed"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        packpipe.pack(wrong, 32, size_columns=("h", "w"), output=tmp_path / "o", progress=False)
    assert not (tmp_path / "o").exists()


def test_rejected_sizes_are_rejects_of_the_build(tmp_path):
    heights, widths = zip(*pictures.SIZES, strict=True)
    columns = {
        "image": [{"bytes": image, "path": None} for image in pictures.encoded_images()],
        "h": [*heights[:2], 0, *heights[3:]],
        "w": widths,
    }
    features = Features({"image": Image(), "h": Value("int32"), "w": Value("int32")})
    source = Dataset.from_dict(columns, features=features)
    options = {"size_columns": ("h", "w"), "max_bad_fraction": 0.2, "progress": False}
    packed = packpipe.pack(source, 32, output=tmp_path / "out", **options)
    assert packpipe.rejects(packed).to_list() == [
        {
            "example_index": 2,
            "stage": "size",
            "reason": "bad size",
            "exception": (
                "(height, width) is (0, 33), expected 1..2147483647; "
                "mend it, or pass size_columns=None to read headers"
            ),
        }
    ]
    found = packpipe.read_rows(packed).example_index.tolist()
    assert sorted(found) == [0, 1, 3, 4, 5, 6, 7, 8]


def test_sizes_of_too_many_pixels_are_rejects():
    found = column_sizes(sized([30, 10], [10, 40]), ("h", "w"), max_pixels=300)
    message = "10x40 pixels, expected at most 300"
    assert found.rejects == [Reject(1, "size", "too many pixels", message)]
    assert found.image_hw.tolist() == [[30, 10], [0, 0]]
