from __future__ import annotations

import struct
from io import BytesIO

import naive_profiles as naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from strategies import encode
from test_decode import BACKGROUND, RULES, png

from packpipe.images import colour
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import decode

ADOBE = naive.rgb_profile(naive.ADOBE, 2.19921875)
WIDE_GREY = naive.grey_profile(1.8)
CMYK = naive.cmyk_profile()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Smooth enough for lossy formats, and of all colours.
DOWN, ACROSS = np.mgrid[0:48, 0:64]
PIXELS = np.stack([ACROSS * 4, DOWN * 5, 255 - (ACROSS + DOWN) * 2], axis=-1).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)
SAVED = {
    "PNG": {},
    "TIFF": {},
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4", "speed": 10},
}


def saved(image, format, profile=None, **options):  # noqa: A002
    options |= {} if profile is None else {"icc_profile": profile}
    return encode(image, format, **SAVED[format], **options)


def found(data, target_hw=None, **rules):
    """The pixels and the flag of an image."""
    size = data.size if isinstance(data, Image.Image) else Image.open(BytesIO(data)).size
    rules = RULES._replace(**rules)
    return decode(data, image_hw=size[::-1], target_hw=target_hw or size[::-1], rules=rules)


def pixels_of(data, target_hw=None, **rules):
    decoded = found(data, target_hw, **rules)
    assert decoded.flag is None
    return decoded.pixels.astype(int)


def is_near(pixels, wanted, most=1.01):
    assert pixels.shape == wanted.shape
    return np.abs(pixels - wanted).max() <= most


@pytest.mark.parametrize("format", SAVED)
def test_colours_of_a_profile_become_srgb(format):  # noqa: A002
    # What is lost to the format is lost before the colours change.
    stored = pixels_of(saved(PICTURE, format)).astype(np.uint8)
    pixels = pixels_of(saved(PICTURE, format, ADOBE))
    wanted = naive.srgb_of(stored, naive.ADOBE, 2.19921875)
    assert is_near(pixels, wanted)
    assert np.abs(pixels - stored).mean() > 3


def test_colours_of_an_image_of_the_callers_become_srgb_and_it_is_not_changed():
    image = PICTURE.copy()
    image.info["icc_profile"] = ADOBE
    assert is_near(pixels_of(image), naive.srgb_of(PIXELS, naive.ADOBE, 2.19921875))
    assert image.info == {"icc_profile": ADOBE}
    assert np.array_equal(np.asarray(image), PIXELS)


def test_pixels_are_resized_first():
    checks = np.where((DOWN + ACROSS)[..., None] % 2, (255, 40, 0), (0, 200, 255)).astype(np.uint8)
    mixed = pixels_of(saved(Image.fromarray(checks), "PNG"), (1, 1)).astype(np.uint8)
    pixels = pixels_of(saved(Image.fromarray(checks), "PNG", ADOBE), (1, 1))
    assert is_near(pixels, naive.srgb_of(mixed, naive.ADOBE, 2.19921875))


@pytest.mark.parametrize("profiles", [{"profile": SRGB}, {"profile": ADOBE, "rule": "ignore"}])
@pytest.mark.parametrize("format", SAVED)
def test_pixels_stay_as_they_are(format, profiles):  # noqa: A002
    pixels = pixels_of(
        saved(PICTURE, format, profiles["profile"]), profiles=profiles.get("rule", "srgb")
    )
    assert np.array_equal(pixels, pixels_of(saved(PICTURE, format)))


def test_a_palette_has_an_rgb_profile():
    palette = PICTURE.quantize(64)
    stored = np.asarray(palette.convert("RGB"))
    pixels = pixels_of(saved(palette, "PNG", ADOBE))
    assert is_near(pixels, naive.srgb_of(stored, naive.ADOBE, 2.19921875))


@pytest.mark.parametrize("profile", [WIDE_GREY, naive.rgb_profile(naive.ADOBE, 1.8)])
@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_grey_has_a_grey_or_an_rgb_profile(mode, profile):
    greys = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (2, 1))
    image = Image.fromarray(greys)
    if mode == "I;16":
        image = Image.fromarray(greys.astype(np.uint16) * 257)
    elif mode == "1":
        greys = np.where(greys > 100, 255, 0).astype(np.uint8)
        image = Image.fromarray(greys).convert("1")
    elif mode == "LA":
        image.putalpha(255)
    wanted = naive.encoded(naive.decoded(greys / 255, 1.8))
    pixels = pixels_of(saved(image, "PNG", profile))
    assert is_near(pixels, np.repeat(wanted[..., None], 3, axis=-1), 1.5)


INKS = np.array(list(np.ndindex(2, 2, 2, 2)), np.uint8)[None] * 255


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk_becomes_srgb_by_its_profile(format):  # noqa: A002
    # Squares of 8 pixels, which a JPEG keeps.
    image = Image.fromarray(INKS.repeat(8, axis=0).repeat(8, axis=1), "CMYK")
    share = (1 - INKS[..., 3] / 255) * (3 - INKS[..., :3].sum(axis=-1) / 255) / 3
    wanted = naive.grey_of_lightness(100 * share)
    pixels = pixels_of(saved(image, format, CMYK))[4:5, 4::8]
    assert is_near(pixels, np.repeat(wanted[..., None], 3, axis=-1), 3)
    assert not is_near(pixels_of(saved(image, format))[4:5, 4::8], pixels, 30)


def test_cmyk_is_resized_as_cmyk():
    black = np.zeros((16, 16, 4), np.uint8)
    black[:, ::2, 3] = 255
    (pixel,) = pixels_of(saved(Image.fromarray(black, "CMYK"), "TIFF", CMYK), (1, 1))[0]
    # Half of the ink is L* 50; half of black and half of white would be 128.
    assert is_near(pixel, np.repeat(naive.grey_of_lightness(50), 3), 1.5)


@pytest.mark.parametrize("target_hw", [None, (12, 16)])
def test_transparency_is_laid_on_the_background_after_the_conversion(target_hw):
    image = PICTURE.copy()
    image.putalpha(
        Image.fromarray(
            np.repeat(np.array([0, 128, 255], np.uint8), 16)[:, None].repeat(64, axis=1)
        )
    )
    pixels = pixels_of(saved(image, "PNG", ADOBE), target_hw)
    converted = pixels_of(saved(PICTURE, "PNG", ADOBE), target_hw)
    third = len(pixels) // 3
    assert (pixels[: third - 1] == BACKGROUND).all()
    half = (converted * 128 + np.array(BACKGROUND) * 127) / 255
    middle = slice(third + 2, 2 * third - 2) if target_hw is None else slice(third + 2, third + 3)
    assert is_near(pixels[middle], half[middle], 2.5)
    assert is_near(pixels[2 * third + 2 :], converted[2 * third + 2 :], 2.5)


def test_a_transparent_value_of_16_bits_is_laid_on_the_background_after_the_conversion():
    values = np.repeat(np.array([[1000, 40000]], np.uint16), 2, axis=0)
    image = Image.fromarray(values)
    pixels = pixels_of(saved(image, "PNG", WIDE_GREY, transparency=1000))
    assert (pixels[:, 0] == BACKGROUND).all()
    assert is_near(pixels[0, 1], np.repeat(naive.encoded((40000 / 65535) ** 1.8), 3))


LINK = naive.profile_of({b"A2B0": b"", b"wtpt": naive.xyz(naive.D50)}, device=b"link")
UNUSABLE = {
    "empty": b"\0",
    "text": b"this is no profile" * 20,
    "cut": ADOBE[:200],
    "no curve": naive.profile_of({b"wtpt": naive.xyz(naive.D50)}),
    "of CMYK": CMYK,
    "of grey": WIDE_GREY,
    "device link": LINK,
}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("profile", UNUSABLE.values(), ids=UNUSABLE)
def test_a_profile_that_cannot_be_used_is_flagged_and_pixels_are_as_without_it(profile, format):  # noqa: A002
    pixels, flag = found(saved(PICTURE, format, profile))
    assert flag == "broken profile"
    assert np.array_equal(pixels, pixels_of(saved(PICTURE, format)))
    assert found(saved(PICTURE, format, profile), profiles="ignore").flag is None


def test_a_profile_in_parts_that_do_not_fit_together_is_flagged():
    encoded = saved(PICTURE, "JPEG", ADOBE).replace(b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\1\2")
    assert found(encoded).flag == "broken profile"


def test_a_profile_of_cmyk_colours_needs_cmyk():
    image = PICTURE.convert("CMYK")
    pixels, flag = found(saved(image, "TIFF", ADOBE))
    assert flag == "broken profile"
    assert np.array_equal(pixels, pixels_of(saved(image, "TIFF")))


def test_a_profile_that_is_too_large_is_flagged(monkeypatch):
    monkeypatch.setattr(colour, "MAX_PROFILE_BYTES", len(ADOBE))
    assert found(saved(PICTURE, "PNG", ADOBE)).flag is None
    assert found(saved(PICTURE, "PNG", ADOBE + b"\0")).flag == "broken profile"


@given(st.lists(st.tuples(st.integers(0, len(ADOBE) - 1), st.integers(0, 255)), min_size=1))
def test_a_damaged_profile_gives_pixels_or_those_without_it(damage):
    profile = bytearray(ADOBE)
    for place, value in damage:
        profile[place] = value
    pixels, flag = found(saved(PICTURE, "PNG", bytes(profile)))
    assert pixels.shape == PIXELS.shape
    if flag is not None:
        assert np.array_equal(pixels, PIXELS)


def test_conversions_are_kept_and_forgotten():
    colour._transform.cache_clear()
    for number in range(colour._KEPT + 5):
        pixels_of(saved(PICTURE, "PNG", naive.rgb_profile(naive.ADOBE, 1 + number / 16)))
    info = colour._transform.cache_info()
    assert (info.currsize, info.hits) == (colour._KEPT, 0)
    pixels_of(saved(PICTURE, "PNG", naive.rgb_profile(naive.ADOBE, 1 + number / 16)))
    assert colour._transform.cache_info().hits == 1


def chunk_icc(profile):
    import zlib

    return b"iCCP", b"profile\0\0" + zlib.compress(profile)


def gama(value):
    return b"gAMA", struct.pack(">I", value)


def chrm(*values):
    return b"cHRM", struct.pack(">8I", *values)


IN_SRGB = b"sRGB", b"\0"
CHRM_P3 = chrm(31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
CHRM_SRGB = chrm(31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
CICP_P3 = b"cICP", bytes([12, 13, 0, 1])
CICP_SRGB = b"cICP", bytes([1, 13, 0, 1])
AS_THEY_ARE = naive.SRGB, None
CHUNKS = {
    # cICP, then a profile, then sRGB, then gAMA and cHRM.
    "cICP before all": ([CICP_P3, chunk_icc(ADOBE), gama(100000)], (naive.P3, None)),
    "cICP of sRGB before all": ([gama(100000), CHRM_P3, CICP_SRGB], AS_THEY_ARE),
    "cICP of video": ([(b"cICP", bytes([1, 1, 0, 1])), gama(100000)], AS_THEY_ARE),
    "cICP of light": ([(b"cICP", bytes([1, 8, 0, 1]))], (naive.SRGB, 1)),
    "cICP that says nothing": ([(b"cICP", bytes([2, 2, 0, 1])), gama(100000)], (naive.SRGB, 1)),
    "a profile before sRGB": ([chunk_icc(ADOBE), gama(100000)], (naive.ADOBE, 2.19921875)),
    "sRGB before gAMA": ([IN_SRGB, gama(100000), CHRM_P3], AS_THEY_ARE),
    "gAMA and cHRM": ([gama(55556), CHRM_P3], (naive.P3, 1.8)),
    "gAMA": ([gama(100000)], (naive.SRGB, 1)),
    "gAMA of 1.8": ([gama(55556)], (naive.SRGB, 1.8)),
    "gAMA of sRGB": ([gama(45455)], AS_THEY_ARE),
    "gAMA of sRGB, about": ([gama(45000)], AS_THEY_ARE),
    "gAMA and cHRM of sRGB": ([gama(45455), CHRM_SRGB], AS_THEY_ARE),
    "cHRM": ([CHRM_P3], (naive.P3, None)),
    "cHRM and gAMA of sRGB": ([gama(45455), CHRM_P3], (naive.P3, None)),
}
BROKEN_CHUNKS = {
    "gAMA of 0": ([gama(0)], AS_THEY_ARE),
    "gAMA that makes all black": ([gama(1)], AS_THEY_ARE),
    "cHRM of one point": ([chrm(*[31270, 32900] * 4)], AS_THEY_ARE),
    "cHRM of zeros": ([chrm(*[0] * 8), gama(100000)], AS_THEY_ARE),
    "cHRM too long": ([(b"cHRM", bytes(36))], AS_THEY_ARE),
    "profile, then gAMA": ([chunk_icc(b"no"), gama(100000)], (naive.SRGB, 1)),
    "profile that does not inflate": ([(b"iCCP", b"profile\0\0no")], AS_THEY_ARE),
    "cICP of an unknown curve": ([(b"cICP", bytes([1, 99, 0, 1]))], AS_THEY_ARE),
    "cICP of unknown primaries": ([(b"cICP", bytes([99, 13, 0, 1]))], AS_THEY_ARE),
    "cICP of the range of video": ([(b"cICP", bytes([12, 13, 0, 0]))], AS_THEY_ARE),
    "cICP cut short": ([(b"cICP", bytes([12, 13]))], AS_THEY_ARE),
}


def png_of(chunks, pixels=PIXELS):
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return png(width, height, 8, 2, rows, chunks)


@pytest.mark.parametrize(("chunks", "colours"), CHUNKS.values(), ids=CHUNKS)
def test_chunks_of_png_say_what_colours_are(chunks, colours):
    pixels = pixels_of(png_of(chunks))
    if colours is AS_THEY_ARE:
        assert np.array_equal(pixels, PIXELS)
    else:
        assert is_near(pixels, naive.srgb_of(PIXELS, *colours), 1.5)
        assert not np.array_equal(pixels, PIXELS)


@pytest.mark.parametrize(("chunks", "colours"), BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
def test_chunks_of_png_that_cannot_be_used_are_flagged(chunks, colours):
    pixels, flag = found(png_of(chunks))
    assert flag == "broken profile"
    assert is_near(pixels.astype(int), naive.srgb_of(PIXELS, *colours))


def test_code_points_after_the_pixels_say_nothing():
    encoded = png_of([])
    body, end = encoded[:-12], encoded[-12:]
    late = png_of([CICP_P3])
    start = late.index(b"cICP") - 4
    assert np.array_equal(pixels_of(body + late[start : start + 16] + end), PIXELS)


def avif_of(primaries, transfer, **options):
    encoded = saved(PICTURE, "AVIF", **options)
    start = encoded.index(b"colrnclx") + 8
    return encoded[:start] + struct.pack(">HH", primaries, transfer) + encoded[start + 4 :]


def test_code_points_of_avif_say_what_colours_are():
    stored = pixels_of(saved(PICTURE, "AVIF")).astype(np.uint8)
    assert np.array_equal(pixels_of(avif_of(1, 13)), stored)
    assert np.array_equal(pixels_of(avif_of(2, 2)), stored)
    assert is_near(pixels_of(avif_of(12, 13)), naive.srgb_of(stored, naive.P3), 1.5)


HIGH = {
    "PNG, PQ": (png_of([(b"cICP", bytes([9, 16, 0, 1]))]), "PQ"),
    "PNG, HLG of video": (png_of([(b"cICP", bytes([9, 18, 0, 0]))]), "HLG"),
    "profile, PQ": (
        saved(PICTURE, "JPEG", naive.rgb_profile(naive.P3, 2.2, cicp=b"cicp\0\0\0\0\x09\x10\0\1")),
        "PQ",
    ),
    "AVIF, HLG": (avif_of(9, 18), "HLG"),
}


@pytest.mark.parametrize(("encoded", "name"), HIGH.values(), ids=HIGH)
def test_a_high_dynamic_range_is_refused_unless_it_is_asked_for(encoded, name):
    message = (
        f"^the transfer is {name}, expected a standard dynamic range; "
        "profiles='ignore' takes its numbers for sRGB's$"
    )
    with pytest.raises(BadImage, match=message) as error:
        found(encoded)
    assert error.value.reason == "high dynamic range"
    as_stored = np.asarray(Image.open(BytesIO(encoded)).convert("RGB"))
    assert np.array_equal(pixels_of(encoded, profiles="ignore"), as_stored)
