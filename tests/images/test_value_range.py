"""Images of unknown range: floating point, 32-bit integers; `value_range` says black and white."""

from __future__ import annotations

import math
import re
import struct
from fractions import Fraction
from io import BytesIO

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from test_decode import decoded

import packpipe
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import probe
from packpipe.images.modes import between
from packpipe.planning.image_config import PackConfig
from packpipe.planning.image_options import BEFORE

tifffile = pytest.importorskip("tifffile")

HIGH, WIDE = 6, 8
RANGES = {
    "float32": (-2.5, 7.0),
    "uint32": (2**31 - 5, 2**32 - 1),
    "int32": (-(2**31), 100),
    "int16": (-300, 300),
}


def values_of(dtype):
    low, high = RANGES[dtype]
    wide = (high - low) / 4  # some lie beyond
    most = (-math.inf, math.inf) if dtype == "float32" else tuple(vars_of(dtype))
    values = np.linspace(low - wide, high + wide, HIGH * WIDE).clip(*most)
    return values.astype(dtype).reshape(HIGH, WIDE)


def vars_of(dtype):
    return np.iinfo(dtype).min, np.iinfo(dtype).max


def tiff(values, **options):
    file = BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack", "metadata": None, **options})
    return file.getvalue()


def grey_of(value, value_range):
    """The level of a value, in exact arithmetic; halves may go either way."""
    if math.isnan(value):
        return 0
    if math.isinf(value):
        return 255 if value > 0 else 0
    low, high = map(Fraction, value_range)
    return float(min(max((Fraction(value) - low) / (high - low), 0), 1) * 255)


def test_levels_follow_the_rule():
    found = between(np.array([0, 1, 2, 3, 4, -9, 9]), (0, 4))
    assert found.tolist() == [0, 64, 128, 191, 255, 0, 255]
    found = between(np.array([np.nan, np.inf, -np.inf, 0.5]), (-1.0, 0.5))
    assert found.tolist() == [0, 255, 0, 255]
    assert found.dtype == np.uint8


FINITE = st.floats(-1e300, 1e300)


@given(st.lists(st.floats(), min_size=1), FINITE, FINITE)
@example([1.0, -1.0], 0.0, 5e-324)
@example([1e300], -1e300, 1e300)
def test_every_level_is_the_nearest(values, one, other):
    value_range = min(one, other), max(one, other)
    if value_range[0] < value_range[1]:
        found = between(np.array(values), value_range)
        for value, level in zip(values, found.tolist(), strict=True):
            assert abs(grey_of(value, value_range) - level) <= 0.5 + 1e-9


@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_a_tiff_is_what_tifffile_reads_of_it(dtype, byteorder):
    value_range, values = RANGES[dtype], values_of(dtype)
    encoded = tiff(values, byteorder=byteorder)
    read = tifffile.imread(BytesIO(encoded))
    assert (read == values).all()
    if (dtype, byteorder) == ("uint32", ">"):
        message = "a TIFF of 1 samples of 32 bits, unsigned, big-endian, has no rule to become RGB"
        with pytest.raises(BadImage, match=f"^{message}$"):
            probe(encoded, max_pixels=10**6)
        return
    expected = [[grey_of(value, value_range) for value in row] for row in read.tolist()]
    found = decoded(encoded, (HIGH, WIDE), value_range=value_range)
    assert set(found.ravel().tolist()) >= {0, 255}
    assert np.abs(found - np.array(expected)[..., None]).max() <= 0.5


@pytest.mark.parametrize("options", [{"tile": (16, 16)}, {"rowsperstrip": 2}, {"bigtiff": True}])
def test_any_place_of_samples(options):
    values, value_range = values_of("float32"), RANGES["float32"]
    expected = between(values, value_range)
    found = decoded(tiff(values, **options), (HIGH, WIDE), value_range=value_range)
    assert (found == expected[..., None]).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "zstd", "lzma"])
@pytest.mark.parametrize("mode", ["F", "I"])
def test_any_compression(compression, mode):
    values = values_of("float32" if mode == "F" else "int32")
    file, value_range = BytesIO(), (float(values.min()), float(values.max()))
    Image.fromarray(values).save(file, "TIFF", compression=compression)
    found = decoded(file.getvalue(), (HIGH, WIDE), value_range=value_range)
    assert (found == between(values, value_range)[..., None]).all()


def test_where_zero_is_white_low_is_white_and_nothing_is_black():
    values = np.array([[0, 1, 3, 4, -9, 9, np.nan]], np.float32)
    found = decoded(tiff(values, photometric="miniswhite"), (1, 7), value_range=(0.0, 4.0))
    assert found[0, :, 0].tolist() == [255, 191, 64, 0, 255, 0, 0]


@pytest.mark.parametrize("order", ["<", ">"])
def test_pfm_has_its_last_row_first(order):
    values = values_of("float32")
    head = f"Pf\n{WIDE} {HIGH}\n{-1.0 if order == '<' else 1.0}\n".encode()
    encoded = head + values[::-1].astype(order + "f4").tobytes()
    assert probe(encoded, max_pixels=10**6).image_hw == (HIGH, WIDE)
    found = decoded(encoded, (HIGH, WIDE), value_range=RANGES["float32"])
    assert (found == between(values, RANGES["float32"])[..., None]).all()


def test_sixteen_bits_keep_their_own_range():
    values = np.arange(HIGH * WIDE, dtype=np.uint16).reshape(HIGH, WIDE) * 1000
    for encoded in (tiff(values), tiff(values, byteorder=">")):
        plain = decoded(encoded, (HIGH, WIDE))
        assert (decoded(encoded, (HIGH, WIDE), value_range=(0.0, 9.0)) == plain).all()


FLOAT_RGB = np.zeros((HIGH, WIDE, 3), np.float32)


@pytest.mark.parametrize(
    ("encoded", "what"),
    [
        (
            tiff(FLOAT_RGB, photometric="rgb"),
            "a TIFF of 3 samples of 32 bits, floating point, little-endian,",
        ),
        (
            tiff(FLOAT_RGB[..., 0].astype("f8")),
            "a TIFF of 1 samples of 64 bits, floating point, little-endian,",
        ),
        (
            tiff(FLOAT_RGB[..., 0].astype("f2")),
            "a TIFF of 1 samples of 16 bits, floating point, little-endian,",
        ),
        (
            tiff(FLOAT_RGB.astype("u4"), photometric="rgb", bigtiff=True),
            "a TIFF of 3 samples of 32 bits, unsigned, little-endian,",
        ),
        (b"PF\n1 1\n-1.0\n" + struct.pack("<3f", 0, 0, 0), "a PFM of three channels"),
    ],
)
def test_what_pillow_cannot_read_is_refused_by_name(encoded, what):
    message = f"{what} has no rule to become RGB"
    with pytest.raises(BadImage, match=f"^{re.escape(message)}$") as found:
        probe(encoded, max_pixels=10**6)
    assert found.value.reason == "unsupported mode"


def test_rows_of_a_folder_say_their_range(tmp_path):
    import pictures

    values = values_of("float32")
    dataset = pictures.dataset_of([tiff(values), tiff(values * 2)])
    found = packpipe.pack(
        dataset, seq_len=64, output=tmp_path / "rows", value_range=RANGES["float32"], num_workers=1
    )
    assert packpipe.manifest(found)["config"]["value_range"] == list(RANGES["float32"])
    assert packpipe.verify(tmp_path / "rows", dataset, sample=None) == []
    plain = packpipe.pack(
        dataset, seq_len=64, output=tmp_path / "none", num_workers=0, max_bad_fraction=1.0
    )
    rejects = packpipe.rejects(plain)
    assert len(rejects) == 2
    assert "value_range" not in packpipe.manifest(plain)["config"]


def test_a_configuration_without_a_range_is_told_as_before():
    assert "value_range" not in PackConfig().to_dict()
    assert "value_range" not in repr(PackConfig())
    config = PackConfig(value_range=[np.float32(-1), 5])
    assert config.value_range == (-1.0, 5.0)
    assert config.to_dict()["value_range"] == [-1.0, 5.0]
    assert PackConfig.from_dict(config.to_dict()) == config
    assert config.as_before() == PackConfig(**BEFORE)
