"""Opening files: regular ones alone, and none outside of a folder that confines them."""

from __future__ import annotations

import fcntl
import re
import signal
import threading
from io import FileIO

import pictures
import pytest
from test_headers import opened_with

from packpipe.images import regular_files
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import decode, probe
from packpipe.images.image_data import Confined
from packpipe.images.rules import PixelRules
from packpipe.sources.image_source import confined

INSIDE, OUTSIDE = (8, 12), (10, 6)
RULES = PixelRules((255, 255, 255), 10**6, None, "bicubic", "bicubic", "srgb")


def test_a_file_that_has_nothing_to_read_yet_is_a_reject(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    path.write_bytes(pictures.encoded_image(*INSIDE))

    class Waiting(FileIO):
        def read(self, *_):
            return None

    opened_with(monkeypatch, Waiting)
    with pytest.raises(BadImage, match=r"^\[Errno 11\] Resource temporarily unavailable: "):
        probe(str(path), max_pixels=10**6)


@pytest.fixture
def leased(tmp_path):
    """A file that somebody has leased: the system has others wait for it, or say EAGAIN."""
    path = tmp_path / "leased.png"
    path.write_bytes(pictures.encoded_image(*INSIDE))
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # so the system asks to have it back
    with path.open("rb") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield str(path)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    signal.signal(signal.SIGIO, before)


def test_a_file_under_a_lease_is_a_reject_of_its_path(leased):
    message = f"[Errno 11] Resource temporarily unavailable: {leased!r}"
    with pytest.raises(BadImage, match=f"^{re.escape(message)}$") as found:
        probe(leased, max_pixels=10**6)
    assert found.value.reason == "unreadable"


def test_a_file_that_cannot_be_read_is_a_reject_of_its_path():
    message = "[Errno 5] Input/output error: '/proc/self/mem'"
    with pytest.raises(BadImage, match=f"^{re.escape(message)}$") as found:
        probe("/proc/self/mem", max_pixels=10**6)
    assert found.value.reason == "unreadable"


@pytest.fixture
def root(tmp_path):
    """A folder of folders of images, beside it one outside, and links of all kinds."""
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "in.png").write_bytes(pictures.encoded_image(*INSIDE))
    outside = tmp_path / "outside"
    (outside / "b").mkdir(parents=True)
    for folder in (outside, outside / "b"):
        (folder / "in.png").write_bytes(pictures.encoded_image(*OUTSIDE))
    (root / "link to a").symlink_to(root / "a")
    (root / "a" / "up").symlink_to("../a/b")
    (root / "link.png").symlink_to("link to a/b/in.png")
    return root


@pytest.fixture(params=["stepwise", "checked"])
def way(request, monkeypatch):
    """How systems of both kinds open files."""
    assert regular_files._OPENS_STEPWISE
    monkeypatch.setattr(regular_files, "_OPENS_STEPWISE", request.param == "stepwise")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "path", ["a/b/in.png", "link to a/b/in.png", "a/up/in.png", "link.png", "{root}/link.png"]
)
def test_links_within_the_root_are_followed(root, path):
    found = confined(path.format(root=root), str(root))
    assert found == Confined(str(root / "a" / "b" / "in.png"), str(root))
    assert probe(found, max_pixels=10**6).image_hw == INSIDE
    assert decode(found, image_hw=INSIDE, target_hw=INSIDE, rules=RULES).pixels.shape == (
        *INSIDE,
        3,
    )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("swapped", ["a", "a/b", "a/b/in.png"])
def test_what_is_swapped_for_a_link_after_the_path_was_resolved_is_not_followed(root, swapped):
    found = confined("a/b/in.png", str(root))
    place = root / swapped
    place.rename(root / "away")
    place.symlink_to(root.parent / "outside" / ("in.png" * (swapped == "a/b/in.png")))
    assert probe(found.path, max_pixels=10**6).image_hw == OUTSIDE, "without a root it would be"
    for _ in range(2):
        with pytest.raises(BadImage, match=re.escape(repr(found.path))) as rejected:
            probe(found, max_pixels=10**6)
        assert rejected.value.reason == "unreadable"
    place.unlink()
    (root / "away").rename(place)
    assert probe(found, max_pixels=10**6).image_hw == INSIDE


def test_no_read_leaves_the_root_while_a_folder_is_swapped_for_a_link(root):
    done = threading.Event()
    swaps = 0

    def swap():
        nonlocal swaps
        folder, away = root / "a", root / "away"
        while not done.is_set():
            folder.rename(away)
            folder.symlink_to(root.parent / "outside")
            folder.unlink()
            away.rename(folder)
            swaps += 1

    thread = threading.Thread(target=swap)
    thread.start()
    found = []
    try:
        # On a busy machine it may be long before a read falls between two swaps.
        while len(found) < 3000 or swaps < 100 or (INSIDE not in found and len(found) < 10**6):
            try:
                found.append(probe(confined("a/b/in.png", str(root)), max_pixels=10**6).image_hw)
            except BadImage as error:
                found.append(error.reason)
    finally:
        done.set()
        thread.join()
    assert swaps >= 100
    assert set(found) <= {INSIDE, "missing", "unreadable", "outside image_root"}
    assert INSIDE in found


def test_a_folder_that_may_only_be_searched_is_no_obstacle(root):
    found = confined("a/b/in.png", str(root))
    (root / "a").chmod(0o111)
    try:
        assert probe(found, max_pixels=10**6).image_hw == INSIDE
    finally:
        (root / "a").chmod(0o755)
