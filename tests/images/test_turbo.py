"""The engine "turbo": Pillow's bytes when it decodes, Pillow's verdicts, and its own resize."""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
import zlib
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import imagecodecs
import naive_profiles
import numpy as np
import pictures
import pytest
import simplejpeg
import strategies
from fuzz_seeds import png_of
from hypothesis import given
from PIL import Image, ImageFilter, PngImagePlugin
from strategies import encode
from test_decode import decoded
from test_edges import INSIDE, framed
from test_headers import with_late_chunk
from test_scans import WRITTEN, reason, scan_of, written

import packpipe
from packpipe.images import decode as decoding
from packpipe.images import headers, rules, turbo
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import probe
from packpipe.images.fill import ImageTask, fill_row
from packpipe.images.headers import bare_hw, jpeg_head, quick_probe
from packpipe.images.rules import pixel_rules
from packpipe.images.scans import scans_of
from packpipe.planning.image_config import PackConfig

TURBO = {"pixels": "turbo"}
RULES = pixel_rules(PackConfig(pixels="turbo"))
PHOTOGRAPHS = sorted((Path(packpipe.__file__).parent / "data/images").rglob("*.jpg"))
SIZES = [(45, 70), (1, 33), (50, 1), (16, 16)]


def soft(height, width, mode="RGB"):
    """Pixels that change slowly, as those of photographs do."""
    image = strategies.random_image("RGB", height, width)
    return image.filter(ImageFilter.GaussianBlur(3)).convert(mode)


def files_of(height, width):
    image = soft(height, width)
    yield from (encode(image, "JPEG", subsampling=n, progressive=n == 1) for n in (0, 1, 2))
    yield encode(image.convert("L"), "JPEG")
    yield encode(image, "JPEG", keep_rgb=True)
    yield simplejpeg.encode_jpeg(np.array(image), colorsubsampling="411")


@pytest.mark.parametrize("size", SIZES)
def test_its_decoded_bytes_are_pillows_at_every_fraction(size):
    height, width = size
    for content in files_of(*size):
        head = jpeg_head(content)
        for parts in (1, 2, 4, 8):
            image = Image.open(BytesIO(content))
            assert scans_of(content).damage is None
            if parts > 1:
                image.draft(None, (max(1, width // parts), max(1, height // parts)))
            if image.size != (-(-width // parts), -(-height // parts)):
                continue  # a side is too short for this fraction
            found = turbo.decoded(content, head, parts)
            assert np.array_equal(found, np.asarray(image))


@given(strategies.image_sizes(900), strategies.image_sizes(900))
def test_it_decodes_at_the_fraction_that_pillows_draft_takes(size, least):
    image = Image.open(BytesIO(encode(Image.new("L", size), "JPEG")))
    drafted = image.draft(None, least)
    parts = turbo.parts_of(size, least)
    assert parts == (1 if drafted is None else round(size[0] / drafted[1][2]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("box", [None, (3, 5, 30, 29)])
def test_it_is_close_to_pillow_however_an_image_is_turned_or_cut(orientation, box):
    exif = Image.Exif()
    exif[0x112] = orientation
    hw = (90, 70) if orientation > 4 else (70, 90)
    for form, mode in [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")]:
        file = encode(soft(70, 90, mode), form, exif=exif)
        for target_hw in [(32, 16), (64, 96)]:
            ours, theirs = (
                decoded(file, hw, target_hw, box, reducing_gap=1.0, pixels=pixels).astype(int)
                for pixels in ("turbo", "pillow")
            )
            assert ours.std() > 3
            assert np.abs(ours - theirs).mean() < 0.7


# Pillow's engine also averages pixels within the gap, which is up to a level on one column.
@pytest.mark.parametrize(("gap", "most"), [(1.0, 1.1), (None, 0.7)])
@pytest.mark.parametrize("size", SIZES)
def test_every_kind_of_file_is_close_to_pillow_made_smaller_and_larger(size, gap, most):
    for content in (*files_of(*size), encode(soft(*size, "CMYK"), "JPEG")):
        for target_hw in [(16, 32), (96, 128)]:
            ours, theirs = (
                decoded(content, size, target_hw, reducing_gap=gap, pixels=pixels).astype(int)
                for pixels in ("turbo", "pillow")
            )
            assert ours.std() > 3
            assert np.abs(ours - theirs).mean() < most


@pytest.mark.parametrize("name", WRITTEN)
def test_it_calls_those_files_damaged_that_pillows_engine_does(name):
    file = written(name)
    start, end = scan_of(file)
    random = np.random.default_rng(0)
    damaged = [file, file[:-2], file + b"tail"]
    for place in random.integers(start, end - 1, 12).tolist():
        damaged += [file[:place] + b"\xff\xd9", file[:place]]
        damaged += [file[:place] + bytes([file[place] ^ 64]) + file[place + 1 :]]
    heads = [(one, head) for one in damaged if (head := jpeg_head(one))]
    assert heads
    assert all(scans_of(one, head) == scans_of(one) for one, head in heads)
    rules = [{"damaged_scans": way} for way in ("reject", "strict", "keep")]
    found = [[reason(one, **rule, pixels="pillow") for rule in rules] for one in damaged]
    assert sum(one[0] is not None for one in found) >= 12
    assert [[reason(one, **rule, **TURBO) for rule in rules] for one in damaged] == found


@pytest.mark.parametrize("form", [bytes, memoryview, str])
def test_pillow_opens_nothing_that_it_decodes(form, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_by_pillow", None)
    exif = Image.Exif()
    exif[0x112] = 6
    for content in files_of(45, 70):
        assert decoded(content, (45, 70), (32, 48), **TURBO).std() > 3
    for mode in ("RGB", "L"):
        file = encode(soft(45, 70, mode), "JPEG", exif=exif, xmp=b'<x tiff:Orientation="3"/>')
        path = tmp_path / mode
        path.write_bytes(file)
        data = str(path) if form is str else form(file)
        assert decoded(data, (70, 45), (48, 32), **TURBO).std() > 3


def bare_files(height, width):
    """PNG and WebP files with nothing but pixels of 8 bits, grey or RGB."""
    image = soft(height, width)
    for one in (image, image.convert("L")):
        yield encode(one, "PNG")
        yield encode(one, "PNG", compress_level=0)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Comment", "none")
    chunks.add(b"sRGB", b"\0")
    chunks.add(b"gAMA", (45455).to_bytes(4))
    yield encode(image, "PNG", pnginfo=chunks, dpi=(72, 72))
    yield encode(image, "WEBP", quality=60)
    yield encode(image, "WEBP", lossless=True)


def other_files(height, width):
    """PNG and WebP files in which something else decides pixels, too."""
    image, exif = soft(height, width), Image.Exif()
    exif[0x112] = 6
    for mode in ("RGBA", "LA", "P", "1", "I;16"):
        yield encode(image.convert("L" if mode == "I;16" else mode).convert(mode), "PNG")
    for form in ("PNG", "WEBP"):
        yield encode(image, form, exif=exif)
        yield encode(image, form, icc_profile=naive_profiles.rgb_profile(naive_profiles.ADOBE, 2.2))
        yield encode(image, form, save_all=True, append_images=[image.transpose(0)])
    yield encode(image, "PNG", transparency=(1, 2, 3))
    for lossless in (False, True):
        yield encode(image.convert("RGBA").rotate(30), "WEBP", lossless=lossless)
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", (100_000).to_bytes(4))
    yield encode(image, "PNG", pnginfo=gamma)
    yield with_late_chunk(encode(image, "PNG"), b"eXIf", exif.tobytes()[6:])


@pytest.mark.parametrize("size", [(45, 70), (1, 33), (50, 1)])
def test_bare_pictures_have_pillows_pixels_without_pillow(size, tmp_path, monkeypatch):
    files = list(bare_files(*size))
    wanted = [np.asarray(Image.open(BytesIO(content))) for content in files]
    monkeypatch.setattr(decoding, "_by_pillow", None)
    for content, pixels in zip(files, wanted, strict=True):
        assert bare_hw(content) == size
        assert np.array_equal(turbo.picture(content, size), pixels)
        path = tmp_path / "file"
        path.write_bytes(content)
        first = decoded(content, size, (32, 48), **TURBO)
        assert np.array_equal(first, decoded(str(path), size, (32, 48), **TURBO))
        assert np.array_equal(first, decoded(memoryview(content), size, (32, 48), **TURBO))


def test_other_pictures_are_left_to_pillow_and_come_out_as_close():
    for content in other_files(45, 70):
        assert bare_hw(content) is None
        hw = probe(content, max_pixels=10**6).image_hw
        ours, theirs = (
            decoded(content, hw, (32, 48), pixels=pixels).astype(int)
            for pixels in ("turbo", "pillow")
        )
        assert np.abs(ours - theirs).mean() < 0.7


def test_a_file_much_longer_than_its_pixels_is_not_read_whole(tmp_path, monkeypatch):
    content, path = encode(soft(45, 70), "PNG"), tmp_path / "long.png"
    path.write_bytes(content)
    os.truncate(path, 2**36)  # of which the disk holds but the first bytes
    monkeypatch.setattr(turbo, "picture", None)
    assert decoded(str(path), (45, 70), (32, 48), **TURBO).std() > 3


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_a_file_of_too_many_pixels_is_not_read_whole(form, tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.write_bytes(encode(soft(45, 70), form))
    monkeypatch.setattr(turbo, "bare_hw", None)  # what is read whole is looked at
    with pytest.raises(BadImage, match=r"^45x70 pixels, expected at most 3149$"):
        decoded(str(path), (45, 70), (32, 48), max_pixels=45 * 70 - 1, **TURBO)


def test_a_file_read_whole_takes_its_own_memory_once(tmp_path):
    path = tmp_path / "stored.png"
    path.write_bytes(encode(strategies.random_image("RGB", 1000, 1000), "PNG", compress_level=0))
    size = path.stat().st_size
    tracemalloc.start()
    assert len(turbo._content_of(str(path), RULES)) == size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * size


@pytest.mark.parametrize(("form", "decoder"), [("PNG", "spng_decode"), ("WEBP", "webp_decode")])
def test_pillow_decodes_what_imagecodecs_is_built_without(form, decoder, monkeypatch):
    file = encode(soft(45, 70), form)
    found = decoded(file, (45, 70), (32, 48), **TURBO)

    def stub(_):  # what it then has under the decoder's name
        raise imagecodecs.DelayedImportError(decoder)

    monkeypatch.setattr(turbo, decoder, stub)
    assert np.array_equal(decoded(file, (45, 70), (32, 48), **TURBO), found)


def test_chunks_are_followed_only_as_far_as_a_header_goes(monkeypatch):
    monkeypatch.setattr(headers, "_is_bare_png", None)  # follows them to the end of the file
    file = encode(soft(45, 70), "PNG")
    unknown = b"\0\0\0\0abCd" + zlib.crc32(b"abCd").to_bytes(4)
    assert bare_hw(file[:33] + unknown * 9 + file[33:]) is None
    with pytest.raises(TypeError):
        bare_hw(file)


def test_of_very_many_chunks_a_png_file_is_left_to_pillow():
    content = encode(soft(45, 70), "PNG")
    at = content.index(b"IDAT") - 4
    empty = b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4)
    few, many = (content[:at] + empty * number + content[at:] for number in (2, 2**17))
    assert bare_hw(few) == (45, 70)
    assert bare_hw(many) is None


def test_damaged_pictures_get_the_verdicts_of_pillows_engine():
    random, found = np.random.default_rng(0), []
    for content in bare_files(45, 70):
        for place in random.integers(60, len(content), 12).tolist():
            cut, flipped = content[:place], bytearray(content)
            flipped[place] ^= 16
            for one in (cut, bytes(flipped), content + b"tail"):
                if quick_probe(one, len(one)) != (45, 70):
                    continue
                verdict = reason(one, (45, 70))
                assert reason(one, (45, 70), **TURBO) == verdict
                found.append(verdict and verdict[0])
                if verdict is None and bare_hw(one) and turbo.picture(one, (45, 70)) is not None:
                    pixels = np.asarray(Image.open(BytesIO(one)))
                    assert np.array_equal(turbo.picture(one, (45, 70)), pixels)
    assert found.count("undecodable") > 20
    assert found.count(None) > 100


def lines_of(interlaced):
    """The lines of a PNG file of 9 x 13 pixels of RGB, of all filters."""
    pixels = np.array(strategies.random_image("RGB", 9, 13))
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2)]
        passes += [(0, 1, 2, 2), (1, 0, 2, 1)]
    parts = (pixels[top::down, left::across] for top, left, down, across in passes)
    lines = (line for part in parts if part.size for line in part)
    return b"".join(bytes([n % 5]) + line.tobytes() for n, line in enumerate(lines))


def odd_data(lines):
    """What the chunks of pixels may hold, as no writer makes it: first what has all pixels."""
    whole = zlib.compress(lines)
    yield from ([whole], [whole[:-4]], [whole + b"more"], [zlib.compress(lines * 2)])
    yield from (
        [whole[at : at + 1] for at in range(len(whole))],
        [b"", whole[:50], b"", whole[50:]],
    )
    yield from ([whole[:-1] + b"?"], [whole[:-9]], [zlib.compress(lines[:-41])], [b""])
    yield from ([zlib.compress(lines[:-1])], [zlib.compress(b"\x05" + lines[1:])], [whole[2:-4]])


@pytest.mark.parametrize("interlaced", [False, True])
def test_pngs_of_odd_chunks_get_the_pixels_or_the_verdicts_of_pillows_engine(interlaced):
    shape, verdicts = struct.pack(">IIBBBBB", 13, 9, 8, 2, 0, 0, interlaced), []
    for data in odd_data(lines_of(interlaced)):
        pixels = [(b"IDAT", part) for part in data]
        file = png_of([(b"IHDR", shape), *pixels, (b"IEND", b"")])
        assert bare_hw(file) == (9, 13)
        found, verdict = turbo.picture(file, (9, 13)), reason(file, (9, 13))
        assert (found is not None) == (len(verdicts) < 6)
        assert reason(file, (9, 13), **TURBO) == verdict
        if found is not None:
            assert np.array_equal(found, np.asarray(Image.open(BytesIO(file))))
        verdicts.append(verdict and verdict[0])
    assert verdicts[:6] == [None] * 6
    assert verdicts.count("undecodable") >= 5


@pytest.mark.parametrize(("gap", "most"), [(1.0, 1.0), (1.5, 0.5)])
def test_photographs_are_close_to_a_full_decode_and_pillows_resize(gap, most):
    means = []
    for path in PHOTOGRAPHS:
        image = Image.open(path)
        share = min(1, (224**2 / (image.width * image.height)) ** 0.5)
        size = [max(16, round(side * share / 16) * 16) for side in image.size]
        expected = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), int)
        image_hw, rules = image.size[::-1], {"profiles": "ignore", "reducing_gap": gap}
        found = decoded(path.read_bytes(), image_hw, tuple(size[::-1]), **rules, **TURBO)
        means.append(np.abs(found - expected).mean())
    assert len(means) >= 18
    assert np.mean(means) < most
    assert max(means) < 3


def test_edges_are_as_clean():
    file = framed(431, 601, 2)
    found = decoded(file, (431, 601), (53, 75), reducing_gap=1.0, **TURBO).astype(int)
    assert np.abs(found - INSIDE).max() <= 1


def test_colours_are_converted_after_its_resize():
    wide = naive_profiles.rgb_profile(naive_profiles.ADOBE, 2.2)
    for form, mode in [("JPEG", "RGB"), ("PNG", "RGBA")]:
        file = encode(soft(64, 64, mode), form, icc_profile=wide)
        ours, theirs = (
            decoded(file, (64, 64), (32, 32), pixels=one) for one in ("turbo", "pillow")
        )
        assert np.abs(ours.astype(int) - theirs).max() <= 2
        assert not np.array_equal(
            ours, decoded(file, (64, 64), (32, 32), profiles="ignore", **TURBO)
        )


@pytest.mark.parametrize("kept", [None, [0, 2, 5]])
def test_a_row_has_the_patches_of_the_image(kept):
    file = encode(soft(45, 70), "JPEG")
    tokens = None if kept is None else np.array(kept, np.int32)
    task = ImageTask(0, file, (45, 70), (2, 3), tokens)
    out = np.full((7, 16 * 16 * 3), 77, np.uint8)
    assert fill_row([task], out, RULES) == [None]
    whole = decoded(file, (45, 70), (32, 48), reducing_gap=1.0, **TURBO)
    patches = whole.reshape(2, 16, 3, 16, 3).transpose(0, 2, 1, 3, 4).reshape(6, -1)
    wanted = patches if kept is None else patches[kept]
    assert np.array_equal(out[: len(wanted)], wanted)
    assert not out[len(wanted) :].any()


def test_a_folder_names_its_engine_and_is_made_and_verified_by_it_alone(tmp_path, monkeypatch):
    files = [encode(soft(40 + n, 60), "JPEG") for n in range(5)]
    dataset = pictures.dataset_of(files, [0] * 5)
    options = {"seq_len": 64, "patch_size": 8, "progress": False, **TURBO}
    rows = packpipe.pack(dataset, output=tmp_path / "own", num_workers=0, **options)
    record = packpipe.manifest(rows)
    assert record["config"]["pixels"] == "turbo"
    for name in ("simplejpeg", "imagecodecs"):
        assert record["codecs"][name] == version(name)
    other = packpipe.pack(dataset, output=tmp_path / "two", num_workers=1, **options)
    assert rows.to_dict() == other.to_dict()
    assert packpipe.verify(tmp_path / "own", dataset) == []
    plain = packpipe.pack(dataset, output=tmp_path / "plain", **options | {"pixels": "pillow"})
    assert "simplejpeg" not in packpipe.manifest(plain)["codecs"]
    assert plain.to_dict() != rows.to_dict()
    monkeypatch.setattr(rules, "find_spec", lambda _: None)
    message = (
        "pixels is 'turbo', expected simplejpeg and imagecodecs to be installed; "
        "pip install 'packpipe[turbo]'; rows made with it need it wherever they are made"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        packpipe.verify(tmp_path / "own", dataset)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        packpipe.pack(dataset, output=tmp_path / "no", num_workers=0, **options)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        packpipe.EpochPacks(dataset, 64, patch_size=8, **TURBO)
