"""JPEG scans: damage within the pixels is found where it can be, and sound files never are."""

from __future__ import annotations

import re
import struct
import sys
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import encode
from test_decode import RULES, decoded

from packpipe.images import rules
from packpipe.images.bad_images import BadImage
from packpipe.images.rules import pixel_rules
from packpipe.images.scans import scans_of
from packpipe.planning.image_config import PackConfig

HIGH, WIDE = 48, 80
NOISE = strategies.random_image("RGB", HIGH, WIDE)
# Options of Pillow's encoder: every way to write a scan that it has.
WRITTEN = {
    "baseline": {"subsampling": 0},
    "4:2:0": {"subsampling": 2},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_blocks": 3},
    "restarts of rows": {"restart_marker_rows": 1},
    "progressive": {"progressive": True},
    "grey": {},
    "CMYK": {},
}
MODES = {"grey": "L", "CMYK": "CMYK"}


def written(name, image=NOISE, **options):
    return encode(image.convert(MODES.get(name, "RGB")), "JPEG", **WRITTEN[name] | options)


def scan_of(file):
    """(start, end) of the last scan of a file."""
    end = scans_of(file).end
    start = file.rindex(b"\xff\xda", 0, end)
    return start + 2 + int.from_bytes(file[start + 2 : start + 4], "big"), end


def reason(file, image_hw=(HIGH, WIDE), target_hw=None, **rules):
    """Why a file is a reject; None if it is a row."""
    try:
        decoded(file, image_hw, target_hw, **rules)
    except BadImage as error:
        return error.reason, str(error)
    return None


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("gap", [None, 1.0])
def test_a_sound_file_is_a_row_whatever_its_last_pixel(name, gap):
    colours = [NOISE, *(Image.new("RGB", (WIDE, HIGH), (grey,) * 3) for grey in (0, 127, 128, 255))]
    for image in colours:
        for quality in (5, 75, 100):
            file = written(name, image, quality=quality)
            assert scans_of(file).damage is None
            assert scans_of(file).end == len(file) - 2
            assert reason(file, target_hw=(6, 10), reducing_gap=gap) is None


@given(strategies.image_sizes(40), st.sampled_from([*WRITTEN]), st.integers(1, 100))
def test_no_sound_file_is_called_damaged(image_hw, name, quality):
    height, width = image_hw
    file = written(name, strategies.random_image("RGB", height, width), quality=quality)
    assert reason(file, image_hw) is None


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("path", [False, True])
def test_a_file_that_is_cut_and_closed_is_a_reject(name, path, tmp_path):
    file = written(name)
    start, end = scan_of(file)
    if name == "progressive":  # its last scan refines the one before it
        start, end = start - 400, start - 60
    else:
        end -= 300  # some bytes more than a unit takes
    assert end - start >= 10
    for place in np.linspace(start, end - 1, 8).astype(int).tolist():
        cut = file[:place] + b"\xff\xd9"
        if path:
            (tmp_path / "cut.jpg").write_bytes(cut)
        found = reason(str(tmp_path / "cut.jpg") if path else cut)
        assert found is not None, place
        if name == "progressive" and found[0] == "undecodable":
            continue  # cut in a table, so Pillow sees it
        assert found[0] == "damaged scan"
        assert reason(cut, damaged_scans="keep") is None


def test_a_cut_is_seen_at_a_smaller_size_too():
    start, end = scan_of(written("4:2:0"))
    cut = written("4:2:0")[: (start + end) // 2] + b"\xff\xd9"
    for target_hw in [(24, 40), (12, 20), (6, 10)]:
        message = "the scan ends before its last unit"
        assert reason(cut, target_hw=target_hw, reducing_gap=1.0) == ("damaged scan", message)


@pytest.mark.parametrize("name", ["baseline", "4:2:0", "optimised", "restarts", "grey", "CMYK"])
def test_bytes_that_the_decoder_does_not_need_are_damage(name):
    file = written(name)
    _, end = scan_of(file)
    longer = file[:end] + bytes(range(1, 41)) + file[end:]
    assert reason(longer) == ("damaged scan", "bytes left over")


@pytest.mark.parametrize("filling", [b"\xff", b"\x00" * 600, b"\xff" * 30, b"\x01\x02"])
def test_filling_at_the_end_of_a_scan_is_none(filling):
    file = written("baseline")
    _, end = scan_of(file)
    assert reason(file[:end] + filling + file[end:]) is None
    assert reason(file + b"\0\1\2 what follows is nobody's business \xff\xd8") is None


def restarted():
    """A file with restarts, and where each is."""
    file = written("restarts")
    start, end = scan_of(file)
    places = [start + found.start() for found in re.finditer(b"\xff[\xd0-\xd7]", file[start:end])]
    assert len(places) == 4
    return file, places


def test_restarts_missing_or_out_of_order_are_damage():
    file, places = restarted()
    number = len(places)
    second, third = places[1:3]
    missing = file[:second] + file[third:]
    told = ("damaged scan", f"{number - 1} restarts, expected {number}")
    assert reason(missing) == told
    other = file[: second + 1] + b"\xd5" + file[second + 2 :]
    assert reason(other) == ("damaged scan", "restarts out of order")
    file = written("baseline")
    start, _ = scan_of(file)
    strange = file[: start + 100] + b"\xff\xd0" + file[start + 100 :]
    assert reason(strange) == ("damaged scan", "1 restarts, expected 0")


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (b"\xff\x22", "marker FF22 within a scan"),
        (b"\xff\xc0\0\2", "marker FFC0 within a scan"),
        (b"\xff\xfe\0\2", "bytes between two segments"),
    ],
)
def test_a_marker_within_a_scan_is_damage(marker, message):
    file = written("baseline")
    start, end = scan_of(file)
    middle = (start + end) // 2
    found = reason(file[:middle] + marker + b"\x01" + file[middle:])
    assert found is not None
    assert found in [("damaged scan", message), ("undecodable", found[1])]
    assert scans_of(file[:middle] + marker + b"\x01" + file[middle:]).damage == message


def test_a_progressive_file_without_its_last_scans_is_damage():
    file = written("progressive")
    number = scans_of(file).number
    assert number == 10
    starts = [found.start() for found in re.finditer(b"\xff\xda", file)]
    assert len(starts) == number
    for last in range(1, number):
        tables = file.rfind(b"\xff\xc4", starts[last - 1], starts[last])
        end = tables if tables > 0 else starts[last]
        told = reason(file[:end] + b"\xff\xd9")
        assert told == ("damaged scan", "coefficients that no scan holds")


@given(st.data())
def test_flipped_bytes_are_a_row_or_a_reject_and_nothing_else(data):
    file = bytearray(written(data.draw(st.sampled_from([*WRITTEN]))))
    start, end = scan_of(bytes(file))
    for place in data.draw(st.lists(st.integers(start, end - 1), min_size=1, max_size=3)):
        file[place] = data.draw(st.integers(0, 255))
    found = reason(bytes(file))
    assert found is None or found[0] in ("damaged scan", "undecodable", "unreadable")


def test_a_picture_of_the_callers_is_not_looked_into():
    start, end = scan_of(written("baseline"))
    cut = written("baseline")[: (start + end) // 2] + b"\xff\xd9"
    with Image.open(BytesIO(cut)) as image:
        assert reason(image) is None


class TestStrict:
    CONFIG = PackConfig(damaged_scans="strict")

    def test_it_rejects_what_libjpeg_warns_of(self, monkeypatch):
        asked = []

        def decode_jpeg(content, colours, **options):
            asked.append((content, colours, options))
            raise ValueError("Corrupt JPEG data: 9 extraneous bytes before marker 0xd9")

        monkeypatch.setitem(sys.modules, "simplejpeg", SimpleNamespace(decode_jpeg=decode_jpeg))
        file = written("baseline")
        assert reason(file) is None
        told = ("damaged scan", "Corrupt JPEG data: 9 extraneous bytes before marker 0xd9")
        assert reason(file, damaged_scans="strict") == told
        small = {"min_height": 1, "min_width": 1, "min_factor": 2}
        assert asked == [(file, "GRAY", small)]

    def test_it_needs_simplejpeg(self, monkeypatch):
        monkeypatch.setattr(rules, "find_spec", lambda _: None)
        message = (
            "damaged_scans is 'strict', expected simplejpeg to be installed; "
            'pip install simplejpeg, or use "reject"'
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            pixel_rules(self.CONFIG)
        assert pixel_rules(PackConfig()).damaged_scans == "reject"


def test_a_record_from_before_means_that_damaged_scans_were_kept():
    before = PackConfig(damaged_scans="keep").to_dict()
    assert "damaged_scans" not in before
    assert PackConfig.from_dict(before).damaged_scans == "keep"
    for chosen in ("reject", "strict"):
        assert (
            PackConfig.from_dict(PackConfig(damaged_scans=chosen).to_dict()).damaged_scans == chosen
        )


def lossless_jpeg(values):
    """A JPEG file of uint8[height, width] that predicts each sample from the one on its left."""
    height, width = values.shape
    before = np.full(values.shape, 128)  # of the first one
    before[1:, 0] = values[:-1, 0]  # of a row's first one: the one above
    before[:, 1:] = values[:, :-1]
    bits = ""
    for difference in (values.astype(int) - before).ravel().tolist():
        size = abs(difference).bit_length()
        value = difference if difference >= 0 else difference + (1 << size) - 1
        bits += f"{size:05b}" + (f"{value:0{size}b}" if size else "")
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    table = b"\0" + bytes([0] * 4 + [17] + [0] * 11) + bytes(range(17))  # code = size, in 5 bits

    def segment(code, content):
        return bytes([0xFF, code]) + struct.pack(">H", len(content) + 2) + content

    return (
        b"\xff\xd8"
        + segment(0xC3, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0")
        + segment(0xC4, table)
        + segment(0xDA, b"\1\1\0\1\0\0")
        + scan
        + b"\xff\xd9"
    )


def test_a_lossless_jpeg_is_decoded_in_full_and_then_shrunk():
    values = np.asarray(NOISE.convert("L"))
    file = lossless_jpeg(values)
    assert scans_of(file).is_lossless
    assert (decoded(file, (HIGH, WIDE))[..., 0] == values).all()
    for gap in (None, 1.0):
        rules = RULES._replace(reducing_gap=gap)
        shrunk = decoded(file, (HIGH, WIDE), (6, 10), reducing_gap=gap)
        wanted = decoded(
            encode(Image.fromarray(values), "PNG"), (HIGH, WIDE), (6, 10), reducing_gap=gap
        )
        assert (shrunk == wanted).all(), rules
