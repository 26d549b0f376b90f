"""Damaged files that once did what no file may do; `fuzz_images.py` found them."""

import warnings
from pathlib import Path

import pytest

from packpipe.images.bad_images import BadImage
from packpipe.images.decode import decode, probe
from packpipe.images.rules import pixel_rules
from packpipe.planning.image_config import PackConfig

FINDS = sorted((Path(__file__).parent.parent / "finds").iterdir())
RULES = pixel_rules(PackConfig(max_pixels=4_000_000))


def outcome_of(data):
    """The shape of its pixels, or why it has none."""
    try:
        image_hw = probe(data, max_pixels=RULES.max_pixels).image_hw
        return decode(data, image_hw=image_hw, target_hw=(16, 32), rules=RULES).pixels.shape
    except BadImage as error:
        return error.reason


@pytest.mark.parametrize("by", ["bytes", "path"])
@pytest.mark.parametrize("path", FINDS, ids=lambda path: path.name)
def test_a_damaged_file_is_pixels_or_a_reject(path, by, caplog):
    data = path.read_bytes() if by == "bytes" else str(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = outcome_of(data)
    assert outcome in {(16, 32, 3), "unreadable", "undecodable", "too many pixels"}
    assert outcome == outcome_of(path.read_bytes())
    assert caplog.records == []


def test_a_tile_larger_than_the_limit_is_refused_before_it_is_allocated():
    (path,) = (path for path in FINDS if path.name.startswith("tile_of"))
    with pytest.raises(BadImage, match=r"^\d+x\d+ pixels, expected at most 4000000$"):
        probe(path.read_bytes(), max_pixels=RULES.max_pixels)
